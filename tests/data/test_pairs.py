import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio import warp

from dinov3geo.data.pairs import _chips, find_pairs, load_pair, match_pairs, overlap_groups
from dinov3geo.errors import DataError, GeoreferenceError
from dinov3geo.rasters.reader import inspect_scene

X, Y = 400_000.0, 3_280_000.0


@pytest.fixture
def write_heights(write_raster):
    def write(name="heights.tif", *, array=None, shape=(4, 6), pixel_size=1.0, nodata=-9999.0, **options):
        if array is None:
            array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        return write_raster(name, array=array, pixel_size=pixel_size, nodata=nodata, **options)

    return write


def test_heights_of_ten_times_the_pixel_size_are_read_without_resampling(write_raster, write_heights):
    image = write_raster("image.tif", shape=(3, 40, 60))
    heights = write_heights()
    (pair,) = find_pairs(image, heights)
    arrays = load_pair(pair)
    assert pair.factor == 10
    assert arrays.image.shape == (3, 40, 60) and arrays.image.dtype == np.uint8
    assert arrays.valid.all() and arrays.target_valid.all()
    np.testing.assert_array_equal(arrays.target, np.arange(24, dtype=np.float32).reshape(4, 6))


def test_partners_are_found_by_place_and_not_by_name_or_order(write_raster, write_heights):
    images = [
        write_raster(f"rgb/{n}.tif", shape=(3, 40, 60), origin=(X + 100 * i, Y)) for i, n in enumerate("abc")
    ]
    heights = [
        write_heights(f"chm/{n}.tif", origin=(X + 100 * i, Y), array=np.full((4, 6), i, np.float32))
        for n, i in (("a", 2), ("b", 0), ("z", 1))
    ]
    match = match_pairs(images[0].parent, heights[0].parent)
    found = {
        pair.image.stem: (pair.target.stem, float(load_pair(pair).target.mean())) for pair in match.pairs
    }
    assert found == {"a": ("b", 0.0), "b": ("z", 1.0), "c": ("a", 2.0)}
    assert match.unmatched_images == () and match.unmatched_targets == ()
    assert len({pair.group for pair in match.pairs}) == 3


def test_windows_begin_at_a_corner_of_the_height_cells(write_raster, write_heights):
    # The image begins 0.3 m east and 0.7 m south of a height cell's corner and ends within a cell.
    image = write_raster("image.tif", shape=(1, 38, 55), origin=(X + 0.3, Y - 0.7))
    heights = write_heights(shape=(6, 8))
    (pair,) = find_pairs(image, heights)
    assert (pair.window.col_off, pair.window.row_off) == (7, 3)
    assert (pair.window.width, pair.window.height) == (40, 30)
    expected = np.arange(48, dtype=np.float32).reshape(6, 8)[1:4, 1:5]
    np.testing.assert_array_equal(load_pair(pair).target, expected)


def test_south_up_heights_come_out_north_up(write_raster, write_heights):
    image = write_raster("image.tif", shape=(3, 40, 60))
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    transform = Affine(1, 0, X, 0, 1, Y - 4)
    heights = write_heights(array=array[::-1], transform=transform)
    (pair,) = find_pairs(image, heights)
    np.testing.assert_allclose(load_pair(pair).target, array, atol=1e-4)


def test_rasters_in_two_zones_meet_only_where_they_overlap(write_raster, write_heights):
    here = write_raster("a.tif", shape=(3, 40, 60))
    write_raster("b.tif", shape=(3, 40, 60), crs="EPSG:32611")
    (pair,) = find_pairs(here.parent / "[ab].tif", write_heights("chm/h.tif"))
    assert pair.image == here


