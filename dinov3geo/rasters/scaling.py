"""Pixels of another size on the same axes: weighted sums along rows and columns, alike in every window.

Within one reference system nothing has to be bent, so each axis is resampled by itself. Where a pixel begins
is known to a millionth of one, and its sum is taken in one order: a window gives the numbers of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from dinov3geo.rasters.grid import PixelGrid

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Read = Callable[[Window], tuple[Array, Mask]]

MIN_WEIGHT = {"bilinear": 0.5, "average": 1e-6}
"""Of the weight of the source pixels, the share that must hold data: most of it, or anything."""

# Positions in source pixels are rounded to this, far above the rounding errors of coordinates in metres.
_STEPS_PER_PIXEL = 2.0**20
# So many source pixels are read at once,
_MAX_SOURCE_PIXELS = 2**22
# and so many sums taken: arrays of a band stay in the processor's cache, and their memory is used again.
_MAX_SUMS = 2**18


def scale_onto(
    read: Read, own: PixelGrid, wanted: PixelGrid, resampling: str, fill: Array
) -> tuple[Array, Mask]:
    """Reads what lies under a grid of the same CRS and resamples it, some rows at a time.

    Args:
        read: gives numbers [C, h, w] and mask [h, w] of a window of `own`.
        own: grid of the source.
        wanted: grid of the result; its rows may run the other way.
        resampling: "average" of the area under a pixel, or "bilinear", whose kernel grows with the pixel.
        fill: [C] numbers at pixels without data.

    Returns:
        Numbers [C, h, w] in the source's dtype, whole ones rounded with halves up, and their mask [h, w].
    """
    relative = ~own.transform @ wanted.transform
    numbers = np.empty((len(fill), *wanted.shape_hw), dtype=fill.dtype)
    numbers[:] = fill[:, None, None]
    valid = np.zeros(wanted.shape_hw, dtype=np.bool_)
    cols = _taps(relative.c, relative.a, range(wanted.width), own.width, resampling)
    if cols is None:
        return numbers, valid
    under = cols.stop - cols.first
    height = int(min(_MAX_SUMS / max(under, wanted.width), _MAX_SOURCE_PIXELS / (under * abs(relative.e))))
    height = max(height, 1)
    for top in range(0, wanted.height, height):
        here = range(top, min(top + height, wanted.height))
        rows = _taps(relative.f, relative.e, here, own.height, resampling)
        if rows is not None:
            window = Window(cols.first, rows.first, under, rows.stop - rows.first)
            part, known = _weighted_means(*read(window), rows, cols, MIN_WEIGHT[resampling])
            valid[here.start : here.stop] = known
            np.copyto(numbers[:, here.start : here.stop], part, where=known)
    return numbers, valid


@dataclass(frozen=True, slots=True)
class _Taps:
    """Which source pixels of an axis flow into n wanted ones.

    Attributes:
        first: source pixel that any of them needs.
        stop: the one after the last.
        index: [K, n], counted from `first`.
        weights: [K, n], 0 where a tap counts nothing.
    """

    first: int
    stop: int
    index: NDArray[np.intp]
    weights: NDArray[np.float64]

    def sums(self, array: Array, axis: int, dtype: np.dtype[Any]) -> Array:
        """Weighted sums [h, w] along an axis, added up in the order of the taps."""
        weights = self.weights.astype(dtype)
        total: Array | None = None
        for index, weight in zip(self.index, weights[:, :, None] if axis == 0 else weights, strict=True):
            part = np.take(array, index, axis=axis).astype(dtype, copy=False)
            part *= weight
            total = part if total is None else np.add(total, part, out=total)
        assert total is not None
        return total


def _taps(start: float, step: float, pixels: range, length: int, resampling: str) -> _Taps | None:
    """Taps of some wanted pixels.

    Args:
        start: where wanted pixel 0 begins, in source pixels.
        step: from one wanted pixel to the next, negative where the axes run against each other.
        pixels: the wanted ones.
        length: of the source along the axis.
        resampling: see `scale_onto`.

    Returns:
        None if they lie outside the source.
    """
    edges = start + step * np.arange(pixels.start, pixels.stop + 1)
    edges = np.rint(edges * _STEPS_PER_PIXEL) / _STEPS_PER_PIXEL
    low, high = np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:])
    centre = (low + high) / 2
    if resampling == "bilinear":
        radius = max(abs(step), 1.0)
        low, high = centre - radius, centre + radius
    begin = np.floor(low)
    taps = begin + np.arange(int((np.ceil(high) - begin).max()))[:, None]
    if resampling == "bilinear":
        weights = 1 - np.abs(taps + 0.5 - centre) / radius
    else:
        weights = np.minimum(high, taps + 1) - np.maximum(low, taps)
    counts = (weights > 0) & (taps >= 0) & (taps < length)
    if resampling == "bilinear":
        # Beside the raster its border would be repeated.
        counts &= (centre >= 0) & (centre <= length)
    if not counts.any():
        return None
    first, stop = int(taps[counts].min()), int(taps[counts].max()) + 1
    index = np.clip(taps, first, stop - 1).astype(np.intp) - first
    return _Taps(first, stop, index, np.where(counts, weights, 0.0))


def _weighted_means(
    numbers: Array, valid: Mask, rows: _Taps, cols: _Taps, min_weight: float
) -> tuple[Array, Mask]:
    """Means [C, n, m] over the source pixels [C, h, w] with data, and where enough of them hold data."""
    # A mean must not leave the range of its numbers by a rounding error; whole numbers are rounded anyway.
    dtype = np.dtype(np.float32 if numbers.dtype.itemsize <= 2 else np.float64)

    def sums(band: Array) -> Array:
        return cols.sums(rows.sums(band, 0, dtype), 1, dtype)

    # Without a hole the weights of all columns are those of the first one.
    full = rows.sums(np.ones((numbers.shape[1], 1), dtype=dtype), 0, dtype)
    whole = cols.sums(np.broadcast_to(full, (len(full), numbers.shape[2])), 1, dtype)
    holes = not valid.all()
    # Normalised convolution: what holds no data is taken out of both sums.
    weight = sums(valid) if holes else whole
    known = (weight >= min_weight * whole) & (weight > 0)
    means = np.zeros((len(numbers), *known.shape), dtype=numbers.dtype)
    for mean, band in zip(means, numbers, strict=True):
        total = sums(np.where(valid, band, band.dtype.type(0)) if holes else band)
        np.divide(total, weight, out=total, where=known)
        total[~known] = 0
        mean[:] = round_half_up(total, mean.dtype)
    return means, known


def round_half_up(values: Array, dtype: np.dtype[Any]) -> Array:
    """Values as numbers of a type; those of a type of whole numbers are rounded as GDAL rounds them."""
    if np.issubdtype(dtype, np.integer):
        values = np.floor(values + values.dtype.type(0.5))
    return values.astype(dtype)
