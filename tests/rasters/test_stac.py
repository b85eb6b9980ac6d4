"""Rasters named by STAC documents."""

import json
from pathlib import Path

import pytest

from dinov3geo.errors import DataError, RasterError
from dinov3geo.rasters.reader import find_rasters


def asset(href: str, **more: object) -> dict:
    return {"href": href, "type": "image/tiff; application=geotiff; profile=cloud-optimized", **more}


def item(name: str, **assets: dict) -> dict:
    return {"type": "Feature", "stac_version": "1.1.0", "id": name, "properties": {}, "assets": assets}


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def rasters(write_raster) -> list[Path]:
    return [write_raster(f"images/{name}.tif") for name in ("b", "a")]


def test_an_item_collection_names_its_rasters(tmp_path, rasters):
    items = [item(path.stem, data=asset(f"./images/{path.name}")) for path in rasters]
    items[0]["assets"]["thumb"] = asset("images/thumb.tif", roles=["thumbnail"])
    items[0]["assets"]["info"] = {"href": "info.json", "type": "application/json"}
    document = save(tmp_path / "items.json", {"type": "FeatureCollection", "features": items})
    assert find_rasters(document) == sorted(rasters)
    assert find_rasters([document, rasters[0]]) == sorted(rasters)


def test_absolute_addresses_and_file_urls_count(tmp_path, rasters):
    odd = rasters[0].rename(rasters[0].with_name("a scene.tif"))
    items = [item("a", data=asset(odd.as_uri())), item("b", data=asset(str(rasters[1])))]
    document = save(tmp_path / "x" / "items.geojson", {"type": "FeatureCollection", "features": items})
    assert find_rasters(str(document)) == sorted([odd, rasters[1]])


def test_catalogues_are_followed_to_their_items_once(tmp_path, rasters):
    save(tmp_path / "deep" / "item.json", item("a", image=asset("../images/a.tif")))
    links = [{"rel": "item", "href": "./item.json"}, {"rel": "child", "href": "../catalog.json"}]
    save(tmp_path / "deep" / "collection.json", {"type": "Collection", "links": links})
    top = [{"rel": "self", "href": "https://x.example"}, {"rel": "child", "href": "deep/collection.json"}]
    document = save(tmp_path / "catalog.json", {"type": "Catalog", "links": top})
    assert find_rasters(document) == [tmp_path / "images" / "a.tif"]


def test_one_of_several_assets_is_named(tmp_path, rasters):
    several = item("s", red=asset("images/a.tif"), nir=asset("images/b.tif"))
    document = save(tmp_path / "items.json", several)
    with pytest.raises(DataError, match=r"several rasters \(nir, red\).*items.json#visual"):
        find_rasters(document)
    assert find_rasters(f"{document}#nir") == [rasters[0]]
    with pytest.raises(DataError, match=r"no asset 'blue'; it has: nir, red"):
        find_rasters(f"{document}#blue")
    several["assets"]["red"]["roles"] = ["data"]
    assert find_rasters(save(tmp_path / "items.json", several)) == [rasters[1]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "no STAC document"),
        ("{", "is no JSON"),
        ('{"type": "Topology"}', "no STAC document"),
        ('{"type": "FeatureCollection", "features": []}', "names no STAC item"),
        (json.dumps(item("a")), "no raster among its assets"),
        (json.dumps(item("a", data=asset("ftp://host/a.tif"))), "neither on this machine"),
        (json.dumps(item("a", data=asset(""))), "without an address"),
    ],
)
def test_what_is_no_stac_of_local_files_is_refused(tmp_path, content, words):
    document = tmp_path / "items.json"
    document.write_text(content)
    with pytest.raises(DataError, match=words):
        find_rasters(document)


def test_remote_rasters_become_addresses_of_gdal(tmp_path, rasters):
    items = [item("a", data=asset("s3://bucket/a.tif")), item("b", data=asset("images/b.tif"))]
    document = save(tmp_path / "items.json", {"type": "FeatureCollection", "features": items})
    assert find_rasters(document) == sorted([Path("/vsis3/bucket/a.tif"), rasters[0]])


def test_tables_that_hold_no_items_are_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "items.parquet"
    parquet.write_table(arrow.table({"id": ["a"], "geometry": [b""]}), path)
    with pytest.raises(DataError, match=r"no column assets; expected STAC-GeoParquet, it has id, geometry"):
        find_rasters(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        find_rasters(path)


def test_missing_files_are_named(tmp_path):
    document = save(tmp_path / "items.json", item("a", data=asset("gone.tif")))
    with pytest.raises(RasterError, match=r"no such file: .*gone.tif \(named by"):
        find_rasters(document)


def test_items_that_this_package_writes_are_read(tmp_path, write_raster):
    from dinov3geo.predict.sidecars import stac_item

    raster = write_raster("map.tif", shape=(1, 8, 8), dtype="float32")
    document = save(tmp_path / "map.stac.json", stac_item(raster))
    assert find_rasters(document) == [raster]
