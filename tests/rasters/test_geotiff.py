"""Tests of the writer."""

import os

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.env import get_gdal_config
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from dinov3geo.errors import DataError, RasterError
from dinov3geo.rasters.geotiff import GeoTiffWriter, block_cache, write_geotiff
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneReader

NORTH_UP = Affine(0.1, 0, 400_000, 0, -0.1, 3_280_000)
SOUTH_UP = Affine(0.1, 0, 400_000, 0, 0.2, 3_280_000)


def grid_of(height, width, transform=NORTH_UP):
    return PixelGrid(CRS.from_epsg(32617), transform, height, width)


@pytest.mark.parametrize("transform", [NORTH_UP, SOUTH_UP], ids=["north-up", "south-up"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 37, 53), (1, 511, 513), (5, 40, 1100)])
def test_result_is_a_whole_cog(tmp_path, transform, dtype, shape):
    grid = grid_of(*shape[1:], transform)
    array = np.random.default_rng(0).integers(1, 200, shape).astype(dtype)
    path = tmp_path / "new" / "folder" / "out.tif"
    names = tuple(f"band {i}" for i in range(shape[0]))
    options = {"nodata": 0, "band_names": names, "units": "m", "tags": {"MODEL": "x", "COMMAND": "y z"}}
    write_geotiff(path, array, grid, **options)
    valid, errors, warnings = cog_validate(str(path), strict=True)
    assert valid and not errors and not warnings
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(dataset.read(), array)
        assert PixelGrid.from_dataset(dataset) == grid
        assert dataset.descriptions == names and dataset.units == ("m",) * shape[0]
        assert dataset.nodata == 0 and dataset.dtypes[0] == dtype
        assert {"MODEL": "x", "COMMAND": "y z"}.items() <= dataset.tags().items()
        assert dataset.profile["compress"] == "deflate"
        assert bool(dataset.overviews(1)) == (max(shape[1:]) > 512)
    assert os.listdir(path.parent) == ["out.tif"]


def test_windows_in_any_order_make_one_raster(tmp_path):
    grid = grid_of(130, 70)
    array = np.random.default_rng(0).random((2, 130, 70)).astype(np.float32)
    plan = grid.tiles(48, 16)
    cache = get_gdal_config("GDAL_CACHEMAX")
    with GeoTiffWriter(tmp_path / "out.tif", grid, count=2, dtype="float32", nodata=np.nan) as writer:
        for window in reversed(list(plan.windows())):
            writer.write(window, array[:, *window.toslices()])
    with SceneReader(tmp_path / "out.tif") as reader:
        numbers, valid = reader.read(Window(0, 0, 70, 130))
    np.testing.assert_array_equal(numbers, array)
    assert valid.all() and np.isnan(reader.info.nodata).all()
    assert get_gdal_config("GDAL_CACHEMAX") == cache


@pytest.mark.parametrize(("count", "block"), [(1, 512), (4, 512), (5, 128), (192, 128)])
def test_a_block_of_many_bands_is_small(tmp_path, count, block):
    write_geotiff(tmp_path / "out.tif", np.ones((count, 8, 520), np.uint8), grid_of(8, 520), nodata=None)
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert set(dataset.block_shapes) == {(block, block)}


def test_the_block_cache_is_capped_and_set_back():
    before = get_gdal_config("GDAL_CACHEMAX")
    with block_cache(2**20):
        assert get_gdal_config("GDAL_CACHEMAX") == 2**20
        with block_cache(2**40):
            assert get_gdal_config("GDAL_CACHEMAX") == 2**20
    assert get_gdal_config("GDAL_CACHEMAX") == before


@pytest.mark.parametrize(
    ("overviews", "expected"), [("average", {2.5}), ("mode", {0.0}), ("nearest", {0.0, 10.0})]
)
def test_overviews(tmp_path, overviews, expected):
    array = np.zeros((1, 1024, 1024), dtype=np.float32)
    array[:, ::2, ::2] = 10
    write_geotiff(tmp_path / "out.tif", array, grid_of(1024, 1024), nodata=None, overviews=overviews)
    with rasterio.open(tmp_path / "out.tif", overview_level=0) as dataset:
        assert dataset.shape == (512, 512)
        assert set(np.unique(dataset.read())) <= expected


