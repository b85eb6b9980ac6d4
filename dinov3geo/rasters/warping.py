"""Brings pixels from one grid onto another; what holds no data never flows into the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyproj.exceptions import ProjError
from rasterio import warp
from rasterio.enums import Resampling
from rasterio.windows import Window

from dinov3geo.errors import GeoreferenceError
from dinov3geo.rasters.crs import transformer
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.scaling import MIN_WEIGHT, round_half_up, scale_onto

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Read = Callable[[Window], tuple[Array, Mask]]

RESAMPLINGS = {
    "nearest": Resampling.nearest,
    "bilinear": Resampling.bilinear,
    "average": Resampling.average,
}

# A warp reads at most this many source pixels at once (larger ones are split).
_MAX_SOURCE_PIXELS = 2**25
# Source pixels beside the wanted area that a kernel may reach.
_MARGIN = 3
# The edge of a larger grid may bend by more than the margin between the points that are transformed.
_LONGEST_STRAIGHT_SIDE = 2048
_EDGE_POINTS = 21


def warp_onto(
    read: Read, own: PixelGrid, wanted: PixelGrid, resampling: str, fill: Array
) -> tuple[Array, Mask]:
    """Reads what lies under a grid and warps it, in halves if that would be too much at once.

    Args:
        read: gives numbers [C, h, w] and mask [h, w] of a window of `own`.
        own: grid of the source.
        wanted: grid of the result.
        resampling: a key of `RESAMPLINGS`.
        fill: [C] numbers at pixels without data.

    Returns:
        Numbers [C, h, w] and their mask [h, w].

    Raises:
        GeoreferenceError: there is no transformation between the two CRS.
    """
    if resampling in MIN_WEIGHT and own.crs == wanted.crs:
        return scale_onto(read, own, wanted, resampling, fill)
    window, inside = _covering_window(own, wanted)
    if window is None:
        blank = np.empty((len(fill), *wanted.shape_hw), dtype=fill.dtype)
        blank[:] = fill[:, None, None]
        return blank, np.zeros(wanted.shape_hw, dtype=np.bool_)
    if window.width * window.height > _MAX_SOURCE_PIXELS and max(wanted.shape_hw) > 1:
        axis = 0 if wanted.height >= wanted.width else 1
        parts = [warp_onto(read, own, half, resampling, fill) for half in _halves(wanted, axis)]
        numbers = np.concatenate([part[0] for part in parts], axis=axis + 1)
        return numbers, np.concatenate([part[1] for part in parts], axis=axis)
    numbers, valid = read(window)
    source = own.window_grid(window)
    if inside and max(wanted.shape_hw) <= _LONGEST_STRAIGHT_SIDE and valid.all():
        return _project(numbers, source, wanted, resampling), np.ones(wanted.shape_hw, dtype=np.bool_)
    return _warp_masked(numbers, valid, source, wanted, resampling, fill)


def _warp_masked(
    numbers: Array, valid: Mask, own: PixelGrid, wanted: PixelGrid, resampling: str, fill: Array
) -> tuple[Array, Mask]:
    """Warps numbers [C, h, w] of which some are no data."""
    if resampling == "nearest":
        target = _project(numbers, own, wanted, resampling)
        target_valid = _project(valid.astype(np.uint8), own, wanted, resampling) > 0
    else:
        # Normalised convolution: the weights of invalid pixels are taken out of both sums.
        working = np.float32 if numbers.dtype.itemsize <= 2 or numbers.dtype == np.float32 else np.float64
        weight = _project(valid.astype(working), own, wanted, resampling)
        total = _project(np.where(valid, numbers, 0).astype(working), own, wanted, resampling)
        target_valid = weight >= MIN_WEIGHT[resampling]
        mean = np.divide(total, weight, out=np.zeros_like(total), where=target_valid)
        target = round_half_up(mean, numbers.dtype)
    target[:, ~target_valid] = fill[:, None]
    return target, target_valid


def _project(array: Array, own: PixelGrid, wanted: PixelGrid, resampling: str) -> Array:
    target = np.zeros((*array.shape[:-2], *wanted.shape_hw), dtype=array.dtype)
    # GDAL would estimate the scale from the sizes of both windows, and neighbours would get other kernels.
    scale = own.gsd_m / wanted.gsd_m
    warp.reproject(
        array,
        target,
        src_transform=own.transform,
        src_crs=own.crs,
        dst_transform=wanted.transform,
        dst_crs=wanted.crs,
        resampling=RESAMPLINGS[resampling],
        # Approximating costs up to 1/8 pixel by default, which would move labels against images.
        tolerance=0.0 if own.crs == wanted.crs else 0.01,
        XSCALE=f"{scale:.6g}",
        YSCALE=f"{scale:.6g}",
    )
    return target


def _covering_window(own: PixelGrid, wanted: PixelGrid) -> tuple[Window | None, bool]:
    """The window of `own`, clipped to it, that holds all of `wanted` and a margin; None if they are apart.

    Also whether nothing had to be clipped.
    """
    bounds = wanted.bounds
    if own.crs != wanted.crs:
        try:
            bounds = transformer(wanted.crs, own.crs).transform_bounds(*bounds, densify_pts=_EDGE_POINTS)
        except ProjError as error:
            raise GeoreferenceError(f"no transformation from {wanted.crs} to {own.crs}: {error}") from error
    if not all(math.isfinite(bound) for bound in bounds):
        return None, False
    inverse = ~own.transform
    cols, rows = zip(*(inverse @ (x, y) for x in bounds[::2] for y in bounds[1::2]), strict=True)
    col0, col1 = math.floor(min(cols)) - _MARGIN, math.ceil(max(cols)) + _MARGIN
    row0, row1 = math.floor(min(rows)) - _MARGIN, math.ceil(max(rows)) + _MARGIN
    inside = col0 >= 0 and row0 >= 0 and col1 <= own.width and row1 <= own.height
    col0, col1, row0, row1 = max(col0, 0), min(col1, own.width), max(row0, 0), min(row1, own.height)
    if col1 <= col0 or row1 <= row0:
        return None, False
    return Window(col0, row0, col1 - col0, row1 - row0), inside


def _halves(grid: PixelGrid, axis: int) -> tuple[PixelGrid, PixelGrid]:
    """Splits a grid along its rows (axis 0) or columns (axis 1)."""
    height, width = grid.shape_hw
    if axis == 0:
        cut = height // 2
        return grid.window_grid(Window(0, 0, width, cut)), grid.window_grid(
            Window(0, cut, width, height - cut)
        )
    cut = width // 2
    return grid.window_grid(Window(0, 0, cut, height)), grid.window_grid(Window(cut, 0, width - cut, height))
