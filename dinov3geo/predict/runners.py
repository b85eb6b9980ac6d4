"""Models as functions from tiles to arrays, the form in which the engine runs them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.inference import for_inference
from dinov3geo.backbones.precision import choose_dtype
from dinov3geo.errors import DataError, EmptySceneError
from dinov3geo.features.extract import apply_view, extract_feature_maps, undo_view
from dinov3geo.features.visualize import PcaBasis
from dinov3geo.heads.base import HeightModel, OutputSpec
from dinov3geo.predict.stream import Array, Floats, Mask, RunTiles, WindowSource, read_tile
from dinov3geo.rasters.grid import TilePlan


class ClassModel(Protocol):
    """What a land-cover model is for the engine: backbone, card, class probabilities of each pixel."""

    backbone: Backbone
    card: dict[str, Any]

    @property
    def output(self) -> OutputSpec:
        """Its class names."""

    def predict(self, numbers: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Images [B, C, H, W] as the file holds them to probabilities [B, K, H, W] that sum to 1."""


SPREAD_VIEWS = (0, 1, 2, 3)
"""Flips and the half turn: they keep the shape of a tile."""


def canopy_runner(
    model: HeightModel, *, spread: bool = False, precision: str = "auto", compiled: bool = False
) -> RunTiles:
    """Heights in metres of images [B, C, h, w], on the model's device.

    Args:
        model: backbone and head.
        spread: also give the standard deviation over `SPREAD_VIEWS`. The height stays that of the scene
            as it lies: a head fitted north up knows less of a turned image.
        precision: a name in `precision.PRECISIONS`.
        compiled: let torch.compile fuse what lies within each block; the first tiles then take long.

    Returns:
        A function to [B, 1, h, w], or [B, 2, h, w] with the spread.

    Raises:
        ConfigError: no such precision.
    """
    device = _device(model.backbone)
    dtype = choose_dtype(precision, device)
    prepared = copy.copy(model)
    prepared.backbone = _prepare(model.backbone, dtype, compiled=compiled)

    def run(images: Array, valid: Mask) -> Floats:
        numbers, known = _tensor(images, device), torch.from_numpy(valid).to(device)
        with torch.inference_mode(), _cast(device, dtype):
            if not spread:
                heights = prepared.predict(numbers, known).float()
            else:
                views = [
                    undo_view(prepared.predict(apply_view(numbers, v), apply_view(known, v)).float(), v)
                    for v in SPREAD_VIEWS
                ]
                heights = torch.cat([views[0], torch.stack(views).std(dim=0)], dim=1)
        return np.asarray(heights.cpu().numpy(), dtype=np.float32)

    return InParts(run)


def feature_runner(
    backbone: Backbone, *, image_scale: float = 1.0, precision: str = "auto", compiled: bool = False
) -> RunTiles:
    """Normed patch features [B, D, h / s, w / s] of the last block, s = patch size / image scale."""
    device = _device(backbone)
    dtype = choose_dtype(precision, device)
    prepared = _prepare(backbone, dtype, compiled=compiled)
    last = (backbone.num_blocks - 1,)

    def run(images: Array, valid: Mask) -> Floats:
        with torch.inference_mode(), _cast(device, dtype):
            (features,) = extract_feature_maps(
                prepared,
                _tensor(images, device),
                torch.from_numpy(valid).to(device),
                blocks=last,
                image_scale=image_scale,
            )
        return np.asarray(features.float().cpu().numpy(), dtype=np.float32)

    return InParts(run)


def class_runner(model: ClassModel, *, precision: str = "auto", compiled: bool = False) -> RunTiles:
    """Class probabilities [B, K, h, w] of images [B, C, h, w], on the model's device."""
    device = _device(model.backbone)
    dtype = choose_dtype(precision, device)
    prepared = copy.copy(model)
    prepared.backbone = _prepare(model.backbone, dtype, compiled=compiled)

    def run(images: Array, valid: Mask) -> Floats:
        numbers, known = _tensor(images, device), torch.from_numpy(valid).to(device)
        with torch.inference_mode(), _cast(device, dtype):
            shares = prepared.predict(numbers, known)
        return np.asarray(shares.float().cpu().numpy(), dtype=np.float32)

    return InParts(run)


class InParts:
    """Runs a batch in as many parts as memory asks for.

    Attributes:
        size: tiles that fit at once, or None as long as every batch did.
    """

    def __init__(self, run: RunTiles) -> None:
        """Wraps a function from tiles to arrays."""
        self._run = run
        self.size: int | None = None

    def __call__(self, images: Array, valid: Mask) -> Floats:
        """See `RunTiles`; halves the parts each time that the device is out of memory."""
        while True:
            size = min(self.size or len(images), len(images))
            starts = range(0, len(images), size)
            try:
                parts = [self._run(images[k : k + size], valid[k : k + size]) for k in starts]
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise DataError(
                        "one tile alone does not fit into the device's memory; take a smaller --tile"
                    ) from error
                self.size = size // 2
            else:
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            # Outside the handler, whose traceback would keep the failed run's tensors alive.
            torch.cuda.empty_cache()


def _prepare(backbone: Backbone, dtype: torch.dtype, *, compiled: bool) -> Backbone:
    """The backbone as it computes fastest: packed on the CPU, elsewhere as it is, under autocast."""
    if not compiled and _device(backbone).type != "cpu":
        return backbone
    return for_inference(backbone, dtype=dtype, compiled=compiled)


def pca_runner(features: RunTiles, basis: PcaBasis) -> RunTiles:
    """Principal components [B, k, h, w] of the features [B, D, h, w] that another runner gives."""

    def run(images: Array, valid: Mask) -> Floats:
        return np.moveaxis(basis.project(np.moveaxis(features(images, valid), 1, -1)), -1, 1)

    return run


def sample_features(
    reader: WindowSource,
    plan: TilePlan,
    features: RunTiles,
    *,
    stride: int,
    max_tiles: int = 32,
    max_patches: int = 20_000,
    seed: int = 0,
) -> Floats:
    """Features of patches drawn evenly from tiles all over a scene, to fit a PCA on.

    Args:
        reader: the scene.
        plan: its tiles.
        features: images to features [B, D, h, w].
        stride: scene pixels per patch.
        max_tiles: tiles to run.
        max_patches: patches to keep.
        seed: of the draw of tiles and patches.

    Returns:
        [N, D], N at most `max_patches`, of patches with any valid pixel.

    Raises:
        EmptySceneError: the scene holds no valid pixel.
    """
    generator = np.random.default_rng(seed)
    starts = [(row, col) for row in plan.row_starts for col in plan.col_starts]
    share = -(-max_patches // min(max_tiles, len(starts)))
    chosen: list[Floats] = []
    for index in generator.permutation(len(starts)):
        tile = read_tile(reader, plan, starts[index], stride=stride)
        if not tile.valid.any():
            continue
        patches = features(tile.image[None], tile.valid[None])[0][:, tile.cells].T
        chosen.append(patches[generator.permutation(len(patches))[:share]])
        if len(chosen) == max_tiles:
            break
    if not chosen:
        raise EmptySceneError("the scene holds no valid pixel: all of it is nodata")
    return np.concatenate(chosen)


@contextmanager
def _cast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Runs matrix products in a smaller type, if it is one; sums and norms stay float32."""
    if dtype == torch.float32:
        yield
        return
    with torch.autocast(device.type, dtype):
        yield


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _tensor(images: Array, device: torch.device) -> torch.Tensor:
    """The numbers on the device, in their own type, so that bytes travel as bytes."""
    return torch.from_numpy(images).to(device)
