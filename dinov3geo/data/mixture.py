"""Endless, seeded, resumable streams of chips from one or several sources."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov3geo.data.areas import read_area
from dinov3geo.data.chosen import ChosenImages, ChosenScenes, read_chosen
from dinov3geo.data.dates import Twice, TwoDates
from dinov3geo.data.drawing import DrawSettings, find_weights
from dinov3geo.data.failures import Failures
from dinov3geo.data.image_folder import ImageFolder
from dinov3geo.data.indexed import IndexedChips, Order
from dinov3geo.data.ranges import Probability
from dinov3geo.data.sampling import ChipSampler, SuperblockSampler
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.data.shards import Shards
from dinov3geo.errors import ConfigError, DataError, UserError
from dinov3geo.rasters.lists import gdal_address
from dinov3geo.rasters.sensors import Sensor, get_sensor

_CHOICES_AT_ONCE = 4096
# Chips of scenes drawn for one that is used, where nodata is frequent; an image is always used.
_KEYS_PER_SCENE_CHIP = 4
# Why reads of a sample failed, beside its tensors.
_PROBLEMS = "problems"
# Keeps the choice of sources apart from the samplers' own randomness.
_MIXING, _STEPS = 1, 2


class SourceSettings(BaseModel):
    """One folder, glob or file of scenes, images or shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(".", description="relative to data.root")
    kind: Literal["scenes", "images", "shards"] = Field(
        "scenes", description="GeoTIFFs, JPEG and PNG files, or tar files of either (WebDataset)"
    )
    sensor: str | None = Field(None, description="where the bands lie in these files; data.sensor if absent")
    weight: float = Field(1.0, gt=0, description="share of the chips, relative to the other sources")
    time: tuple[str, str] | None = Field(
        None, description="first and last date of interest; scenes without a date always count"
    )
    two_dates: bool = Field(
        False, description="the two global crops show one place on two dates, where there are two"
    )
    draw: DrawSettings = Field(
        DrawSettings(), description="where in the scenes chips are drawn; all ground alike if absent"
    )
    chips: Path | None = Field(
        None, description="table of `dinov3geo curate`: only its chips are drawn, by their weights"
    )
    split: str | None = Field(
        None, description="FILE#NAME of `dinov3geo split`: pixels outside that ground count as no data"
    )
    in_order: bool = Field(
        False,
        description="of shards: chips in the order in which they were packed; they are that run's steps",
    )
    hold_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="of images: share left out by a hash of their names; 0.2: the test part of `classify`",
    )
    mixed_resolution: bool = Field(False, description="read files of different pixel size, each in its own")


class SuperblockSettings(BaseModel):
    """For scenes much larger than a chip: several chips are cut from what is decoded once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(1024, gt=0, description="side of a superblock, pixels")
    chips_per_visit: int = Field(16, gt=0, description="more: less decoding, more chips of one neighbourhood")
    shuffled_visits: int = Field(16, gt=0, description="visits whose chips are mixed in each lane")
    lanes: int = Field(
        4, gt=0, description="sequences dealt out batch by batch; a multiple of data.workers decodes least"
    )


class DataSettings(BaseModel):
    """What is read and how it is cut into chips."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Path = Field(Path("."), description="folder that the sources' paths are relative to")
    sources: tuple[SourceSettings, ...] = Field((SourceSettings(),), min_length=1)
    sensor: str = Field("aerial_rgb", description="bands, scale and statistics of the network's input")
    bands: tuple[str, ...] | None = Field(None, description="band names; all bands of the sensor if absent")
    chip_size: int = Field(256, gt=0, description="side of the square read from a scene, in pixels")
    min_valid_share: Probability = Field(
        0.5, description="chips of scenes with less data are drawn again, up to three times"
    )
    homogeneous: Probability = Field(
        0.0, description="share of the steps whose chips all come from one source, drawn by weight"
    )
    superblocks: SuperblockSettings | None = Field(
        None, description="draw chips in an order that decodes large scenes once; absent: anywhere at random"
    )
    unreadable: Literal["stop", "skip"] = Field(
        "stop", description="what a file does that turns out to be damaged: end the run, or be left out"
    )
    workers: int = Field(1, ge=0, description="processes that read chips; 0 reads in the training process")


