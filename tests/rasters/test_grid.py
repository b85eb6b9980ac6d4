"""Tests of grids, tile plans and blend weights."""

import math

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.windows import Window

from dinov3geo.errors import DataError, GeoreferenceError
from dinov3geo.rasters.grid import PixelGrid, aligned_window, blend_weights

UTM = CRS.from_epsg(32617)


def grid_of(height, width, transform=None, crs=UTM):
    return PixelGrid(crs, transform or Affine(0.5, 0, 400_000, 0, -0.5, 3_280_000), height, width)


@st.composite
def plans(draw):
    size = draw(st.integers(1, 40))
    overlap = draw(st.integers(0, size - 1))
    multiple = draw(st.integers(1, size - overlap))
    shape = draw(st.tuples(st.integers(1, 101), st.integers(1, 101)))
    return shape, size, overlap, multiple


@given(plans())
def test_tiles_cover_every_pixel_and_stay_inside(case):
    (height, width), size, overlap, multiple = case
    plan = grid_of(height, width).tiles(size, overlap, multiple)
    weights = np.zeros((height, width))
    windows = list(plan.windows())
    for window in windows:
        assert (window.height, window.width) == plan.size_hw == (min(size, height), min(size, width))
        rows, cols = window.toslices()
        assert rows.start >= 0 and rows.stop <= height and cols.start >= 0 and cols.stop <= width
        weights[rows, cols] += blend_weights(plan.size_hw, overlap)
    assert weights.min() > 0
    assert len(windows) == len(plan)
    for starts, tile in zip((plan.row_starts, plan.col_starts), plan.size_hw, strict=True):
        assert list(starts) == sorted(set(starts))
        assert all(start % multiple == 0 for start in starts[:-1])
        assert all(b - a <= tile - overlap or tile < size for a, b in zip(starts, starts[1:], strict=False))


def test_windows_run_row_by_row():
    windows = list(grid_of(10, 7).tiles(5, 2).windows())
    assert [(w.row_off, w.col_off) for w in windows] == [(r, c) for r in (0, 3, 5) for c in (0, 2)]


def test_one_pixel_scene_is_one_tile():
    plan = grid_of(1, 1).tiles(512, 128, 16)
    assert list(plan.windows()) == [Window(0, 0, 1, 1)]


@pytest.mark.parametrize(
    ("size", "overlap", "multiple"), [(8, 8, 1), (8, 9, 1), (0, 0, 1), (8, -1, 1), (16, 8, 16), (8, 0, 0)]
)
def test_impossible_tiles_are_refused(size, overlap, multiple):
    with pytest.raises(DataError):
        grid_of(100, 100).tiles(size, overlap, multiple)


@given(st.integers(1, 64), st.integers(0, 64), st.data())
def test_blend_weights_are_positive_and_symmetric(length, overlap, data):
    other = data.draw(st.integers(1, 64))
    weights = blend_weights((length, other), overlap)
    assert weights.shape == (length, other) and weights.dtype == np.float32
    assert weights.min() > 0 and weights.max() <= 1
    np.testing.assert_allclose(weights, weights[::-1, ::-1], rtol=1e-5)


@given(st.integers(1, 50), st.integers(0, 50))
def test_neighbours_that_overlap_as_planned_add_up_to_one(overlap, inner):
    size = 2 * overlap + inner
    ramp = blend_weights((2 * overlap + 1, size), overlap)[overlap]
    np.testing.assert_allclose(ramp[-overlap:] + ramp[:overlap], 1.0, rtol=1e-5)


def test_bad_blend_weights_are_refused():
    with pytest.raises(DataError):
        blend_weights((4, 4), -1)
    with pytest.raises(DataError):
        blend_weights((0, 4), 1)


def test_window_grid_keeps_pixels_in_place():
    south_up = grid_of(20, 30, Affine(0.5, 0, 10, 0, 0.25, 40))
    part = south_up.window_grid(Window(4, 6, 10, 5))
    assert part.shape_hw == (5, 10)
    assert part.transform == Affine(0.5, 0, 12, 0, 0.25, 41.5)
    assert part.bounds == (12, 41.5, 17, 42.75)
    assert south_up.bounds == (10, 40, 25, 45)
    assert south_up.resolution_xy == (0.5, 0.25)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9))
def test_coarser_grid_covers_the_fine_one(height, width, factor):
    coarse = grid_of(height, width).coarsen(factor)
    assert coarse.shape_hw == (math.ceil(height / factor), math.ceil(width / factor))
    assert coarse.resolution_xy == (0.5 * factor, 0.5 * factor)
    assert (coarse.transform.c, coarse.transform.f) == (400_000, 3_280_000)


