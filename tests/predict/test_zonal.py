"""Zonal statistics against sums over whole pixels and shares of pixels."""

from pathlib import Path

import geopandas
import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS
from shapely.geometry import Point, box

from dinov3geo.errors import ConfigError, DataError, GeoreferenceError, RasterError, UserError
from dinov3geo.predict.zonal import write_zonal_statistics, zonal_statistics
from dinov3geo.rasters.geotiff import write_geotiff
from dinov3geo.rasters.grid import PixelGrid

pytest.importorskip("exactextract")

GRID = PixelGrid(CRS.from_epsg(32617), Affine(2, 0, 400_000, 0, -2, 3_280_000), 20, 30)
HEIGHTS = np.arange(600, dtype=np.float32).reshape(20, 30)


@pytest.fixture
def heights(tmp_path: Path) -> Path:
    array = HEIGHTS.copy()
    array[0, 0] = -9999
    write_geotiff(tmp_path / "heights.tif", array, GRID, nodata=-9999, units="m")
    return tmp_path / "heights.tif"


def zones(tmp_path: Path, *shapes: object, crs: object = 32617) -> Path:
    frame = geopandas.GeoDataFrame(
        {"plot": [f"p{n}" for n in range(len(shapes))]}, geometry=list(shapes), crs=crs
    )
    frame.to_file(tmp_path / "zones.gpkg")
    return tmp_path / "zones.gpkg"


def test_whole_pixels_and_shares_of_pixels(heights: Path, tmp_path: Path) -> None:
    whole = box(400_000, 3_280_000 - 8, 400_000 + 6, 3_280_000)  # 4 rows, 3 columns, one of them without data
    half = box(
        400_001, 3_280_000 - 4, 400_004, 3_280_000 - 2
    )  # half of column 0 and all of column 1 of row 1
    path = zones(tmp_path, whole, half)
    frame = zonal_statistics(heights, path, statistics=["count", "mean", "max", "sum"])
    known = np.delete(HEIGHTS[:4, :3].ravel(), 0)
    assert frame["count"].tolist() == pytest.approx([11, 1.5])
    assert frame["mean"].tolist() == pytest.approx([known.mean(), (0.5 * 30 + 31) / 1.5])
    assert frame["sum"][0] == pytest.approx(known.sum()) and frame["max"][0] == known.max()
    assert frame["plot"].tolist() == ["p0", "p1"]


def test_zones_in_degrees_and_scaled_numbers(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "dm.tif", HEIGHTS.astype(np.uint16)[None], GRID, nodata=65535, scale=0.1)
    plain = zones(tmp_path, box(400_010, 3_279_970, 400_040, 3_279_990))
    first = zonal_statistics(tmp_path / "dm.tif", plain, statistics=["mean"])["mean"][0]
    assert first == pytest.approx(HEIGHTS[5:15, 5:20].mean() * 0.1)
    geopandas.read_file(plain).to_crs(4326).to_file(tmp_path / "degrees.gpkg")
    second = zonal_statistics(tmp_path / "dm.tif", tmp_path / "degrees.gpkg", statistics=["mean"])["mean"][0]
    assert second == pytest.approx(first, rel=1e-4)


def test_classes_give_areas(tmp_path: Path) -> None:
    array = np.zeros((20, 30), dtype=np.uint8)
    array[:, 10:] = 1
    array[:, 25:] = 255
    tags = {"CLASS_0": "water", "CLASS_1": "trees"}
    write_geotiff(tmp_path / "cover.tif", array, GRID, nodata=255, tags=tags)
    path = zones(tmp_path, box(400_000, 3_279_960, 400_060, 3_280_000))
    frame = zonal_statistics(tmp_path / "cover.tif", path)
    assert frame["area_water"][0] == pytest.approx(10 * 20 * 4)
    assert frame["area_trees"][0] == pytest.approx(15 * 20 * 4)
    with pytest.raises(ConfigError, match="area of each class"):
        zonal_statistics(tmp_path / "cover.tif", path, statistics=["mean"])


@pytest.mark.parametrize("suffix", ["gpkg", "csv"])
def test_written_files(heights: Path, tmp_path: Path, suffix: str) -> None:
    path, output = zones(tmp_path, box(400_000, 3_279_990, 400_010, 3_280_000)), tmp_path / f"out.{suffix}"
    assert write_zonal_statistics(heights, path, output) == 1
    assert output.stat().st_size > 30
    with pytest.raises(RasterError, match="exists"):
        write_zonal_statistics(heights, path, output)


def test_bad_input(heights: Path, tmp_path: Path) -> None:
    square = box(400_000, 3_279_990, 400_010, 3_280_000)
    with pytest.raises(DataError, match="holds Point, expected polygons"):
        zonal_statistics(heights, zones(tmp_path, Point(400_001, 3_279_999)))
    with pytest.raises(GeoreferenceError, match="no coordinate reference system"):
        zonal_statistics(heights, zones(tmp_path, square, crs=None))
    path = zones(tmp_path, square)
    with pytest.raises(UserError, match="unknown statistic 'men'.*did you mean 'mean'"):
        zonal_statistics(heights, path, statistics=["men"])
    with pytest.raises(ConfigError, match="ends in one of"):
        write_zonal_statistics(heights, path, tmp_path / "a.shp")
    with pytest.raises(RasterError, match="no such file"):
        zonal_statistics(heights, tmp_path / "no.gpkg")
    (tmp_path / "text.gpkg").write_text("no")
    with pytest.raises(RasterError, match="cannot be read as a vector file"):
        zonal_statistics(heights, tmp_path / "text.gpkg")
