"""Fits a regression head on cached feature maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dinov3geo.errors import DataError
from dinov3geo.heads.base import Head
from dinov3geo.heads.objectives import charbonnier_loss, silog_loss

Progress = Callable[[int, int, float], None]


class FitSettings(BaseModel):
    """How a head is fitted.

    The loss is `silog_weight` x SiLog, fading to zero over `silog_share` of the steps, plus a
    Charbonnier loss that grows as it fades (the curriculum of CHMv2: SiLog alone biases tall canopy low,
    Charbonnier alone starts at the mean).

    Attributes:
        epochs: passes over the training samples, each with one random view per sample.
        batch_pixels: image pixels per step; larger samples make smaller batches.
        learning_rate: peak of AdamW.
        weight_decay: of AdamW, on weights but not on biases.
        warmup_share: share of the steps that raise the learning rate linearly; a cosine to 0 follows.
        clip_norm: largest norm of the gradient.
        average_decay: decay per step of the moving average of weights that is kept; 0 keeps the last weights.
        silog_share: share of the steps over which SiLog fades into Charbonnier; 0 for none.
        silog_weight: brings SiLog, which has no unit, to the size of an error in metres.
        silog_floor_m: metres added before the logarithm.
        charbonnier_m: errors far below are squared, far above absolute; metres.
        validation_share: share of the samples, by group, kept out to stop early; 0 for a fixed length.
        patience: epochs without a better validation error before the fit stops.
        seed: of everything random in a fit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=120, ge=1)
    batch_pixels: int = Field(default=160_000, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    average_decay: float = Field(default=0.0, ge=0, lt=1)
    silog_share: float = Field(default=0.0, ge=0, le=1)
    silog_weight: float = Field(default=10.0, ge=0)
    silog_floor_m: float = Field(default=1.0, gt=0)
    charbonnier_m: float = Field(default=3.0, gt=0)
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    patience: int = Field(default=15, ge=1)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FitView:
    """Features of one view of a sample, with the targets turned alike.

    Attributes:
        maps: one [D, h, w] per block, float16 or float32.
        covered_hw: pixels that the maps cover, at least the image's.
        target: [H / k, W / k] float32.
        valid: [H / k, W / k] bool.
    """

    maps: tuple[Tensor, ...]
    covered_hw: tuple[int, int]
    target: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class FitSample:
    """One image and its heights, seen from one or more sides.

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
        validation_mae: per epoch, empty without a validation part.
        best_epoch: 0-based epoch whose weights the head holds.
    """

    losses: tuple[float, ...]
    validation_mae: tuple[float, ...]
    best_epoch: int


def predict_cells(head: Head, views: Sequence[FitView], factor: int) -> Tensor:
    """Predicts target cells: pixels first, then their mean over each cell.

    Args:
        head: with one output channel.
        views: of one shape.
        factor: pixels per cell.

    Returns:
        [B, 1, h, w] at the size of the targets.
    """
    device = next(head.parameters()).device
    maps = [torch.stack(m).to(device, torch.float32) for m in zip(*(v.maps for v in views), strict=True)]
    pixels = head(maps, views[0].covered_hw)
    height, width = (length * factor for length in views[0].target.shape)
    return F.avg_pool2d(pixels[..., :height, :width], factor)


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
        raise DataError(f"a validation part of {share:g} leaves none of {len(names)} plots to train on")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {names[i] for i in order[:kept_out]}
    return (
        [i for i, g in enumerate(groups) if g not in chosen],
        [i for i, g in enumerate(groups) if g in chosen],
    )


def fit_head(
    head: Head, samples: Sequence[FitSample], *, settings: FitSettings, progress: Progress | None = None
) -> FitResult:
    """Fits a head in place; equal seeds give equal weights on one machine and thread count.

    Args:
        head: with one output channel, on the device to fit on.
        samples: training data; the validation part is taken from them.
        settings: how.
        progress: called after each epoch with the epoch (from 1), their number and the mean loss.

    Returns:
        What happened; the head holds the best (with a validation part) or the last weights.

    Raises:
        DataError: no sample has a valid target.
    """
    if not any(bool(s.views[0].valid.any()) for s in samples):
        raise DataError(f"none of the {len(samples)} height windows holds a valid height")
    train_indexes, held_indexes = split_groups(
        [s.group for s in samples], settings.validation_share, seed=settings.seed
    )
    train, held = [samples[i] for i in train_indexes], [samples[i] for i in held_indexes]
    # Dropout draws from the global generator, so that one is seeded too and given back as it was.
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return _Fit(head, train, held, settings).run(progress)


class _Fit:
    """The state of one fit."""

    def __init__(
        self, head: Head, train: list[FitSample], held: list[FitSample], settings: FitSettings
    ) -> None:
        self.head, self.train, self.held, self.settings = head, train, held, settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        # One step per batch; views 4 to 7 of an oblong sample can change the number slightly.
        self.total = settings.epochs * sum(1 for _ in self._batches())
        self.step = 0
        groups: list[dict[str, Any]] = [
            {"params": [p for p in head.parameters() if p.ndim > 1]},
            {"params": [p for p in head.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.average = {n: p.detach().clone() for n, p in head.state_dict().items()}

    def run(self, progress: Progress | None) -> FitResult:
        losses: list[float] = []
        errors: list[float] = []
        best_epoch, best_state = -1, self.average
        for epoch in range(self.settings.epochs):
            losses.append(self._epoch())
            if progress is not None:
                progress(epoch + 1, self.settings.epochs, losses[-1])
            if self.held:
                state = self._state()
                errors.append(self._validate(state))
                if errors[-1] <= min(errors):
                    best_epoch, best_state = epoch, {n: t.clone() for n, t in state.items()}
                elif epoch - best_epoch >= self.settings.patience:
                    break
        if not self.held:
            best_epoch, best_state = self.settings.epochs - 1, self._state()
        self.head.load_state_dict(best_state)
        self.head.eval()
        return FitResult(tuple(losses), tuple(errors), best_epoch)

    def _state(self) -> dict[str, Tensor]:
        return self.average if self.settings.average_decay else self.head.state_dict()

    def _batches(self) -> Iterator[tuple[list[FitView], int]]:
        """One pass in random order; a batch holds views of one shape."""
        waiting: dict[tuple[int, ...], list[FitView]] = {}
        for index in torch.randperm(len(self.train), generator=self.generator).tolist():
            sample = self.train[index]
            number = int(torch.randint(len(sample.views), (1,), generator=self.generator))
            view = sample.views[number]
            shape = (*view.covered_hw, *view.target.shape, sample.factor)
            waiting.setdefault(shape, []).append(view)
            if len(waiting[shape]) >= self.settings.batch_pixels // math.prod(view.covered_hw):
                yield waiting.pop(shape), sample.factor
        for shape, views in waiting.items():
            yield views, shape[-1]

    def _epoch(self) -> float:
        self.head.train()
        total, count = 0.0, 0
        for views, factor in self._batches():
            valid = torch.stack([v.valid for v in views])[:, None]
            if not valid.any():
                continue
            loss = self._loss(predict_cells(self.head, views, factor), views, valid)
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

    def _rate(self) -> float:
        warmup = self.settings.warmup_share * self.total
        if self.step < warmup:
            return (self.step + 1) / warmup
        done = min((self.step - warmup) / max(self.total - warmup, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _loss(self, predicted: Tensor, views: list[FitView], valid: Tensor) -> Tensor:
        settings = self.settings
        target = torch.stack([v.target for v in views])[:, None].to(predicted.device)
        valid = valid.to(predicted.device)
        fade = max(1 - self.step / (settings.silog_share * self.total), 0.0) if settings.silog_share else 0.0
        loss = (1 - fade) * charbonnier_loss(predicted, target, valid, scale=settings.charbonnier_m)
        if fade > 0:
            silog = silog_loss(predicted, target, valid, floor=settings.silog_floor_m, mean_weight=1.0)
            loss = loss + fade * settings.silog_weight * silog
        return loss

    def _update_average(self) -> None:
        # Early steps count less far back, or the average would remember the initial weights.
        decay = min(self.settings.average_decay, (1 + self.step) / (10 + self.step))
        for name, tensor in self.head.state_dict().items():
            self.average[name].lerp_(tensor, 1 - decay)

    def _validate(self, state: dict[str, Tensor]) -> float:
        current = {n: t.clone() for n, t in self.head.state_dict().items()}
        self.head.load_state_dict(state)
        self.head.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for sample in self.held:
                view = sample.views[0]
                error = (predict_cells(self.head, [view], sample.factor)[0, 0].cpu() - view.target).abs()
                total, count = total + float(error[view.valid].sum()), count + int(view.valid.sum())
        self.head.load_state_dict(current)
        return total / max(count, 1)
