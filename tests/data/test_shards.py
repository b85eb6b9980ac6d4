"""Packed chips: the same pixels as the files that were packed, in an order that resumes."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from PIL import Image

from dinov3geo.cli import main
from dinov3geo.data.image_folder import ImageFolder
from dinov3geo.data.mixture import DataSettings, MixedSampler, chip_loader, open_sources
from dinov3geo.data.sampling import IndexSampler
from dinov3geo.data.shards import Shards
from dinov3geo.errors import DataError

RGB = ("red", "green", "blue")


def pixels(number: int, bands: int = 3, side: int = 40) -> np.ndarray:
    return np.random.default_rng(number).integers(1, 255, (bands, side, side), dtype=np.uint8)


def png(number: int) -> bytes:
    written = io.BytesIO()
    Image.fromarray(pixels(number).transpose(1, 2, 0)).save(written, format="PNG")
    return written.getvalue()


def geotiff(number: int, names: tuple[str, ...] = RGB, hole: bool = False) -> bytes:
    array = pixels(number, len(names))
    if hole:
        array[:, :8] = 0
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            count=len(names),
            height=40,
            width=40,
            dtype="uint8",
            nodata=0,
            crs="EPSG:32617",
            transform=Affine(0.1, 0, 404000 + number, 0, -0.1, 3285000),
        ) as opened:
            opened.write(array)
            opened.descriptions = names
        return bytes(memory.read())


def pack(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as shard:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three shards of five, four and three PNG files, each beside a JSON file; the same in a plain folder."""
    number = 0
    for shard, count in enumerate((5, 4, 3)):
        members = {}
        for _ in range(count):
            members[f"class_{number % 2}/{number:04d}.png"] = png(number)
            members[f"class_{number % 2}/{number:04d}.json"] = json.dumps({"label": 1}).encode()
            number += 1
        pack(tmp_path / "shards" / f"part-{shard}.tar", members)
    (tmp_path / "plain").mkdir()
    for each in range(number):
        (tmp_path / "plain" / f"{each:04d}.png").write_bytes(png(each))
    return tmp_path


def test_chips_are_those_of_the_files_that_were_packed(photographs: Path) -> None:
    shards = Shards(photographs / "shards", chip_size=32, bands=RGB)
    plain = ImageFolder(photographs / "plain", chip_size=32)
    assert len(shards) == len(plain) == 12
    assert shards.band_count == 3 and shards.gsd_range_m is None
    for index in np.random.default_rng(0).permutation(12).tolist():
        packed, file = shards[index], plain[index]
        assert torch.equal(packed["image"], file["image"]) and bool(packed["valid"].all())
    assert shards.place(5).endswith("part-1.tar:class_1/0005.png")


def test_bands_are_taken_by_name_and_nodata_is_masked(tmp_path: Path) -> None:
    names = ("blue", "nir", "red", "green")
    pack(tmp_path / "a.tar", {"0.tif": geotiff(3, names), "1.tif": geotiff(4, names, hole=True)})
    shards = Shards(tmp_path / "a.tar", chip_size=40, bands=RGB)
    assert shards.band_count is None
    assert np.array_equal(shards[0]["image"].numpy(), pixels(3, 4)[[2, 3, 0]])
    assert bool(shards[0]["valid"].all())
    valid = shards[1]["valid"]
    assert not bool(valid[:8].any()) and bool(valid[8:].all())


def test_an_epoch_holds_every_chip_once_and_goes_on_anywhere(photographs: Path) -> None:
    shards = Shards(photographs / "shards", chip_size=32, bands=RGB)
    first = list(islice(shards.order(seed=3, rank=0, world_size=1).stream(0), 24))
    assert sorted(first[:12]) == sorted(first[12:]) == list(range(12)) and first[:12] != first[12:]
    assert list(islice(shards.order(seed=3, rank=0, world_size=1).stream(7), 17)) == first[7:]
    both = [list(islice(shards.order(seed=3, rank=rank, world_size=2).stream(0), 6)) for rank in range(2)]
    assert both == [first[0:12:2], first[1:12:2]]


