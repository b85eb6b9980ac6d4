"""Windows put together from kept blocks are those of the file, in no more memory than allowed."""

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.windows import Window

from dinov3geo.errors import DataError
from dinov3geo.rasters.blocks import BlockCache, block_side, worth_keeping
from dinov3geo.rasters.reader import SceneReader, read_on_grid
from dinov3geo.rasters.warped import WarpedScene


@pytest.fixture(scope="module")
def striped(tmp_path_factory, write_raster_in):
    """A raster of strips of 7 rows with a hole of nodata, wider than a block that is kept."""
    array = np.random.default_rng(0).integers(1, 255, (3, 530, 610)).astype(np.uint8)
    array[:, 200:330, 240:300] = 0
    folder = tmp_path_factory.mktemp("blocks")
    return write_raster_in(folder, array=array, nodata=0, blockysize=7, compress="deflate")


@given(
    row=st.integers(-30, 540),
    col=st.integers(-30, 620),
    height=st.integers(1, 400),
    width=st.integers(1, 400),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_are_those_of_the_file(striped, row, col, height, width):
    window = Window(col, row, width, height)
    cache = BlockCache(2_000_000)
    with SceneReader(striped) as plain, SceneReader(striped, cache=cache) as kept:
        for _ in range(2):  # from the file, then from the cache
            numbers, valid = kept.read(window)
            expected, expected_valid = plain.read(window)
            np.testing.assert_array_equal(numbers, expected)
            np.testing.assert_array_equal(valid, expected_valid)
            numbers[:] = 0  # the caller's own: the cache must not change
            valid[:] = False
    assert cache.used_bytes <= cache.limit_bytes


def test_blocks_used_longest_ago_make_room():
    cache = BlockCache(100)
    for key in range(4):
        cache.put(key, (np.zeros((1, 5, 8), np.uint8), None))
        cache.get(0)
    assert cache.get(0) is not None and cache.get(3) is not None and cache.get(1) is cache.get(2) is None
    assert cache.used_bytes == 80
    cache.put("large", (np.zeros(101, np.uint8), None))
    assert cache.get("large") is None and cache.used_bytes == 0
    cache.clear()
    assert cache.used_bytes == 0


def test_blocks_are_whole_ones_of_the_file():
    assert block_side(8192, 512) == 512 and block_side(8192, 100) == 300 and block_side(60, 3) == 60
    assert worth_keeping((512, 512), 4, BlockCache(2**22)) and not worth_keeping(
        (512, 512), 5, BlockCache(2**22)
    )


def test_a_file_of_one_huge_block_is_read_past_the_cache(write_raster):
    path = write_raster(shape=(1, 300, 300), blockysize=300)
    cache = BlockCache(100_000)
    with SceneReader(path, cache=cache) as reader:
        numbers, valid = reader.read(Window(3, 5, 20, 10))
    assert cache.used_bytes == 0 and valid.all()
    np.testing.assert_array_equal(numbers, rasterio.open(path).read()[:, 5:15, 3:23])


def test_readers_of_other_bands_and_nodata_share_nothing(write_raster):
    path, cache = write_raster(array=np.arange(12, dtype=np.uint8).reshape(3, 2, 2)), BlockCache()
    window = Window(0, 0, 2, 2)
    for bands, nodata in (((1, 2), None), ((2, 1), None), ((1,), 0.0)):
        with SceneReader(path, bands=bands, nodata=nodata, cache=cache) as kept:
            numbers, valid = kept.read(window)
        np.testing.assert_array_equal(numbers, rasterio.open(path).read(list(bands)))
        assert valid.all() == (nodata is None)
    with SceneReader(path, cache=cache) as kept, pytest.raises(DataError):
        SceneReader(path, bands=(4,), cache=cache)
    assert kept.path == path


@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [0.1, 0.13])
def test_warped_blocks_are_what_one_warp_gives(striped, resampling, size):
    crs, cache = CRS.from_epsg(32616), BlockCache()
    with SceneReader(striped) as reader:
        scene = WarpedScene(
            lambda: reader, "a", reader.info.grid, crs, (size, size), lambda *_: resampling, cache
        )
        numbers, valid = scene.read_at(-5, -5, (520, 530))
        grid = scene.grid(-5, -5, (520, 530))
        assert scene.pixel_at(grid.transform.c + 0.4 * size, grid.transform.f - 0.4 * size) == (-5, -5)
        expected, expected_valid = read_on_grid(reader, grid, resampling=resampling)
    assert valid is not None and 0.3 < valid.mean() < 1
    same = valid == expected_valid
    assert same.mean() > 0.999
    both = valid & expected_valid
    # The coordinates are approximated to a hundredth of a pixel, piece by piece.
    close = np.abs(numbers[:, both].astype(int) - expected[:, both]) <= 4
    assert close.mean() > 0.995
