"""Chips packed into tar files (the convention of WebDataset), read where they lie.

A shard is an uncompressed tar. Of every sample it holds `KEY.tif`, `KEY.jpg`, `KEY.jpeg` or `KEY.png`, and
anything else of the same key (`KEY.json` with a chip's place, labels), which pretraining has no use for.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from torch import Tensor

from dinov3geo.data.image_folder import IMAGE_SUFFIXES, decode_image, fit_image
from dinov3geo.data.indexed import IndexedChips, Order
from dinov3geo.data.sampling import Endless
from dinov3geo.errors import DataError, RasterError

SHARD_SUFFIX = ".tar"
_RASTER_SUFFIXES = (".tif", ".tiff")
# Shards whose samples are mixed: reading stays near a few files, and neighbours in a shard part.
_SHARDS_AT_ONCE = 8


class Shards(IndexedChips):
    """All chips in the tar files below a folder.

    Only headers are read at first; a chip is read by its place in its file, in any order and by any process.

    Attributes:
        files: sorted paths of the shards.
    """

    noun = "packed chips"

    def __init__(
        self, root: str | Path, *, chip_size: int, bands: Sequence[str], in_order: bool = False
    ) -> None:
        """Reads the headers.

        Args:
            root: a shard, or a folder that is searched recursively.
            chip_size: side of the chips in pixels; JPEG and PNG images are cut to it, GeoTIFFs must have it.
            bands: that are wanted, in order. A GeoTIFF is asked for them by its band names, where it has
                names, and must hold just as many where it has none.
            in_order: whether a run sees the chips in the order in which they were packed.

        Raises:
            RasterError: no such file or folder.
            DataError: no shard, a damaged one, or one without images.
        """
        self.root = Path(root)
        self.files = _find_shards(self.root)
        self._chip_size = chip_size
        self._in_order = in_order
        self._bands = tuple(bands)
        places: list[tuple[int, int, int]] = []
        self._names: list[str] = []
        self._counts: list[int] = []
        for number, path in enumerate(self.files):
            found = _members(path)
            self._counts.append(len(found))
            places += [(number, offset, size) for _, offset, size in found]
            self._names += [name for name, _, _ in found]
        if not places:
            kinds = ", ".join(f"KEY{suffix}" for suffix in (*_RASTER_SUFFIXES, *IMAGE_SUFFIXES))
            raise DataError(f"no chip in the {len(self.files)} shard(s) of {root}; expected members {kinds}")
        self._places = np.array(places, dtype=np.int64)  # [N, 3]: shard, first byte, bytes
        self._open: dict[int, int] = {}
        self._opened_by = os.getpid()

    def __len__(self) -> int:
        """Number of chips."""
        return len(self._places)

    @property
    def band_count(self) -> int | None:
        """Three, if there are photographs; GeoTIFFs are asked for bands by name."""
        photographs = any(name.lower().endswith(IMAGE_SUFFIXES) for name in self._names)
        return 3 if photographs else None

    def place(self, index: int) -> str:
        """Shard and member."""
        return f"{self.files[int(self._places[index, 0])]}:{self._names[index]}"

    def order(self, *, seed: int, rank: int, world_size: int) -> Order:
        """Every chip once per epoch; shards are shuffled, and a few at once are mixed chip by chip."""
        if self._in_order:
            return _PackedOrder(len(self), seed=seed, rank=rank, world_size=world_size)
        return _ShardOrder(self._counts, seed=seed, rank=rank, world_size=world_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Reads one chip.

        Raises:
            DataError: it is damaged, of another size, or without the bands.
        """
        if self._names[index].lower().endswith(IMAGE_SUFFIXES):
            content = io.BytesIO(self._read(index))
            decoded = fit_image(decode_image(content, self.place(index)), self._chip_size)
            image = torch.from_numpy(decoded).permute(2, 0, 1)
            return {"image": image, "valid": torch.ones(image.shape[1:], dtype=torch.bool)}
        pixels, valid = self._raster(index)
        return {"image": torch.from_numpy(pixels), "valid": torch.from_numpy(valid)}

    def _read(self, index: int) -> bytes:
        number, offset, size = (int(value) for value in self._places[index])
        if self._opened_by != os.getpid():  # a reading process has open files of its own
            self._open, self._opened_by = {}, os.getpid()
        if number not in self._open:
            self._open[number] = os.open(self.files[number], os.O_RDONLY)
        content = os.pread(self._open[number], size, offset)
        if len(content) < size:
            raise DataError(f"{self.place(index)} is cut off: {len(content)} of {size} bytes; copy it again")
        return content

    def _raster(self, index: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        number, offset, size = (int(value) for value in self._places[index])
        try:
            with rasterio.open(f"/vsisubfile/{offset}_{size},{self.files[number].resolve()}") as opened:
                numbers = self._band_numbers(opened, index)
                pixels = opened.read(numbers)
                valid = (opened.read_masks(numbers) > 0).all(0)
        except RasterioError as error:
            raise DataError(f"{self.place(index)} cannot be read as GeoTIFF: {error}") from error
        if pixels.shape[1:] != (self._chip_size, self._chip_size):
            raise DataError(
                f"{self.place(index)} is {pixels.shape[2]} x {pixels.shape[1]} pixels but data.chip_size is "
                f"{self._chip_size}; set it to the side of the packed chips"
            )
        if np.issubdtype(pixels.dtype, np.floating):
            valid &= np.isfinite(pixels).all(0)
        return pixels, valid

    def _band_numbers(self, opened: rasterio.DatasetReader, index: int) -> list[int]:
        """1-based numbers of the wanted bands."""
        names = list(opened.descriptions)
        if all(band in names for band in self._bands):
            return [names.index(band) + 1 for band in self._bands]
        if any(names) or opened.count != len(self._bands):
            held = ", ".join(name or "?" for name in names)
            raise DataError(
                f"{self.place(index)} holds {opened.count} bands ({held}) but the run wants "
                f"{', '.join(self._bands)}; set data.bands, or pack the chips with these bands"
            )
        return list(range(1, opened.count + 1))


class _PackedOrder(Endless[int]):
    def _draw(self, generator: np.random.Generator) -> Sequence[int]:
        return range(self._epoch_length)


class _ShardOrder(Endless[int]):
    def __init__(self, counts: Sequence[int], *, seed: int, rank: int, world_size: int) -> None:
        super().__init__(sum(counts), seed=seed, rank=rank, world_size=world_size)
        self._ends = np.cumsum(counts)

    def _draw(self, generator: np.random.Generator) -> Sequence[int]:
        shards = generator.permutation(len(self._ends))
        drawn: list[int] = []
        for first in range(0, len(shards), _SHARDS_AT_ONCE):
            starts = [
                (self._ends[s - 1] if s else 0, self._ends[s]) for s in shards[first:][:_SHARDS_AT_ONCE]
            ]
            together = np.concatenate([np.arange(low, high) for low, high in starts])
            drawn += generator.permutation(together).tolist()
        return drawn


def _find_shards(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise RasterError(f"no such file or folder: {root}")
    files = sorted(path for path in root.rglob(f"*{SHARD_SUFFIX}") if path.is_file())
    if not files:
        raise DataError(f"no shard found in {root}; expected files named *{SHARD_SUFFIX}")
    return files


def _members(path: Path) -> list[tuple[str, int, int]]:
    """Name, first byte and bytes of every image in a shard."""
    wanted = (*_RASTER_SUFFIXES, *IMAGE_SUFFIXES)
    try:
        with tarfile.open(path, "r:") as shard:
            return [
                (member.name, member.offset_data, member.size)
                for member in shard
                if member.isfile() and member.name.lower().endswith(wanted)
            ]
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as an uncompressed tar: {error}; a compressed one must be unpacked first"
        ) from error
