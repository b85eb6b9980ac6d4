"""Fits heads of every kind on cached feature maps: what is minimised comes as an `Objective`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dinov3geo.backbones.precision import choose_dtype
from dinov3geo.errors import DataError
from dinov3geo.heads.base import Head
from dinov3geo.heads.epochs import EpochFit, Progress, adamw, copy_state
from dinov3geo.heads.epochs import FitResult as FitResult
from dinov3geo.heads.epochs import split_groups as split_groups
from dinov3geo.heads.progress_file import ProgressFile

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
    samples = _converted(samples)
    fit = _HeadFit(head, [samples[i] for i in train], [samples[i] for i in held], objective, settings, drawn)
    return fit.run(progress, None if state_file is None else ProgressFile(state_file))


class _HeadFit(EpochFit):
    """The state of a fit of a head to an objective."""

    head: Head

    def __init__(
        self,
        head: Head,
        train: list[FitSample],
        held: list[FitSample],
        objective: Objective,
        settings: FitSettings,
        weights: Tensor | None,
    ) -> None:
        super().__init__(
            head,
            _optimizer(head, settings),
            epochs=settings.epochs,
            patience=settings.patience,
            seed=settings.seed,
            validates=bool(held),
        )
        self.train, self.held = train, held
        self.objective, self.settings, self.weights = objective, settings, weights
        self.device = next(head.parameters()).device
        self.dtype = choose_dtype(settings.precision, self.device)
        # One step per batch; views 4 to 7 of an oblong sample can change the number slightly.
        self.total = settings.epochs * sum(1 for _ in self._batches())
        if settings.average_decay:
            self.average = copy_state(head.state_dict())

    def pass_over(self) -> float:
        return self._lbfgs_step() if self.settings.optimizer == "lbfgs" else self._epoch()

    def held_error(self) -> float:
        scorer = self.objective.scorer()
        for sample in self.held:
            view = sample.views[0]
            predicted = predict_cells(self.head, [view], sample.factor)[0]
            scorer.update(predicted.float().cpu(), view.target, view.valid)
        return scorer.error()

    def facts(self) -> list[object]:
        found: list[object] = [self.settings.model_dump_json()]
        for sample in (*self.train, *self.held):
            view = sample.views[0]
            found += [sample.group, tuple(view.target.shape), float(view.target[view.valid].double().sum())]
            found += [float(view.maps[0].double().sum())]
        return found

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
    return adamw(head, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
