"""Tests of the writer."""

import os
import shutil

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.env import get_gdal_config
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from dinov3geo.errors import DataError, RasterError
from dinov3geo.rasters.geotiff import GeoTiffWriter, Layer, block_cache, write_geotiff
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


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rows_in_pieces_of_any_height_make_one_raster(tmp_path, count):
    grid = grid_of(1300, 70)
    array = np.random.default_rng(0).random((count, 1300, 70)).astype(np.float32)
    with GeoTiffWriter(tmp_path / "out.tif", grid, Layer(count, "float32", np.nan)) as writer:
        for start in range(0, 1300, 77):
            assert writer.next_row == start
            writer.write(array[:, start : start + 77])
    with SceneReader(tmp_path / "out.tif") as reader:
        numbers, valid = reader.read(Window(0, 0, 70, 1300))
    np.testing.assert_array_equal(numbers, array)
    assert valid.all() and np.isnan(reader.info.nodata).all()


def test_gdals_own_copy_of_it_holds_the_same(tmp_path):
    array = np.random.default_rng(0).random((2, 1100, 1500)).astype(np.float32)
    array[:, 600:, 300:500] = -9999
    write_geotiff(tmp_path / "ours.tif", array, grid_of(1100, 1500), nodata=-9999)
    rasterio.shutil.copy(tmp_path / "ours.tif", tmp_path / "gdal.tif", driver="COG", COMPRESS="DEFLATE")
    ours, theirs = (rasterio.open(tmp_path / name) for name in ("ours.tif", "gdal.tif"))
    with ours, theirs:
        assert ours.overviews(1) == theirs.overviews(1) == [2, 4]
        assert ours.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        np.testing.assert_array_equal(ours.read(), theirs.read())


def test_statistics_are_those_of_the_valid_numbers(tmp_path):
    array = np.random.default_rng(0).normal(5, 2, (2, 700, 90)).astype(np.float32)
    array[0, 100:600, 20:50] = -9999
    array[1] = -9999
    write_geotiff(tmp_path / "out.tif", array, grid_of(700, 90), nodata=-9999)
    known = array[0][array[0] != -9999]
    with rasterio.open(tmp_path / "out.tif") as dataset:
        tags = {name: float(text) for name, text in dataset.tags(1).items() if name.startswith("STATISTICS")}
        assert not [name for name in dataset.tags(2) if name.startswith("STATISTICS")]
    assert tags["STATISTICS_MINIMUM"] == pytest.approx(known.min())
    assert tags["STATISTICS_MAXIMUM"] == pytest.approx(known.max())
    assert tags["STATISTICS_MEAN"] == pytest.approx(known.mean(dtype=np.float64), rel=1e-6)
    assert tags["STATISTICS_STDDEV"] == pytest.approx(known.std(dtype=np.float64), rel=1e-6)
    assert tags["STATISTICS_VALID_PERCENT"] == pytest.approx(100 * known.size / 63000, rel=1e-3)


def test_colours_and_scales(tmp_path):
    array = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
    colours = {1: (255, 0, 0), 3: (0, 9, 8)}
    write_geotiff(tmp_path / "out.tif", array, grid_of(2, 2), nodata=0, colours=colours, overviews="mode")
    write_geotiff(tmp_path / "dm.tif", array.astype(np.uint16), grid_of(2, 2), nodata=65535, scale=0.1)
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.colorinterp == (ColorInterp.palette,)
        assert dataset.colormap(1)[1] == (255, 0, 0, 255) and dataset.colormap(1)[3] == (0, 9, 8, 255)
    with rasterio.open(tmp_path / "dm.tif") as dataset:
        assert dataset.scales == (0.1,) and dataset.dtypes == ("uint16",)


