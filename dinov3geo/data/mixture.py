"""Endless, seeded, resumable streams of chips from one or several sources."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov3geo.data.image_folder import ImageFolder
from dinov3geo.data.sampling import ChipSampler, IndexSampler
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import DataError
from dinov3geo.rasters.sensors import get_sensor

_CHOICES_AT_ONCE = 4096


class SourceSettings(BaseModel):
    """One folder, glob or file of scenes or images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(".", description="relative to data.root")
    kind: Literal["scenes", "images"] = Field("scenes", description="GeoTIFFs, or JPEG and PNG files")
    sensor: str | None = Field(None, description="where the bands lie in these files; data.sensor if absent")
    weight: float = Field(1.0, gt=0, description="share of the chips, relative to the other sources")


class DataSettings(BaseModel):
    """What is read and how it is cut into chips."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Path = Field(Path("."), description="folder that the sources' paths are relative to")
    sources: tuple[SourceSettings, ...] = (SourceSettings(),)
    sensor: str = Field("aerial_rgb", description="bands, scale and statistics of the network's input")
    bands: tuple[str, ...] | None = Field(None, description="band names; all bands of the sensor if absent")
    chip_size: int = Field(256, gt=0, description="side of the square read from a scene, in pixels")
    workers: int = Field(1, ge=0, description="processes that read chips; 0 reads in the training process")


class _Stream(Protocol):
    def stream(self, start: int) -> Iterator[Any]:
        """Keys from a position on."""


class MixedChips(Dataset[dict[str, Tensor]]):
    """Several data sets under one address (source number, key)."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        """Keeps the data sets; their items hold `image` [C, S, S] and `valid` [S, S]."""
        self.datasets = list(datasets)

    def __getitem__(self, address: tuple[int, Any]) -> dict[str, Tensor]:
        """One chip with its valid mask."""
        source, key = address
        sample = self.datasets[source][key]
        return {"image": sample["image"], "valid": sample["valid"]}


class MixedSampler(Sampler[tuple[int, Any]]):
    """Draws the source of every chip by weight, then the next key of that source.

    The sequence depends on seed and rank alone, so a run that stops after n chips goes on with
    `start=n` exactly as if it had not stopped.
    """

    def __init__(
        self, samplers: Sequence[_Stream], weights: Sequence[float], *, seed: int, rank: int, start: int
    ) -> None:
        """Keeps the streams.

        Args:
            samplers: one per source.
            weights: relative shares.
            seed: of the choice of sources.
            rank: of this process.
            start: chips that this rank has already consumed.
        """
        self.samplers = list(samplers)
        self.shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self.seed = (seed, rank)
        self.start = start

    def _choices(self) -> Iterator[int]:
        rng = np.random.default_rng(self.seed)
        while True:
            yield from rng.choice(len(self.shares), size=_CHOICES_AT_ONCE, p=self.shares).tolist()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Endless addresses for `MixedChips`."""
        choices = self._choices()
        consumed = [0] * len(self.samplers)
        for _ in range(self.start):
            consumed[next(choices)] += 1
        streams = [sampler.stream(count) for sampler, count in zip(self.samplers, consumed, strict=True)]
        for source in choices:
            yield source, next(streams[source])


def open_sources(settings: DataSettings) -> list[SceneDataset | ImageFolder]:
    """Opens every source.

    Raises:
        DataError: nothing found, or the bands differ.
        UnknownNameError: no such sensor or band.
    """
    datasets: list[SceneDataset | ImageFolder] = []
    for source in settings.sources:
        path = settings.root / source.path
        if source.kind == "images":
            datasets.append(ImageFolder(path, chip_size=settings.chip_size))
        else:
            sensor = get_sensor(source.sensor or settings.sensor)
            datasets.append(SceneDataset(path, sensor=sensor, bands=network_bands(settings)))
    return datasets


def network_bands(settings: DataSettings) -> tuple[str, ...]:
    """Names of the network's input bands."""
    return tuple(band.name for band in get_sensor(settings.sensor).select(settings.bands))


def chip_loader(
    datasets: Sequence[SceneDataset | ImageFolder],
    settings: DataSettings,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[dict[str, Tensor]]:
    """Endless batches `{"image": [B, C, S, S], "valid": [B, S, S]}`.

    Args:
        datasets: from `open_sources`.
        settings: as given there.
        batch_size: chips per batch of this rank.
        seed: of the run.
        start: chips that this rank has already consumed.
        rank: of this process.
        world_size: number of processes; their chips are disjoint positions of one sequence.
    """
    samplers: list[_Stream] = []
    for number, dataset in enumerate(datasets):
        shard = {"seed": seed + number, "rank": rank, "world_size": world_size}
        if isinstance(dataset, ImageFolder):
            samplers.append(IndexSampler(dataset, **shard))
        else:
            samplers.append(
                ChipSampler(dataset, chip_size=settings.chip_size, chips_per_epoch=_CHOICES_AT_ONCE, **shard)
            )
    weights = [source.weight for source in settings.sources]
    return DataLoader(
        MixedChips(datasets),
        batch_size=batch_size,
        sampler=MixedSampler(samplers, weights, seed=seed, rank=rank, start=start),
        num_workers=settings.workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=settings.workers > 0,
        worker_init_fn=_leave_signals_to_the_trainer,
    )


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """A scheduler signals the whole process group; readers must live until the trainer has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def check_bands(datasets: Sequence[SceneDataset | ImageFolder], settings: DataSettings) -> None:
    """Images have three bands, so they go with a sensor of three.

    Raises:
        DataError: an image folder under a sensor with another number of bands.
    """
    names = network_bands(settings)
    if len(names) != 3 and any(isinstance(dataset, ImageFolder) for dataset in datasets):
        raise DataError(
            f"image folders give 3 bands but sensor {settings.sensor!r} has {len(names)} ({', '.join(names)}"
            "); set data.bands to three of them or use another sensor"
        )