class MixedChips(Dataset["dict[str, Tensor] | UserError"]):
    """Several data sets under one address (source number, keys)."""

    def __init__(
        self,
        datasets: Sequence[Any],
        *,
        min_valid_share: float,
        blanks: Sequence[dict[str, Tensor]] | None = None,
    ) -> None:
        """Keeps the data sets; their items hold `image` [C, S, S] and `valid` [S, S].

        Args:
            datasets: one per source.
            min_valid_share: of a chip that is taken at once.
            blanks: a sample without data for each source, where files that cannot be read are left out; None
                where they are errors.
        """
        self.datasets = list(datasets)
        self.min_valid_share = min_valid_share
        self.blanks = blanks

    def __getitem__(self, address: tuple[int, Sequence[Any]]) -> dict[str, Tensor] | UserError:
        """The first chip of an address with enough valid pixels, else the one with most.

        What a user can mend is returned, not raised: out of a reading process an exception arrives as the
        text of a traceback.
        """
        source, keys = address
        best: dict[str, Any] = {}
        share = -1.0
        problems: list[str] = []
        for key in keys:
            try:
                sample = self.datasets[source][key]
            except UserError as error:
                if self.blanks is None:
                    return DataError(str(error))
                problems.append(str(error))
                continue
            own_share = float(sample["valid"].float().mean())
            if own_share > share:
                share, best = own_share, {"image": sample["image"], "valid": sample["valid"]}
            if share >= self.min_valid_share:
                break
        if not best and self.blanks is not None:
            best = dict(self.blanks[source])
        return best | {_PROBLEMS: problems} if problems else best


