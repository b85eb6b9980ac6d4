"""Pairs of an image and its targets become training samples of a head: features of each view, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import BackboneCard
from dinov3geo.data.pairs import PairArrays, RasterPair, load_pair
from dinov3geo.features.extract import (
    FeatureCache,
    apply_view,
    colour_map,
    extract_feature_maps,
    feature_key,
    pixels_per_patch,
    weights_digest,
)
from dinov3geo.heads.fit import FitSample, FitView
from dinov3geo.rasters.bands import choose_bands

StageProgress = Callable[[str, int, int], None]
# What a pair holds, and which 1-based bands of the image were read.
LoadPair = Callable[[RasterPair], tuple[PairArrays, tuple[int, ...]]]

# Cells whose image pixels mostly hold no data teach nothing.
MIN_IMAGE_SHARE = 0.5


def cell_validity(arrays: PairArrays, factor: int) -> np.ndarray:
    """Cells with a known target and enough image.

    Args:
        arrays: of one pair.
        factor: image pixels per cell.

    Returns:
        [h, w] bool.
    """
    return enough_image(arrays.valid, factor) & arrays.target_valid


def enough_image(valid: np.ndarray, factor: int) -> np.ndarray:
    """Cells [h, w] at least `MIN_IMAGE_SHARE` of whose image pixels [h k, w k], k the factor, are valid."""
    height, width = (length // factor for length in valid.shape)
    enough: np.ndarray = valid.reshape(height, factor, width, factor).mean(axis=(1, 3)) >= MIN_IMAGE_SHARE
    return enough


def load_model_pair(pair: RasterPair, card: BackboneCard) -> tuple[PairArrays, tuple[int, ...]]:
    """Reads a pair with the image bands that a backbone takes, in its order, as prediction reads scenes.

    Args:
        pair: from `find_pairs`.
        card: of the backbone.

    Returns:
        The pair's numbers, and the 1-based image bands that were read.

    Raises:
        RasterError, DataError: see `choose_bands` and `load_pair`.
    """
    bands, _ = choose_bands(pair.image, card.normalization.bands, model=card.name)
    return load_pair(pair, bands=bands), bands


def build_samples(
    pairs: Sequence[RasterPair],
    backbone: Backbone,
    *,
    blocks: Sequence[int],
    image_scale: float,
    views: int,
    cache: FeatureCache,
    colours: bool = False,
    load: LoadPair | None = None,
    progress: StageProgress | None = None,
) -> list[FitSample]:
    """Features and targets of each pair in several views.

    Args:
        pairs: from `find_pairs`.
        backbone: with a card, on the device to run on.
        blocks: block numbers whose features are taken.
        image_scale: see `extract_feature_maps`.
        views: the first so many of the eight flips and turns.
        cache: features that are in it are not computed again.
        colours: whether `colour_map` follows the features; it is not cached.
        load: reads a pair; None for `load_model_pair`, which reads heights.
        progress: called as `progress("features", done, total)`.

    Returns:
        One sample per pair, features in float16 on the CPU.

    Raises:
        RasterError, DataError: a file cannot be read or has bands or targets that do not fit.
    """
    assert backbone.card is not None
    digest = weights_digest(backbone)
    side = pixels_per_patch(backbone.patch_size, image_scale)
    samples = []
    for done, pair in enumerate(pairs):
        if progress is not None:
            progress("features", done, len(pairs))
        arrays, bands = load_model_pair(pair, backbone.card) if load is None else load(pair)
        image, valid = torch.from_numpy(arrays.image), torch.from_numpy(arrays.valid)
        target = torch.from_numpy(arrays.target)
        known = torch.from_numpy(cell_validity(arrays, pair.factor))
        window = tuple(
            int(n) for n in (pair.window.col_off, pair.window.row_off, pair.window.width, pair.window.height)
        )
        collected = []
        for view in range(views):
            key = feature_key(
                digest,
                pair.image,
                bands=bands,
                normalization=backbone.card.normalization,
                window=window,
                blocks=blocks,
                view=view,
                image_scale=image_scale,
            )
            compute = partial(_maps, backbone, image, valid, view, blocks, image_scale)
            maps = tuple(cache.get_or_compute(key, compute))
            if colours:
                maps = (*maps, _colours(backbone, image, valid, view, image_scale))
            covered_hw = (maps[0].shape[-2] * side, maps[0].shape[-1] * side)
            collected.append(FitView(maps, covered_hw, apply_view(target, view), apply_view(known, view)))
        samples.append(FitSample(tuple(collected), pair.factor, pair.group))
    if progress is not None:
        progress("features", len(pairs), len(pairs))
    return samples


def _maps(
    backbone: Backbone,
    image: Tensor,
    valid: Tensor,
    view: int,
    blocks: Sequence[int],
    image_scale: float,
) -> list[Tensor]:
    """Feature maps [D, h, w] of one view of one image."""
    device = next(backbone.parameters()).device
    maps = extract_feature_maps(
        backbone,
        apply_view(image, view)[None].to(device),
        apply_view(valid, view)[None].to(device),
        blocks=blocks,
        image_scale=image_scale,
    )
    return [m[0] for m in maps]


def _colours(backbone: Backbone, image: Tensor, valid: Tensor, view: int, image_scale: float) -> Tensor:
    """`colour_map` [2C, h, w] of one view of one image, on the CPU."""
    numbers, known = apply_view(image, view)[None], apply_view(valid, view)[None]
    return colour_map(backbone, numbers, known, image_scale=image_scale)[0]
