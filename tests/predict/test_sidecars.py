"""Files beside a map, read by independent programs where there are any."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS

from dinov3geo.errors import RasterError
from dinov3geo.predict.encodings import class_colours
from dinov3geo.predict.sidecars import class_names, qgis_style, stac_item, write_sidecars
from dinov3geo.rasters.geotiff import write_geotiff
from dinov3geo.rasters.grid import PixelGrid

GRID = PixelGrid(CRS.from_epsg(32617), Affine(0.5, 0, 400_000, 0, -0.5, 3_280_000), 40, 60)
CLASSES = ("water", "bare & built", "trees")


@pytest.fixture
def heights(tmp_path: Path) -> Path:
    array = np.linspace(0, 23, 40 * 60, dtype=np.float32).reshape(40, 60)
    array[:4] = -9999
    path = tmp_path / "heights.tif"
    write_geotiff(
        path,
        array,
        GRID,
        nodata=-9999,
        units="m",
        band_names=["canopy height"],
        tags={"DINOV3GEO_MODEL": "x"},
    )
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    array = np.random.default_rng(0).integers(0, 3, (40, 60)).astype(np.uint8)
    path = tmp_path / "cover.tif"
    tags = {f"CLASS_{number}": name for number, name in enumerate(CLASSES)}
    write_geotiff(path, array, GRID, nodata=255, colours=class_colours(3), overviews="mode", tags=tags)
    return path


def test_the_stac_item_is_valid_and_lies_where_the_map_lies(heights: Path) -> None:
    pystac = pytest.importorskip("pystac")
    item = pystac.Item.from_dict(stac_item(heights))
    west, south, east, north = item.bbox
    assert -82.1 < west < east < -81.9 and 29.6 < south < north < 29.7
    assert item.properties["proj:code"] == "EPSG:32617" and item.properties["proj:shape"] == [40, 60]
    assert item.properties["gsd"] == pytest.approx(0.5, rel=1e-6)
    (band,) = stac_item(heights)["assets"]["data"]["raster:bands"]
    assert (band["unit"], band["nodata"], band["data_type"]) == ("m", -9999, "float32")
    assert band["statistics"]["maximum"] == pytest.approx(23)
    assert item.properties["dinov3geo:MODEL".lower()] == "x"


def test_the_stac_item_obeys_the_schema_that_pystac_ships(heights: Path) -> None:
    pystac = pytest.importorskip("pystac")
    pytest.importorskip("jsonschema")
    item = stac_item(heights)
    # The core schemas come with the package; those of extensions would be fetched.
    item["stac_extensions"] = []
    item["stac_version"] = "1.1.0"
    pystac.Item.from_dict(item, preserve_dict=True).validate()


def test_the_date_is_that_of_the_scene_if_it_tells_one(
    heights: Path, write_raster: Callable[..., Path]
) -> None:
    dated = write_raster("dated.tif", tags={"TIFFTAG_DATETIME": "2019:06:07 12:00:01"})
    assert stac_item(heights, dated)["properties"]["datetime"] == "2019-06-07T12:00:01Z"
    plain = write_raster("plain.tif")
    assert stac_item(heights, plain)["properties"]["datetime"].startswith("20")


def test_the_style_of_heights_is_a_ramp_over_all_of_them(heights: Path) -> None:
    root = ElementTree.fromstring(qgis_style(heights))
    renderer = root.find("pipe/rasterrenderer")
    assert renderer is not None and renderer.get("type") == "singlebandpseudocolor"
    items = root.findall("pipe/rasterrenderer/rastershader/colorrampshader/item")
    values = [float(item.get("value")) for item in items]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 25
    assert all(len(item.get("color")) == 7 for item in items)


def test_the_style_of_scaled_heights_is_in_stored_numbers(tmp_path: Path) -> None:
    path = tmp_path / "dm.tif"
    write_geotiff(path, np.full((40, 60), 230, np.uint16), GRID, nodata=65535, scale=0.1, units="m")
    items = ElementTree.fromstring(qgis_style(path)).findall(".//item")
    assert float(items[-1].get("value")) == pytest.approx(250) and items[-1].get("label") == "25"


def test_classes_carry_names_and_colours_everywhere(classes: Path) -> None:
    written = write_sidecars(classes)
    assert {path.name for path in written} == {
        "cover.stac.json", "cover.qml", "cover_legend.png", "cover.tif.aux.xml",
    }  # fmt: skip
    assert class_names(classes) == CLASSES
    entries = ElementTree.parse(classes.with_name("cover.qml")).getroot().findall(".//paletteEntry")
    assert [entry.get("label") for entry in entries] == list(CLASSES)
    with rasterio.open(classes) as dataset:
        for number, entry in enumerate(entries):
            red, green, blue, _ = dataset.colormap(1)[number]
            assert f"#{red:02x}{green:02x}{blue:02x}" == entry.get("color")
    table = ElementTree.parse(classes.with_name("cover.tif.aux.xml")).getroot()
    assert [name.text for name in table.findall(".//Category")] == list(CLASSES)
    assert [row[1].text for row in table.findall(".//Row")] == list(CLASSES)


def test_sidecars_of_heights(heights: Path) -> None:
    written = write_sidecars(heights)
    assert [path.name for path in written] == ["heights.stac.json", "heights.qml", "heights_legend.png"]
    assert json.loads(written[0].read_text())["id"] == "heights"
    assert written[2].stat().st_size > 1000


def test_what_is_no_raster_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_text("no")
    with pytest.raises(RasterError, match="cannot read"):
        write_sidecars(tmp_path / "a.tif")