def test_heights_in_another_crs_are_warped_onto_the_image(write_raster, write_heights):
    image = write_raster("image.tif", shape=(3, 200, 200), pixel_size=0.5)
    left, bottom, right, top = warp.transform_bounds(
        "EPSG:32617", "EPSG:32618", X - 50, Y - 150, X + 150, Y + 50
    )
    transform = Affine.translation(left, top) * Affine.scale(1, -1)
    shape = (round(top - bottom), round(right - left))
    heights = write_heights(array=np.full(shape, 7, np.float32), crs="EPSG:32618", transform=transform)
    (pair,) = find_pairs(image, heights)
    arrays = load_pair(pair)
    assert pair.factor == 2 and arrays.target.shape == (100, 100)
    assert arrays.target_valid.mean() > 0.99
    np.testing.assert_allclose(arrays.target[arrays.target_valid], 7, atol=1e-4)


def test_finer_heights_are_averaged_over_coarse_pixels(write_raster, write_heights):
    image = write_raster("image.tif", shape=(4, 4, 6), pixel_size=10.0)
    array = np.random.default_rng(0).uniform(0, 30, (40, 60)).astype(np.float32)
    (pair,) = find_pairs(image, write_heights(array=array))
    expected = array.reshape(4, 10, 6, 10).mean(axis=(1, 3))
    assert pair.factor == 1
    np.testing.assert_allclose(load_pair(pair).target, expected, rtol=1e-4)


def test_nodata_holes_are_not_valid(write_raster, write_heights):
    array = np.full((4, 6), 5, np.float32)
    array[1, 2] = -9999
    image = write_raster("image.tif", shape=(3, 40, 60))
    arrays = load_pair(find_pairs(image, write_heights(array=array))[0])
    expected = np.ones((4, 6), bool)
    expected[1, 2] = False
    np.testing.assert_array_equal(arrays.target_valid, expected)
    assert arrays.target[1, 2] == 0


def test_slightly_negative_heights_become_zero_and_few_outliers_are_left_out(write_raster, write_heights):
    array = np.full((20, 20), 5, np.float32)
    array[0, 0], array[3, 3] = -0.4, 500
    image = write_raster("image.tif", shape=(3, 200, 200))
    arrays = load_pair(find_pairs(image, write_heights(array=array))[0])
    assert arrays.target[0, 0] == 0 and arrays.target_valid[0, 0]
    assert not arrays.target_valid[3, 3] and arrays.target_valid.sum() == 399


@pytest.mark.parametrize(("value", "nodata"), [(-9999, None), (1850, -9999.0)])
def test_numbers_that_are_no_heights_in_metres_are_an_error(write_raster, write_heights, value, nodata):
    array = np.full((4, 6), 5, np.float32)
    array[:2] = value
    pair = find_pairs(
        write_raster("image.tif", shape=(3, 40, 60)), write_heights(array=array, nodata=nodata)
    )[0]
    with pytest.raises(DataError, match=r"heights\.tif holds 12 of 24 cells outside -1 to 120 m"):
        load_pair(pair)


def test_undeclared_nan_is_an_error(write_raster, write_heights):
    array = np.full((4, 6), 5, np.float32)
    array[0, 0] = np.nan
    pair = find_pairs(write_raster("image.tif", shape=(3, 40, 60)), write_heights(array=array))[0]
    with pytest.raises(DataError, match="NaN"):
        load_pair(pair)


def test_heights_of_several_bands_are_an_error(write_raster, write_heights):
    heights = write_heights(array=np.ones((2, 4, 6), np.float32))
    pair = find_pairs(write_raster("image.tif", shape=(3, 40, 60)), heights)[0]
    with pytest.raises(DataError, match="2 bands"):
        load_pair(pair)


def test_heights_that_overlap_no_image_are_named_with_both_extents(write_raster, write_heights):
    image = write_raster("image.tif", shape=(3, 40, 60))
    heights = write_heights(origin=(X + 1000, Y))
    with pytest.raises(GeoreferenceError) as caught:
        find_pairs(image, heights)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "heights.tif",
        "image.tif",
        "x 401000.0 to 401006.0",
        "x 400000.0 to 400006.0",
        "EPSG:32617",
    ):
        assert part in message


def test_neighbours_that_only_touch_are_no_pair(write_raster, write_heights):
    image = write_raster("image.tif", shape=(3, 40, 60))
    with pytest.raises(GeoreferenceError):
        find_pairs(image, write_heights(origin=(X + 6, Y)))