class MixedSampler(Sampler[tuple[int, tuple[Any, ...]]]):
    """Draws the source of every chip by weight, then the next keys of that source.

    The sequence depends on seed and rank alone, so a run that stops after n chips goes on with
    `start=n` exactly as if it had not stopped.
    """

    def __init__(
        self,
        samplers: Sequence[Order],
        weights: Sequence[float],
        *,
        keys_per_chip: Sequence[int],
        seed: int,
        rank: int,
        start: int,
        batch_size: int = 1,
        homogeneous: float = 0.0,
    ) -> None:
        """Keeps the streams.

        Args:
            samplers: one per source.
            weights: relative shares.
            keys_per_chip: of each source; further keys serve where the first shows too little data.
            seed: of the choice of sources.
            rank: of this process.
            start: chips that this rank has already consumed.
            batch_size: chips of this rank in a step.
            homogeneous: share of the steps whose chips, in all ranks, come from one source.
        """
        self.samplers = list(samplers)
        self.shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self.keys_per_chip = tuple(keys_per_chip)
        self.seed = seed
        self.rank = rank
        self.start = start
        self.batch_size = batch_size
        self.homogeneous = homogeneous

    def _choices(self) -> Iterator[int]:
        own = self._draws((self.seed, self.rank, _MIXING))
        if self.homogeneous == 0:
            yield from own
        # The choice of a step is that of all ranks.
        coins = np.random.default_rng((self.seed, _STEPS))
        sources = self._draws((self.seed, _STEPS, _MIXING))
        while True:
            alike, source = coins.random() < self.homogeneous, next(sources)
            for _ in range(self.batch_size):
                drawn = next(own)
                yield source if alike else drawn

    def _draws(self, seed: tuple[int, ...]) -> Iterator[int]:
        """Sources by weight, without end."""
        rng = np.random.default_rng(seed)
        while True:
            yield from rng.choice(len(self.shares), size=_CHOICES_AT_ONCE, p=self.shares).tolist()

    def __iter__(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Endless addresses for `MixedChips`."""
        choices = self._choices()
        consumed = [0] * len(self.samplers)
        for _ in range(self.start):
            consumed[next(choices)] += 1
        streams = [
            sampler.stream(count * keys)
            for sampler, count, keys in zip(self.samplers, consumed, self.keys_per_chip, strict=True)
        ]
        for source in choices:
            yield source, tuple(next(streams[source]) for _ in range(self.keys_per_chip[source]))


def open_sources(settings: DataSettings) -> list[SceneDataset | IndexedChips]:
    """Opens every source.

    Raises:
        DataError: nothing found, or the bands differ.
        ConfigError: a source's numbers have another scale than the network's input.
        UnknownNameError: no such sensor or band.
    """
    return [_open_source(source, settings) for source in settings.sources]


def _open_source(source: SourceSettings, settings: DataSettings) -> SceneDataset | IndexedChips:
    address = gdal_address(source.path)
    path = settings.root / source.path if address is None else Path(address)
    table = None if source.chips is None else read_chosen(source.chips)
    if source.in_order and source.kind != "shards":
        raise ConfigError(f"source {source.path}: in_order is for kind: shards, not for {source.kind}")
    if source.kind != "scenes" and source.draw != DrawSettings():
        raise ConfigError(f"source {source.path}: draw is for scenes, not for kind: {source.kind}")
    if source.kind == "images":
        if source.split is not None:
            raise ConfigError(f"source {source.path}: images lie nowhere on the ground; split is for scenes")
        folder = ImageFolder(path, chip_size=settings.chip_size, hold_out=source.hold_out)
        return folder if table is None else ChosenImages(folder, table)
    if source.hold_out:
        raise ConfigError(f"source {source.path}: hold_out is for kind: images; scenes have split")
    sensor = get_sensor(source.sensor or settings.sensor)
    _check_scale(sensor, settings)
    if source.kind == "shards":
        if table is not None:
            raise ConfigError("chips names places in scenes or images; it does not go with kind: shards")
        bands = network_bands(settings)
        return Shards(path, chip_size=settings.chip_size, bands=bands, in_order=source.in_order)
    scenes = SceneDataset(
        path,
        sensor=sensor,
        bands=network_bands(settings),
        allow_mixed_resolution=source.mixed_resolution,
        time=source.time,
        area=None if source.split is None else read_area(source.split),
    )
    if table is None:
        visited = settings.chip_size if settings.superblocks is None else settings.superblocks.size
        scenes.weights = find_weights(scenes, source.draw, settings.root, settings.chip_size, visited)
        return scenes
    if source.draw != DrawSettings():
        raise ConfigError(f"source {source.path}: chips has weights of its own; leave out draw")
    if source.two_dates:
        raise ConfigError("two_dates draws places anew; it does not go with a table of chosen chips")
    return ChosenScenes(scenes, table, chip_size=settings.chip_size, source=path)


def _check_scale(sensor: Sensor, settings: DataSettings) -> None:
    """One normalisation serves the whole run, so all sources must store their numbers alike."""
    wanted = get_sensor(settings.sensor).select(settings.bands)
    own = sensor.select(network_bands(settings))
    for one, other in zip(wanted, own, strict=True):
        if (one.scale, one.offset) != (other.scale, other.offset):
            raise ConfigError(
                f"band {one.name} of sensor {sensor.name!r} has scale {other.scale:g} and offset "
                f"{other.offset:g}, but data.sensor {settings.sensor!r} has {one.scale:g} and "
                f"{one.offset:g}; train on sources of one scale, or convert the files first"
            )


def network_bands(settings: DataSettings) -> tuple[str, ...]:
    """Names of the network's input bands."""
    return tuple(band.name for band in get_sensor(settings.sensor).select(settings.bands))


def chip_loader(
    datasets: Sequence[SceneDataset | IndexedChips],
    settings: DataSettings,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    warn: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Endless batches `{"image": [B, C, S, S], "valid": [B, S, S]}`, or of two dates [B, 2, C, S, S].

    Args:
        datasets: from `open_sources`.
        settings: as given there.
        batch_size: chips per batch of this rank.
        seed: of the run.
        start: chips that this rank has already consumed.
        rank: of this process.
        world_size: number of processes; their chips are disjoint positions of one sequence.
        warn: told of every file that is left out, once, and how many reads have failed.

    Raises:
        DataError: while iterating, a file that cannot be used, or a reading process that was killed.
    """
    sampler = chip_sampler(
        datasets, settings, batch_size, seed=seed, start=start, rank=rank, world_size=world_size
    )
    loader: DataLoader[Any] = DataLoader(
        MixedChips(
            _views(datasets, settings),
            min_valid_share=settings.min_valid_share,
            blanks=_blanks(datasets, settings) if settings.unreadable == "skip" else None,
        ),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=settings.workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=settings.workers > 0,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    failures = Failures(warn)
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        failures.count(batch.pop(_PROBLEMS, []))
        yield batch


def _blanks(
    datasets: Sequence[SceneDataset | IndexedChips], settings: DataSettings
) -> list[dict[str, Tensor]]:
    """A sample without any data for each source."""
    two = any(source.two_dates for source in settings.sources)
    lead, side = ((2,) if two else ()), settings.chip_size
    bands = len(network_bands(settings))
    valid = torch.zeros((*lead, side, side), dtype=torch.bool)
    return [
        {"image": torch.zeros((*lead, bands, side, side), dtype=data.dtype), "valid": valid}
        for data in datasets
    ]


def locate_chips(
    datasets: Sequence[SceneDataset | IndexedChips],
    settings: DataSettings,
    *,
    batch_size: int,
    seed: int,
    start: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[str]:
    """Where the chips of the next batch of `chip_loader` come from; arguments as there.

    Returns:
        For each chip its file, or the files and the corner coordinates that were asked for. Of a scene chip
        that was drawn again for its lack of data, all places are named.
    """
    sampler = chip_sampler(
        datasets, settings, batch_size, seed=seed, start=start, rank=rank, world_size=world_size
    )
    addresses = itertools.islice(sampler, batch_size)
    return ["; ".join(_place(datasets[source], key) for key in keys) for source, keys in addresses]


def _place(dataset: SceneDataset | IndexedChips, key: Any) -> str:  # noqa: ANN401 (an index or a query)
    if isinstance(dataset, IndexedChips):
        return dataset.place(key)
    x, y = key[:2]
    corners = f"x {x.start:.9g} to {x.stop:.9g}, y {y.start:.9g} to {y.stop:.9g}"
    return f"{', '.join(dataset.paths_at(key))} at {corners}"


def chip_sampler(
    datasets: Sequence[SceneDataset | IndexedChips],
    settings: DataSettings,
    batch_size: int,
    *,
    seed: int,
    start: int,
    rank: int,
    world_size: int,
) -> MixedSampler:
    """The sequence of chips that `chip_loader` reads; arguments as there."""
    samplers: list[Order] = []
    for number, dataset in enumerate(datasets):
        own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        shard: dict[str, Any] = {"seed": own_seed, "rank": rank, "world_size": world_size}
        if isinstance(dataset, IndexedChips):
            samplers.append(dataset.order(**shard))
        else:
            samplers.append(_scene_sampler(dataset, settings, batch_size, shard))
    weights = [source.weight for source in settings.sources]
    keys = [1 if isinstance(dataset, IndexedChips) else _KEYS_PER_SCENE_CHIP for dataset in datasets]
    return MixedSampler(
        samplers,
        weights,
        keys_per_chip=keys,
        seed=seed,
        rank=rank,
        start=start,
        batch_size=batch_size,
        homogeneous=settings.homogeneous,
    )


def _views(datasets: Sequence[SceneDataset | IndexedChips], settings: DataSettings) -> list[Any]:
    """The data sets as they are read: with one view of a place, or with two if any source has two dates."""
    if not any(source.two_dates for source in settings.sources):
        return list(datasets)
    return [
        TwoDates(dataset) if source.two_dates and isinstance(dataset, SceneDataset) else Twice(dataset)
        for dataset, source in zip(datasets, settings.sources, strict=True)
    ]


def _scene_sampler(
    dataset: SceneDataset, settings: DataSettings, batch_size: int, shard: dict[str, Any]
) -> ChipSampler:
    chips: dict[str, Any] = {"chip_size": settings.chip_size, "chips_per_epoch": _CHOICES_AT_ONCE, **shard}
    chips["weights"] = dataset.weights
    blocks = settings.superblocks
    if blocks is None:
        return ChipSampler(dataset, **chips)
    return SuperblockSampler(
        dataset,
        superblock=blocks.size,
        chips_per_visit=blocks.chips_per_visit * _KEYS_PER_SCENE_CHIP,
        shuffled_visits=blocks.shuffled_visits,
        lanes=blocks.lanes,
        batch_size=batch_size * _KEYS_PER_SCENE_CHIP,
        **chips,
    )


def _collate(samples: list[dict[str, Tensor] | UserError]) -> dict[str, Tensor] | UserError:
    """Stacks the samples, or hands on the first error among them."""
    stacked: dict[str, list[Tensor]] = {}
    problems: list[str] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        problems += cast(list[str], sample.pop(_PROBLEMS, []))
        for name, tensor in sample.items():
            stacked.setdefault(name, []).append(tensor)
    batch: dict[str, Any] = {name: torch.stack(tensors) for name, tensors in stacked.items()}
    return batch | {_PROBLEMS: problems} if problems else batch


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """A signal to the process group must not end the readers before the trainer has saved."""
    os.setpgid(0, 0)


def check_bands(datasets: Sequence[SceneDataset | IndexedChips], settings: DataSettings) -> None:
    """Images have three bands, so they go with a sensor of three.

    Raises:
        DataError: an image folder under a sensor with another number of bands.
    """
    names = network_bands(settings)
    for count in {d.band_count for d in datasets if isinstance(d, IndexedChips)} - {None, len(names)}:
        raise DataError(
            f"image folders give {count} bands but sensor {settings.sensor!r} has {len(names)} "
            f"({', '.join(names)}); set data.bands to three of them or use another sensor"
        )
