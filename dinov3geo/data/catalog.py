"""Finds the scenes under a query, and keeps a few of them open."""

from __future__ import annotations

import functools
import itertools
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS

from dinov3geo.errors import DataError
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneInfo, SceneReader

# Cylindrical equal-area: one metric plane for scenes of several CRS, in which areas stay comparable.
EQUAL_AREA = CRS.from_epsg(6933)
RESOLUTION_TOLERANCE = 0.01
# Opening costs a millisecond, an open file a descriptor (of 1024 that a process usually has).
MAX_OPEN_SCENES = 256
# Along a meridian, for a nominal pixel size only.
_METRES_PER_DEGREE = 111_320.0


class ReaderPool:
    """Open readers of the files used last; all pools of a process share one limit, `MAX_OPEN_SCENES`.

    A forked or pickled copy starts empty: GDAL's handles cannot travel. Not for use by several threads.
    """

    _pools: ClassVar[weakref.WeakSet[ReaderPool]] = weakref.WeakSet()
    _clock: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, open_reader: Callable[[Path], SceneReader]) -> None:
        """Keeps readers that `open_reader` makes; it must be picklable."""
        self._open_reader = open_reader
        # With the time of their last use, the one used longest ago first.
        self._readers: OrderedDict[Path, tuple[int, SceneReader]] = OrderedDict()
        self._process = os.getpid()
        self._pools.add(self)

    def get(self, path: Path) -> SceneReader:
        """The open reader of a file."""
        if self._process != os.getpid():
            self._readers = OrderedDict()
            self._process = os.getpid()
        if path in self._readers:
            _, reader = self._readers.pop(path)
        else:
            reader = self._open_reader(path)
            while sum(len(pool._readers) for pool in self._pools) >= MAX_OPEN_SCENES:
                self._close_oldest()
        self._readers[path] = next(self._clock), reader
        return reader

    def _close_oldest(self) -> None:
        """Closes the reader that was used longest ago by any pool."""
        used = [pool._readers for pool in self._pools if pool._readers]
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
    """

    def __init__(self, index: gpd.GeoDataFrame) -> None:
        """Copies geometry, time and paths out of the frame."""
        self.index = index
        self.crs = to_rasterio(index.crs)
        self.paths = [Path(path) for path in index["filepath"]]
        self.geometries: NDArray[np.object_] = np.asarray(index.geometry.values, dtype=object)
        self._tree = shapely.STRtree(self.geometries)
        self._start_ns: NDArray[np.int64] = index.index.left.as_unit("ns").asi8
        self._stop_ns: NDArray[np.int64] = index.index.right.as_unit("ns").asi8
        xmin, ymin, xmax, ymax = (float(value) for value in index.total_bounds)
        self.bounds = ((xmin, xmax), (ymin, ymax), (index.index.left.min(), index.index.right.max()))

    def find(self, bounds: tuple[float, float, float, float], start: Any, stop: Any) -> list[int]:  # noqa: ANN401
        """Rows whose area overlaps and whose time interval meets the query, in the order of the index.

        Args:
            bounds: (xmin, ymin, xmax, ymax) in the CRS of the index; files that only touch them do not count.
            start: first moment (anything pandas takes as one), or None.
            stop: last moment, or None.
        """
        xmin, ymin, xmax, ymax = bounds
        inset_x, inset_y = 1e-6 * (xmax - xmin), 1e-6 * (ymax - ymin)
        box = shapely.box(xmin + inset_x, ymin + inset_y, xmax - inset_x, ymax - inset_y)
        rows = np.sort(self._tree.query(box, predicate="intersects"))
        if start is not None:
            rows = rows[self._stop_ns[rows] >= _nanoseconds(start)]
        if stop is not None:
            rows = rows[self._start_ns[rows] <= _nanoseconds(stop)]
        return [int(row) for row in rows]

    def nearest(self, rows: Sequence[int], x: float, y: float) -> int:
        """Of these rows the first whose footprint is nearest to a point."""
        distances = shapely.distance(self.geometries[list(rows)], shapely.Point(x, y))
        return rows[int(np.argmin(distances))]


def build_index(
    infos: Sequence[SceneInfo], dates: Sequence[tuple[datetime, datetime]], crs: CRS
) -> gpd.GeoDataFrame:
    """A torchgeo index (columns filepath and geometry, IntervalIndex datetime) of scenes in any CRS."""
    intervals = pd.IntervalIndex.from_tuples(list(dates), closed="both", name="datetime")
    paths = [str(info.path) for info in infos]
    return gpd.GeoDataFrame(
        {"filepath": paths}, index=intervals, geometry=footprints(infos, crs), crs=to_pyproj(crs)
    )


def footprints(infos: Sequence[SceneInfo], crs: CRS) -> list[Any]:
    """The polygon of each scene in one CRS."""
    target = to_pyproj(crs)
    geometries: list[Any] = [None] * len(infos)
    by_crs: dict[CRS, list[int]] = {}
    for row, info in enumerate(infos):
        by_crs.setdefault(info.grid.crs, []).append(row)
    for own, rows in by_crs.items():
        boxes = gpd.GeoSeries([shapely.box(*infos[row].grid.bounds) for row in rows], crs=to_pyproj(own))
        if own != crs:
            # Straight edges bend under reprojection: follow them at eight points a side.
            longest = max(max(b[2] - b[0], b[3] - b[1]) for b in (infos[row].grid.bounds for row in rows))
            boxes = boxes.segmentize(longest / 8).to_crs(target)
        for row, geometry in zip(rows, boxes, strict=True):
            geometries[row] = geometry
    return geometries


def common_resolution(infos: Sequence[SceneInfo], crs: CRS, allow_mixed: bool) -> tuple[float, float]:
    """The first scene's pixel width and height in units of `crs`.

    Raises:
        DataError: pixel sizes differ by more than 1 % and that is not allowed.
    """
    sizes = [_size(info, crs) for info in infos]
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


def same_lattice(own: PixelGrid, wanted: PixelGrid) -> bool:
    """Whether both grids have one CRS and one pixel size, so that a shift brings one onto the other."""
    if own.crs != wanted.crs:
        return False
    return same_resolution(own.resolution_xy, wanted.resolution_xy)


def same_resolution(
    one: tuple[float, float], other: tuple[float, float], tolerance: float = RESOLUTION_TOLERANCE
) -> bool:
    """Whether pixel widths and heights agree to a relative tolerance."""
    return all(abs(a / b - 1.0) <= tolerance for a, b in zip(one, other, strict=True))


def move_inside(start: float, size: int, length: int) -> float:
    """Moves an interval of `size` inside [0, length], or so that it holds all of that if it is longer."""
    low, high = sorted((0, length - size))
    return min(max(start, low), high)


@functools.lru_cache(maxsize=256)
def transformer(source: CRS, target: CRS) -> pyproj.Transformer:
    """From (x, y) in one CRS to (x, y) in another."""
    return pyproj.Transformer.from_crs(to_pyproj(source), to_pyproj(target), always_xy=True)


def to_pyproj(crs: CRS) -> pyproj.CRS:
    """A rasterio CRS as torchgeo keeps it."""
    return pyproj.CRS.from_wkt(crs.to_wkt(version="WKT2_2019"))


def to_rasterio(crs: Any) -> CRS:  # noqa: ANN401
    """Any description of a CRS as rasterio keeps it."""
    return CRS.from_wkt(crs.to_wkt()) if isinstance(crs, pyproj.CRS) else CRS.from_user_input(crs)


def _size(info: SceneInfo, crs: CRS) -> tuple[float, float]:
    """Pixel width and height in units of `crs`."""
    width, height = info.grid.resolution_xy
    if info.grid.crs == crs:
        return width, height
    unit_m = _METRES_PER_DEGREE if crs.is_geographic else crs.linear_units_factor[1]
    factor = info.grid.gsd_m / (width * height) ** 0.5 / unit_m
    return width * factor, height * factor


def _pretty(size: tuple[float, float]) -> str:
    return f"{size[0]:g} x {size[1]:g}"


def _nanoseconds(moment: Any) -> int:  # noqa: ANN401
    return int(pd.Timestamp(moment).as_unit("ns").value)
