"""Rasters by address: over HTTP with ranges, from lists, in virtual mosaics."""

import functools
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dinov3geo.cli import main
from dinov3geo.config import load_config
from dinov3geo.data.mixture import DataSettings, SourceSettings, chip_loader, open_sources
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import RasterError
from dinov3geo.rasters.geotiff import write_geotiff
from dinov3geo.rasters.lists import gdal_address
from dinov3geo.rasters.reader import SceneReader, inspect_scene


class Ranges(SimpleHTTPRequestHandler):
    """Answers requests for a part of a file, as object stores do, and counts the bytes."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        last = min(int(wanted[2]), len(content) - 1) if wanted and wanted[2] else len(content) - 1
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[first : last + 1])
        self.server.sent += last - first + 1

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    handler = functools.partial(Ranges, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.sent = 0
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def cog(server, write_raster, tmp_path):
    """A COG of 12 MB on the server, and its address."""
    source = write_raster("local.tif", shape=(3, 2048, 2048), pixel_size=0.5)
    with SceneReader(source) as reader:
        numbers = reader.read_at(0, 0, (2048, 2048))[0]
        write_geotiff(tmp_path / "www" / "a.tif", numbers, reader.info.grid, nodata=None)
    return f"http://127.0.0.1:{server.server_port}/a.tif", numbers


def test_a_window_over_http_fetches_a_part_of_the_file(server, cog):
    address, numbers = cog
    dataset = SceneDataset(address)
    info = next(iter(dataset.infos.values()))
    found, valid = dataset.read_window(info.path, 600, 700, (64, 80))
    np.testing.assert_array_equal(found, numbers[:, 600:664, 700:780])
    assert valid.all() and 0 < server.sent < numbers.nbytes / 3


def test_a_training_reads_addresses_and_lists_of_them(cog, write_raster, tmp_path):
    address, _ = cog
    write_raster("b.tif", shape=(3, 64, 64), pixel_size=0.5, origin=(500_000, 3_280_000))
    listed = tmp_path / "list.txt"
    listed.write_text(f"{address}\nb.tif\n")
    for path in (address, "list.txt"):
        settings = DataSettings(root=tmp_path, chip_size=32, sources=(SourceSettings(path=path),), workers=0)
        (dataset,) = open_sources(settings)
        assert len(dataset) == (2 if path == "list.txt" else 1)
        batch = next(iter(chip_loader([dataset], settings, batch_size=2, seed=0)))
        assert batch["valid"].all() and batch["image"].float().std() > 0


def test_pretraining_reads_stac_tables_of_local_and_remote_items(cog, write_raster, tmp_path):
    """From YAML, with one item on a server and one beside the table."""
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    address, _ = cog
    write_raster("b.tif", shape=(3, 64, 64), pixel_size=0.5, origin=(500_000, 3_280_000))
    hrefs = {"far": {"visual": {"href": address}}, "near": {"data": {"href": "b.tif", "roles": ["data"]}}}
    for key, assets in hrefs.items():
        next(iter(assets.values()))["type"] = "image/tiff; application=geotiff"
        assets["thumbnail"] = {"href": f"{key}.png", "type": "image/png", "roles": ["thumbnail"]}
    rows = [{"id": key, "type": "Feature", "assets": assets} for key, assets in hrefs.items()]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "items.parquet")
    head = "{prototypes: 32, hidden: 16, bottleneck: 8}"
    config = tmp_path / "c.yaml"
    config.write_text(
        "steps: 3\nbatch_size: 4\nthreads: 1\nmodel: {variant: vit_tiny}\n"
        f"data:\n  root: {tmp_path}\n  chip_size: 48\n  workers: 1\n  sources: [{{path: items.parquet}}]\n"
        "crops: {global_size: 32, local_size: 16, local_count: 1}\n"
        f"losses: {{dino_head: {head}, ibot_head: {head}}}\n"
    )
    (dataset,) = open_sources(load_config(config).data)
    assert len(dataset) == 2
    assert main(["pretrain", str(config), "--out", str(tmp_path / "run")]) == 0
    assert main(["pretrain", str(config), "--set", "data.sources=[{path: 'items.parquet#red'}]"]) == 2


def test_what_is_not_there_is_told(server):
    with pytest.raises(RasterError, match=r"http:/+127.*none.tif cannot be opened"):
        inspect_scene(f"http://127.0.0.1:{server.server_port}/none.tif")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://a.b/c.tif", "/vsicurl/https://a.b/c.tif"),
        (Path("https://a.b/c.tif"), "/vsicurl/https://a.b/c.tif"),
        ("s3://bucket/k/c.tif", "/vsis3/bucket/k/c.tif"),
        ("gs://bucket/c.tif", "/vsigs/bucket/c.tif"),
        (Path("/vsicurl/https://a.b/c.tif"), "/vsicurl/https://a.b/c.tif"),
        ("/vsizip/x.zip/c.tif", "/vsizip/x.zip/c.tif"),
        ("scenes/a.tif", None),
        ("/data/a:b/c.tif", None),
        ("**/*.tif", None),
    ],
)
def test_addresses_as_gdal_knows_them(name, expected):
    assert gdal_address(name) == expected


def test_a_virtual_mosaic_is_one_scene(write_raster, tmp_path):
    """A VRT of two neighbours reads as one raster without a seam."""
    rng = np.random.default_rng(0)
    array = rng.integers(1, 255, (1, 40, 80)).astype("uint8")
    write_raster("v/w.tif", array=array[:, :, :40], pixel_size=1.0, origin=(500_000, 4_000_000))
    write_raster("v/e.tif", array=array[:, :, 40:], pixel_size=1.0, origin=(500_040, 4_000_000))
    with SceneReader(tmp_path / "v" / "w.tif") as reader:
        wkt = reader.info.grid.crs.to_wkt().replace('"', "&quot;")
    parts = "".join(
        f'<SimpleSource><SourceFilename relativeToVRT="1">{name}.tif</SourceFilename>'
        "<SourceBand>1</SourceBand>"
        f'<SrcRect xOff="0" yOff="0" xSize="40" ySize="40"/>'
        f'<DstRect xOff="{x}" yOff="0" xSize="40" ySize="40"/></SimpleSource>'
        for name, x in (("w", 0), ("e", 40))
    )
    (tmp_path / "v" / "m.vrt").write_text(
        f'<VRTDataset rasterXSize="80" rasterYSize="40"><SRS>{wkt}</SRS>'
        "<GeoTransform>500000, 1, 0, 4000000, 0, -1</GeoTransform>"
        f'<VRTRasterBand dataType="Byte" band="1">{parts}</VRTRasterBand></VRTDataset>'
    )
    dataset = SceneDataset(tmp_path / "v" / "m.vrt", is_image=False)
    sample = dataset[500_030:500_050, 3_999_970:3_999_990]
    np.testing.assert_array_equal(sample["mask"], array[0, 10:30, 30:50])
