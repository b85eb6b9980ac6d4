"""Halves the resolution of rows of pixels, for overviews; nodata never flows into a value."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Overviews = Literal["average", "mode", "nearest"]


def halve(rows: NDArray[Any], nodata: float | None, method: Overviews) -> NDArray[Any]:
    """Every 2 x 2 pixels become one.

    Args:
        rows: [C, h, w].
        nodata: number of pixels without data, or None.
        method: "average" of the pixels with data (whole numbers are rounded, halves up), "mode", the most
            frequent of them (of equally frequent ones the first in reading order), or "nearest", the upper
            left one.

    Returns:
        [C, ceil(h / 2), ceil(w / 2)] of the same type; nodata where none of the pixels holds data.
    """
    if method == "nearest":
        return np.ascontiguousarray(rows[:, ::2, ::2])
    # Beyond the edge the last row and column are repeated; there they count twice, which changes no mean of
    # two equal halves and no majority.
    padded = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2), (0, rows.shape[2] % 2)), mode="edge")
    corners = [padded[:, row::2, col::2] for row in (0, 1) for col in (0, 1)]
    valid = [_has_data(corner, nodata) for corner in corners]
    reduced = _average(corners, valid) if method == "average" else _mode(corners, valid)
    if nodata is not None:
        np.copyto(reduced, np.array(nodata, dtype=rows.dtype), where=~np.logical_or.reduce(valid))
    return reduced


def _has_data(numbers: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    if nodata is None:
        return np.ones(numbers.shape, dtype=np.bool_)
    if math.isnan(nodata):
        return ~np.isnan(numbers)
    return np.asarray(numbers != numbers.dtype.type(nodata))


def _average(corners: list[NDArray[Any]], valid: list[NDArray[np.bool_]]) -> NDArray[Any]:
    dtype = corners[0].dtype
    whole = np.issubdtype(dtype, np.integer)
    total = np.zeros(corners[0].shape, dtype=np.int64 if whole else dtype)
    count = np.zeros(corners[0].shape, dtype=np.uint8)
    for numbers, known in zip(corners, valid, strict=True):
        np.add(total, numbers, out=total, where=known)
        count += known
    count = np.maximum(count, 1)
    return ((total + count // 2) // count).astype(dtype) if whole else (total / count.astype(dtype))


def _mode(corners: list[NDArray[Any]], valid: list[NDArray[np.bool_]]) -> NDArray[Any]:
    votes = np.zeros((4, *corners[0].shape), dtype=np.uint8)
    for index in range(4):
        for other in range(4):
            votes[index] += (corners[index] == corners[other]) & valid[index] & valid[other]
    chosen = votes.argmax(axis=0)
    return np.asarray(np.take_along_axis(np.stack(corners), chosen[None], axis=0)[0])
