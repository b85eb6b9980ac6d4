"""Chips of a configuration into tar shards: drawn as a training draws them, whole files, taken up again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov3geo.data.indexed import IndexedChips
from dinov3geo.data.mixture import DataSettings, chip_sampler, network_bands, open_sources
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import ConfigError, RasterError
from dinov3geo.rasters.geotiff import encode_chip
from dinov3geo.rasters.grid import PixelGrid

_NOTE = "pack.json"
_FORMAT = "dinov3geo-pack/1"

Chip = tuple[NDArray[Any], NDArray[np.bool_], PixelGrid | None, str]


@dataclass(frozen=True, slots=True)
class Packing:
    """What is packed.

    Attributes:
        settings: sources, bands, size of a chip.
        count: chips.
        per_shard: chips in a shard; the last one may hold fewer.
        seed: of the draw; a training with the same seed draws the same chips.
    """

    settings: DataSettings
    count: int
    per_shard: int
    seed: int

    @property
    def num_shards(self) -> int:
        """Files that are written."""
        return -(-self.count // self.per_shard)

    @property
    def identity(self) -> str:
        """Changes with everything that changes what is in the shards."""
        what = self.settings.model_dump_json(exclude={"workers"})
        return hashlib.sha256(f"{what} {self.per_shard} {self.seed}".encode()).hexdigest()


def pack(
    packing: Packing, folder: Path, *, workers: int, tell: Callable[[int, int], None] | None = None
) -> int:
    """Writes the shards that are not there yet.

    Args:
        packing: what.
        folder: for shards and for a note of what they hold; one of the same packing is gone on with.
        workers: processes that each write a shard at a time; 0 or 1 writes in this one.
        tell: called with shards done and in all.

    Returns:
        Shards that were there already.

    Raises:
        ConfigError: two dates, or a folder of another packing.
        UserError: chips that cannot be read.
    """
    for source in packing.settings.sources:
        if source.two_dates:
            raise ConfigError(
                f"source {source.path}: two dates of a place cannot be packed, only single chips"
            )
    open_sources(packing.settings)
    _enter(packing, folder)
    missing = [n for n in range(packing.num_shards) if not _shard(folder, n).exists()]
    done = packing.num_shards - len(missing)
    already = done
    for _ in _write_all(packing, folder, missing, workers):
        done += 1
        if tell is not None:
            tell(done, packing.num_shards)
    return already


def _write_all(packing: Packing, folder: Path, numbers: list[int], workers: int) -> Iterator[None]:
    if workers < 2:
        for number in numbers:
            _write_shard(packing, folder, number)
            yield
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_write_shard, packing, folder, number) for number in numbers]
        try:
            for future in futures:
                future.result()
                yield
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _enter(packing: Packing, folder: Path) -> None:
    """Notes what the folder is for, or checks that it is for this."""
    note = folder / _NOTE
    content = {
        "format": _FORMAT,
        "identity": packing.identity,
        "chips": packing.count,
        "per_shard": packing.per_shard,
        "seed": packing.seed,
        "bands": list(network_bands(packing.settings)),
        "settings": packing.settings.model_dump(mode="json"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if note.is_file():
            known = json.loads(note.read_text(encoding="utf-8"))
            if known.get("identity") != packing.identity:
                raise ConfigError(
                    f"{folder} holds chips of another configuration, seed or size of shards; choose another "
                    "folder"
                )
        elif any(folder.glob("*.tar")):
            raise ConfigError(f"{folder} holds tar files of another origin; choose another folder")
        temporary = note.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(note)
    except (OSError, json.JSONDecodeError) as error:
        raise RasterError(f"cannot pack into {folder}: {error}") from error


def _write_shard(packing: Packing, folder: Path, number: int) -> None:
    """Writes a shard under a hidden name, then gives it its own."""
    start = number * packing.per_shard
    count = min(packing.per_shard, packing.count - start)
    bands = network_bands(packing.settings)
    temporary = folder / f".{number:06}.{os.getpid()}.tmp"
    try:
        try:
            with tarfile.open(temporary, "w:", format=tarfile.USTAR_FORMAT) as archive:
                for offset, chip in enumerate(_chips(packing, start, count)):
                    for suffix, content in _members(chip, bands):
                        _add(archive, f"{start + offset:09}{suffix}", content)
            temporary.replace(_shard(folder, number))
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RasterError(f"cannot write into {folder}: {error}") from error


def _chips(packing: Packing, start: int, count: int) -> Iterator[Chip]:
    """Chips of the sequence that a training of this seed reads with one process."""
    settings = packing.settings
    datasets = open_sources(settings)
    sampler = chip_sampler(
        datasets, settings, packing.per_shard, seed=packing.seed, start=start, rank=0, world_size=1
    )
    for source, keys in islice(sampler, count):
        yield _best(datasets[source], keys, settings.min_valid_share)


def _best(dataset: SceneDataset | IndexedChips, keys: tuple[Any, ...], least: float) -> Chip:
    """The first with enough data, else the one with most."""
    best: Chip | None = None
    for key in keys:
        chip = _read(dataset, key)
        if best is None or chip[1].mean() > best[1].mean():
            best = chip
        if best[1].mean() >= least:
            break
    assert best is not None
    return best


def _read(dataset: SceneDataset | IndexedChips, key: Any) -> Chip:  # noqa: ANN401 (an index or a query)
    if isinstance(dataset, IndexedChips):
        sample = dataset[key]
        return sample["image"].numpy(), sample["valid"].numpy(), dataset.grid(key), dataset.place(key)
    numbers, valid, grid = dataset.read_query(key)
    return numbers, valid, grid, ", ".join(dataset.paths_at(key))


def _members(chip: Chip, bands: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    numbers, valid, grid, place = chip
    facts: dict[str, Any] = {"source": place, "valid_share": round(float(valid.mean()), 6)}
    if grid is None:
        encoded = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(numbers.transpose(1, 2, 0))).save(encoded, "PNG")
        yield ".png", encoded.getvalue()
    else:
        yield ".tif", encode_chip(numbers, valid, grid, bands)
        a = grid.transform
        facts |= {
            "crs": grid.crs.to_string(),
            "transform": [a.a, a.b, a.c, a.d, a.e, a.f],
            "bounds": grid.bounds,
        }
    yield ".json", json.dumps(facts).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    # Without times and owners the same chips give the same bytes.
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"chips-{number:06}.tar"
