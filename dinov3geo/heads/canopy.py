"""Canopy height: a frozen backbone and a fitted head, with the card that travels with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from dinov3geo.backbones.zoo import load_backbone
from dinov3geo.data.pairs import Spec, match_pairs
from dinov3geo.errors import DataError
from dinov3geo.features.extract import FeatureCache, apply_view, default_blocks, undo_view
from dinov3geo.heads.base import Head, OutputSpec
from dinov3geo.heads.canopy_report import CanopyFitReport, FittedHead, finish_fit
from dinov3geo.heads.context import ContextHead
from dinov3geo.heads.dpt import DPTHead
from dinov3geo.heads.fit import FitResult, FitSample, fit_head, predict_cells
from dinov3geo.heads.folders import (
    check_free,
    find_model,
    load_head_weights,
    model_card,
    open_model,
    save_model,
)
from dinov3geo.heads.frozen import FrozenModel, head_map
from dinov3geo.heads.heights import HeightFitSettings, HeightObjective
from dinov3geo.heads.registration import find_shift, inner_folds, move_back
from dinov3geo.heads.samples import StageProgress, build_samples

DEFAULT_MODEL = "canopy-tiny-aerial"
# With few plots, too, heights come better from its features than from those of a small transformer
# (benchmarks/results/2026-11-29_filters).
CANOPY_BACKBONE = "filters-aerial"
BUNDLED_MODELS = (DEFAULT_MODEL,)
CanopyHead = ContextHead | DPTHead
CANOPY_HEIGHT = OutputSpec("canopy_height", unit="m", minimum=0.0, maximum=80.0)


class HeadSettings(BaseModel):
    """Kind and shape of the head.

    Attributes:
        kind: `"dpt"` (`DPTHead`), or `"context"` (`ContextHead`), which is smaller and sees further.
        components: principal components of a context head.
        hidden: width of its MLP.
        channels: width of a DPT head's pyramid.
        finest: its finest level in units of the patch grid.
        bins: number of mixed log and linear height bins of either kind, or 0 for direct regression.
        members: MLPs of a context head, fitted with seeds of their own; their mean is the prediction.
        dropout: share of channels silenced in training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["context", "dpt"] = "dpt"
    components: int = Field(default=64, ge=1)
    hidden: int = Field(default=64, ge=1)
    channels: int = Field(default=32, ge=2)
    finest: Literal[1, 2, 4] = 1
    bins: int = Field(default=0, ge=0)
    members: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _members_of_context(self) -> HeadSettings:
        if self.kind == "dpt" and self.members > 1:
            raise ValueError("members are those of a context head; a dpt head has 1")
        return self

    def build(self, dims: Sequence[int], *, output: OutputSpec, typical: float = 10.0) -> CanopyHead:
        """A new head on feature maps of the given widths.

        Args:
            dims: width of each map.
            output: what the numbers mean.
            typical: height that the untrained head gives.
        """
        if self.kind == "context":
            return ContextHead(
                dims,
                output=output,
                components=self.components,
                hidden=self.hidden,
                dropout=self.dropout,
                typical=typical,
                bins=self.bins,
                members=self.members,
            )
        return DPTHead(
            dims,
            output=output,
            channels=self.channels,
            finest=self.finest,
            bins=self.bins,
            dropout=self.dropout,
            typical=typical,
        )


