"""Mixed sources: shares, resume, refusals."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinov3geo.data.mixture import (
    DataSettings,
    MixedSampler,
    SourceSettings,
    check_bands,
    chip_loader,
    open_sources,
)
from dinov3geo.errors import DataError


class Counting:
    def stream(self, start: int) -> Iterator[int]:
        return itertools.count(start)


def first(sampler: MixedSampler, count: int) -> list[tuple[int, int]]:
    return list(itertools.islice(iter(sampler), count))


def test_sources_come_by_weight_and_resume_in_the_middle() -> None:
    streams = [Counting(), Counting()]
    whole = first(MixedSampler(streams, [3, 1], seed=0, rank=0, start=0), 6000)
    resumed = first(MixedSampler(streams, [3, 1], seed=0, rank=0, start=4500), 1500)
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


def test_photographs_have_three_bands(settings: DataSettings) -> None:
    two = settings.model_copy(update={"bands": ("red", "green")})
    with pytest.raises(DataError, match="image folders give 3 bands"):
        check_bands(open_sources(two), two)
