"""Images and rasters of what is to be predicted, matched by where they lie on the ground."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio import warp
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.windows import Window

from dinov3geo.data.catalog import EQUAL_AREA, footprints
from dinov3geo.errors import DataError, GeoreferenceError
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneInfo, SceneReader, find_rasters, inspect_scene, read_on_grid

Spec = str | Path | Sequence[str | Path]
Bounds = tuple[float, float, float, float]

LOWEST_M = -1.0
HIGHEST_M = 120.0
# More impossible heights than this share are an error in the file, not noise of the sensor.
MAX_IMPOSSIBLE_SHARE = 0.01
# Offsets that differ from whole pixels by less are rounding errors.
_TOLERANCE_PX = 1e-2


class Placed(Protocol):
    """Something on the ground: a raster, or what was computed from one."""

    @property
    def path(self) -> Path:
        """File or folder."""

    @property
    def grid(self) -> PixelGrid:
        """Of the image's pixels."""


@dataclass(frozen=True, slots=True)
class RasterPair:
    """A window of an image and the grid on which heights or classes are wanted.

    Attributes:
        image: raster file, or a store of its features.
        target: raster file with canopy heights in metres, or with classes.
        window: of the image, in whole pixels; a multiple of `factor` each way.
        factor: k, image pixels per cell of `grid`.
        grid: the window's grid, k times coarser.
        group: pairs whose images overlap on the ground share a group; split by it.
    """

    image: Path
    target: Path
    window: Window
    factor: int
    grid: PixelGrid
    group: str


@dataclass(frozen=True, slots=True)
class PairArrays:
    """What a pair holds.

    Attributes:
        image: [C, H, W] in the file's dtype.
        valid: [H, W] bool.
        target: [H / k, W / k] float32 metres or uint8 classes, 0 where not valid.
        target_valid: [H / k, W / k] bool.
    """

    image: NDArray[Any]
    valid: NDArray[np.bool_]
    target: NDArray[Any]
    target_valid: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PairMatch:
    """Result of matching two sets of rasters.

    Attributes:
        pairs: sorted by image, target and window.
        unmatched_images: without a target.
        unmatched_targets: without an image.
    """

    pairs: tuple[RasterPair, ...]
    unmatched_images: tuple[Path, ...]
    unmatched_targets: tuple[Path, ...]


def find_pairs(images: Spec, heights: Spec, *, max_size: int = 512) -> list[RasterPair]:
    """The pairs of `match_pairs`, for who does not ask what was left over."""
    return list(match_pairs(images, heights, max_size=max_size).pairs)


def match_pairs(
    images: Spec, heights: Spec, *, max_size: int = 512, what: str = "height raster"
) -> PairMatch:
    """Matches images and height (or class) rasters by their georeference, never by name or order.

    Each overlap of an image with a height raster becomes one pair, or several where it is larger than
    `max_size`. Both may have their own CRS and pixel size; where they share a lattice (1 m heights under
    0.1 m pixels, say) windows begin at the corner of a height cell, so no height is resampled. An image with
    a partner of exactly its own extent takes that one only: neighbours that overlap may be of another day.

    Args:
        images: folder, glob, file or list of them.
        heights: likewise, canopy height in metres, or classes.
        max_size: largest side of a pair's window in image pixels.
        what: name of one of the second kind, for messages.

    Returns:
        Pairs and what found no partner.

    Raises:
        RasterError, DataError: a file cannot be read, or there are none.
        GeoreferenceError: a file has no usable georeference, or none of the second kind overlaps any image.
    """
    return match_placed([inspect_scene(path) for path in find_rasters(images)], heights, max_size, what)


def match_placed(images: Sequence[Placed], heights: Spec, max_size: int, what: str) -> PairMatch:
    """`match_pairs` with images that are known by their grids; arguments and errors as there."""
    height_infos = [inspect_scene(path) for path in find_rasters(heights)]
    groups = overlap_groups(images)
    pairs: list[RasterPair] = []
    matched_images: set[int] = set()
    unmatched_targets = []
    for info, found in zip(height_infos, _partners(images, height_infos), strict=True):
        own = {i: _pair_windows(images[i], info, groups[i], max_size) for i in found}
        matched_images.update(i for i, windows in own.items() if windows)
        pairs.extend(pair for windows in own.values() for pair in windows)
        if not any(own.values()):
            unmatched_targets.append(info.path)
    if not pairs:
        raise GeoreferenceError(_no_overlap_message(images, height_infos, what))
    pairs.sort(key=lambda p: (str(p.image), str(p.target), p.window.row_off, p.window.col_off))
    unmatched_images = tuple(x.path for i, x in enumerate(images) if i not in matched_images)
    return PairMatch(tuple(pairs), unmatched_images, tuple(unmatched_targets))


def load_pair(pair: RasterPair, *, bands: Sequence[int] | None = None) -> PairArrays:
    """Reads a pair; heights as `load_heights` says.

    Args:
        pair: from `find_pairs`.
        bands: 1-based image bands; None for all but alpha.

    Returns:
        Image and heights with their masks.

    Raises:
        RasterError, DataError: as `load_heights`, or the image is gone or damaged.
    """
    with SceneReader(pair.image, bands=bands) as reader:
        image, valid = reader.read(pair.window)
    return PairArrays(image, valid, *load_heights(pair))


