"""iBOT block masks with exact counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from dinov3geo.data.ranges import Probability, ShareRange

_TRIES = 10
_SMALLEST_BLOCK = 4
_ASPECT_RANGE = (0.3, 1 / 0.3)


class MaskSettings(BaseModel):
    """Which global crops lose which share of their patches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probability: Probability = Field(0.5, description="share of the global crops that get a mask")
    ratio: ShareRange = Field((0.1, 0.5), description="smallest and largest masked share of a crop")


def masked_counts(num_images: int, num_patches: int, settings: MaskSettings) -> list[int]:
    """Masked patches per image, before shuffling.

    The shares are stratified, not drawn: with n masked images, image i gets
    `floor(P * linspace(low, high, n + 1)[i + 1])` patches, the others none.

    Source: DINOv2 and DINOv3 training code, as facts.
    """
    num_masked = int(num_images * settings.probability)
    shares = np.linspace(*settings.ratio, num_masked + 1)[1:]
    return [int(num_patches * share) for share in shares] + [0] * (num_images - num_masked)


def block_mask(
    grid_hw: tuple[int, int], count: int, *, largest_block: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Mask of exactly `count` patches: blocks first, then single patches to the exact number.

    Args:
        grid_hw: rows and columns.
        count: patches to mask.
        largest_block: in patches; each block's area is at most this and at most what is missing.
        rng: source of randomness.

    Returns:
        [h, w] bool.

    Source: Bao et al. 2022 (BEiT), algorithm 1, with random completion as in DINOv2.
    """
    height, width = grid_hw
    mask = np.zeros(grid_hw, dtype=bool)
    missing = count
    while missing > 0:
        placed = _place_block(mask, missing, min(missing, largest_block), rng)
        if not placed:
            break
        missing -= placed
    if missing > 0:
        free = np.flatnonzero(~mask)
        mask.reshape(-1)[rng.choice(free, size=missing, replace=False)] = True
    return mask.reshape(height, width)


def _place_block(mask: NDArray[np.bool_], missing: int, largest: float, rng: np.random.Generator) -> int:
    height, width = mask.shape
    for _ in range(_TRIES):
        area = rng.uniform(_SMALLEST_BLOCK, max(largest, _SMALLEST_BLOCK))
        aspect = math.exp(rng.uniform(math.log(_ASPECT_RANGE[0]), math.log(_ASPECT_RANGE[1])))
        rows, cols = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < rows < height and 0 < cols < width):
            continue
        top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - cols + 1)
        block = mask[top : top + rows, left : left + cols]
        fresh = int(block.size - block.sum())
        if 0 < fresh <= missing:
            block[...] = True
            return fresh
    return 0


def batch_masks(
    patch_valid: NDArray[np.bool_],
    grid_hw: tuple[int, int],
    settings: MaskSettings,
    *,
    seed: int,
    images: Sequence[int] | None = None,
    num_images: int | None = None,
) -> NDArray[np.bool_]:
    """Masks for global crops; patches without data are never masked.

    A masked patch is a target, and a patch that holds no data has nothing to predict. Every image draws from
    a stream of its own, so that a process can make the masks of its images alone.

    Args:
        patch_valid: [n, N], patches whose every pixel holds data.
        grid_hw: rows and columns, N = h * w.
        settings: shares.
        seed: of this batch.
        images: which of the batch's V * B global crops these are; all if None.
        num_images: V * B over all processes; n if None.

    Returns:
        [n, N] bool.
    """
    numbers = range(len(patch_valid)) if images is None else images
    num_patches = patch_valid.shape[1]
    counts = masked_counts(len(numbers) if num_images is None else num_images, num_patches, settings)
    np.random.default_rng(seed).shuffle(counts)
    masks = np.zeros_like(patch_valid)
    for mask, valid, number in zip(masks, patch_valid, numbers, strict=True):
        if counts[number]:
            rng = np.random.default_rng([seed, number])
            largest = settings.ratio[1] * num_patches
            block = block_mask(grid_hw, counts[number], largest_block=largest, rng=rng)
            mask[:] = block.reshape(-1) & valid
    return masks