def test_files_without_partner_are_counted(write_raster, write_heights):
    images = [write_raster(f"rgb/{i}.tif", shape=(3, 40, 60), origin=(X + 100 * i, Y)) for i in range(3)]
    heights = [write_heights(f"chm/{i}.tif", origin=(X + 100 * i, Y)) for i in (1, 7)]
    match = match_pairs(images, heights)
    assert match.unmatched_images == (images[0], images[2])
    assert match.unmatched_targets == (heights[1],)


def test_large_images_are_cut_and_stay_in_one_group(write_raster, write_heights):
    image = write_raster("image.tif", shape=(1, 200, 130))
    array = np.arange(260, dtype=np.float32).reshape(20, 13) / 10
    pairs = find_pairs(image, write_heights(array=array), max_size=64)
    rebuilt = np.full((20, 13), np.nan, np.float32)
    for pair in pairs:
        row, col = int(pair.window.row_off) // 10, int(pair.window.col_off) // 10
        heights = load_pair(pair).target
        rebuilt[row : row + heights.shape[0], col : col + heights.shape[1]] = heights
        assert max(pair.window.width, pair.window.height) <= 64
    np.testing.assert_array_equal(rebuilt, array)
    assert len({pair.group for pair in pairs}) == 1


def test_overlapping_images_share_a_group(write_raster, write_heights):
    images = [
        write_raster(f"{name}.tif", shape=(1, 40, 60), origin=(X + shift, Y))
        for name, shift in (("a", 0), ("b", 4), ("c", 8), ("d", 14))
    ]
    pairs = find_pairs(images, write_heights(shape=(4, 30)))
    groups = {pair.image.stem: pair.group for pair in pairs}
    assert groups["a"] == groups["b"] == groups["c"] != groups["d"]


def test_images_of_the_same_ground_in_two_crs_share_a_group(write_raster, write_heights):
    here = write_raster("a.tif", shape=(1, 40, 60))
    bounds = warp.transform_bounds("EPSG:32617", "EPSG:32616", X, Y - 4, X + 6, Y)
    other = write_raster("b.tif", shape=(1, 40, 60), crs="EPSG:32616", origin=(bounds[0], bounds[3]))
    neighbour = write_raster("c.tif", shape=(1, 40, 60), origin=(X + 6, Y))  # touches a in their own CRS
    far = write_raster("d.tif", shape=(1, 40, 60), crs="EPSG:32616", origin=(bounds[0] + 500, bounds[3]))
    infos = [inspect_scene(path) for path in (here, other, neighbour, far)]
    assert overlap_groups(infos) == [str(here), str(here), str(neighbour), str(far)]


def test_real_plots_pair_up_whole(data_root):
    match = match_pairs(
        [data_root / "neon/rgb", data_root / "teak/rgb"], [data_root / "neon/chm", data_root / "teak/chm"]
    )
    assert len(match.pairs) == 77
    assert all(pair.image.stem == pair.target.stem for pair in match.pairs)
    teak = load_pair(match.pairs[-1])
    assert teak.image.shape == (3, 400, 400) and teak.target.shape == (40, 40)
    assert 0 < (~teak.target_valid).sum() < 200


@settings(max_examples=200, deadline=None)
@given(
    low=st.floats(-50, 300),
    extent=st.floats(0, 400),
    length=st.integers(1, 300),
    factor=st.integers(1, 12),
    max_cells=st.integers(1, 9),
    phase=st.integers(-40, 40),
)
def test_chips_cover_the_overlap_in_whole_cells(low, extent, length, factor, max_cells, phase):
    chips = _chips(low, low + extent, length, factor, max_cells * factor, phase=phase)
    end = None
    for start, size in chips:
        assert 0 <= start and start + size <= length
        assert start >= low - 0.1 and start + size <= low + extent + 0.1
        assert (start - phase) % factor == 0 and size % factor == 0 and 0 < size <= max_cells * factor
        assert end is None or start == end
        end = start + size
    first, last = max(low, 0), min(low + extent, length)
    covered = sum(size for _, size in chips)
    assert last - first - covered < 2 * factor + 0.1
