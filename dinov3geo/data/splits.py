"""Splits of scenes by place: blocks of ground with a buffer, whole files, or polygons."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS

from dinov3geo.data.areas import COLUMN, read_polygons
from dinov3geo.data.catalog import EQUAL_AREA, footprints, shared_crs
from dinov3geo.data.scene_files import find_scenes
from dinov3geo.errors import ConfigError, DataError, RasterError
from dinov3geo.rasters.crs import to_pyproj
from dinov3geo.rasters.reader import SceneInfo

LAYER = "splits"
_INSIDE, _OUTSIDE = "test", "train"
_MAX_BLOCKS = 1_000_000


@dataclass(frozen=True, slots=True)
class Ground:
    """Where scenes lie, in one plane in metres.

    Attributes:
        infos: headers of the scenes.
        shapes: footprint of each.
        crs: of the plane: that of the scenes if they share one in metres, else equal-area.
    """

    infos: tuple[SceneInfo, ...]
    shapes: NDArray[np.object_]
    crs: CRS

    @property
    def union(self) -> Any:  # noqa: ANN401 (a geometry)
        """All ground together."""
        return shapely.union_all(self.shapes)


def find_ground(paths: Sequence[str]) -> Ground:
    """Footprints of scenes.

    Raises:
        UserError: no scenes, or some that cannot be read.
    """
    infos = tuple(record.info for record in find_scenes(list(paths), None, None, None, same_bands=False))
    crs = shared_crs(infos)
    if crs.is_geographic or crs.linear_units_factor[1] != 1:
        crs = EQUAL_AREA
    shapes = np.array(footprints([info.grid for info in infos], crs), dtype=object)
    return Ground(infos, shapes, crs)


def split_blocks(
    ground: Ground, shares: Mapping[str, float], *, block_m: float, buffer_m: float, seed: int
) -> gpd.GeoDataFrame:
    """Squares of ground, dealt out at random so that the covered areas come near the shares.

    Between two splits lies a strip of `buffer_m` that belongs to none: it is taken from the one named first,
    so that test ground named last stays whole.

    Args:
        ground: of the scenes.
        shares: of the covered area by name, the first gives way.
        block_m: side of a square, metres; squares lie on a fixed lattice of the plane.
        buffer_m: width of the strip, metres.
        seed: of the dealing.

    Raises:
        DataError: fewer blocks than splits, or a split that the buffer eats up.
    """
    names = list(shares)
    blocks, corners = _blocks(ground, block_m)
    if len(blocks) < len(names):
        raise DataError(
            f"{len(blocks)} blocks of {block_m:g} m do not suffice for {len(names)} splits; "
            "choose smaller blocks"
        )
    covered = shapely.area(shapely.intersection(blocks, ground.union))
    owner = _deal(covered, np.array([shares[name] for name in names]), np.random.default_rng(seed))
    pieces = blocks.copy()
    for number in range(len(names) - 1):
        later = blocks[owner > number]
        if buffer_m > 0 and len(later):
            wide = shapely.union_all(shapely.buffer(later, buffer_m, join_style="mitre"))
            own = owner == number
            pieces[own] = shapely.difference(blocks[own], wide)
    labels = [f"{i}_{j}" for i, j in corners]
    frame = _frame([names[k] for k in owner], pieces, ground.crs, block=labels)
    return _checked(frame, names)


def split_files(
    ground: Ground, shares: Mapping[str, float], *, buffer_m: float, seed: int
) -> gpd.GeoDataFrame:
    """Whole scenes; those that overlap, or lie nearer than `buffer_m`, stay together.

    Raises:
        DataError: fewer groups of scenes than splits.
    """
    groups = _groups(ground.shapes, buffer_m)
    names = list(shares)
    count = int(groups.max()) + 1
    if count < len(names):
        raise DataError(
            f"{len(groups)} scenes make {count} groups that do not overlap, expected at least {len(names)} "
            "for the splits; use blocks"
        )
    areas = np.bincount(groups, weights=shapely.area(ground.shapes))
    owner = _deal(areas, np.array([shares[name] for name in names]), np.random.default_rng(seed))[groups]
    paths = [str(info.path) for info in ground.infos]
    frame = _frame([names[k] for k in owner], ground.shapes, ground.crs, path=paths)
    return _checked(frame, names)


def split_polygons(
    ground: Ground, polygons: Path, *, column: str | None, buffer_m: float
) -> gpd.GeoDataFrame:
    """Polygons of a file: named by a column, or the ground inside for tests and that outside for training.

    Args:
        ground: of the scenes.
        polygons: vector file.
        column: whose values name the splits; None for "test" inside and "train" outside.
        buffer_m: strip around the polygons that belongs to neither.

    Raises:
        DataError: no polygon meets a scene, or no such column.
    """
    given = read_polygons(polygons).to_crs(to_pyproj(ground.crs))
    if column is not None:
        if column not in given.columns:
            columns = ", ".join(str(c) for c in given.columns if c != given.geometry.name)
            raise DataError(f"{polygons} has no column {column!r}; it has {columns or 'none'}")
        return _frame(given[column].astype(str).tolist(), np.asarray(given.geometry), ground.crs)
    inside = shapely.union_all(np.asarray(given.geometry))
    outside = shapely.difference(ground.union, shapely.buffer(inside, buffer_m, join_style="mitre"))
    reached = shapely.intersection(ground.union, inside)
    if reached.is_empty:
        raise DataError(f"no scene reaches into {polygons}; check that both lie in the same place")
    frame = _frame([_OUTSIDE, _INSIDE], np.array([outside, reached], dtype=object), ground.crs)
    return _checked(frame, [_OUTSIDE, _INSIDE])


def parse_shares(text: str) -> dict[str, float]:
    """Shares from `train=0.8,val=0.1,test=0.1`.

    Raises:
        ConfigError: something else, or shares that do not add up to 1.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")]
        shares = {name.strip(): float(number) for name, number in pairs}
    except ValueError as error:
        raise ConfigError(f"shares must look like train=0.8,test=0.2, got {text!r}") from error
    if len(shares) < len(pairs) or "" in shares:
        raise ConfigError(f"every split needs a name of its own, got {text!r}")
    if min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(f"shares must be above 0 and add up to 1, got {text!r}")
    return shares