def test_coarsening_by_nothing_is_refused():
    with pytest.raises(DataError):
        grid_of(4, 4).coarsen(0)


def test_southward_counts_the_same_pixels_from_the_north():
    south_up = grid_of(20, 30, Affine(0.5, 0, 10, 0, 0.25, 40))
    turned = south_up.southward()
    assert turned.bounds == south_up.bounds and turned.transform == Affine(0.5, 0, 10, 0, -0.25, 45)
    assert turned.southward() is turned


@pytest.mark.parametrize(
    ("epsg", "size", "origin", "expected"),
    [
        (32617, 0.1, (400_000, 3_280_000), 0.1),
        (2263, 10.0, (980_000, 200_000), 10 * 1200 / 3937),  # US survey feet
        (3857, 1.0, (0, 8_399_737.89), 0.5),  # latitude 60
        (4326, 1 / 3600, (8.0, 0.0), math.sqrt(30.715 * 30.922)),  # arc second at the equator
        (4326, 1 / 3600, (8.0, 60.0), math.sqrt(30.947 * 15.500)),
    ],
)
def test_gsd_in_metres(epsg, size, origin, expected):
    grid = grid_of(2, 2, Affine(size, 0, origin[0], 0, -size, origin[1]), CRS.from_epsg(epsg))
    assert grid.gsd_m == pytest.approx(expected, rel=2e-3)


def test_gsd_of_oblong_pixels_is_the_geometric_mean():
    assert grid_of(4, 4, Affine(2, 0, 0, 0, -8, 0)).gsd_m == pytest.approx(4.0)


def test_aligned_window_needs_whole_pixels():
    own = grid_of(20, 20)
    part = own.window_grid(Window(-3, 5, 8, 7))
    assert aligned_window(own, part) == Window(-3, 5, 8, 7)
    nudged = PixelGrid(UTM, part.transform @ Affine.translation(0.0005, 0), 7, 8)
    assert aligned_window(own, nudged) == Window(-3, 5, 8, 7)
    assert aligned_window(own, PixelGrid(UTM, part.transform @ Affine.translation(0.01, 0), 7, 8)) is None
    assert aligned_window(own, own.coarsen(2)) is None
    assert aligned_window(own, PixelGrid(CRS.from_epsg(32618), part.transform, 7, 8)) is None


def test_from_dataset_keeps_an_upright_transform(write_raster):
    transform = Affine(0.5, 0, 400_000, 0, 0.25, 3_280_000)
    with rasterio.open(write_raster(transform=transform)) as dataset:
        grid = PixelGrid.from_dataset(dataset)
    assert grid == PixelGrid(UTM, transform, 48, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crs": None}, "no coordinate reference system"),
        ({"transform": Affine.translation(4e5, 3e6) @ Affine.rotation(10)}, "rotated or sheared"),
        ({"transform": Affine(1, 0.1, 4e5, 0, -1, 3e6)}, "rotated or sheared"),
        ({"transform": Affine(-1, 0, 4e5, 0, -1, 3e6)}, "mirrored"),
        ({"transform": Affine.identity()}, "no position"),
        ({"crs": 'LOCAL_CS["our yard",UNIT["metre",1]]'}, "our yard"),
    ],
)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_unusable_georeference_is_refused(write_raster, changes, message):
    with rasterio.open(write_raster(**changes)) as dataset:
        with pytest.raises(GeoreferenceError, match=message) as caught:
            PixelGrid.from_dataset(dataset)
    assert dataset.name in str(caught.value)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_ground_control_points_alone_are_refused(tmp_path):
    path = tmp_path / "gcps.tif"
    points = [GroundControlPoint(r, c, 4e5 + c, 3e6 - r) for r in (0, 8) for c in (0, 8)]
    options = {"driver": "GTiff", "height": 8, "width": 8, "count": 1, "dtype": "uint8"}
    with rasterio.open(path, "w", **options) as dataset:
        dataset.gcps = (points, UTM)
    with rasterio.open(path) as dataset, pytest.raises(GeoreferenceError, match="ground control points"):
        PixelGrid.from_dataset(dataset)


def test_local_system_of_a_registered_name_is_that_system(write_raster):
    local = 'LOCAL_CS["RGF93 v1 / Lambert-93",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
    with rasterio.open(write_raster(crs=local)) as dataset:
        assert PixelGrid.from_dataset(dataset).crs == CRS.from_epsg(2154)
