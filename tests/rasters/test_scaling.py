"""Pixels of another size on the same axes: closed forms, holes, and no seam between windows."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio import warp
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.windows import Window

from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneReader, read_on_grid

WriteRaster = Callable[..., Path]
UTM = CRS.from_epsg(32617)
CORNER = Affine(0.6, 0, 500_000.3, 0, -0.6, 4_400_000.7)


def scaled(own: PixelGrid, factor: float) -> PixelGrid:
    """A grid of the same corner that covers another one."""
    height, width = (int(np.ceil(length / factor - 1e-6)) for length in own.shape_hw)
    return PixelGrid(own.crs, own.transform @ Affine.scale(factor), height, width)


def read(path: Path, factor: float, resampling: str) -> tuple[np.ndarray, np.ndarray]:
    with SceneReader(path) as reader:
        return read_on_grid(reader, scaled(reader.info.grid, factor), resampling=resampling)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int32"])
@pytest.mark.parametrize(("factor", "resampling"), [(0.3, "bilinear"), (1.7, "average"), (41.0, "average")])
def test_a_constant_stays_a_constant(
    write_raster: WriteRaster, dtype: str, factor: float, resampling: str
) -> None:
    path = write_raster(array=np.full((2, 60, 70), 201, dtype=dtype), transform=CORNER)
    numbers, valid = read(path, factor, resampling)
    assert numbers.dtype == dtype and (numbers[:, valid] == 201).all()
    # Finer pixels may begin before the edge and have their centre beyond it.
    assert valid[:-1, :-1].all() and (resampling == "bilinear" or valid.all())


def test_a_checkerboard_is_averaged(write_raster: WriteRaster) -> None:
    board = (np.indices((60, 60)).sum(axis=0) % 2 * 200).astype(np.float32)[None]
    path = write_raster(array=board, transform=CORNER)
    numbers, valid = read(path, 2.0, "average")
    assert valid.all() and (numbers == 100).all()
    # Of 3 x 3 pixels, 5 and 4 by turns have the colour of the corners.
    numbers, _ = read(path, 3.0, "average")
    np.testing.assert_allclose(numbers[0], np.where(np.indices((20, 20)).sum(axis=0) % 2, 1000, 800) / 9)


def test_halves_are_rounded_up(write_raster: WriteRaster) -> None:
    array = np.tile(np.array([[126, 127], [127, 126]], dtype=np.uint8), (4, 4))[None]
    for nodata in (None, 0):
        numbers, _ = read(write_raster(array=array, transform=CORNER, nodata=nodata), 2.0, "average")
        assert (numbers == 127).all()


def test_a_slope_is_interpolated(write_raster: WriteRaster) -> None:
    slope = np.broadcast_to(np.arange(40, dtype=np.float64) + 0.5, (1, 30, 40))
    path = write_raster(array=slope, transform=CORNER)
    numbers, valid = read(path, 0.4, "bilinear")
    centres = (np.arange(100) + 0.5) * 0.4
    np.testing.assert_allclose(numbers[0], np.broadcast_to(np.clip(centres, 0.5, 39.5), (75, 100)), rtol=1e-6)
    assert valid.all()


@pytest.mark.parametrize(("factor", "resampling"), [(0.4, "bilinear"), (2.5, "average")])
def test_pixels_without_data_never_flow_into_others(
    write_raster: WriteRaster, factor: float, resampling: str
) -> None:
    array = np.full((1, 50, 50), 90, dtype=np.uint8)
    array[:, 10:23, 6:31] = 255
    path = write_raster(array=array, transform=CORNER, nodata=255)
    numbers, valid = read(path, factor, resampling)
    assert (numbers[:, valid] == 90).all() and (numbers[:, ~valid] == 255).all()
    known = array[0] == 90
    edges = np.arange(len(valid) + 1) * factor
    if resampling == "average":
        spans = [slice(int(low + 1e-9), int(np.ceil(high - 1e-9))) for low, high in pairwise(edges)]
        np.testing.assert_array_equal(valid, [[known[y, x].any() for x in spans] for y in spans])
    else:
        # Most of the weight is that of the pixel around the centre, but at the corners of the hole.
        centres = ((edges[:-1] + edges[1:]) / 2).astype(int)
        assert np.count_nonzero(valid != known[np.ix_(centres, centres)]) <= 4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [0.5, 0.73, 1.3, 2.0, 3.0, 3.7, 10.0])
def test_windows_equal_the_whole_to_the_last_bit(
    write_raster: WriteRaster, factor: float, masked: bool
) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(1, 256, (3, 331, 287), dtype=np.uint8)
    array[:, 100:150, 60:180] = 0
    path = write_raster(array=array, transform=CORNER, nodata=0 if masked else None)
    resampling = "average" if factor > 1 else "bilinear"
    with SceneReader(path) as reader:
        grid = scaled(reader.info.grid, factor)
        numbers, valid = read_on_grid(reader, grid, resampling=resampling)
        for row in range(0, grid.height, 57):
            for col in range(0, grid.width, 83):
                window = Window(col, row, min(83, grid.width - col), min(57, grid.height - row))
                here = window.toslices()
                part, known = read_on_grid(reader, grid.window_grid(window), resampling=resampling)
                np.testing.assert_array_equal(part, numbers[:, *here])
                np.testing.assert_array_equal(known, valid[here])


@pytest.mark.parametrize(("factor", "resampling"), [(0.37, "bilinear"), (1.2, "bilinear"), (3.3, "average")])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_numbers_are_those_of_gdal(
    write_raster: WriteRaster, factor: float, resampling: str, direction: float
) -> None:
    rng = np.random.default_rng(1)
    array = rng.uniform(0, 100, (2, 90, 120)).astype(np.float32)
    path = write_raster(array=array, transform=CORNER)
    with SceneReader(path) as reader:
        grid = scaled(reader.info.grid, factor)
        if direction < 0:
            turned = grid.transform @ Affine.translation(0, grid.height) @ Affine.scale(1, -1)
            grid = PixelGrid(UTM, turned, *grid.shape_hw)
        numbers, _ = read_on_grid(reader, grid, resampling=resampling)
    expected = np.zeros_like(numbers)
    with rasterio.open(path) as dataset:
        warp.reproject(
            dataset.read(),
            expected,
            src_transform=dataset.transform,
            src_crs=UTM,
            dst_transform=grid.transform,
            dst_crs=UTM,
            resampling=Resampling[resampling],
            tolerance=0,
            XSCALE=f"{1 / factor}",
            YSCALE=f"{1 / factor}",
        )
    inside = (slice(None), slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(numbers[inside], expected[inside], rtol=2e-5, atol=1e-3)


def test_a_grid_beside_the_raster_holds_nothing(write_raster: WriteRaster) -> None:
    path = write_raster(array=np.ones((1, 20, 20), dtype=np.uint8), transform=CORNER, nodata=7)
    beside = PixelGrid(UTM, CORNER @ Affine.translation(500, 3) @ Affine.scale(2), 4, 5)
    for resampling in ("average", "bilinear"):
        numbers, valid = read_on_grid(path, beside, resampling=resampling)
        assert not valid.any() and (numbers == 7).all() and numbers.shape == (1, 4, 5)