def write_splits(frame: gpd.GeoDataFrame, path: Path) -> None:
    """Writes a GeoPackage, whole or not at all; paths of scenes below its folder become relative to it.

    Raises:
        RasterError: the disk refuses.
    """
    frame = frame.copy()
    if "path" in frame.columns:
        base = os.path.abspath(path.parent) + os.sep
        absolute = [os.path.abspath(p) for p in frame["path"]]
        frame["path"] = [os.path.relpath(p, base) if p.startswith(base) else p for p in absolute]
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.gpkg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            frame.to_file(temporary, driver="GPKG", layer=LAYER)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RasterError(f"cannot write {path}: {error}") from error


def _blocks(ground: Ground, side: float) -> tuple[NDArray[np.object_], list[tuple[int, int]]]:
    """Squares that meet the ground, and their places in the lattice."""
    corners: set[tuple[int, int]] = set()
    for shape in ground.shapes:
        xmin, ymin, xmax, ymax = (value / side for value in shape.bounds)
        if (xmax - xmin + 1) * (ymax - ymin + 1) > _MAX_BLOCKS:
            raise DataError(f"blocks of {side:g} m cut the ground into over a million; choose larger ones")
        columns = range(int(np.floor(xmin)), int(np.ceil(xmax)))
        rows = range(int(np.floor(ymin)), int(np.ceil(ymax)))
        corners.update((i, j) for i in columns for j in rows)
    ordered = np.array(sorted(corners), dtype=np.int64)
    low = ordered * side
    blocks: NDArray[np.object_] = shapely.box(*low.T, *(low + side).T)
    meets = np.zeros(len(blocks), dtype=np.bool_)
    tree = shapely.STRtree(blocks)
    shapes, hits = tree.query(ground.shapes, predicate="intersects")
    solid = shapely.area(shapely.intersection(ground.shapes[shapes], blocks[hits])) > 0
    meets[hits[solid]] = True
    return blocks[meets], [(i, j) for i, j in ordered[meets].tolist()]


def _deal(
    sizes: NDArray[np.float64], shares: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Deals parts in random order, each to the split farthest behind its share; each gets one at least."""
    owner = np.empty(len(sizes), dtype=np.int64)
    given = np.zeros(len(shares))
    for number, part in enumerate(generator.permutation(len(sizes)).tolist()):
        missing = np.flatnonzero(given == 0)
        left = len(sizes) - number
        wanting = (given.sum() + sizes[part]) * shares - given
        choice = int(missing[0]) if 0 < len(missing) == left else int(np.argmax(wanting))
        owner[part] = choice
        given[choice] += sizes[part]
    return owner


def _groups(shapes: NDArray[np.object_], distance: float) -> NDArray[np.int64]:
    """A number per shape, equal for shapes nearer than a distance, directly or through others."""
    one, other = shapely.STRtree(shapes).query(shapes, predicate="dwithin", distance=max(distance, 1e-9))
    if distance <= 0:
        shared = shapely.area(shapely.intersection(shapes[one], shapes[other])) > 0
        one, other = one[shared], other[shared]
    labels: NDArray[np.int64] = np.arange(len(shapes))
    # The smallest number spreads along the links until nothing changes.
    while True:
        before = labels.copy()
        np.minimum.at(labels, one, before[other])
        labels = labels[labels]
        if np.array_equal(labels, before):
            return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _frame(
    names: Sequence[str], shapes: NDArray[np.object_], crs: CRS, **columns: Sequence[str]
) -> gpd.GeoDataFrame:
    frame = gpd.GeoDataFrame({COLUMN: list(names), **columns}, geometry=list(shapes), crs=to_pyproj(crs))
    return frame[~frame.geometry.is_empty].reset_index(drop=True)


def _checked(frame: gpd.GeoDataFrame, names: Sequence[str]) -> gpd.GeoDataFrame:
    lost = [name for name in names if name not in set(frame[COLUMN])]
    if lost:
        raise DataError(
            f"nothing is left of {', '.join(lost)}: the buffer is too wide for these blocks or polygons"
        )
    return frame
