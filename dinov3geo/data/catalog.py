"""Finds the scenes under a query, and keeps a few of them open."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, cast

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.env import get_gdal_config, set_gdal_config
from rasterio.windows import Window

from dinov3geo.errors import DataError
from dinov3geo.rasters.crs import to_pyproj, to_rasterio, transformer
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneInfo, SceneReader

# Cylindrical equal-area: one metric plane for scenes of several CRS, in which areas stay comparable.
EQUAL_AREA = CRS.from_epsg(6933)
RESOLUTION_TOLERANCE = 0.01
# Opening costs a millisecond, an open file a descriptor (of 1024 that a process usually has) and memory.
MAX_OPEN_SCENES = 256
MAX_OPEN_BYTES = 128 * 2**20
# Decoded blocks are kept by `rasters.blocks`; in processes that only read, GDAL need not keep them again.
_GDAL_CACHE_BYTES = 64 * 2**20
# Along a meridian, for a nominal pixel size only.
_METRES_PER_DEGREE = 111_320.0


class ReaderPool:
    """Open readers of the files used last, within limits that all pools of a process share.

    The limits are `MAX_OPEN_SCENES` and `MAX_OPEN_BYTES`. A forked or pickled copy starts empty: GDAL's
    handles cannot travel. Not for use by several threads.
    """

    _pools: ClassVar[weakref.WeakSet[ReaderPool]] = weakref.WeakSet()
    _clock: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, open_reader: Callable[[Path], SceneReader]) -> None:
        """Keeps readers that `open_reader` makes; it must be picklable."""
        self._open_reader = open_reader
        # With the time of their last use, the one used longest ago first.
        self._readers: OrderedDict[Path, tuple[int, SceneReader]] = OrderedDict()
        self._enter_process()
        self._pools.add(self)

    def get(self, path: Path) -> SceneReader:
        """The open reader of a file."""
        if self._process != os.getpid():
            self._readers = OrderedDict()
            self._enter_process()
        if path in self._readers:
            _, reader = self._readers.pop(path)
        else:
            reader = self._open_reader(path)
            while self._too_many(reader.open_bytes):
                self._close_oldest()
        self._readers[path] = next(self._clock), reader
        return reader

    def _enter_process(self) -> None:
        """Belongs to this process from now on."""
        self._process = os.getpid()
        if multiprocessing.parent_process() is not None:
            set_gdal_config("GDAL_CACHEMAX", min(get_gdal_config("GDAL_CACHEMAX"), _GDAL_CACHE_BYTES))

    def _too_many(self, more_bytes: int) -> bool:
        """Whether one more reader of this size would pass a limit that closing others can keep."""
        # Pools that a forked process has not used yet hold handles of its parent.
        readers = [
            r for pool in self._pools if pool._process == os.getpid() for _, r in pool._readers.values()
        ]
        used = sum(reader.open_bytes for reader in readers)
        return bool(readers) and (len(readers) >= MAX_OPEN_SCENES or used + more_bytes > MAX_OPEN_BYTES)

    def _close_oldest(self) -> None:
        """Closes the reader that was used longest ago by any pool."""
        used = [p._readers for p in self._pools if p._readers and p._process == os.getpid()]
        oldest = min(used, key=lambda readers: next(iter(readers.values()))[0])
        oldest.popitem(last=False)[1][1].close()

    def __reduce__(self) -> tuple[type[ReaderPool], tuple[Callable[[Path], SceneReader]]]:
        """A new pool that opens files in the same way."""
        return ReaderPool, (self._open_reader,)


class SceneCatalog:
    """A torchgeo index as arrays: a lookup costs some microseconds at any number of files.

    Attributes:
        index: the frame that the arrays were made from.
        crs: of the index.
        paths: the file of each row.
        bounds: (start, stop) of all rows together along x, y and time.
        share_lattice: per row whether the file's rows run southwards in the CRS of the index, with pixels of
            the first file's size: then its windows need no transformation.
    """

    def __init__(self, index: gpd.GeoDataFrame, infos: Mapping[Path, SceneInfo]) -> None:
        """Copies geometry, time and paths out of the frame.

        Args:
            index: of a torchgeo data set.
            infos: of the files in it.
        """
        self.index = index
        self.crs = to_rasterio(index.crs)
        self.paths = [Path(path) for path in index["filepath"]]
        self.geometries: NDArray[np.object_] = np.asarray(index.geometry.values, dtype=object)
        self._tree = shapely.STRtree(self.geometries)
        self._start_ns: NDArray[np.int64] = index.index.left.as_unit("ns").asi8
        self._stop_ns: NDArray[np.int64] = index.index.right.as_unit("ns").asi8
        xmin, ymin, xmax, ymax = (float(value) for value in index.total_bounds)
        self.bounds = ((xmin, xmax), (ymin, ymax), (index.index.left.min(), index.index.right.max()))
        grids = [infos[path].grid for path in self.paths]
        self._corners = [(t.c, t.f, t.a, t.e) for t in (grid.transform for grid in grids)]
        # Equality of reference systems is slow to tell, and there are few of them.
        own = {identity: crs == self.crs for identity, crs in {id(g.crs): g.crs for g in grids}.items()}
        _, _, width, height = self._corners[0]
        size = width, abs(height)
        self.share_lattice = [
            own[id(grid.crs)] and e < 0 and same_resolution((a, -e), size)
            for grid, (_, _, a, e) in zip(grids, self._corners, strict=True)
        ]
        # Chips that follow each other often lie in one scene: what is known of the last one spares a search.
        self._lone: tuple[int, tuple[float, ...]] | None = None
        self._lone_rows: dict[int, bool] = {}

    def find(self, bounds: tuple[float, float, float, float], start: Any, stop: Any) -> list[int]:  # noqa: ANN401
        """Rows whose area overlaps and whose time interval meets the query, in the order of the index.

        Args:
            bounds: (xmin, ymin, xmax, ymax) in the CRS of the index; files that only touch them do not count.
            start: first moment (anything pandas takes as one), or None.
            stop: last moment, or None.
        """
        xmin, ymin, xmax, ymax = bounds
        if self._lone is not None:
            row, (left, bottom, right, top) = self._lone
            if left <= xmin and bottom <= ymin and xmax <= right and ymax <= top and start is stop is None:
                return [row]
        inset_x, inset_y = 1e-6 * (xmax - xmin), 1e-6 * (ymax - ymin)
        box = shapely.box(xmin + inset_x, ymin + inset_y, xmax - inset_x, ymax - inset_y)
        rows = self._tree.query(box, predicate="intersects")
        if len(rows) > 1:
            rows.sort()
        if start is not None:
            rows = rows[self._stop_ns[rows] >= _nanoseconds(start)]
        if stop is not None:
            rows = rows[self._start_ns[rows] <= _nanoseconds(stop)]
        found = cast(list[int], rows.tolist())
        if len(found) == 1 and self._is_lone(found[0]):
            self._lone = found[0], tuple(self.geometries[found[0]].bounds)
        return found

    def _is_lone(self, row: int) -> bool:
        """Whether a scene is a rectangle in the plane of the index that no other scene meets."""
        if row not in self._lone_rows:
            geometry = self.geometries[row]
            rectangle = shapely.box(*geometry.bounds).equals(geometry)
            self._lone_rows[row] = rectangle and len(self._tree.query(geometry, predicate="intersects")) == 1
        return self._lone_rows[row]

    def window(self, row: int, x: float, y: float) -> tuple[int, int, Affine]:
        """First row and column of a file's window whose upper left corner is nearest to a point.

        Args:
            row: of the index, one with `share_lattice`.
            x: of the point, in the CRS of the index.
            y: of the point.

        Returns:
            Row and column in the file, and the window's transform.
        """
        left, top, a, e = self._corners[row]
        col, line = round((x - left) / a), round((y - top) / e)
        return line, col, Affine(a, 0.0, left + col * a, 0.0, e, top + line * e)

    def nearest(self, rows: Sequence[int], x: float, y: float) -> int:
        """Of these rows the first whose footprint is nearest to a point."""
        distances = shapely.distance(self.geometries[list(rows)], shapely.Point(x, y))
        return rows[int(np.argmin(distances))]


def own_grid(
    catalog: SceneCatalog, infos: Mapping[Path, SceneInfo], rows: list[int], wanted: PixelGrid
) -> tuple[int, PixelGrid]:
    """The row whose file leads, and the window of as many pixels in that file's own grid."""
    (xmin, ymin, xmax, ymax), size = wanted.bounds, wanted.shape_hw
    center = ((xmin + xmax) / 2, (ymin + ymax) / 2)
    all_native = all(same_lattice(infos[catalog.paths[row]].grid, wanted) for row in rows)
    first = rows[0] if all_native else catalog.nearest(rows, *center)
    own = infos[catalog.paths[first]].grid.southward()
    if same_lattice(own, wanted):
        col, row = ~own.transform @ (xmin, ymax)
    else:
        col, row = ~own.transform @ transformer(wanted.crs, own.crs).transform(*center)
        row, col = (
            move_inside(row - size[0] / 2, size[0], own.height),
            move_inside(col - size[1] / 2, size[1], own.width),
        )
    return first, own.window_grid(Window(round(col), round(row), size[1], size[0]))


