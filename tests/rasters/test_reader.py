"""Tests of window reads, masks and reads on other grids."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from dinov3geo.errors import DataError, GeoreferenceError, RasterError, UserError
from dinov3geo.rasters import reader as reader_module
from dinov3geo.rasters import scaling, warping
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneReader, find_rasters, inspect_scene, read_on_grid

METRE = {"pixel_size": 1.0}


def whole(reader):
    return reader.read(Window(0, 0, reader.info.grid.width, reader.info.grid.height))


def test_header(write_raster):
    path = write_raster(nodata=255, band_names=("red", "green"), **METRE)
    info = inspect_scene(path)
    assert (info.path, info.num_bands, info.dtype) == (path, 3, "uint8")
    assert info.nodata == (255.0,) * 3 and info.band_names == ("red", "green", "")
    assert info.grid.shape_hw == (48, 64) and info.grid.gsd_m == 1.0
    assert pickle.loads(pickle.dumps(info)) == info


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("count", [1, 3, 13])
def test_numbers_keep_dtype_and_order(write_raster, dtype, count):
    path = write_raster(shape=(count, 17, 23), dtype=dtype)
    with rasterio.open(path) as dataset:
        expected = dataset.read()
    with SceneReader(path) as reader:
        numbers, valid = whole(reader)
    assert numbers.dtype == dtype and valid.all()
    np.testing.assert_array_equal(numbers, expected)
    chosen = [count, 1]
    with SceneReader(path, bands=chosen) as reader:
        np.testing.assert_array_equal(whole(reader)[0], expected[[band - 1 for band in chosen]])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.integers(-40, 60), st.integers(-40, 70), st.integers(1, 90), st.integers(1, 90))
def test_any_window_equals_a_slice_of_the_padded_array(write_raster, row, col, height, width):
    array = np.arange(1, 48 * 64 + 1, dtype=np.uint16).reshape(1, 48, 64)
    path = write_raster("window.tif", array=array, nodata=7)
    with SceneReader(path) as reader:
        numbers, valid = reader.read(Window(col, row, width, height))
    padded = np.full((1, 48 + 240, 64 + 240), 7, dtype=np.uint16)
    padded[:, 120:168, 120:184] = array
    expected = padded[:, row + 120 : row + 120 + height, col + 120 : col + 120 + width]
    np.testing.assert_array_equal(numbers, expected)
    np.testing.assert_array_equal(valid, expected[0] != 7)


def test_nodata_counts_where_all_selected_bands_hold_it(write_raster):
    array = np.full((3, 4, 4), 9, dtype=np.uint8)
    array[:, 0, 0] = 255
    array[0, 1, 1] = 255  # red alone is saturated: that is data
    path = write_raster(array=array, nodata=255)
    with SceneReader(path) as reader:
        assert np.argwhere(~whole(reader)[1]).tolist() == [[0, 0]]
    with SceneReader(path, bands=[1]) as reader:
        assert np.argwhere(~whole(reader)[1]).tolist() == [[0, 0], [1, 1]]


def test_nodata_given_by_the_caller_only_helps_out(write_raster):
    array = np.array([[0, 1], [255, 2]], dtype=np.uint8)
    with SceneReader(write_raster("a.tif", array=array), nodata=0) as reader:
        assert whole(reader)[1].tolist() == [[False, True], [True, True]]
    with SceneReader(write_raster("b.tif", array=array, nodata=255), nodata=0) as reader:
        assert whole(reader)[1].tolist() == [[True, True], [False, True]]


def test_nodata_that_the_dtype_cannot_hold_never_matches(write_raster):
    with SceneReader(write_raster(array=np.zeros((1, 3, 3), np.uint8)), nodata=-9999.0) as reader:
        assert whole(reader)[1].all()


def test_nodata_of_single_precision_matches(write_raster):
    array = np.array([[-3.4028234663852886e38, 1.0]], dtype=np.float32)
    with SceneReader(write_raster(array=array, nodata=-3.4028234663852886e38)) as reader:
        assert whole(reader)[1].tolist() == [[False, True]]


def test_declared_nan_is_no_data_and_leaves_no_nan(write_raster):
    array = np.ones((2, 3, 3), dtype=np.float32)
    array[:, 0, 0] = np.nan
    array[1, 2, 2] = np.nan
    with SceneReader(write_raster(array=array, nodata=np.nan)) as reader:
        numbers, valid = whole(reader)
    assert np.argwhere(~valid).tolist() == [[0, 0], [2, 2]]
    assert np.isfinite(numbers).all()


@pytest.mark.parametrize("nodata", [None, -9999.0])
@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_unexplained_nan_is_an_error(write_raster, nodata, strange):
    array = np.ones((1, 6, 8), dtype=np.float32)
    array[0, 4, 5] = strange
    path = write_raster(array=array, nodata=nodata)
    with SceneReader(path) as reader:
        reader.read(Window(0, 0, 8, 4))
        with pytest.raises(DataError, match=r"scene\.tif holds NaN.*row 4, column 5.*nodata=nan"):
            reader.read(Window(4, 2, 4, 4))


def test_mask_band_counts(write_raster):
    path = write_raster(shape=(3, 8, 8))
    mask = np.full((8, 8), 255, dtype=np.uint8)
    mask[2:4, 5] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    with SceneReader(path) as reader:
        np.testing.assert_array_equal(whole(reader)[1], mask > 0)


def test_alpha_band_is_a_mask_unless_it_is_asked_for(write_raster):
    array = np.full((4, 4, 4), 50, dtype=np.uint8)
    array[3, 1, 2] = 0
    path = write_raster(array=array)
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    with SceneReader(path) as reader:
        numbers, valid = whole(reader)
    assert numbers.shape[0] == 3 and np.argwhere(~valid).tolist() == [[1, 2]]
    with SceneReader(path, bands=[1, 4]) as reader:
        numbers, valid = whole(reader)
    assert numbers.shape[0] == 2 and valid.all()


def test_bands_beyond_the_file_are_refused(write_raster):
    with pytest.raises(DataError, match=r"has 1 band; bands \(1, 2, 3\) were asked for"):
        SceneReader(write_raster(shape=(1, 4, 4)), bands=[1, 2, 3])


def test_absent_folder_and_text(tmp_path):
    with pytest.raises(RasterError, match="no such file: .*absent.tif"):
        inspect_scene(tmp_path / "absent.tif")
    with pytest.raises(RasterError, match="is a folder"):
        inspect_scene(tmp_path)
    text = tmp_path / "notes.tif"
    text.write_text("not a raster")
    with pytest.raises(RasterError, match="cannot be opened as a raster"):
        inspect_scene(text)


def test_no_crs(write_raster):
    with pytest.raises(GeoreferenceError, match="no coordinate reference system"):
        inspect_scene(write_raster(crs=None))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tiled": True, "blockxsize": 16, "blockysize": 16},
        {"bigtiff": "YES"},
        {"endianness": "BIG"},
        {"driver": "COG"},
    ],
)
@pytest.mark.parametrize("kept", [0.001, 0.3, 0.9, 0.999])
def test_truncated_file_is_noticed_at_once(write_raster, options, kept):
    options = {"interleave": "band", "compress": "deflate", **options}
    driver = options.pop("driver", "GTiff")
    path = write_raster(shape=(3, 90, 90), **options)
    if driver == "COG":
        source, path = path, path.with_name("copy.tif")
        rasterio.shutil.copy(source, path, driver="COG", BLOCKSIZE=128)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(RasterError, match=path.name):
        inspect_scene(path)


def test_sparse_file_is_whole(tmp_path):
    options = {"crs": "EPSG:32617", "transform": Affine(1, 0, 4e5, 0, -1, 3e6), "sparse_ok": True}
    path = tmp_path / "sparse.tif"
    with rasterio.open(path, "w", "GTiff", 90, 90, 1, dtype="uint8", **options):
        pass
    with SceneReader(path) as reader:
        assert whole(reader)[0].max() == 0


def test_damaged_block_names_file_and_window(write_raster):
    path = write_raster(shape=(1, 64, 64), compress="deflate", blockysize=8)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 300] = bytes(300)
    path.write_bytes(content)
    with SceneReader(path) as reader, pytest.raises(RasterError, match=r"scene\.tif at rows 0-63"):
        whole(reader)


def test_find_rasters(write_raster, tmp_path):
    paths = [write_raster(name) for name in ("b/2.TIF", "b/c/3.tiff", "a/1.tif", "a/.hidden.tif")]
    (tmp_path / "a" / "readme.txt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    visible = sorted(paths[:3])
    assert find_rasters(tmp_path / "a") == [paths[2]]
    assert find_rasters([tmp_path / "a", str(tmp_path / "b"), paths[2]]) == visible
    assert find_rasters(f"{tmp_path}/*/*.tif*") == [paths[2]]
    assert find_rasters(f"{tmp_path}/a/*") == [paths[2]]
    assert tmp_path / "link" / "2.TIF" in find_rasters(tmp_path)


def test_find_rasters_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no raster found in .*expected a file, folder or glob of \.tif"):
        find_rasters(tmp_path)
    with pytest.raises(DataError, match="no raster found"):
        find_rasters(f"{tmp_path}/*.tif")
    with pytest.raises(DataError, match="an empty list"):
        find_rasters([])
    with pytest.raises(RasterError, match="no such file or folder"):
        find_rasters(tmp_path / "absent")


def holed(write_raster, **changes):
    """A 40 x 40 raster of 1 m whose numbers grow along the rows, with a hole of nodata."""
    array = np.broadcast_to(np.arange(40, dtype=np.float32) + 100, (1, 40, 40)).copy()
    array[0, 10:15, 10:15] = -9999
    return write_raster(array=array, nodata=-9999, origin=(400_000, 3_280_000), **METRE, **changes)


def test_aligned_grid_is_read_directly(write_raster, monkeypatch):
    path = holed(write_raster)
    monkeypatch.setattr(reader_module, "warp_onto", None)
    grid = inspect_scene(path).grid.window_grid(Window(30, -5, 20, 20))
    numbers, valid = read_on_grid(path, grid)
    with SceneReader(path) as reader:
        expected, expected_valid = reader.read(Window(30, -5, 20, 20))
    np.testing.assert_array_equal(numbers, expected)
    np.testing.assert_array_equal(valid, expected_valid)


def test_nearest_on_a_finer_grid_repeats_pixels(write_raster):
    path = holed(write_raster)
    coarse = inspect_scene(path).grid
    fine = PixelGrid(coarse.crs, coarse.transform @ Affine.scale(0.1), 400, 400)
    numbers, valid = read_on_grid(path, fine)
    with SceneReader(path) as reader:
        expected, expected_valid = whole(reader)
    np.testing.assert_array_equal(numbers[0], np.kron(expected[0], np.ones((10, 10))))
    np.testing.assert_array_equal(valid, np.kron(expected_valid, np.ones((10, 10))) > 0)


@pytest.mark.parametrize("limit", [2**22, 200])
def test_average_counts_valid_pixels_only(write_raster, monkeypatch, limit):
    monkeypatch.setattr(scaling, "_MAX_SOURCE_PIXELS", limit)
    path = holed(write_raster)
    with SceneReader(path) as reader:
        array, mask = whole(reader)
    grid = inspect_scene(path).grid.coarsen(4)
    numbers, valid = read_on_grid(path, grid, resampling="average")
    cells = np.where(mask, array[0], 0).reshape(10, 4, 10, 4).sum(axis=(1, 3))
    counts = mask.reshape(10, 4, 10, 4).sum(axis=(1, 3))
    np.testing.assert_array_equal(valid, counts > 0)
    np.testing.assert_allclose(numbers[0][valid], (cells / np.maximum(counts, 1))[valid], rtol=1e-6)
    assert (numbers[0][~valid] == -9999).all()


def test_average_of_whole_numbers_is_rounded(write_raster):
    array = np.array([[1, 2], [2, 2]], dtype=np.uint8)
    path = write_raster(array=array, **METRE)
    numbers, valid = read_on_grid(path, inspect_scene(path).grid.coarsen(2), resampling="average")
    assert numbers.tolist() == [[[2]]] and numbers.dtype == np.uint8 and valid.all()


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "average"])
@pytest.mark.parametrize(
    "transform",
    [
        Affine(0.7, 0, 400_001.3, 0, -0.7, 3_279_998.8),
        Affine(2.6, 0, 399_980.0, 0, -2.6, 3_280_020.0),
        Affine(1.0, 0, 400_000.5, 0, 1.0, 3_279_960.0),
    ],
)
def test_nodata_never_bleeds(write_raster, resampling, transform):
    path = holed(write_raster)
    grid = PixelGrid(CRS.from_epsg(32617), transform, 41, 37)
    numbers, valid = read_on_grid(path, grid, resampling=resampling)
    assert valid.any() and not valid.all()
    assert numbers[0][valid].min() >= 100 and numbers[0][valid].max() <= 139
    x = transform.c + (np.arange(37) + 0.5) * transform.a - 400_000
    expected = np.broadcast_to(100 + x - 0.5, (41, 37))
    # The hole shifts the mean of what is left by less than half its width.
    assert np.abs(numbers[0] - expected)[valid].max() < 3.1


@pytest.mark.parametrize("limit", [2**25, 200])
def test_other_utm_zone_keeps_the_place(write_raster, monkeypatch, limit):
    monkeypatch.setattr(warping, "_MAX_SOURCE_PIXELS", limit)
    path = holed(write_raster)
    own = inspect_scene(path).grid
    from rasterio.warp import transform_bounds

    other = CRS.from_epsg(32616)
    west, _, _, north = transform_bounds(own.crs, other, *own.bounds)
    grid = PixelGrid(other, Affine(0.5, 0, west - 2, 0, -0.5, north + 2), 100, 100)
    numbers, valid = read_on_grid(path, grid)
    assert 0.5 < valid.mean() < 0.9
    from rasterio.warp import transform

    rows, cols = np.nonzero(valid)
    xs, ys = transform(other, own.crs, west - 2 + (cols + 0.5) * 0.5, north + 2 - (rows + 0.5) * 0.5)
    expected = 100 + np.floor(np.array(xs) - 400_000)
    assert (numbers[0][valid] == expected).mean() > 0.98
    assert np.abs(numbers[0][valid] - expected).max() <= 1


def test_grid_elsewhere_has_nothing_valid(write_raster):
    path = holed(write_raster)
    grid = PixelGrid(CRS.from_epsg(32617), Affine(0.3, 0, 500_000, 0, -0.3, 3_280_000), 5, 6)
    numbers, valid = read_on_grid(path, grid)
    assert numbers.shape == (1, 5, 6) and not valid.any() and (numbers == -9999).all()


def test_south_up_raster_on_a_north_up_grid(write_raster):
    path = write_raster(transform=Affine(0.5, 0, 400_000, 0, 0.25, 3_280_000))
    numbers, valid = read_on_grid(path, inspect_scene(path).grid.southward())
    with SceneReader(path) as reader:
        np.testing.assert_array_equal(numbers, whole(reader)[0][:, ::-1])
    assert valid.all()


def test_unknown_resampling_lists_the_valid_ones(write_raster):
    path = write_raster()
    with pytest.raises(UserError, match="average, bilinear, nearest"):
        read_on_grid(path, inspect_scene(path).grid, resampling="cubic")


def test_real_height_lies_on_its_image(data_root):
    image = inspect_scene(data_root / "teak" / "rgb" / "TEAK_043.tif")
    heights = data_root / "teak" / "chm" / "TEAK_043.tif"
    numbers, valid = read_on_grid(heights, image.grid)
    with rasterio.open(heights) as dataset:
        expected = np.kron(dataset.read(1), np.ones((10, 10)))
    np.testing.assert_array_equal(numbers[0], expected)
    np.testing.assert_array_equal(valid, expected != -9999)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads resident memory from /proc")
def test_open_bytes_count_the_buffers_that_gdal_keeps(write_raster):
    """A file of one block of 1 MiB, deflated noise: without the two buffers 0.1 MiB would be counted."""
    numbers = np.random.default_rng(0).integers(0, 255, (4, 512, 512), dtype=np.uint8)
    options = {
        "compress": "deflate",
        "interleave": "pixel",
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
    }
    paths = [write_raster(f"{number}.tif", array=numbers, **options) for number in range(48)]
    # In a process of its own: this one may hold freed memory that the buffers would fit into.
    command = [sys.executable, "-c", COUNTED_AND_GROWN, str(2 * numbers.nbytes), *map(str, paths)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    counted, grown = (int(number) for number in answer.stdout.split())
    assert counted / 3 < grown < 1.2 * counted


COUNTED_AND_GROWN = """
import sys
from pathlib import Path
from rasterio.env import set_gdal_config
from rasterio.windows import Window
from dinov3geo.rasters.reader import SceneReader

def resident_bytes():
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

set_gdal_config("GDAL_CACHEMAX", int(sys.argv[1]))
begin = resident_bytes()
readers = [SceneReader(path) for path in sys.argv[2:]]
for reader in readers:
    reader.read(Window(0, 0, 512, 512))
print(sum(reader.open_bytes for reader in readers), resident_bytes() - begin)
"""