class CanopySettings(BaseModel):
    """How a canopy-height model is made.

    Attributes:
        image_scale: images are made this many times larger for the backbone.
        num_maps: number of blocks whose features are taken, evenly spread over the depth.
        views: flips and turns of each image that the head is fitted on. One, north up, lets the head learn
            to which side shadows fall and heights are displaced; more suit imagery of many sun angles.
        predict_views: flips and turns that are averaged in a prediction; each costs one more run. At most
            `views`, since a head knows only the turns that it was fitted on.
        max_window: images larger than this are cut for training, pixels.
        colours: give the head mean and deviation of each band within a patch beside the features.
        register_cells: heights are searched for up to so many cells from their image, plot by plot, and
            moved back before the fit; 0 leaves them where they are. See `heads.registration`.
        head: shape of the head.
        fit: how it is fitted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_scale: float = Field(default=1.0, gt=0)
    num_maps: int = Field(default=4, ge=1)
    views: Literal[1, 2, 4, 8] = 1
    predict_views: Literal[1, 2, 4, 8] = 1
    max_window: int = Field(default=512, ge=1)
    colours: bool = False
    register_cells: int = Field(default=0, ge=0)
    head: HeadSettings = HeadSettings()
    fit: HeightFitSettings = HeightFitSettings()

    @model_validator(mode="after")
    def _knows_its_views(self) -> CanopySettings:
        if self.predict_views > self.views:
            raise ValueError(
                f"predict_views is {self.predict_views}, but the head is fitted on {self.views} views; "
                "raise views, or lower predict_views"
            )
        return self


@dataclass
class CanopyModel(FrozenModel[CanopyHead]):
    """Everything that turns an image into heights.

    Attributes:
        blocks: numbers of the backbone's blocks that the head reads.
        image_scale: images are made this many times larger for the backbone.
        views: flips and turns that are averaged.
        colours: whether the head reads colours beside features.
        card: what is known of the model; see `save_canopy_model`.
    """

    blocks: tuple[int, ...]
    image_scale: float
    views: int
    card: dict[str, Any]
    colours: bool = False

    def predict(self, numbers: Tensor, valid: Tensor | None = None) -> Tensor:
        """Heights of each pixel.

        Args:
            numbers: [B, C, H, W] as the file holds them, on the model's device.
            valid: [B, H, W] bool, or None if all pixels hold data.

        Returns:
            [B, 1, H, W] float32 metres, within the output's minimum and maximum; heights where `valid` is
            false mean nothing.

        Raises:
            DataError: another number of bands than the backbone takes.
        """
        total = sum(self._predict_view(numbers, valid, view) for view in range(self.views))
        assert isinstance(total, Tensor)
        return (total / self.views).clamp(self.output.minimum, self.output.maximum)

    def _predict_view(self, numbers: Tensor, valid: Tensor | None, view: int) -> Tensor:
        heights = head_map(
            self,
            apply_view(numbers, view),
            None if valid is None else apply_view(valid, view),
            blocks=self.blocks,
            image_scale=self.image_scale,
            colours=self.colours,
        )
        return undo_view(heights, view)


def fit_canopy(
    images: Spec,
    heights: Spec,
    *,
    out: Path,
    backbone: str | Path | None = None,
    settings: CanopySettings | None = None,
    overwrite: bool = False,
    cache: FeatureCache | None = None,
    scores: Mapping[str, Any] | None = None,
    command: str = "",
    progress: StageProgress | None = None,
) -> CanopyFitReport:
    """Fits a head on pairs of images and height rasters and saves the model.

    Args:
        images: folder, glob, file or list of them.
        heights: likewise; matched to the images by georeference.
        out: folder of the model.
        backbone: name or path, or None for `CANOPY_BACKBONE`.
        settings: how; None for the defaults.
        overwrite: replace an existing folder.
        cache: of features, or None to keep none.
        scores: measured ones to write into the card, each with the command that gives it.
        command: that was typed, for the card.
        progress: called with a stage's name, how much is done, and of how much.

    Returns:
        What was done.

    Raises:
        UserError: a file, name or number that cannot be used; nothing is written then.
    """
    settings = settings or CanopySettings()
    check_free(out, what="canopy", overwrite=overwrite)
    source = CANOPY_BACKBONE if backbone is None else backbone
    frozen = load_backbone(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = match_pairs(images, heights, max_size=settings.max_window)
    blocks = default_blocks(frozen.num_blocks, settings.num_maps)
    samples = build_samples(
        match.pairs,
        frozen.to(device),
        blocks=blocks,
        image_scale=settings.image_scale,
        views=settings.views,
        colours=settings.colours,
        cache=cache or FeatureCache(None),
        progress=progress,
    )
    state_file = out.with_name(f".{out.name}.fit")
    head, result = fit_canopy_head(samples, settings, device=device, progress=progress, state_file=state_file)
    card = model_card(frozen, source, CANOPY_HEIGHT) | {"blocks": list(blocks), "scores": dict(scores or {})}
    return finish_fit(
        FittedHead(head, result, samples, match, settings),
        out,
        backbone=frozen,
        card=card,
        overwrite=overwrite,
        command=command,
    )


def fit_canopy_head(
    samples: list[FitSample],
    settings: CanopySettings,
    *,
    device: torch.device,
    progress: StageProgress | None = None,
    state_file: Path | None = None,
) -> tuple[CanopyHead, FitResult]:
    """A new head, fitted on samples.

    Args:
        samples: of every plot.
        settings: of head and fit.
        device: to fit on.
        progress: called with a stage's name, how much is done, and of how much.
        state_file: see `fit_head`; each member of a head has one of its own, its number appended. Heads that
            judge the register are fitted anew.

    Raises:
        DataError: the samples hold no valid height.
    """
    known = [s.views[0].target[s.views[0].valid] for s in samples]
    heights = torch.cat(known) if known else torch.empty(0)
    if heights.numel() == 0:
        raise DataError(
            f"none of the {len(samples)} height windows holds a valid height; is all of it nodata?"
        )
    if settings.register_cells:
        samples = register_samples(samples, settings, device=device, progress=progress)
    with torch.random.fork_rng():
        torch.manual_seed(settings.fit.seed)
        head = settings.head.build(
            [m.shape[0] for m in samples[0].views[0].maps],
            output=CANOPY_HEIGHT,
            typical=max(float(heights.mean()), 0.1),
        ).to(device)
    head.fit_statistics([s.views[0].maps for s in samples])

    def report(done: int, total: int, loss: float) -> None:
        if progress is not None:
            progress(f"head (loss {loss:.2f})", done, total)

    objective = HeightObjective(settings.fit)
    fit = partial(fit_head, objective=objective, weights=objective.draws(samples), progress=report)
    if isinstance(head, ContextHead):
        # Its components do not change in training: computed once, an epoch takes a fraction of a second.
        reduced = [_reduced(head, sample) for sample in samples]
        results = []
        for number, member in enumerate(head.members):
            own = settings.fit.model_copy(update={"seed": settings.fit.seed + number})
            kept = None if state_file is None else state_file.with_name(f"{state_file.name}{number}")
            results.append(fit(member, reduced, settings=own, state_file=kept))
        # Finished members of a fit that was cut off are fitted again, so a later one may tell of it.
        resumed = max(result.resumed_epoch for result in results)
        return head.eval(), replace(results[0], resumed_epoch=resumed)
    return head, fit(head, samples, settings=settings.fit, state_file=state_file)


def register_samples(
    samples: list[FitSample],
    settings: CanopySettings,
    *,
    device: torch.device,
    progress: StageProgress | None = None,
) -> list[FitSample]:
    """Samples whose heights are moved to where the image shows them.

    Each third of the places is judged by a head fitted on the others; a plot is moved only where that clearly
    raises the correlation (`Shift.is_believable`).

    Args:
        samples: of at least two places.
        settings: of the heads that judge, and how far to look.
        device: to fit on.
        progress: called with a stage's name, how much is done, and of how much.
    """
    moved = list(samples)
    plain = settings.model_copy(update={"register_cells": 0})
    for part in inner_folds(samples, settings.fit.seed):
        others = [s for i, s in enumerate(samples) if i not in part]
        if not part or not any(bool(s.views[0].valid.any()) for s in others):
            continue
        judge, _ = fit_canopy_head(others, plain, device=device, progress=progress)
        for i in part:
            view = samples[i].views[0]
            shift = find_shift(
                predict_plot(judge, samples[i], 1),
                view.target.numpy(),
                view.valid.numpy(),
                reach=settings.register_cells,
            )
            if shift.is_believable:
                moved[i] = move_back(samples[i], round(shift.rows), round(shift.cols))
    return moved


def predict_plot(head: Head, sample: FitSample, views: int) -> NDArray[np.float32]:
    """Heights of a plot's cells, averaged over its first views, [h, w] metres."""
    low, high = head.output.minimum, head.output.maximum
    with torch.no_grad():
        turned = [
            undo_view(predict_cells(head, [sample.views[v]], sample.factor)[0, 0], v) for v in range(views)
        ]
        mean: NDArray[np.float32] = torch.stack(turned).mean(0).clamp(low, high).cpu().numpy()
    return mean


