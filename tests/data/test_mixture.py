"""Mixed sources: shares, resume, refusals."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinov3geo.data.mixture import (
    DataSettings,
    MixedChips,
    MixedSampler,
    SourceSettings,
    _check_scale,
    check_bands,
    chip_loader,
    open_sources,
)
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.rasters.sensors import get_sensor


class Counting:
    def stream(self, start: int) -> Iterator[int]:
        return itertools.count(start)


def first(sampler: MixedSampler, count: int) -> list[tuple[int, tuple[int, ...]]]:
    return list(itertools.islice(iter(sampler), count))


def test_sources_come_by_weight_and_resume_in_the_middle() -> None:
    streams = [Counting(), Counting()]
    whole = first(MixedSampler(streams, [3, 1], keys_per_chip=[4, 1], seed=0, rank=0, start=0), 6000)
    resumed = first(MixedSampler(streams, [3, 1], keys_per_chip=[4, 1], seed=0, rank=0, start=4500), 1500)
    assert resumed == whole[4500:]
    assert Counter(source for source, _ in whole)[0] / 6000 == pytest.approx(0.75, abs=0.02)


@pytest.fixture
def settings(write_raster: Callable[..., Path], tmp_path: Path) -> DataSettings:
    write_raster("mix/scenes/a.tif", shape=(3, 60, 70))
    (tmp_path / "mix" / "photos" / "cat").mkdir(parents=True)
    for number in range(3):
        image = Image.fromarray(torch.randint(0, 256, (50, 60, 3), dtype=torch.uint8).numpy())
        image.save(tmp_path / "mix" / "photos" / "cat" / f"{number}.jpg")
    return DataSettings(
        root=tmp_path / "mix",
        sources=(SourceSettings(path="scenes"), SourceSettings(path="photos", kind="images")),
        chip_size=32,
        workers=0,
    )


def test_scenes_and_photographs_in_one_batch(settings: DataSettings) -> None:
    datasets = open_sources(settings)
    loader = iter(chip_loader(datasets, settings, batch_size=5, seed=1))
    batches = [next(loader) for _ in range(4)]
    assert all(b["image"].shape == (5, 3, 32, 32) and b["image"].dtype == torch.uint8 for b in batches)
    resumed = next(iter(chip_loader(datasets, settings, batch_size=5, seed=1, start=15)))
    assert torch.equal(resumed["image"], batches[3]["image"])


def test_chips_with_little_data_are_drawn_again() -> None:
    class Shares:
        def __getitem__(self, percent: int) -> dict[str, torch.Tensor]:
            return {"image": torch.tensor(percent), "valid": torch.arange(100) < percent}

    chips = MixedChips([Shares()], min_valid_share=0.5)
    for keys, expected in (((10, 80, 90), 80), ((10, 30, 20), 30), ((0, 0), 0)):
        sample = chips[0, keys]
        assert isinstance(sample, dict)
        assert int(sample["image"]) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_reading_process_is_one_line(
    workers: int, settings: DataSettings, write_raster: Callable[..., Path]
) -> None:
    scene = write_raster("mix/scenes/a.tif", shape=(3, 60, 70))
    used = settings.model_copy(update={"workers": workers, "sources": settings.sources[:1]})
    datasets = open_sources(used)
    scene.write_bytes(scene.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.tif") as caught:
        next(iter(chip_loader(datasets, used, batch_size=2, seed=0)))
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_sources_of_another_scale_are_refused(settings: DataSettings) -> None:
    reflectance = replace(
        get_sensor("aerial_rgb"), bands=tuple(replace(b, scale=1e-4) for b in get_sensor("aerial_rgb").bands)
    )
    with pytest.raises(ConfigError, match="band red .* scale 0.0001"):
        _check_scale(reflectance, settings)


def test_scenes_cannot_be_held_out_by_name(settings: DataSettings) -> None:
    source = settings.sources[0].model_copy(update={"hold_out": 0.2})
    with pytest.raises(ConfigError, match="hold_out is for kind: images"):
        open_sources(settings.model_copy(update={"sources": (source,)}))


def test_photographs_have_three_bands(settings: DataSettings) -> None:
    two = settings.model_copy(update={"bands": ("red", "green")})
    with pytest.raises(DataError, match="image folders give 3 bands"):
        check_bands(open_sources(two), two)