def test_the_loader_gives_the_same_with_and_without_reading_processes(photographs: Path) -> None:
    batches = []
    for workers in (0, 2):
        settings = DataSettings.model_validate(
            {
                "root": str(photographs),
                "sources": [{"path": "shards", "kind": "shards"}, {"path": "plain", "kind": "images"}],
                "sensor": "photo_rgb",
                "chip_size": 32,
                "workers": workers,
            }
        )
        loader = chip_loader(open_sources(settings), settings, batch_size=4, seed=1, start=4)
        batches.append([next(loader)["image"] for _ in range(3)])
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"0.txt": b"x"}, "expected members KEY.tif"),
        ({"0.tif": geotiff(0, ("vv", "vh", "x"))}, "holds 3 bands (vv, vh, x) but the run wants red"),
        ({"0.tif": b"no raster"}, "cannot be read as GeoTIFF"),
        ({"0.png": b"no image"}, "cannot be decoded"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    pack(tmp_path / "a.tar", members)
    with pytest.raises(DataError) as error:
        _ = Shards(tmp_path, chip_size=40, bands=RGB)[0]
    assert said in str(error.value) and "a.tar" in str(error.value) or said.startswith("expected members")


def test_shards_of_other_forms_are_refused(tmp_path: Path) -> None:
    pack(tmp_path / "z" / "a.tar", {"0.png": png(0)}, mode="w:gz")
    with pytest.raises(DataError, match="uncompressed tar"):
        Shards(tmp_path / "z", chip_size=40, bands=RGB)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no shard found"):
        Shards(tmp_path / "empty", chip_size=40, bands=RGB)
    whole = pack(tmp_path / "cut" / "a.tar", {"0.tif": geotiff(0), "1.png": png(1)})
    shards = Shards(whole, chip_size=48, bands=RGB)
    with pytest.raises(DataError, match="40 x 40 pixels but data.chip_size is 48"):
        _ = shards[0]
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(DataError, match="is cut off"):
        _ = shards[1]
    with pytest.raises(DataError, match="cannot be read as GeoTIFF"):
        _ = shards[0]


def test_whole_steps_come_from_one_source() -> None:
    def sequence(rank: int, homogeneous: float, start: int = 0) -> list[int]:
        samplers = [IndexSampler(range(50), seed=s, rank=rank, world_size=2) for s in range(2)]
        sampler = MixedSampler(
            samplers,
            (3.0, 1.0),
            keys_per_chip=(1, 1),
            seed=5,
            rank=rank,
            start=start,
            batch_size=4,
            homogeneous=homogeneous,
        )
        return [source for source, _ in islice(sampler, 4 * 500)]

    def alike(sources: list[int]) -> np.ndarray:
        steps = np.array(sources).reshape(-1, 4)
        return (steps == steps[:, :1]).all(1)

    always = sequence(0, 1.0)
    assert alike(always).all() and always == sequence(1, 1.0)  # all ranks choose the same
    assert np.mean(always) == pytest.approx(0.25, abs=0.05)
    half = sequence(0, 0.5)
    by_chance = 0.75**4 + 0.25**4
    assert alike(half).mean() == pytest.approx(0.5 + 0.5 * by_chance, abs=0.06)
    assert np.mean(half) == pytest.approx(0.25, abs=0.05)
    assert sequence(0, 0.5, start=40)[:100] == half[40:140]
    assert sequence(0, 0.0) != sequence(1, 0.0)


def test_pretraining_reads_shards(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = photographs / "c.yaml"
    head = {"hidden": 16, "bottleneck": 8, "prototypes": 16}
    config.write_text(
        json.dumps(
            {
                "steps": 1,
                "batch_size": 4,
                "data": {
                    "root": str(photographs),
                    "sources": [{"path": "shards", "kind": "shards"}],
                    "sensor": "photo_rgb",
                    "chip_size": 32,
                    "workers": 0,
                },
                "crops": {"global_size": 32, "local_size": 16, "local_count": 1},
                "losses": {"dino_head": head, "ibot_head": head},
            }
        )
    )
    command = ["pretrain", str(config), "--out", str(photographs / "run")]
    assert main([*command, "--dry-run"]) == 0
    assert "12 packed chips" in capsys.readouterr().out
    assert main(command) == 0
    assert (photographs / "run" / "backbone.safetensors").is_file()