def load_heights(pair: RasterPair) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Heights of a pair in metres, 0 where not valid, and which are valid, both [H / k, W / k].

    Heights between -1 and 0 m are the LiDAR's noise and become 0; below -1 and above 120 m a few cells
    (1 %) are left out as outliers, more are an error.

    Raises:
        RasterError: the file is gone or damaged.
        DataError: more than one band of heights, undeclared NaN, or numbers that are no heights in metres.
    """
    metres, known = _load_numbers(pair)
    possible = known & (metres >= LOWEST_M) & (metres <= HIGHEST_M)
    impossible = int(known.sum() - possible.sum())
    if impossible > MAX_IMPOSSIBLE_SHARE * max(int(known.sum()), 1):
        strange = metres[known & ~possible]
        raise DataError(
            f"{pair.target} holds {impossible} of {int(known.sum())} cells outside {LOWEST_M:g} to "
            f"{HIGHEST_M:g} m (from {strange.min():g} to {strange.max():g}); expected canopy height "
            "in metres above ground: declare nodata, convert the unit, or subtract the terrain"
        )
    return np.where(possible, metres.clip(min=0), 0).astype(np.float32), possible


def load_number_pair(pair: RasterPair, *, bands: Sequence[int] | None = None) -> PairArrays:
    """Reads a pair whose target is any quantity, in its own unit and as float32.

    Args:
        pair: from `find_pairs`.
        bands: 1-based image bands; None for all but alpha.

    Raises:
        RasterError: a file is gone or damaged.
        DataError: more than one band of the quantity, or undeclared NaN.
    """
    with SceneReader(pair.image, bands=bands) as reader:
        image, valid = reader.read(pair.window)
    return PairArrays(image, valid, *_load_numbers(pair))


def _load_numbers(pair: RasterPair) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The quantity of a pair and where it is known, both [H / k, W / k]."""
    with SceneReader(pair.target) as reader:
        if len(reader.bands) != 1:
            raise DataError(f"{pair.target} has {len(reader.bands)} bands, expected one band of heights")
        numbers, known = read_on_grid(reader, pair.grid, resampling=_resampling(reader.info.grid, pair.grid))
    return numbers[0].astype(np.float32), known


def _partners(images: Sequence[Placed], heights: list[SceneInfo]) -> list[list[int]]:
    """For each height raster the indexes of the images that it is paired with."""
    found = _overlaps(images, heights)
    exact = [
        [i for i in indexes if _same_extent(images[i].grid, info.grid)]
        for info, indexes in zip(heights, found, strict=True)
    ]
    settled = {i for indexes in exact for i in indexes}
    return [
        [i for i in indexes if i in own or i not in settled]
        for indexes, own in zip(found, exact, strict=True)
    ]


def _same_extent(one: PixelGrid, other: PixelGrid) -> bool:
    if one.crs != other.crs:
        return False
    sides = zip(one.bounds, other.bounds, strict=True)
    return max(abs(a - b) for a, b in sides) < 0.5 * min(*one.resolution_xy, *other.resolution_xy)


def _overlaps(images: Sequence[Placed], heights: list[SceneInfo]) -> list[list[int]]:
    """For each height raster the indexes of the images whose extents it meets, each in its own CRS."""
    by_crs: dict[CRS, list[int]] = {}
    for index, info in enumerate(images):
        by_crs.setdefault(info.grid.crs, []).append(index)
    found: list[list[int]] = [[] for _ in heights]
    for crs, members in by_crs.items():
        tree = shapely.STRtree([shapely.box(*images[i].grid.bounds) for i in members])
        for number, info in enumerate(heights):
            bounds = _bounds_in(info.grid, crs)
            if bounds is not None:
                hits = tree.query(shapely.box(*bounds), predicate="intersects")
                found[number].extend(members[int(hit)] for hit in hits)
    return [sorted(hits) for hits in found]


def _bounds_in(grid: PixelGrid, crs: CRS) -> Bounds | None:
    """Extent of a grid in another CRS, or None where the projection does not reach."""
    if grid.crs == crs:
        return grid.bounds
    try:
        left, bottom, right, top = warp.transform_bounds(grid.crs, crs, *grid.bounds, densify_pts=21)
    except (CRSError, RasterioError):
        # Another UTM zone at the far side of the globe: not here, then.
        return None
    return (left, bottom, right, top) if all(map(math.isfinite, (left, bottom, right, top))) else None


def overlap_groups(images: Sequence[Placed]) -> list[str]:
    """A name per image, shared by images that overlap, in whatever CRS, directly or through others."""
    roots = list(range(len(images)))

    def root(index: int) -> int:
        while roots[index] != index:
            index = roots[index]
        return index

    for one, other in _overlapping_images(images):
        roots[max(root(one), root(other))] = min(root(one), root(other))
    return [str(images[root(index)].path) for index in range(len(images))]


