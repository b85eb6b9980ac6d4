"""Models as functions from tiles to arrays, the form in which the engine runs them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.errors import DataError
from dinov3geo.features.extract import extract_feature_maps
from dinov3geo.features.visualize import PcaBasis
from dinov3geo.heads.base import HeightModel
from dinov3geo.predict.stream import Array, Floats, Mask, RunTiles, WindowSource, read_tile
from dinov3geo.rasters.grid import TilePlan


def canopy_runner(model: HeightModel) -> RunTiles:
    """Heights [B, 1, h, w] in metres of images [B, C, h, w], on the model's device."""
    device = _device(model.backbone)

    def run(images: Array, valid: Mask) -> Floats:
        with torch.inference_mode():
            heights = model.predict(_tensor(images, device), torch.from_numpy(valid).to(device))
        return np.asarray(heights.float().cpu().numpy(), dtype=np.float32)

    return run


def feature_runner(backbone: Backbone, *, image_scale: float = 1.0) -> RunTiles:
    """Normed patch features [B, D, h / s, w / s] of the last block, s = patch size / image scale."""
    device = _device(backbone)
    last = (backbone.num_blocks - 1,)

    def run(images: Array, valid: Mask) -> Floats:
        with torch.inference_mode():
            (features,) = extract_feature_maps(
                backbone,
                _tensor(images, device),
                torch.from_numpy(valid).to(device),
                blocks=last,
                image_scale=image_scale,
            )
        return np.asarray(features.float().cpu().numpy(), dtype=np.float32)

    return run


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
        DataError: the scene holds no valid pixel.
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
        raise DataError("the scene holds no valid pixel: all of it is nodata")
    return np.concatenate(chosen)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _tensor(images: Array, device: torch.device) -> torch.Tensor:
    """The numbers on the device, in their own type, so that bytes travel as bytes."""
    return torch.from_numpy(images).to(device)