def pixels_of(x: slice, y: slice) -> tuple[int, int]:
    """Rows and columns of a query whose steps are pixels.

    Raises:
        IndexError: it holds less than half a pixel.
    """
    height, width = round((y.stop - y.start) / y.step), round((x.stop - x.start) / x.step)
    if not (height > 0 and width > 0):
        raise IndexError(
            f"the query {x.start} to {x.stop}, {y.start} to {y.stop} holds no pixel of {x.step:g} x "
            f"{y.step:g}; ask for a wider one, or give smaller pixels (res)"
        )
    return height, width


def filled_slice(part: slice, whole: tuple[Any, Any], step: float) -> slice:
    """A slice with what it leaves out."""
    return slice(
        whole[0] if part.start is None else part.start,
        whole[1] if part.stop is None else part.stop,
        step if part.step is None else part.step,
    )


def build_index(
    infos: Sequence[SceneInfo], dates: Sequence[tuple[datetime, datetime]], crs: CRS
) -> gpd.GeoDataFrame:
    """A torchgeo index (columns filepath and geometry, IntervalIndex datetime) of scenes in any CRS."""
    intervals = pd.IntervalIndex.from_tuples(list(dates), closed="both", name="datetime")
    paths = [str(info.path) for info in infos]
    return gpd.GeoDataFrame(
        {"filepath": paths},
        index=intervals,
        geometry=footprints([i.grid for i in infos], crs),
        crs=to_pyproj(crs),
    )


