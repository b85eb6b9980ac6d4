"""Ground that a data set keeps to: pixels outside it are as pixels without data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.features import geometry_mask

from dinov3geo.errors import DataError, UnknownNameError
from dinov3geo.rasters.crs import to_pyproj, to_rasterio
from dinov3geo.rasters.grid import PixelGrid

Mask = NDArray[np.bool_]
COLUMN = "split"


class Area:
    """Polygons in one reference system, asked for in any.

    Attributes:
        name: what it is called in messages.
        polygons: of the area, in `crs`.
        crs: reference system of rasterio.
    """

    def __init__(self, polygons: list[Any], crs: Any, name: str) -> None:  # noqa: ANN401 (anything rasterio takes)
        """Keeps the polygons; they must be valid."""
        self.polygons = polygons
        self.crs = to_rasterio(crs)
        self.name = name
        self._places: dict[str, _Place] = {}

    def outside(self, grid: PixelGrid) -> Mask | None:
        """[h, w] True where a pixel's centre lies outside; None where all lie inside."""
        place = self._place(grid.crs)
        box = shapely.box(*grid.bounds)
        near = place.tree.query(box, predicate="intersects")
        if len(near) == 0:
            return np.ones(grid.shape_hw, dtype=np.bool_)
        shapes = [place.polygons[number] for number in near]
        if any(shape.covers(box) for shape in shapes):
            return None
        mask: Mask = geometry_mask(shapes, grid.shape_hw, grid.transform)
        return mask if mask.any() else None

    def clip(self, index: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
        """The index of a data set with a row for each piece of a scene inside a polygon.

        Raises:
            DataError: no scene reaches into the area.
        """
        place = self._place(to_rasterio(index.crs))
        geometries = np.asarray(index.geometry.values, dtype=object)
        rows, numbers = place.tree.query(geometries, predicate="intersects")
        pieces = shapely.intersection(geometries[rows], np.array(place.polygons, dtype=object)[numbers])
        # Neighbours that only touch share a line.
        solid = shapely.area(pieces) > 0
        order = np.argsort(rows[solid], kind="stable")
        if not len(order):
            raise DataError(f"no scene reaches into {self.name}; check that both lie in the same place")
        clipped = index.iloc[rows[solid][order]].copy()
        return clipped.set_geometry(gpd.GeoSeries(pieces[solid][order], index=clipped.index, crs=index.crs))

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made again when it is needed."""
        return {**self.__dict__, "_places": {}}

    def _place(self, crs: Any) -> _Place:  # noqa: ANN401
        key = crs.to_wkt()
        if key not in self._places:
            series = gpd.GeoSeries(self.polygons, crs=to_pyproj(self.crs))
            if crs != self.crs:
                longest = max(max(b[2] - b[0], b[3] - b[1]) for b in shapely.bounds(self.polygons))
                series = series.segmentize(longest / 8).to_crs(to_pyproj(crs))
            polygons = list(series)
            self._places[key] = _Place(polygons, shapely.STRtree(polygons))
        return self._places[key]


@dataclass(frozen=True, slots=True)
class _Place:
    polygons: list[Any]
    tree: shapely.STRtree


def read_area(spec: str) -> Area:
    """One of the areas of a file of polygons.

    Args:
        spec: `FILE#NAME`: the polygons of a GeoPackage (or another vector file) whose column `split` holds
            the name; `FILE` alone takes all of them.

    Raises:
        DataError: no such file, no polygons or no reference system in it.
        UnknownNameError: no polygon of that name.
    """
    name, _, wanted = spec.partition("#")
    frame = read_polygons(Path(name))
    if wanted:
        if COLUMN not in frame.columns:
            columns = ", ".join(str(c) for c in frame.columns if c != frame.geometry.name)
            raise DataError(f"{name} has no column {COLUMN!r} for {wanted!r}; it has {columns or 'none'}")
        found = frame[frame[COLUMN].astype(str) == wanted]
        if found.empty:
            raise UnknownNameError(f"split of {name}", wanted, sorted(set(frame[COLUMN].astype(str))))
        frame = found
    return Area(list(frame.geometry.explode(index_parts=False)), frame.crs, spec)


def read_polygons(path: Path) -> gpd.GeoDataFrame:
    """Polygons of a vector file, made valid.

    Raises:
        DataError: no such file, not a vector file, no polygons, or no reference system.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}; expected polygons, e.g. a GeoPackage of `dinov3geo split`")
    try:
        frame = gpd.read_parquet(path) if path.suffix == ".parquet" else gpd.read_file(path)
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as vector data: {error}") from error
    if not isinstance(frame, gpd.GeoDataFrame) or frame.empty:
        raise DataError(f"{path} holds no geometries, expected polygons")
    if frame.crs is None:
        raise DataError(f"{path} has no reference system; set one, e.g. with QGIS")
    if not frame.geom_type.isin(["Polygon", "MultiPolygon"]).all():
        raise DataError(f"{path} holds {', '.join(sorted(set(frame.geom_type)))}, expected polygons")
    return frame.set_geometry(frame.geometry.make_valid())
