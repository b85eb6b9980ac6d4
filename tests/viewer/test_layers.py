"""Layers of the web map: tiles, legends and numbers, against the arrays that were written."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image
from rasterio import warp
from rasterio.crs import CRS
from rasterio.transform import from_bounds

from dinov3geo.errors import DataError, GeoreferenceError, RasterError

pytest.importorskip("rio_tiler")

from dinov3geo.viewer.layers import (  # noqa: E402
    MAX_ZOOM,
    MapLayer,
    cell_at,
    deepest_zoom,
    empty_tile,
    lonlat_bounds,
    open_layers,
)
from dinov3geo.viewer.similarity import SimilarityLayer  # noqa: E402

WriteRaster = Callable[..., Path]
ZOOM, COL, ROW = 12, 1115, 1690
SIDE = 256


def tile_transform(zoom: int, col: int, row: int) -> Affine:
    """Pixels of a tile of Web Mercator, from its definition."""
    edge = math.pi * 6378137
    side = 2 * edge / 2**zoom
    west, north = col * side - edge, edge - row * side
    return from_bounds(west, north - side, west + side, north, SIDE, SIDE)


def on_tile(write_raster: WriteRaster, name: str, array: np.ndarray, **options: object) -> Path:
    """A raster whose pixels are those of one tile."""
    return write_raster(
        name, array=array, crs="EPSG:3857", transform=tile_transform(ZOOM, COL, ROW), **options
    )


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def lonlat(x: float, y: float, crs: object = "EPSG:32617") -> tuple[float, float]:
    (lon,), (lat,) = warp.transform(CRS.from_user_input(crs), CRS.from_epsg(4326), [x], [y])
    return lon, lat


def test_a_tile_holds_the_colours_of_the_values_and_nothing_where_there_is_no_data(write_raster):
    values = np.random.default_rng(0).uniform(0, 30, (SIDE, SIDE)).astype(np.float32)
    values[10:20, 30:40] = -9999
    values[5, 5] = np.nan
    (layer,) = open_layers([on_tile(write_raster, "h.tif", values, nodata=-9999.0)])
    pixels = decode(layer.tile(ZOOM, COL, ROW))
    known = np.isfinite(values) & (values >= 0)
    assert (pixels[..., 3] == 255 * known).all()
    expected = matplotlib.colormaps["viridis"](np.clip(values / layer.high, 0, 1), bytes=True)
    assert (pixels[known] == expected[known]).all()
    assert layer.low == 0 and layer.high == 30


def test_zero_metres_is_a_height(write_raster):
    (layer,) = open_layers([on_tile(write_raster, "h.tif", np.zeros((SIDE, SIDE), np.float32), nodata=-9999)])
    assert (decode(layer.tile(ZOOM, COL, ROW))[..., 3] == 255).all()


def test_tiles_elsewhere_are_empty(files):
    layers = open_layers([files.heights, files.scene])
    for layer in layers:
        assert layer.tile(3, 0, 0) == empty_tile()
        assert not decode(layer.tile(3, 0, 0)).any()


def test_photographs_are_drawn_as_they_are(write_raster):
    image = np.random.default_rng(1).integers(1, 255, (4, SIDE, SIDE)).astype(np.uint8)
    (layer,) = open_layers([on_tile(write_raster, "rgb.tif", image, photometric="rgb", alpha="yes")])
    assert layer.kind == "image" and layer.legend() == {}
    opaque = image.copy()
    opaque[3] = 255
    (layer,) = open_layers([on_tile(write_raster, "opaque.tif", opaque, photometric="rgb", alpha="yes")])
    assert (decode(layer.tile(ZOOM, COL, ROW)) == np.moveaxis(opaque, 0, -1)).all()


def test_wide_numbers_are_stretched(write_raster):
    image = np.linspace(0, 10_000, SIDE * SIDE * 3).reshape(3, SIDE, SIDE).astype(np.uint16)
    (layer,) = open_layers([on_tile(write_raster, "u16.tif", image)])
    pixels = decode(layer.tile(ZOOM, COL, ROW))
    assert pixels[..., :3].min() == 0 and pixels[..., :3].max() == 255
    assert (np.diff(pixels[..., 0].ravel().astype(int)) >= 0).all()


def test_classes_have_their_names_and_colours(write_raster):
    array = np.random.default_rng(2).integers(0, 3, (SIDE, SIDE)).astype(np.uint8)
    array[:4] = 255
    tags = {"CLASS_0": "water", "CLASS_1": "forest", "CLASS_2": "road"}
    path = on_tile(write_raster, "c.tif", array, nodata=255, tags=tags)
    table = {0: (0, 0, 255, 255), 1: (0, 160, 0, 255), 2: (99, 99, 99, 255)}
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, table)
    (layer,) = open_layers([path])
    assert [entry["label"] for entry in layer.legend()["classes"]] == ["water", "forest", "road"]
    assert layer.legend()["classes"][2]["colour"] == "#636363"
    pixels = decode(layer.tile(ZOOM, COL, ROW))
    for number, colour in table.items():
        assert (pixels[array == number] == colour).all()
    assert not pixels[:4].any()
    x, y = tile_transform(ZOOM, COL, ROW) @ (100.5, 50.5)
    assert layer.value_at(*lonlat(x, y, "EPSG:3857"))["text"] == tags[f"CLASS_{array[50, 100]}"]


def test_classes_without_names_are_those_that_occur(write_raster):
    array = np.full((8, 8), 7, np.uint8)
    array[0] = 3
    path = write_raster("c.tif", array=array)
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, {3: (1, 2, 3, 255), 7: (4, 5, 6, 255)})
    (layer,) = open_layers([path])
    assert dict(layer.classes) == {3: ("class 3", (1, 2, 3)), 7: ("class 7", (4, 5, 6))}


def test_every_pixel_gives_its_own_number(files):
    (layer,) = open_layers([files.heights])
    generator = np.random.default_rng(5)
    for row, col in generator.integers(0, 64, (40, 2)):
        x, y = layer.grid.transform @ (col + generator.uniform(0.01, 0.99), row + 0.5)
        found = layer.value_at(*lonlat(x, y))
        number = files.array[row, col]
        assert (found["row"], found["col"]) == (row, col)
        assert found["x"] == pytest.approx(x, abs=1e-6) and found["y"] == pytest.approx(y, abs=1e-6)
        if number < 0:
            assert found["text"] == "no data" and found["values"] == [None]
        else:
            assert np.float32(found["values"][0]) == number
            assert np.float32(found["text"]) == number


@pytest.mark.parametrize("south_up", [False, True])
def test_rows_may_run_northwards(write_raster, south_up):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    transform = Affine(10, 0, 400_000, 0, 10 if south_up else -10, 3_280_000)
    (layer,) = open_layers([write_raster(array=array, transform=transform)])
    assert layer.value_at(*lonlat(400_015, 3_280_000 + (25 if south_up else -25)))["values"] == [9]


def test_whole_numbers_with_a_scale_are_shown_as_values(write_raster):
    path = write_raster(array=np.full((4, 4), 123, np.uint16), nodata=65535)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.units = (0.1,), ("m",)
    (layer,) = open_layers([path])
    found = layer.value_at(*lonlat(400_000.15, 3_279_999.85))
    assert found["values"] == [pytest.approx(12.3)] and found["text"] == "12.3 m"
    assert layer.unit == "m" and layer.high == 15


def test_points_outside_have_no_number(files):
    (layer,) = open_layers([files.heights])
    found = layer.value_at(*lonlat(399_999.9, 3_279_990))
    assert found["text"] == "outside" and "values" not in found
    for lon, lat in ((0, 0), (98, 0), (0, 90), (-180, -90)):  # UTM 17 knows nothing of them
        assert layer.value_at(lon, lat)["text"] == "outside"
    assert cell_at(layer.grid, math.inf, 0.0) is None


def test_images_lie_below_maps_and_further_bands_are_hidden(write_raster, files):
    path = write_raster("two.tif", shape=(2, 8, 8), dtype="float32", band_names=("height", "spread"))
    layers = open_layers([files.heights, path, files.scene])
    assert [layer.name for layer in layers] == [
        "scene.tif",
        "two.tif: spread",
        "two.tif: height",
        "heights.tif: canopy height",
    ]
    assert [layer.shown for layer in layers] == [True, False, True, True]
    assert len({layer.key for layer in layers}) == 4


def test_rasters_of_one_invalid_value_open(write_raster):
    (layer,) = open_layers([write_raster(array=np.full((4, 4), -9999, np.float32), nodata=-9999)])
    assert (layer.low, layer.high) == (0, 1)


def test_zoom_follows_the_pixel_size(write_raster):
    coarse = open_layers([write_raster("a.tif", pixel_size=10)])[0]
    fine = open_layers([write_raster("b.tif", pixel_size=0.1)])[0]
    huge = open_layers([write_raster("c.tif", pixel_size=0.001)])[0]
    # 10 m at 29.6 degrees north: zoom 14 has pixels of 8.3 m, two deeper ones are drawn.
    assert deepest_zoom(coarse.grid) == 16
    assert deepest_zoom(fine.grid) == 23 and deepest_zoom(huge.grid) == MAX_ZOOM


def test_files_without_a_place_on_a_web_map_are_refused(write_raster, tmp_path):
    with pytest.raises(GeoreferenceError, match="no coordinate reference system"):
        open_layers([write_raster("plain.tif", crs=None)])
    polar = Affine(10, 0, 0, 0, -10, 0)
    with pytest.raises(GeoreferenceError, match="outside of what a web map shows"):
        open_layers([write_raster("polar.tif", crs="EPSG:3031", transform=polar)])
    text = tmp_path / "text.tif"
    text.write_text("no raster")
    with pytest.raises(RasterError, match="text.tif"):
        open_layers([text])
    with pytest.raises(RasterError, match="missing.tif"):
        open_layers([tmp_path / "missing.tif"])


def test_bounds_cross_the_antimeridian_eastwards(write_raster):
    path = write_raster(crs="EPSG:32601", pixel_size=1000, origin=(200_000, 100_000), shape=(1, 8, 200))
    west, _, east, _ = lonlat_bounds(open_layers([path])[0].grid, "x")
    assert -180 <= west < east
    path = write_raster(
        "b.tif", crs="EPSG:32660", pixel_size=1000, origin=(700_000, 100_000), shape=(1, 8, 300)
    )
    west, _, east, _ = lonlat_bounds(open_layers([path])[0].grid, "x")
    assert 175 < west < 180 < east < 185


def test_a_file_that_vanishes_is_an_error_of_one_line(files):
    (layer,) = open_layers([files.heights])
    files.heights.unlink()
    with pytest.raises(RasterError, match="heights.tif"):
        layer.tile(3, 0, 0)
    with pytest.raises(RasterError, match="heights.tif"):
        layer.value_at(*lonlat(400_001, 3_279_999))


def naive_similarity(features: np.ndarray, row: int, col: int) -> np.ndarray:
    query = features[:, row, col].astype(float)
    found = np.full(features.shape[1:], np.nan)
    for i, j in np.ndindex(*found.shape):
        other = features[:, i, j].astype(float)
        found[i, j] = other @ query / np.sqrt((other**2).sum() * (query**2).sum())
    return found


def test_similarity_is_the_cosine_to_the_cell_under_the_point(store, features):
    layer = SimilarityLayer(store)
    described = layer.describe(*lonlat(400_000 + 4 * 2.5, 3_280_000 - 4 * 5.2))
    assert described["key"] == "5_2"
    found = layer.map_of(5, 2)
    np.testing.assert_allclose(found.values, naive_similarity(features, 5, 2), atol=1e-6)
    assert described["legend"]["high"] == "1"
    assert layer.map_of(5, 2) is found


def test_similarity_tiles_show_the_cells_where_they_are(store, features):
    layer = SimilarityLayer(store)
    found = layer.map_of(1, 1)
    zoom = 19
    lon, lat = lonlat(400_016, 3_279_984)
    col = int((lon + 180) / 360 * 2**zoom)
    row = int((1 - math.asinh(math.tan(math.radians(lat))) / math.pi) / 2 * 2**zoom)
    pixels = decode(layer.tile(1, 1, zoom, col, row))
    transform = tile_transform(zoom, col, row)
    checked = 0
    for i, j in np.ndindex(8, 8):
        (x,), (y,) = warp.transform(
            CRS.from_epsg(32617), CRS.from_epsg(3857), [400_000 + 4 * j + 2], [3_280_000 - 4 * i - 2]
        )
        px, py = (math.floor(k) for k in ~transform @ (x, y))
        if not (0 <= px < SIDE and 0 <= py < SIDE):
            continue
        checked += 1
        share = (found.values[i, j] - found.low) / (1 - found.low)
        expected = matplotlib.colormaps["magma"](np.clip(share, 0, 1), bytes=True)
        assert (pixels[py, px] == (expected if i < 7 else (pixels[py, px][0], *pixels[py, px][1:3], 0))).all()
    assert checked > 20


def test_similarity_is_refused_outside_and_on_holes(store):
    layer = SimilarityLayer(store)
    with pytest.raises(DataError, match="outside"):
        layer.describe(*lonlat(399_999, 3_279_999))
    with pytest.raises(DataError, match="no data"):
        layer.describe(*lonlat(400_002, 3_280_000 - 30))
    with pytest.raises(DataError, match="no cell"):
        layer.map_of(8, 0)


def test_few_similarity_maps_are_kept(store):
    layer = SimilarityLayer(store)
    first = layer.map_of(0, 0)
    for col in range(1, 5):
        layer.map_of(0, col)
    assert layer.map_of(0, 0) is not first


def test_a_layer_is_described_for_the_page(files):
    described = [layer.describe() for layer in open_layers([files.scene, files.heights])]
    assert [d["kind"] for d in described] == ["image", "values"]
    west, south, east, north = described[0]["bounds"]
    lon, lat = lonlat(400_016, 3_279_984)
    assert west < lon < east and south < lat < north
    assert isinstance(open_layers([files.scene])[0], MapLayer)
