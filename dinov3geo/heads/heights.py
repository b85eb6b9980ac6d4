"""Fitting heights: the loss curriculum of CHMv2, and which plots are drawn how often."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dinov3geo.heads.fit import FitSample, FitSettings, Scorer
from dinov3geo.heads.objectives import charbonnier_loss, patch_gradient_loss, silog_loss

# A plot is tall if so large a share of its cells is above the limit, low if its median is below.
_TALL_SHARE = 0.1


class HeightFitSettings(FitSettings):
    """How a head for heights is fitted.

    The loss is `silog_weight` x SiLog, fading to zero over `silog_share` of the steps, plus a
    Charbonnier loss that grows as it fades (the curriculum of CHMv2: SiLog alone biases tall canopy low,
    Charbonnier alone starts at the mean), plus a patch-gradient loss that grows
    up to `edge_share` of the steps.

    Attributes:
        epochs: as in `FitSettings`.
        silog_share: share of the steps over which SiLog fades into Charbonnier; 0 for none.
        silog_weight: brings SiLog, which has no unit, to the size of an error in metres.
        silog_floor_m: metres added before the logarithm.
        charbonnier_m: errors far below are squared, far above absolute; metres.
        edge_weight: of the patch-gradient loss at its end; 0 for none.
        edge_share: share of the steps at whose end it has its full weight (CHMv2: half).
        low_share: share of the draws that plots of low canopy get beside their natural one.
        low_m: a plot is low if its median height is below.
        tall_share: likewise of tall canopy.
        tall_m: a plot is tall if a tenth of its cells is above.
    """

    epochs: int = Field(default=60, ge=1)
    silog_share: float = Field(default=0.0, ge=0, le=1)
    silog_weight: float = Field(default=10.0, ge=0)
    silog_floor_m: float = Field(default=1.0, gt=0)
    charbonnier_m: float = Field(default=3.0, gt=0)
    edge_weight: float = Field(default=0.0, ge=0)
    edge_share: float = Field(default=0.5, gt=0, le=1)
    low_share: float = Field(default=0.0, ge=0, lt=1)
    low_m: float = Field(default=1.0, gt=0)
    tall_share: float = Field(default=0.0, ge=0, lt=1)
    tall_m: float = Field(default=25.0, gt=0)

    @model_validator(mode="after")
    def _leaves_some(self) -> HeightFitSettings:
        if self.low_share + self.tall_share >= 1:
            raise ValueError("low_share and tall_share must leave draws to all the other plots")
        return self


class HeightObjective:
    """See `HeightFitSettings`; judged by the mean absolute error."""

    def __init__(self, settings: HeightFitSettings) -> None:
        """Takes the settings of the losses."""
        self.settings = settings

    def loss(self, predicted: Tensor, target: Tensor, valid: Tensor, done: float) -> Tensor:
        """See `Objective.loss`."""
        own = self.settings
        truth, known = target[:, None], valid[:, None]
        fade = max(1 - done / own.silog_share, 0.0) if own.silog_share else 0.0
        loss = (1 - fade) * charbonnier_loss(predicted, truth, known, scale=own.charbonnier_m)
        if fade > 0:
            silog = silog_loss(predicted, truth, known, floor=own.silog_floor_m, mean_weight=1.0)
            loss = loss + fade * own.silog_weight * silog
        edge = own.edge_weight * _ramp(done, own.edge_share / 10, own.edge_share)
        if edge > 0:
            loss = loss + edge * patch_gradient_loss(predicted, truth, known, floor=own.silog_floor_m)
        return loss

    def mass(self, target: Tensor, valid: Tensor) -> float:
        """Number of heights."""
        return float(valid.sum())

    def scorer(self) -> Scorer:
        """Mean absolute error."""
        return AbsoluteErrors()

    def draws(self, samples: Sequence[FitSample]) -> list[float] | None:
        """Weights with which samples are drawn, or None where each is taken once."""
        own = self.settings
        if not own.low_share and not own.tall_share:
            return None
        known = [s.views[0].target[s.views[0].valid] for s in samples]
        low = [h.numel() > 0 and float(h.median()) < own.low_m for h in known]
        tall = [h.numel() > 0 and float((h > own.tall_m).float().mean()) >= _TALL_SHARE for h in known]
        rest = 1 - (own.low_share if any(low) else 0.0) - (own.tall_share if any(tall) else 0.0)
        return [
            rest / len(samples)
            + (own.low_share / sum(low) if is_low else 0.0)
            + (own.tall_share / sum(tall) if is_tall else 0.0)
            for is_low, is_tall in zip(low, tall, strict=True)
        ]


class AbsoluteErrors:
    """Mean absolute error of the samples so far."""

    def __init__(self) -> None:
        """Starts empty."""
        self._total, self._count = 0.0, 0

    def update(self, predicted: Tensor, target: Tensor, valid: Tensor) -> None:
        """See `Scorer.update`."""
        error = (predicted[0] - target).abs()
        self._total += float(error[valid].sum())
        self._count += int(valid.sum())

    def error(self) -> float:
        """See `Scorer.error`; 0 without a valid cell."""
        return self._total / max(self._count, 1)


def _ramp(done: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, linear between."""
    return float(torch.tensor((done - start) / (end - start)).clamp(0, 1))