def _reduced(head: ContextHead, sample: FitSample) -> FitSample:
    """The sample with the head's components in the place of its feature maps."""
    device = head.basis.device
    with torch.no_grad():
        views = tuple(
            replace(view, maps=(head.components([m.to(device).float()[None] for m in view.maps])[0].cpu(),))
            for view in sample.views
        )
    return replace(sample, views=views)


def save_canopy_model(folder: Path, model: CanopyModel, *, overwrite: bool = False) -> None:
    """Writes head.safetensors, card.json and, unless the backbone is a bundled one, the backbone.

    The folder appears under its name only when whole.

    Args:
        folder: to make.
        model: to write.
        overwrite: replace an existing folder.

    Raises:
        RasterError: the folder exists and may not be replaced, or cannot be written.
    """
    save_model(folder, model.backbone, model.head, model.card, what="canopy", overwrite=overwrite)


def load_canopy_model(
    name_or_folder: str | Path = DEFAULT_MODEL, *, backbone: str | Path | None = None
) -> CanopyModel:
    """A model ready to predict, on the CPU.

    Args:
        name_or_folder: a bundled name, or a folder that `save_canopy_model` wrote.
        backbone: see `load_model_backbone`.

    Raises:
        UnknownNameError: neither a bundled name nor a folder.
        ConfigError: the card is missing, incomplete, or belongs to other backbone weights.
        DataError: the weights are damaged or do not fit.
    """
    folder = find_model(name_or_folder, BUNDLED_MODELS, what="canopy", command="canopy fit")
    stored = open_model(folder, CanopySettings, product=CANOPY_HEIGHT.name, backbone=backbone)
    frozen, settings = stored.backbone, stored.settings
    dims = [frozen.embed_dim] * len(stored.blocks) + [2 * frozen.in_channels] * settings.colours
    head = settings.head.build(dims, output=stored.output)
    load_head_weights(folder, head)
    return CanopyModel(
        frozen,
        head,
        stored.blocks,
        settings.image_scale,
        settings.predict_views,
        stored.card,
        settings.colours,
    )