@pytest.mark.parametrize("big", [False, True])
def test_bigtiff_and_classic(tmp_path, big, monkeypatch):
    if big:
        monkeypatch.setattr("dinov3geo.rasters.cog._CLASSIC_LIMIT", 0)
    array = np.random.default_rng(0).integers(0, 99, (3, 600, 1100)).astype(np.uint8)
    write_geotiff(tmp_path / "out.tif", array, grid_of(600, 1100), nodata=None)
    assert (tmp_path / "out.tif").read_bytes()[:4] == (b"II+\0" if big else b"II*\0")
    assert cog_validate(tmp_path / "out.tif", strict=True)[0]
    with rasterio.open(tmp_path / "out.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(), array)


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
    layer = Layer(1, "uint8", None)
    with pytest.raises(error):
        with GeoTiffWriter(tmp_path / "a" / "b" / "out.tif", grid_of(64, 64), layer) as writer:
            writer.write(np.ones((1, 8, 64), np.uint8))
            raise error
    assert os.listdir(tmp_path) == []


def test_missing_rows_are_no_raster(tmp_path):
    with pytest.raises(ValueError, match="8 of 64 rows"):
        with GeoTiffWriter(tmp_path / "out.tif", grid_of(64, 64), Layer(1, "uint8", None)) as writer:
            writer.write(np.ones((1, 8, 64), np.uint8))
    assert os.listdir(tmp_path) == []


def test_a_failing_copy_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.tif"
    write_geotiff(path, np.ones((4, 4), np.uint8), grid_of(4, 4), nodata=None)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dinov3geo.rasters.geotiff.write_cog", fail)
    with pytest.raises(RasterError, match="No space left"):
        write_geotiff(path, np.zeros((4, 4), np.uint8), grid_of(4, 4), nodata=None, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.tif"]


def numbers_of(rows, seed=0):
    return np.random.default_rng(seed).random((1, rows, 700)).astype(np.float32)


def write_part(path, array, stop, *, job="job", error=KeyboardInterrupt, **options):
    """Writes rows up to `stop` and is interrupted there, or goes on to the end."""
    grid = grid_of(array.shape[1], array.shape[2])
    with GeoTiffWriter(path, grid, Layer(1, "float32", -9999.0), job=job, **options) as writer:
        began = writer.next_row
        writer.write(array[:, began:stop])
        if stop < array.shape[1]:
            raise error
    return began


def test_an_interrupted_job_goes_on_where_it_was_and_ends_in_the_same_bytes(tmp_path):
    array = numbers_of(2100)
    write_part(tmp_path / "whole.tif", array, 2100)
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "out.tif", array, 600)
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "out.tif", array, 1900)
    assert not (tmp_path / "out.tif").exists()
    assert write_part(tmp_path / "out.tif", array, 2100) == 1536
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out.tif", "whole.tif"]


def test_what_a_killed_process_left_half_written_is_written_again(tmp_path):
    array = numbers_of(1700)
    write_part(tmp_path / "whole.tif", array, 1700)
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "out.tif", array, 1600)
    folder = tmp_path / ".out.tif.unfinished"
    lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 3
    (folder / "journal.jsonl").write_text(lines[0] + lines[1] + lines[2][:40])
    strip = folder / "strip000001.tif"
    strip.write_bytes(strip.read_bytes()[:100])
    assert write_part(tmp_path / "out.tif", array, 1700) == 512
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_unfinished_work_of_another_job_is_thrown_away_only_when_asked(tmp_path):
    array = numbers_of(600)
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "out.tif", array, 550, job="a")
    with pytest.raises(RasterError, match="unfinished work of another command"):
        write_part(tmp_path / "out.tif", array, 600, job="b")
    assert (tmp_path / ".out.tif.unfinished" / "journal.jsonl").exists()
    assert write_part(tmp_path / "out.tif", array, 600, job="b", overwrite=True) == 0


def test_two_writers_of_one_output_are_one_too_many(tmp_path):
    array = numbers_of(600)
    layer = Layer(1, "float32", -9999.0)
    with GeoTiffWriter(tmp_path / "out.tif", grid_of(600, 700), layer, job="a") as writer:
        with pytest.raises(RasterError, match="another process is writing"):
            write_part(tmp_path / "out.tif", array, 600, job="a")
        writer.write(array)
    with rasterio.open(tmp_path / "out.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(), array)


def test_an_error_in_the_data_leaves_nothing_to_take_up(tmp_path):
    with pytest.raises(DataError):
        write_part(tmp_path / "out.tif", numbers_of(1700), 1600, error=DataError("NaN"))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named_and_its_work_taken_up(tmp_path, monkeypatch):
    array = numbers_of(1700)
    write_part(tmp_path / "whole.tif", array, 1700)
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room._replace(free=1000))
    with pytest.raises(RasterError, match="more are needed, 1 kB are free"):
        write_part(tmp_path / "out.tif", array, 1700)
    assert not (tmp_path / "out.tif").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: room._replace(free=5_000_000))
    with pytest.raises(RasterError, match="run the same command again"):
        with GeoTiffWriter(
            tmp_path / "out.tif", grid_of(1700, 700), Layer(1, "float32", -9999.0), job="job"
        ) as writer:
            for start in range(0, 1700, 100):
                writer.write(array[:, start : start + 100])
    assert not (tmp_path / "out.tif").exists()
    monkeypatch.undo()
    assert write_part(tmp_path / "out.tif", array, 1700) >= 512
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


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
        GeoTiffWriter(path, grid, Layer(1, "uint8", -9999))
    with pytest.raises(DataError, match="2 band names for 1 band"):
        GeoTiffWriter(path, grid, Layer(1, "uint8", None, band_names=("a", "b")))
    writer = GeoTiffWriter(path, grid, Layer(1, "uint8", None))
    with pytest.raises(RuntimeError, match="outside of its with block"):
        writer.write(np.ones((1, 8, 8), np.uint8))
    for array, message in (
        (np.ones((2, 8, 8), np.uint8), "rows of shape"),
        (np.ones((1, 8, 7), np.uint8), "rows of shape"),
        (np.ones((1, 8, 8), np.float32), "numbers of type uint8"),
        (np.ones((1, 9, 8), np.uint8), "beyond the raster"),
    ):
        with pytest.raises(DataError, match=message):
            with GeoTiffWriter(path, grid, Layer(1, "uint8", None)) as writer:
                writer.write(array)
    assert os.listdir(tmp_path) == []
