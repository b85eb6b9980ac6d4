"""What a fit of canopy height ends with: the card, the folder, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from dinov3geo.backbones.base import Backbone
from dinov3geo.data.pairs import PairMatch, RasterPair
from dinov3geo.heads.base import Head
from dinov3geo.heads.fit import FitResult, FitSample, predict_cells
from dinov3geo.heads.folders import save_model


@dataclass(frozen=True, slots=True)
class CanopyFitReport:
    """What `fit_canopy` did.

    Attributes:
        folder: of the model.
        pairs: number of image windows with heights.
        cells: number of heights.
        unmatched_images: images without heights.
        unmatched_heights: height rasters without an image.
        training_mae_m: mean absolute error on the data that the head was fitted on; no measure of quality.
        result: of the fit.
    """

    folder: Path
    pairs: int
    cells: int
    unmatched_images: int
    unmatched_heights: int
    training_mae_m: float
    result: FitResult


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A head and what it was fitted on.

    Attributes:
        head: fitted.
        result: of the fit.
        samples: of the fit.
        match: images, or stores of their features, with heights.
        settings: of the fit.
    """

    head: Head
    result: FitResult
    samples: list[FitSample]
    match: PairMatch
    settings: BaseModel


def finish_fit(
    fitted: FittedHead,
    out: Path,
    *,
    backbone: Backbone | None,
    card: Mapping[str, Any],
    overwrite: bool,
    command: str,
) -> CanopyFitReport:
    """Saves a model.

    Args:
        fitted: what to save.
        out: folder of the model.
        backbone: see `save_model`.
        card: what is known beside the fit.
        overwrite: replace an existing folder.
        command: that was typed, for the card.

    Raises:
        RasterError: see `save_model`.
    """
    samples, pairs = fitted.samples, fitted.match.pairs
    cells = sum(int(s.views[0].valid.sum()) for s in samples)
    training_mae = round(mean_absolute_error(fitted.head, samples), 4)
    about = {
        "name": out.name,
        "gsd_m": list(gsd_range(pairs)),
        "trained_on": {"pairs": len(pairs), "images": len({p.image for p in pairs}), "cells": cells},
        "settings": fitted.settings.model_dump(),
        "command": command,
        "training_mae_m": training_mae,
    }
    save_model(out, backbone, fitted.head, {**card, **about}, what="canopy", overwrite=overwrite)
    return CanopyFitReport(
        folder=out,
        pairs=len(pairs),
        cells=cells,
        unmatched_images=len(fitted.match.unmatched_images),
        unmatched_heights=len(fitted.match.unmatched_targets),
        training_mae_m=training_mae,
        result=fitted.result,
    )


def mean_absolute_error(head: Head, samples: list[FitSample]) -> float:
    """Mean absolute error over all valid cells of the samples' first view, metres."""
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            view = sample.views[0]
            error = (predict_cells(head, [view], sample.factor)[0, 0].cpu() - view.target).abs()
            total, count = total + float(error[view.valid].sum()), count + int(view.valid.sum())
    return total / max(count, 1)


def gsd_range(pairs: tuple[RasterPair, ...]) -> tuple[float, float]:
    """Smallest and largest ground sampling distance of the images, metres."""
    sizes = [p.grid.gsd_m / p.factor for p in pairs]
    return round(min(sizes), 6), round(max(sizes), 6)
