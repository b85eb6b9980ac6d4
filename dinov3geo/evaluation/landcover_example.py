"""One held-out scene, put together from its windows, for pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.data.pairs import PairArrays, RasterPair
from dinov3geo.evaluation.landcover_parts import Classes, Part

Spot = tuple[slice, slice]


@dataclass(frozen=True, slots=True)
class Example:
    """One scene as everyone sees it.

    Attributes:
        name: of its file.
        image: [H, W, 3] in 0..1.
        truth: [H, W] classes.
        valid: [H, W] bool.
        predicted: [H, W] classes of each method.
    """

    name: str
    image: NDArray[np.float32]
    truth: Classes
    valid: NDArray[np.bool_]
    predicted: Mapping[str, Classes]


def choose_example(pairs: Sequence[RasterPair], arrays: Sequence[PairArrays]) -> list[int]:
    """Numbers of the windows of the scene whose classes are the most evenly mixed.

    Args:
        pairs: all windows.
        arrays: what they hold.
    """
    counts: dict[Path, NDArray[np.int64]] = {}
    for pair, own in zip(pairs, arrays, strict=True):
        found = np.bincount(own.target[own.target_valid], minlength=256)
        counts[pair.image] = counts.get(pair.image, np.zeros(256, dtype=np.int64)) + found

    def mixture(path: Path) -> float:
        share = counts[path] / max(int(counts[path].sum()), 1)
        return float(-(share * np.log(np.maximum(share, 1e-12))).sum())

    chosen = max(sorted(counts), key=mixture)
    return [i for i, pair in enumerate(pairs) if pair.image == chosen]


def show_example(
    pairs: Sequence[RasterPair],
    arrays: Sequence[PairArrays],
    numbers: Sequence[int],
    found: Mapping[str, Sequence[Part]],
) -> Example:
    """Puts a scene together.

    Args:
        pairs: all windows.
        arrays: what they hold.
        numbers: of the scene's windows.
        found: parts of each method, which hold its classes there.
    """
    own = [pairs[i] for i in numbers]
    factor = own[0].factor
    spots = _spots(numbers, own)
    shape = max(s[0].stop for s in spots.values()), max(s[1].stop for s in spots.values())
    truth, valid = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=bool)
    image = np.zeros((*shape, 3), dtype=np.float32)
    for i, spot in spots.items():
        truth[spot], valid[spot] = arrays[i].target, arrays[i].target_valid
        image[spot] = _picture(arrays[i].image, factor)
    low, high = np.percentile(image, (2, 98), axis=(0, 1))
    predicted = {}
    for method, parts in found.items():
        canvas = np.zeros(shape, dtype=np.uint8)
        for part in parts:
            for i, classes in part.example.items():
                canvas[spots[i]] = classes
        predicted[method] = canvas
    stretched = ((image - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    return Example(own[0].image.stem, stretched, truth, valid, predicted)


def _spots(numbers: Sequence[int], pairs: Sequence[RasterPair]) -> dict[int, Spot]:
    """Rows and columns of each window in the scene, in cells."""
    corners = [(int(p.window.row_off) // p.factor, int(p.window.col_off) // p.factor) for p in pairs]
    top, left = (min(corner[axis] for corner in corners) for axis in (0, 1))
    return {
        i: (
            slice(row - top, row - top + p.grid.height),
            slice(col - left, col - left + p.grid.width),
        )
        for i, p, (row, col) in zip(numbers, pairs, corners, strict=True)
    }


def _picture(image: NDArray[Any], factor: int) -> NDArray[np.float32]:
    """The first three bands at the resolution of the labels, [h, w, 3]."""
    shown = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    rows, cols = shown.shape[1] // factor, shown.shape[2] // factor
    means = shown.reshape(3, rows, factor, cols, factor).mean(axis=(2, 4))
    return np.moveaxis(means, 0, -1).astype(np.float32)