def _overlapping_images(images: Sequence[Placed]) -> Iterator[tuple[int, int]]:
    """Pairs of images with common ground, exactly in a common CRS, else in an equal-area plane."""
    by_crs: dict[CRS, list[int]] = {}
    for index, info in enumerate(images):
        by_crs.setdefault(info.grid.crs, []).append(index)
    for members in by_crs.values():
        for one, other in _overlapping([shapely.box(*images[i].grid.bounds) for i in members]):
            yield members[one], members[other]
    if len(by_crs) > 1:
        # Neighbours that only touch may overlap a little here; within one CRS that has been settled.
        for one, other in _overlapping(footprints([info.grid for info in images], EQUAL_AREA)):
            if images[one].grid.crs != images[other].grid.crs:
                yield one, other


def _overlapping(shapes: list[Any]) -> Iterator[tuple[int, int]]:
    """Pairs of shapes, the lower index first, that share an area and not only an edge."""
    tree = shapely.STRtree(shapes)
    for index, shape in enumerate(shapes):
        for other in tree.query(shape, predicate="intersects").tolist():
            if other > index and shape.intersection(shapes[other]).area > 0:
                yield index, other


def _pair_windows(image: Placed, heights: SceneInfo, group: str, max_size: int) -> list[RasterPair]:
    """Pairs of one image with one height raster; none if they share less than one cell."""
    grid = image.grid
    factor = max(1, round(heights.grid.gsd_m / grid.gsd_m))
    if max_size < factor:
        raise DataError(
            f"{heights.path} has cells of {heights.grid.gsd_m:g} m, {factor} pixels of {image.path}, "
            f"which is more than a window of {max_size} pixels"
        )
    bounds = _bounds_in(heights.grid, grid.crs)
    if bounds is None:
        return []
    inverse = ~grid.transform
    cols, rows = zip(*(inverse @ (x, y) for x in bounds[::2] for y in bounds[1::2]), strict=True)
    corner_xy = heights.grid.transform @ (0, 0)
    shared = _shares_lattice(grid, heights.grid, factor)
    origin_col, origin_row = inverse @ corner_xy if shared else (0.0, 0.0)
    col_chips = _chips(min(cols), max(cols), grid.width, factor, max_size, phase=origin_col)
    row_chips = _chips(min(rows), max(rows), grid.height, factor, max_size, phase=origin_row)
    windows = [Window(col, row, width, height) for row, height in row_chips for col, width in col_chips]
    return [
        RasterPair(image.path, heights.path, w, factor, grid.window_grid(w).coarsen(factor), group)
        for w in windows
    ]


def _shares_lattice(image: PixelGrid, heights: PixelGrid, factor: int) -> bool:
    """Whether height cells are exactly `factor` pixels wide and high and begin at pixel corners."""
    if image.crs != heights.crs:
        return False
    relative = ~image.transform @ heights.transform
    length = max(heights.width, heights.height)
    sizes = max(abs(abs(relative.a) - factor), abs(abs(relative.e) - factor)) * length
    offsets = max(abs(relative.c - round(relative.c)), abs(relative.f - round(relative.f)))
    return bool(max(sizes, offsets) < _TOLERANCE_PX)


def _chips(
    low: float, high: float, length: int, factor: int, max_size: int, *, phase: float
) -> list[tuple[int, int]]:
    """Cuts the overlap along one axis into near-equal (start, size), whole cells that begin at the phase."""
    shift = round(phase) % factor
    first = math.ceil((max(low, 0) - shift - _TOLERANCE_PX) / factor)
    last = math.floor((min(high, length) - shift + _TOLERANCE_PX) / factor)
    if last <= first:
        return []
    cells = last - first
    count = -(-cells // (max_size // factor))
    edges = [first + round(i * cells / count) for i in range(count + 1)]
    return [
        (shift + start * factor, (stop - start) * factor)
        for start, stop in zip(edges[:-1], edges[1:], strict=True)
    ]


def _resampling(heights: PixelGrid, wanted: PixelGrid) -> str:
    """Average where heights are finer than wanted, else bilinear; neither is used where grids coincide."""
    return "average" if heights.gsd_m < 0.75 * wanted.gsd_m else "bilinear"


def _no_overlap_message(images: Sequence[Placed], heights: list[SceneInfo], what: str) -> str:
    height = heights[0]
    # An image in the same CRS makes extents that can be compared by eye.
    image = next((i for i in images if i.grid.crs == height.grid.crs), images[0])
    return (
        f"none of {len(heights)} {what}s overlaps one of {len(images)} images: {height.path} covers "
        f"{_extent(height.grid)}, {image.path} covers {_extent(image.grid)}; "
        f"expected images and {what}s of the same places"
    )


def _extent(grid: PixelGrid) -> str:
    left, bottom, right, top = grid.bounds
    digits = 6 if grid.crs.is_geographic else 1
    numbers = f"x {left:.{digits}f} to {right:.{digits}f}, y {bottom:.{digits}f} to {top:.{digits}f}"
    return f"{numbers} ({grid.crs.to_string()[:40]})"
