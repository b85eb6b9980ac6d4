"""Fits heads of every kind on cached feature maps: what is minimised comes as an `Objective`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dinov3geo.backbones.precision import choose_dtype
from dinov3geo.errors import DataError
from dinov3geo.heads.base import Head
from dinov3geo.heads.progress_file import ProgressFile

Progress = Callable[[int, int, float], None]
# A fit that was cut off loses at most the epochs of so many seconds.
SECONDS_BETWEEN_SAVES = 5.0
# Features that take up to so much memory in float32 are converted once, not in every epoch.
_CONVERTED_BYTES = 2**30


class FitSettings(BaseModel):
    """How a head is fitted, whatever it predicts.

    Attributes:
        optimizer: `"adamw"`, or `"lbfgs"`: all data in each step, for linear heads.
        epochs: passes over the training samples, each with one random view per sample; steps of L-BFGS.
        batch_pixels: image pixels per step; larger samples make smaller batches.
        learning_rate: peak of AdamW; L-BFGS searches its own.
        weight_decay: of AdamW, on weights but not on biases.
        l2: L-BFGS adds half of this times the sum of squared weights to the loss.
        warmup_share: share of the steps that raise the learning rate linearly; a cosine to 0 follows.
        clip_norm: largest norm of the gradient.
        average_decay: decay per step of the moving average of weights that is kept; 0 keeps the last weights.
        validation_share: share of the samples, by group, kept out to stop early; 0 for a fixed length.
        patience: epochs without a better validation error before the fit stops.
        precision: `"auto"`, `"float32"` or `"bfloat16"` (mixed: weights stay float32).
        seed: of everything random in a fit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    optimizer: Literal["adamw", "lbfgs"] = "adamw"
    epochs: int = Field(default=120, ge=1)
    batch_pixels: int = Field(default=160_000, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    l2: float = Field(default=1e-4, ge=0)
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    average_decay: float = Field(default=0.0, ge=0, lt=1)
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    patience: int = Field(default=15, ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FitView:
    """Features of one view of a sample, with the targets turned alike.

    Attributes:
        maps: one [D, h, w] per block, float16 or float32.
        covered_hw: pixels that the maps cover, at least the image's.
        target: [H / k, W / k] float32 metres or uint8 classes.
        valid: [H / k, W / k] bool.
        origin: row and column, among the covered pixels, of the targets' upper left corner.
    """

    maps: tuple[Tensor, ...]
    covered_hw: tuple[int, int]
    target: Tensor
    valid: Tensor
    origin: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class FitSample:
    """One image and its targets, seen from one or more sides.

    Attributes:
        views: at least one.
        factor: k, image pixels per target cell.
        group: samples of one group never lie on both sides of a split.
    """

    views: tuple[FitView, ...]
    factor: int
    group: str


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a fit did.

    Attributes:
        losses: mean training loss per epoch.
        validation_errors: per epoch what the objective's scorer said, empty without a validation part.
        best_epoch: 0-based epoch whose weights the head holds.
        resumed_epoch: epochs that an earlier, interrupted run had done.
    """

    losses: tuple[float, ...]
    validation_errors: tuple[float, ...]
    best_epoch: int
    resumed_epoch: int = 0


class Scorer(Protocol):
    """Gathers predictions of held-out samples."""

    def update(self, predicted: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds a sample: [K, h, w], [h, w] and [h, w] bool, on the CPU."""

    def error(self) -> float:
        """Smaller is better."""


class Objective(Protocol):
    """What a fit minimises."""

    def loss(self, predicted: Tensor, target: Tensor, valid: Tensor, done: float) -> Tensor:
        """Mean loss of a batch.

        Args:
            predicted: [B, K, h, w].
            target: [B, h, w] as in `FitView`.
            valid: [B, h, w] bool, true somewhere.
            done: share of the fit that lies behind, 0 to 1.
        """

    def mass(self, target: Tensor, valid: Tensor) -> float:
        """What the loss of these targets counts beside other batches, e.g. their number."""

    def scorer(self) -> Scorer:
        """A new judge of held-out samples."""


def predict_cells(head: Head, views: Sequence[FitView], factor: int) -> Tensor:
    """Predicts target cells: pixels first, then their mean over each cell.

    Args:
        head: any.
        views: of one shape.
        factor: pixels per cell.

    Returns:
        [B, K, h, w] at the size of the targets.
    """
    device = next(head.parameters()).device
    maps = [torch.stack(m).to(device, torch.float32) for m in zip(*(v.maps for v in views), strict=True)]
    pixels = head(maps, views[0].covered_hw)
    height, width = (length * factor for length in views[0].target.shape)
    top, left = views[0].origin
    inside: Tensor = pixels[..., top : top + height, left : left + width]
    return inside if factor == 1 else F.avg_pool2d(inside, factor)


def split_groups(groups: Sequence[str], share: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Splits samples so that no group lies on both sides.

    Args:
        groups: of each sample.
        share: of the groups to keep out; rounded up to one group if above 0.
        seed: of the draw.

    Returns:
        Indexes of the part to train on and of the part kept out.

    Raises:
        DataError: nothing would be left to train on.
    """
    if share == 0:
        return list(range(len(groups))), []
    names = sorted(set(groups))
    kept_out = max(1, round(share * len(names)))
    if kept_out >= len(names):
        raise DataError(
            f"a validation part of {share:g} leaves none of {len(names)} separate places to train on; "
            "set fit.validation_share=0, or add places that do not overlap"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {names[i] for i in order[:kept_out]}
    return (
        [i for i, g in enumerate(groups) if g not in chosen],
        [i for i, g in enumerate(groups) if g in chosen],
    )


def fit_head(
    head: Head,
    samples: Sequence[FitSample],
    objective: Objective,
    *,
    settings: FitSettings,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
    state_file: Path | None = None,
) -> FitResult:
    """Fits a head in place; equal seeds give equal weights on one machine and thread count.

    Args:
        head: on the device to fit on.
        samples: training data; the validation part is taken from them.
        objective: what to minimise.
        settings: how.
        weights: how often each sample is drawn, relative to the others; None takes each once per epoch.
        progress: called after each epoch with the epoch (from 1), their number and the mean loss.
        state_file: where the fit is kept while it runs. A fit of the same data, head and settings that
            finds it there goes on with it and ends in the same bits; it is removed at the end.

    Returns:
        What happened; the head holds the best (with a validation part) or the last weights.

    Raises:
        DataError: no sample has a valid target, or every place that has one is kept out for validation.
    """
    if not any(bool(s.views[0].valid.any()) for s in samples):
        raise DataError(f"none of the {len(samples)} windows holds a valid target")
    train, held = split_groups([s.group for s in samples], settings.validation_share, seed=settings.seed)
    if not any(bool(samples[i].views[0].valid.any()) for i in train):
        raise DataError("every valid target is in the validation part; lower fit.validation_share")
    drawn = None if weights is None else torch.tensor([weights[i] for i in train], dtype=torch.float64)
    # Dropout draws from the global generator, so that one is seeded too and given back as it was.
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        samples = _converted(samples)
        fit = _Fit(head, [samples[i] for i in train], [samples[i] for i in held], objective, settings, drawn)
        return fit.run(progress, None if state_file is None else ProgressFile(state_file))


class _Fit:
    """The state of one fit."""

    def __init__(
        self,
        head: Head,
        train: list[FitSample],
        held: list[FitSample],
        objective: Objective,
        settings: FitSettings,
        weights: Tensor | None,
    ) -> None:
        self.head, self.train, self.held = head, train, held
        self.objective, self.settings, self.weights = objective, settings, weights
        self.device = next(head.parameters()).device
        self.dtype = choose_dtype(settings.precision, self.device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        # One step per batch; views 4 to 7 of an oblong sample can change the number slightly.
        self.total = settings.epochs * sum(1 for _ in self._batches())
        self.step = self.epoch = 0
        self.optimizer = _optimizer(head, settings)
        self.average = _copy(head.state_dict())
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.best_epoch, self.best = -1, self.average

    def run(self, progress: Progress | None, file: ProgressFile | None) -> FitResult:
        fingerprint = "" if file is None else self._fingerprint()
        resumed = 0 if file is None else self._resume(file.read(fingerprint))
        saved = time.monotonic()
        pass_over = self._lbfgs_step if self.settings.optimizer == "lbfgs" else self._epoch
        while self.epoch < self.settings.epochs and not self._has_stopped():
            self.losses.append(pass_over())
            self.epoch += 1
            if self.held:
                self.errors.append(self._validate(self._state()))
                if self.errors[-1] <= min(self.errors):
                    self.best_epoch, self.best = self.epoch - 1, _copy(self._state())
            if progress is not None:
                progress(self.epoch, self.settings.epochs, self.losses[-1])
            if file is not None and time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                file.write(fingerprint, self._snapshot())
                saved = time.monotonic()
        if not self.held:
            self.best_epoch, self.best = self.epoch - 1, self._state()
        self.head.load_state_dict(self.best)
        self.head.eval()
        if file is not None:
            file.remove()
        return FitResult(tuple(self.losses), tuple(self.errors), self.best_epoch, resumed)

    def _has_stopped(self) -> bool:
        return bool(self.errors) and self.epoch - 1 - self.best_epoch >= self.settings.patience

    def _state(self) -> dict[str, Tensor]:
        return self.average if self.settings.average_decay else self.head.state_dict()

    def _fingerprint(self) -> str:
        """Equal for equal settings, weights to begin with and data (as far as their sums tell)."""
        facts: list[object] = [self.settings.model_dump_json(), type(self.head).__name__]
        facts += [float(p.double().sum()) for p in self.head.state_dict().values()]
        for sample in (*self.train, *self.held):
            view = sample.views[0]
            facts += [sample.group, tuple(view.target.shape), float(view.target[view.valid].double().sum())]
            facts += [float(view.maps[0].double().sum())]
        return repr(facts)

    def _snapshot(self) -> dict[str, Any]:
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "best": self.best,
            "losses": self.losses,
            "errors": self.errors,
            "numbers": [self.step, self.epoch, self.best_epoch],
            "generator": self.generator.get_state(),
            "dropout": torch.get_rng_state(),
        }

    def _resume(self, state: dict[str, Any] | None) -> int:
        if state is None:
            return 0
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.best = state["average"], state["best"]
        self.losses, self.errors = list(state["losses"]), list(state["errors"])
        self.step, self.epoch, self.best_epoch = state["numbers"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["dropout"])
        return self.epoch

    def _order(self) -> list[int]:
        if self.weights is None:
            return torch.randperm(len(self.train), generator=self.generator).tolist()
        drawn = torch.multinomial(self.weights, len(self.train), replacement=True, generator=self.generator)
        return drawn.tolist()

    def _batches(self) -> Iterator[tuple[list[FitView], int]]:
        """One pass in random order; a batch holds views of one shape."""
        waiting: dict[tuple[int, ...], list[FitView]] = {}
        for index in self._order():
            sample = self.train[index]
            number = int(torch.randint(len(sample.views), (1,), generator=self.generator))
            view = sample.views[number]
            shape = (*view.covered_hw, *view.target.shape, *view.origin, sample.factor)
            waiting.setdefault(shape, []).append(view)
            if len(waiting[shape]) >= self.settings.batch_pixels // math.prod(view.covered_hw):
                yield waiting.pop(shape), sample.factor
        for shape, views in waiting.items():
            yield views, shape[-1]

    def _cast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _loss(self, views: list[FitView], factor: int) -> tuple[Tensor, float] | None:
        """Mean loss of a batch and what it counts, or None if nothing in it is valid."""
        target, valid = torch.stack([v.target for v in views]), torch.stack([v.valid for v in views])
        if not valid.any():
            return None
        with self._cast():
            predicted = predict_cells(self.head, views, factor)
        target, valid = target.to(self.device), valid.to(self.device)
        loss = self.objective.loss(predicted.float(), target, valid, min(self.step / self.total, 1.0))
        return loss, self.objective.mass(target, valid)

    def _epoch(self) -> float:
        self.head.train()
        total, count = 0.0, 0
        for views, factor in self._batches():
            found = self._loss(views, factor)
            if found is None:
                continue
            loss, _ = found
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.settings.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * self._rate()
            self.optimizer.step()
            self._update_average()
            self.step += 1
            total, count = total + float(loss.detach()), count + 1
        return total / max(count, 1)

    def _lbfgs_step(self) -> float:
        """One step on all samples and views at once; dropout and batch statistics rest."""
        self.head.eval()
        views = [(view, sample.factor) for sample in self.train for view in sample.views]
        masses = [self.objective.mass(v.target, v.valid) if v.valid.any() else 0.0 for v, _ in views]
        total = sum(masses)

        def closure() -> float:
            self.optimizer.zero_grad()
            squares = [p.square().sum() for p in self.head.parameters() if p.ndim > 1]
            value = 0.5 * self.settings.l2 * torch.stack(squares).sum()
            value.backward()
            value = value.detach()
            for (view, factor), mass in zip(views, masses, strict=True):
                found = self._loss([view], factor) if mass else None
                if found is not None:
                    (found[0] * (mass / total)).backward()
                    value = value + found[0].detach() * (mass / total)
            return float(value)

        loss = float(self.optimizer.step(closure))
        self._update_average()
        self.step += 1
        return loss

    def _rate(self) -> float:
        warmup = self.settings.warmup_share * self.total
        if self.step < warmup:
            return (self.step + 1) / warmup
        done = min((self.step - warmup) / max(self.total - warmup, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _update_average(self) -> None:
        if not self.settings.average_decay:
            return
        # Early steps count less far back, or the average would remember the initial weights.
        decay = min(self.settings.average_decay, (1 + self.step) / (10 + self.step))
        for name, tensor in self.head.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)

    def _validate(self, state: dict[str, Tensor]) -> float:
        current = _copy(self.head.state_dict())
        self.head.load_state_dict(state)
        self.head.eval()
        scorer = self.objective.scorer()
        with torch.no_grad():
            for sample in self.held:
                view = sample.views[0]
                predicted = predict_cells(self.head, [view], sample.factor)[0]
                scorer.update(predicted.float().cpu(), view.target, view.valid)
        self.head.load_state_dict(current)
        return scorer.error()


def _converted(samples: Sequence[FitSample]) -> Sequence[FitSample]:
    """The samples with maps in float32, if those fit into `_CONVERTED_BYTES`."""
    if sum(4 * m.numel() for s in samples for v in s.views for m in v.maps) > _CONVERTED_BYTES:
        return samples
    return [
        replace(s, views=tuple(replace(v, maps=tuple(m.float() for m in v.maps)) for v in s.views))
        for s in samples
    ]


def _optimizer(head: Head, settings: FitSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "lbfgs":
        return torch.optim.LBFGS(
            head.parameters(), max_iter=1, max_eval=25, history_size=10, line_search_fn="strong_wolfe"
        )
    groups: list[dict[str, Any]] = [
        {"params": [p for p in head.parameters() if p.ndim > 1]},
        {"params": [p for p in head.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
