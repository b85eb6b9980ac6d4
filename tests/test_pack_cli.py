"""`dinov3geo pack`: the chips of a run in tar shards, and a training that reads them."""

import io
import json
import tarfile
from itertools import islice

import numpy as np
import pytest
import rasterio
from PIL import Image

from dinov3geo.cli import main
from dinov3geo.data.mixture import chip_loader, open_sources
from dinov3geo.data.scenes import SceneDataset


@pytest.fixture
def config(write_raster, tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(1, 255, (3, 90, 120)).astype("uint8")
    array[:, 30:50, 40:60] = 0
    write_raster("mix/s/a.tif", array=array, nodata=0)
    write_raster("mix/s/b.tif", shape=(3, 70, 70), crs="EPSG:32611")
    photos = tmp_path / "mix" / "p"
    photos.mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (50, 40, 3)).astype("uint8")).save(photos / f"{number}.png")
    path = tmp_path / "c.yaml"
    path.write_text(
        f"steps: 2\nbatch_size: 4\ndata:\n  root: {tmp_path / 'mix'}\n  chip_size: 48\n  workers: 0\n"
        "  sources: [{path: s, weight: 2}, {path: p, kind: images}]\n"
        "model: {variant: vit_tiny}\ncrops: {global_size: 32, local_size: 16, local_count: 1}\n"
        "losses: {dino_head: {prototypes: 32, hidden: 16, bottleneck: 8}, "
        "ibot_head: {prototypes: 32, hidden: 16, bottleneck: 8}}\n"
    )
    return path


def pack(config, output, *more):
    return main(
        ["pack", str(config), "-o", str(output), "--chips", "25", "--per-shard", "10", *map(str, more)]
    )


def members(folder):
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {m.name: archive.extractfile(m).read() for m in archive}
    return found


def settings_of(config):
    from dinov3geo.config import load_config

    return load_config(config).data


def test_shards_hold_the_chips_of_the_run(config, tmp_path, capsys):
    output = tmp_path / "packed"
    assert pack(config, output) == 0
    assert "3, 0 of them were there" in capsys.readouterr().out
    assert sorted(p.name for p in output.iterdir()) == [*(f"chips-{n:06}.tar" for n in range(3)), "pack.json"]
    settings = settings_of(config)
    drawn = chip_loader(open_sources(settings), settings, batch_size=1, seed=0)
    held = members(output)
    assert len(held) == 50
    for number, batch in enumerate(islice(drawn, 25)):
        image, valid = batch["image"][0].numpy(), batch["valid"][0].numpy()
        facts = json.loads(held[f"{number:09}.json"])
        if f"{number:09}.png" in held:
            stored = np.array(Image.open(io.BytesIO(held[f"{number:09}.png"]))).transpose(2, 0, 1)
            np.testing.assert_array_equal(stored, image)
            assert facts["source"].endswith(".png")
            continue
        with rasterio.MemoryFile(held[f"{number:09}.tif"]) as memory, memory.open() as dataset:
            np.testing.assert_array_equal(dataset.read(), image)
            np.testing.assert_array_equal(dataset.dataset_mask() > 0, valid)
            assert dataset.descriptions == ("red", "green", "blue")
            assert [dataset.crs.to_string(), list(dataset.bounds)] == [facts["crs"], facts["bounds"]]
            name = facts["source"].rsplit("/", 1)[-1]
            scenes = SceneDataset(tmp_path / "mix" / "s" / name)
            box = dataset.bounds
            query = (slice(box.left, box.right), slice(box.bottom, box.top))
            np.testing.assert_array_equal(scenes.read_query(query)[0], image)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_missing_shards_are_written_again_with_the_same_bytes(config, tmp_path, capsys, workers):
    output = tmp_path / "packed"
    assert pack(config, output) == 0
    shards = {path.name: path.read_bytes() for path in output.glob("*.tar")}
    (output / "chips-000001.tar").unlink()
    capsys.readouterr()
    assert pack(config, output, "--workers", workers) == 0
    assert "2 of them were there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in output.glob("*.tar")} == shards
    assert pack(config, output, "--set", "seed=1") == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--set", "data.sources=[{path: s, two_dates: true}]"), "cannot be packed, only single chips"),
        (("--set", "data.sources=[{path: nowhere}]"), "no such file or folder"),
        (("--set", "data.chip=3"), "did you mean"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(more, message, config, tmp_path, capsys):
    assert pack(config, tmp_path / "packed", *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "packed").exists()
