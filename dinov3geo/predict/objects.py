"""Boxes of scenes as tables: a GeoPackage with a reference system, or a CSV in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import geopandas
from pyproj import CRS
from shapely.geometry import Polygon, box

from dinov3geo.data.boxes import CSV_COLUMNS
from dinov3geo.errors import ConfigError, GeoreferenceError
from dinov3geo.heads.scene_boxes import SceneBoxes
from dinov3geo.paths import written_whole
from dinov3geo.rasters.grid import PixelGrid

SUFFIXES = (".gpkg", ".csv")
_WGS84 = CRS.from_epsg(4326)


def write_objects(
    scenes: Sequence[SceneBoxes], output: Path, *, classes: Sequence[str]
) -> geopandas.GeoDataFrame:
    """Writes boxes of scenes: a GeoPackage with a reference system, or a CSV in pixels for `load_boxes`.

    Args:
        scenes: from `find_objects`.
        output: .gpkg or .csv, replaced if it exists.
        classes: names.

    Raises:
        ConfigError: another suffix.
        GeoreferenceError: a picture without a place for a GeoPackage.
    """
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{output}: unknown form of table; valid suffixes: {', '.join(SUFFIXES)}")
    rows, shapes = [], []
    systems = {scene.grid.crs.to_wkt() for scene in scenes if scene.grid is not None}
    target = CRS.from_wkt(next(iter(systems))) if len(systems) == 1 else _WGS84
    for scene in scenes:
        if suffix == ".gpkg" and scene.grid is None:
            raise GeoreferenceError(f"{scene.path} has no place on the ground; write a .csv instead")
        sides = scene.boxes.boxes.double().tolist()
        for side, score, label in zip(
            sides, scene.boxes.scores.tolist(), scene.boxes.labels.tolist(), strict=True
        ):
            pixels = [round(value, 2) for value in side]
            rows.append([scene.path.name, *pixels, classes[label], round(score, 4)])
            shapes.append(
                None if scene.grid is None else (_ground(side, scene.grid), scene.grid.crs.to_wkt())
            )
    geometry = geopandas.GeoSeries(
        [None if s is None else _moved(s[0], s[1], target) for s in shapes], crs=target
    )
    table = geopandas.GeoDataFrame(
        {name: [row[k] for row in rows] for k, name in enumerate((*CSV_COLUMNS, "score"))},
        geometry=geometry,
        crs=target,
    )
    with written_whole(output) as temporary:
        if suffix == ".gpkg":
            table.to_file(temporary, driver="GPKG", layer="objects", engine="pyogrio")
        else:
            table.drop(columns="geometry").to_csv(temporary, index=False)
    return table


def _ground(side: Sequence[float], grid: PixelGrid) -> Polygon:
    x0, y0 = grid.transform @ (side[0], side[1])
    x1, y1 = grid.transform @ (side[2], side[3])
    return box(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def _moved(shape: Polygon, crs: str, target: CRS) -> Polygon:
    if CRS.from_wkt(crs) == target:
        return shape
    moved: Polygon = geopandas.GeoSeries([shape], crs=crs).to_crs(target).iloc[0]
    return moved