def test_overviews_ignore_nodata(tmp_path):
    array = np.full((1, 1024, 1024), 4.0, dtype=np.float32)
    array[:, ::2] = -9999
    write_geotiff(tmp_path / "out.tif", array, grid_of(1024, 1024), nodata=-9999)
    with rasterio.open(tmp_path / "out.tif", overview_level=0) as dataset:
        assert np.unique(dataset.read()).tolist() == [4.0]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    options = {"count": 1, "dtype": "uint8", "nodata": None}
    with pytest.raises(error):
        with GeoTiffWriter(tmp_path / "a" / "b" / "out.tif", grid_of(64, 64), **options) as writer:
            writer.write(Window(0, 0, 64, 8), np.ones((1, 8, 64), np.uint8))
            raise error
    assert os.listdir(tmp_path) == []


def test_a_failing_copy_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.tif"
    write_geotiff(path, np.ones((4, 4), np.uint8), grid_of(4, 4), nodata=None)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rasterio.shutil.copy", fail)
    with pytest.raises(RasterError, match="No space left"):
        write_geotiff(path, np.zeros((4, 4), np.uint8), grid_of(4, 4), nodata=None, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.tif"]


def test_existing_output_is_kept_unless_told_otherwise(tmp_path):
    path = tmp_path / "out.tif"
    write_geotiff(path, np.ones((4, 4), np.uint8), grid_of(4, 4), nodata=None)
    with pytest.raises(RasterError, match="exists already"):
        write_geotiff(path, np.zeros((4, 4), np.uint8), grid_of(4, 4), nodata=None)
    write_geotiff(path, np.zeros((4, 4), np.uint8), grid_of(4, 4), nodata=None, overwrite=True)
    with rasterio.open(path) as dataset:
        assert dataset.read().max() == 0


def test_output_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    one = np.ones((2, 2), np.uint8)
    with pytest.raises(RasterError, match="it is a folder"):
        write_geotiff(tmp_path, one, grid_of(2, 2), nodata=None, overwrite=True)
    with pytest.raises(RasterError, match=r"cannot write .*out\.tif"):
        write_geotiff(tmp_path / "file" / "out.tif", one, grid_of(2, 2), nodata=None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    with pytest.raises(RasterError, match="not writable"):
        write_geotiff(folder / "out.tif", np.ones((2, 2), np.uint8), grid_of(2, 2), nodata=None)


def test_permission_error_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(RasterError, match="not writable"):
        write_geotiff(tmp_path / "out.tif", np.ones((2, 2), np.uint8), grid_of(2, 2), nodata=None)


def test_arguments_that_do_not_fit(tmp_path):
    path, grid = tmp_path / "out.tif", grid_of(8, 8)
    with pytest.raises(DataError, match="nodata -9999 does not fit"):
        GeoTiffWriter(path, grid, count=1, dtype="uint8", nodata=-9999)
    with pytest.raises(DataError, match="2 band names for 1 band"):
        GeoTiffWriter(path, grid, count=1, dtype="uint8", nodata=None, band_names=("a", "b"))
    writer = GeoTiffWriter(path, grid, count=1, dtype="uint8", nodata=None)
    with pytest.raises(RuntimeError, match="outside of its with block"):
        writer.write(Window(0, 0, 8, 8), np.ones((1, 8, 8), np.uint8))
    for window, array, message in (
        (Window(0, 0, 8, 8), np.ones((2, 8, 8), np.uint8), "window of shape"),
        (Window(0, 0, 8, 8), np.ones((1, 8, 8), np.float32), "numbers of type uint8"),
        (Window(4, 0, 8, 8), np.ones((1, 8, 8), np.uint8), "beyond the raster"),
    ):
        with pytest.raises(DataError, match=message):
            with writer:
                writer.write(window, array)
    assert os.listdir(tmp_path) == []