def footprints(grids: Sequence[PixelGrid], crs: CRS) -> list[Any]:
    """The polygon of each grid in one CRS."""
    target = to_pyproj(crs)
    geometries: list[Any] = [None] * len(grids)
    by_crs: dict[int, list[int]] = {}
    for row, grid in enumerate(grids):
        by_crs.setdefault(id(grid.crs), []).append(row)
    for rows in by_crs.values():
        own = grids[rows[0]].crs
        boxes = gpd.GeoSeries([shapely.box(*grids[row].bounds) for row in rows], crs=to_pyproj(own))
        if own != crs:
            # Straight edges bend under reprojection: follow them at eight points a side.
            longest = max(max(b[2] - b[0], b[3] - b[1]) for b in (grids[row].bounds for row in rows))
            boxes = boxes.segmentize(longest / 8).to_crs(target)
        for row, geometry in zip(rows, boxes, strict=True):
            geometries[row] = geometry
    return geometries


def common_resolution(infos: Sequence[SceneInfo], crs: CRS, allow_mixed: bool) -> tuple[float, float]:
    """The first scene's pixel width and height in units of `crs`.

    Raises:
        DataError: pixel sizes differ by more than 1 % and that is not allowed.
    """
    same = {identity: own == crs for identity, own in {id(i.grid.crs): i.grid.crs for i in infos}.items()}
    sizes = [info.grid.resolution_xy if same[id(info.grid.crs)] else _size(info, crs) for info in infos]
    if not allow_mixed:
        for info, size in zip(infos, sizes, strict=True):
            if not same_resolution(size, sizes[0]):
                raise DataError(
                    f"pixel sizes differ: {infos[0].path} has {_pretty(sizes[0])}, {info.path} has "
                    f"{_pretty(size)}; resample one, choose a resolution with res=..., or read each scene in "
                    "its own pixels with allow_mixed_resolution=True (in a configuration mixed_resolution: "
                    "true of its entry in data.sources)"
                )
    return sizes[0]


def shared_crs(infos: Sequence[SceneInfo]) -> CRS:
    """The CRS that all scenes have, or the equal-area plane."""
    first = infos[0].grid.crs
    others = {id(info.grid.crs): info.grid.crs for info in infos}.values()
    return first if all(crs == first for crs in others) else EQUAL_AREA


def same_lattice(own: PixelGrid, wanted: PixelGrid) -> bool:
    """Whether both grids have one CRS and one pixel size, so that a shift brings one onto the other."""
    if own.crs != wanted.crs:
        return False
    return same_resolution(own.resolution_xy, wanted.resolution_xy)


def same_resolution(
    one: tuple[float, float], other: tuple[float, float], tolerance: float = RESOLUTION_TOLERANCE
) -> bool:
    """Whether pixel widths and heights agree to a relative tolerance."""
    return abs(one[0] / other[0] - 1.0) <= tolerance and abs(one[1] / other[1] - 1.0) <= tolerance


def move_inside(start: float, size: int, length: int) -> float:
    """Moves an interval of `size` inside [0, length], or so that it holds all of that if it is longer."""
    low, high = sorted((0, length - size))
    return min(max(start, low), high)


def _size(info: SceneInfo, crs: CRS) -> tuple[float, float]:
    """Pixel width and height in units of `crs`, which is another than the scene's."""
    width, height = info.grid.resolution_xy
    unit_m = _METRES_PER_DEGREE if crs.is_geographic else crs.linear_units_factor[1]
    factor = info.grid.gsd_m / (width * height) ** 0.5 / unit_m
    return width * factor, height * factor


def _pretty(size: tuple[float, float]) -> str:
    return f"{size[0]:g} x {size[1]:g}"


@functools.lru_cache(maxsize=1024)
def seconds(moment: Any) -> float:  # noqa: ANN401
    """A moment as seconds since 1970."""
    return float(pd.Timestamp(moment).timestamp())


@functools.lru_cache(maxsize=1024)
def _nanoseconds(moment: Any) -> int:  # noqa: ANN401
    return int(pd.Timestamp(moment).as_unit("ns").value)
