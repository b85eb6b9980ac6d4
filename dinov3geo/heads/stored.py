"""Canopy height fitted on stored features: neither the images nor the backbone are opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from affine import Affine
from torch import Tensor

from dinov3geo.data.pairs import PairMatch, RasterPair, Spec, load_heights, match_placed
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.features.facts import FeatureFacts
from dinov3geo.features.opened import KINDS, StoredFeatures, open_features
from dinov3geo.heads.canopy import CANOPY_HEIGHT, CanopySettings, fit_canopy_head
from dinov3geo.heads.canopy_report import CanopyFitReport, FittedHead, finish_fit
from dinov3geo.heads.fit import FitSample, FitView
from dinov3geo.heads.folders import check_free, stored_card
from dinov3geo.heads.samples import StageProgress, enough_image
from dinov3geo.rasters.grid import PixelGrid


@dataclass(frozen=True, slots=True)
class StoredScene:
    """Stored features and where their scene lay (a `data.pairs.Placed`).

    Attributes:
        features: of the scene.
        facts: what they are of.
        grid: of the scene's pixels.
    """

    features: StoredFeatures
    facts: FeatureFacts
    grid: PixelGrid

    @property
    def path(self) -> Path:
        """Of the features."""
        return self.features.path


def fit_canopy_from_features(
    features: Spec,
    heights: Spec,
    *,
    out: Path,
    settings: CanopySettings | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: StageProgress | None = None,
) -> CanopyFitReport:
    """Fits a head on features that `dinov3geo features` stored, and saves the model.

    The head reads what is stored: one map, the last block's. Its folder holds no backbone; the card says
    where it lies. Patches without data, whose features are not stored, get the mean of the others in their
    window.

    Args:
        features: one or more files, folders of them, or globs; all of one backbone.
        heights: folder, glob, file or list of them, matched to the features by georeference.
        out: folder of the model.
        settings: how; None for `stored_settings`.
        overwrite: replace an existing folder.
        command: that was typed, for the card.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        UserError: a file, name or number that cannot be used; nothing is written then.
    """
    check_free(out, what="canopy", overwrite=overwrite)
    scenes = open_scenes(features)
    facts = shared_facts(scenes)
    settings = settings or stored_settings(facts)
    check_stored(settings, facts)
    match = match_stored(scenes, heights, settings)
    samples = stored_samples(match, scenes, progress=progress)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state_file = out.with_name(f".{out.name}.fit")
    head, result = fit_canopy_head(samples, settings, device=device, progress=progress, state_file=state_file)
    card = stored_card(facts, CANOPY_HEIGHT) | {"blocks": [facts.block], "scores": {}}
    fitted = FittedHead(head, result, samples, match, settings)
    return finish_fit(fitted, out, backbone=None, card=card, overwrite=overwrite, command=command)


def open_scenes(spec: Spec) -> list[StoredScene]:
    """Opens stored features.

    Args:
        spec: one or more files, folders of them, or globs.

    Raises:
        DataError: nothing was found.
        ConfigError, RasterError: see `open_features` and `FeatureFacts.from_tags`.
    """
    specs = [spec] if isinstance(spec, str | Path) else list(spec)
    paths = sorted({path for item in specs for path in _find(Path(item))})
    if not paths:
        raise DataError(
            f"no features found in {', '.join(map(str, specs))}; expected files of {', '.join(KINDS)}"
        )
    return [_open(path) for path in paths]


def shared_facts(scenes: Sequence[StoredScene]) -> FeatureFacts:
    """What all the features are of.

    Raises:
        ConfigError: principal components, or features that differ in backbone, block, scale or statistics.
    """
    first = scenes[0]
    for scene in scenes:
        if scene.facts.components is not None:
            raise ConfigError(
                f"{scene.path} holds {scene.facts.components} principal components, but a head needs the "
                "features themselves: write them without --pca"
            )
        for name in ("weights", "block", "image_scale", "normalization"):
            if getattr(scene.facts, name) != getattr(first.facts, name):
                raise ConfigError(
                    f"{first.path} and {scene.path} differ in {name.replace('_', ' ')}; expected features "
                    "of one backbone and one scale: compute them alike, or fit on those of one kind"
                )
    return first.facts


def stored_settings(facts: FeatureFacts) -> CanopySettings:
    """The default settings that stored features allow."""
    return CanopySettings(**required_settings(facts))


def required_settings(facts: FeatureFacts) -> dict[str, float]:
    """Settings that stored features prescribe: one map, at the scale at which it was computed."""
    return {"num_maps": 1, "image_scale": facts.image_scale}


def check_stored(settings: CanopySettings, facts: FeatureFacts) -> None:
    """Raises `ConfigError` for settings that need more than what is stored."""
    wanted = {**required_settings(facts), "views": 1, "predict_views": 1, "colours": False}
    for name, value in wanted.items():
        given = getattr(settings, name)
        if given != value:
            raise ConfigError(
                f"{name} is {given}, but the stored features are of block {facts.block} alone, north up, at "
                f"scale {facts.image_scale:g}, which needs {value}; leave it out, or fit from --images"
            )


def match_stored(scenes: Sequence[StoredScene], heights: Spec, settings: CanopySettings) -> PairMatch:
    """Scenes matched to heights; arguments and errors as `data.pairs.match_pairs`."""
    return match_placed(scenes, heights, settings.max_window, "height raster")


def stored_samples(
    match: PairMatch, scenes: Sequence[StoredScene], *, progress: StageProgress | None = None
) -> list[FitSample]:
    """Features and heights of each pair.

    Args:
        match: of the scenes with heights.
        scenes: from `open_scenes`.
        progress: called as `progress("features", done, total)`.

    Returns:
        One sample per pair, features in float16.

    Raises:
        RasterError, DataError: a file cannot be read, or holds no heights in metres.
    """
    by_path = {scene.path: scene for scene in scenes}
    samples = []
    for done, pair in enumerate(match.pairs, start=1):
        samples.append(_sample(pair, by_path))
        if progress is not None:
            progress("features", done, len(match.pairs))
    return samples


def _sample(pair: RasterPair, scenes: Mapping[Path, StoredScene]) -> FitSample:
    scene, side, window = scenes[pair.image], scenes[pair.image].facts.stride, pair.window
    (rows, top), (cols, left) = (
        _patches(int(start), int(length), side)
        for start, length in ((window.row_off, window.height), (window.col_off, window.width))
    )
    features, known = _filled(scene.features.read(rows, cols))
    pixels = known.repeat(side, 0).repeat(side, 1)
    pixels = pixels[top : top + int(window.height), left : left + int(window.width)]
    target, valid = load_heights(pair)
    view = FitView(
        maps=(features,),
        covered_hw=(side * known.shape[0], side * known.shape[1]),
        target=torch.from_numpy(target),
        valid=torch.from_numpy(valid & enough_image(pixels, pair.factor)),
        origin=(top, left),
    )
    return FitSample((view,), pair.factor, pair.group)


def _patches(start: int, length: int, side: int) -> tuple[slice, int]:
    """Patches that cover pixels along one axis, and how many pixels before the first lie in them."""
    first = start // side
    return slice(first, -(-(start + length) // side)), start - first * side


def _filled(values: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Features in float16 without holes, and where there were none [h, w]."""
    known = ~np.isnan(values).any(axis=0)
    if not known.all():
        mean = values[:, known].mean(axis=1) if known.any() else np.zeros(len(values), np.float32)
        values = np.where(known, values, mean[:, None, None])
    return torch.from_numpy(values).half(), known


def _open(path: Path) -> StoredScene:
    features = open_features(path)
    facts = FeatureFacts.from_tags(features.attributes, source=path)
    pixels = features.grid.transform @ Affine.scale(1 / facts.stride)
    return StoredScene(features, facts, PixelGrid(features.grid.crs, pixels, *facts.scene_hw))


def _find(path: Path) -> list[Path]:
    if any(sign in str(path) for sign in "*?[") and not path.exists():
        return [found for found in path.parent.glob(path.name) if found.suffix.lower() in KINDS]
    if path.is_dir() and path.suffix.lower() not in KINDS:
        return [found for found in path.iterdir() if found.suffix.lower() in KINDS]
    return [path]
