"""The only writer of georeferenced files: rows in, cloud-optimised GeoTIFF out, whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.env import get_gdal_config, set_gdal_config
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile

from dinov3geo.errors import DataError, RasterError, UserError
from dinov3geo.paths import check_free
from dinov3geo.rasters.cog import Level, write_cog
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.layer import FEW_BANDS, Layer, Rgb
from dinov3geo.rasters.overviews import Overviews, halve
from dinov3geo.rasters.threads import step_back
from dinov3geo.rasters.unfinished import FinishedStrip, Statistics, WorkFolder

__all__ = ["GeoTiffWriter", "Layer", "Overviews", "block_cache", "encode_chip", "write_geotiff"]

# Strips compressed to less than this share of their numbers are rare: a disk without that much room is full
# for certain. After the first strips the real share is known.
_LEAST_SHARE = 0.02
_OVERVIEW_SHARE = 4 / 3
_FULL = (errno.ENOSPC, errno.EDQUOT)
# GDAL warns about rasters that lie nowhere.
_SOMEWHERE = Affine(1, 0, 1, 0, -1, 1)


class GeoTiffWriter:
    """Writes a raster from its first row to its last; a context manager.

    Rows go, one row of blocks at a time, as compressed strips into a hidden folder beside the output, and
    their overviews with them. When the block ends without an error the strips are put together to a COG
    (DEFLATE, overviews, blocks of 512 pixels or, beyond 4 bands, 128), which then takes the output's name.
    Compression runs in a thread of its own, so `write` returns while a strip is compressed.

    Work with a name for its job can be taken up again: strips that are on disk stay there when the process is
    killed or interrupted, fails, or the disk is full, and the next writer of the same job begins at
    `next_row`. After an error in what the user gave nothing is left.
    """

    def __init__(
        self, path: str | Path, grid: PixelGrid, layer: Layer, *, job: str = "", overwrite: bool = False
    ) -> None:
        """Checks the arguments; files are made on entering the context.

        Args:
            path: output; missing folders are made.
            grid: where the raster lies. Its rows may run northwards: row 0 is the grid's first one.
            layer: what the numbers are.
            job: name of everything the numbers depend on; equal jobs give equal rows. "" for work that
                cannot be taken up again.
            overwrite: whether an existing output, or unfinished work of another job, may be replaced.

        Raises:
            RasterError: the output exists (and overwrite is off) or is a folder.
            DataError: nodata does not fit dtype, or not one name per band.
        """
        self.path = Path(path)
        self.grid = grid
        self.layer = layer
        layer.check(self.path)
        check_free(self.path, overwrite=overwrite)
        self._overwrite = overwrite
        self._folder = WorkFolder(self.path, job)
        self._stack: _LevelStack | None = None
        self.next_row = 0

    def __enter__(self) -> Self:
        """Makes the work folder, or takes up the one of an unfinished run.

        Raises:
            RasterError: the output's folder cannot be made or written to, the disk is too full, or the work
                folder belongs to another job or a process that still runs.
        """
        try:
            with _errors(self.path):
                strips = self._folder.open(overwrite=self._overwrite)
                self._stack = _LevelStack(self.grid, self.layer, self._folder)
                self._check_room()
                for strip in strips:
                    self._stack.take_up(strip)
                self.next_row = min(len(strips) * self.layer.block, self.grid.height)
        except BaseException:
            self._leave(keep=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the output. After an error, removes everything but the strips of work to take up again.

        Raises:
            RasterError: the output cannot be written.
            ValueError: rows are missing.
        """
        if kind is not None:
            self._leave(keep=_is_worth_keeping(error))
            return
        try:
            with _errors(self.path, self._folder.advice):
                self._finish()
        except BaseException as failure:
            self._leave(keep=_is_worth_keeping(failure))
            raise

    def flush(self) -> None:
        """Waits until all whole strips so far are on disk.

        Raises:
            RasterError: the disk refuses.
        """
        assert self._stack is not None
        with _errors(self.path, self._folder.advice):
            self._stack.wait()

    @property
    def statistics(self) -> Statistics:
        """Of the numbers with data in all strips that are on disk; after the block, of the whole raster."""
        assert self._stack is not None
        return self._stack.statistics

    def write(self, rows: NDArray[Any]) -> None:
        """Writes the next rows.

        Args:
            rows: [C, n, width], those from `next_row` on; numbers of another type are cast if that loses no
                kind (not float to integer).

        Raises:
            DataError: the array's shape or type does not fit.
            RasterError: the disk refuses.
        """
        if self._stack is None:
            raise RuntimeError("GeoTiffWriter.write outside of its with block")
        dtype = np.dtype(self.layer.dtype)
        if rows.ndim != 3 or (rows.shape[0], rows.shape[2]) != (self.layer.count, self.grid.width):
            expected = (self.layer.count, "n", self.grid.width)
            raise DataError(f"{self.path}: rows of shape {expected} expected, got {rows.shape}")
        if not np.can_cast(rows.dtype, dtype, casting="same_kind"):
            raise DataError(f"{self.path}: numbers of type {dtype} expected, got {rows.dtype}")
        if self.next_row + rows.shape[1] > self.grid.height:
            last = self.next_row + rows.shape[1]
            raise DataError(f"{self.path}: row {last} reaches beyond the raster of {self.grid.height} rows")
        with _errors(self.path, self._folder.advice):
            self._stack.append(rows)
            self._check_room()
        self.next_row += rows.shape[1]

    def _check_room(self) -> None:
        """Refuses, as soon as it is certain, work for which the disk has no room.

        Raises:
            RasterError: so.
        """
        assert self._stack is not None
        total = self.layer.count * self.grid.height * self.grid.width * np.dtype(self.layer.dtype).itemsize
        share = self._stack.compressed_share() or _LEAST_SHARE
        whole = total * share * _OVERVIEW_SHARE
        # The strips still to come, and then the output beside all of them.
        needed = whole * (1 - self._stack.done_share()) + whole
        free = shutil.disk_usage(self._folder.path).free
        if needed > free:
            raise RasterError(
                f"cannot write {self.path}: about {_format_bytes(needed)} more are needed, "
                f"{_format_bytes(free)} are free on its disk; {self._folder.advice}"
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _finish(self) -> None:
        """Puts the strips together and gives the result the output's name."""
        assert self._stack is not None
        if self.next_row != self.grid.height:
            raise ValueError(f"{self.path}: {self.next_row} of {self.grid.height} rows were written")
        levels = self._stack.close()
        template, final = self._folder.path / "template.tif", self._folder.path / "output.tif"
        _write_template(template, self.grid, self.layer, self._stack.statistics)
        write_cog(final, template, levels)
        _sync(final)
        check_free(self.path, overwrite=self._overwrite)
        os.replace(final, self.path)
        self._folder.remove()

    def _leave(self, *, keep: bool) -> None:
        """Ends the thread; keeps the finished strips of work to take up again if wanted, nothing else."""
        if self._stack is not None:
            self._stack.abandon()
        self._folder.leave(keep=keep)


class _LevelStack:
    """The full resolution and its overviews, each filled by the one below it."""

    def __init__(self, grid: PixelGrid, layer: Layer, folder: WorkFolder) -> None:
        self._layer = layer
        self._folder = folder
        self.statistics = Statistics(layer.count)
        self._levels = [_LevelBuffer(grid.height, grid.width, layer)]
        while max(self._levels[-1].shape_hw) > layer.block:
            height, width = self._levels[-1].shape_hw
            self._levels.append(_LevelBuffer(-(-height // 2), -(-width // 2), layer))
        self._pool = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="write-strip", initializer=step_back
        )
        self._waiting: Future[None] | None = None
        self._raw_bytes = self._stored_bytes = 0

    def compressed_share(self) -> float | None:
        """Bytes on disk over bytes of the numbers, None before the first strip."""
        return self._stored_bytes / self._raw_bytes if self._raw_bytes else None

    def done_share(self) -> float:
        """Rows on disk over all rows."""
        level = self._levels[0]
        return min(len(level.strips) * self._layer.block / level.shape_hw[0], 1.0)

    def append(self, rows: NDArray[Any]) -> None:
        """Adds rows of the full resolution; whole strips are compressed in the thread."""
        for strip in self._levels[0].fill(rows):
            self.wait()
            self._waiting = self._pool.submit(self._store_first, strip)

    def take_up(self, strip: FinishedStrip) -> None:
        """Adds a strip that lies on disk already; its overviews are computed again."""
        level = self._levels[0]
        with rasterio.open(strip.path) as dataset:
            rows = dataset.read()[:, : min(self._layer.block, level.rows_left), : level.shape_hw[1]]
        level.skip(rows.shape[1], strip.path)
        self.statistics.add(strip.statistics)
        self._count_bytes(rows, strip.path)
        self._pass_on(1, rows)

    def close(self) -> list[Level]:
        """Waits for the thread and returns all levels, complete."""
        self.wait()
        self._pool.shutdown()
        return [Level(*level.shape_hw, tuple(level.strips)) for level in self._levels]

    def abandon(self) -> None:
        """Ends the thread once it has written the strip that it has."""
        self._pool.shutdown(wait=True)

    def wait(self) -> None:
        """Waits for the strip in the thread and raises its error."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.result()

    def _store_first(self, rows: NDArray[Any]) -> None:
        """Stores a strip of the full resolution and what it adds to the overviews."""
        level = self._levels[0]
        number = len(level.strips)
        own = Statistics.of(rows, self._layer.nodata)
        path = self._folder.add_strip(number, level.compress(rows), own)
        level.strips.append(path)
        self.statistics.add(own)
        self._count_bytes(rows, path)
        self._pass_on(1, rows)

    def _pass_on(self, index: int, rows: NDArray[Any]) -> None:
        """Halves rows of a level into the next one and stores the strips that this fills there."""
        if index == len(self._levels):
            return
        level = self._levels[index]
        for strip in level.fill(halve(rows, self._layer.nodata, self._layer.overviews)):
            path = self._folder.overview_path(index, len(level.strips))
            path.write_bytes(level.compress(strip))
            level.strips.append(path)
            self._pass_on(index + 1, strip)

    def _count_bytes(self, rows: NDArray[Any], path: Path) -> None:
        self._raw_bytes += rows.nbytes
        self._stored_bytes += path.stat().st_size


class _LevelBuffer:
    """Rows of one level until they fill a strip."""

    def __init__(self, height: int, width: int, layer: Layer) -> None:
        self.shape_hw = (height, width)
        self.rows_left = height
        self.strips: list[Path] = []
        self._layer = layer
        self._rows = self._new()
        self._filled = 0

    def skip(self, count: int, path: Path) -> None:
        """Counts a strip that is there already."""
        self.rows_left -= count
        self.strips.append(path)

    def fill(self, rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Adds rows [C, n, w]; yields each strip [C, block or less, w] that is full or the level's last."""
        block = self._layer.block
        while rows.shape[1]:
            count = min(rows.shape[1], block - self._filled)
            self._rows[:, self._filled : self._filled + count] = rows[:, :count]
            rows = rows[:, count:]
            self._filled += count
            self.rows_left -= count
            if self._filled == block or self.rows_left == 0:
                strip, self._filled = self._rows[:, : self._filled], 0
                # The thread may still be at work on the full one.
                self._rows = self._new() if self.rows_left else strip
                yield strip

    def compress(self, rows: NDArray[Any]) -> bytes:
        """A TIFF file of one row of whole blocks; beyond the edges the last pixels are repeated."""
        block = self._layer.block
        edges = ((0, 0), (0, block - rows.shape[1]), (0, -rows.shape[2] % block))
        padded = np.pad(rows, edges, mode="edge")
        # While rows are still to come, a network computes them; blocks are the same however many threads.
        cores = os.cpu_count() or 1
        threads = max(cores // 2, 1) if self.rows_left else cores
        options = _creation_options(self._layer) | {"height": block, "width": padded.shape[2]}
        with MemoryFile() as memory:
            with memory.open(**options, transform=_SOMEWHERE, NUM_THREADS=str(threads)) as dataset:
                dataset.write(padded)
            content: bytes = memory.read()
        return content

    def _new(self) -> NDArray[Any]:
        rows = min(self._layer.block, max(self.rows_left, 1))
        return np.empty((self._layer.count, rows, self.shape_hw[1]), dtype=self._layer.dtype)


def write_geotiff(
    path: str | Path,
    array: NDArray[Any],
    grid: PixelGrid,
    *,
    nodata: float | None,
    band_names: Sequence[str] = (),
    units: str = "",
    scale: float = 1.0,
    overviews: Overviews = "average",
    colours: Mapping[int, Rgb] | None = None,
    tags: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a whole array [C, H, W] (or [H, W]) at once; arguments as `Layer`, errors as `GeoTiffWriter`."""
    bands = array[None] if array.ndim == 2 else array
    layer = Layer(
        count=bands.shape[0],
        dtype=bands.dtype.name,
        nodata=nodata,
        band_names=tuple(band_names),
        units=units,
        scale=scale,
        overviews=overviews,
        colours=colours,
        tags=tags,
    )
    with GeoTiffWriter(path, grid, layer, overwrite=overwrite) as writer:
        writer.write(bands)


def encode_chip(
    numbers: NDArray[Any], valid: NDArray[np.bool_], grid: PixelGrid, band_names: Sequence[str] = ()
) -> bytes:
    """A small GeoTIFF in memory, whose pixels without data lie under an internal mask.

    Args:
        numbers: [C, H, W].
        valid: [H, W].
        grid: where they lie.
        band_names: one per band, or none.
    """
    count, height, width = numbers.shape
    place = {"crs": grid.crs, "transform": grid.transform, "height": height, "width": width}
    options = {"driver": "GTiff", "count": count, "dtype": numbers.dtype.name, "compress": "deflate"}
    # One strip per band: a chip is always read whole.
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        with memory.open(**options, **place, blockysize=height, photometric="minisblack") as dataset:
            dataset.write(numbers)
            if not valid.all():
                dataset.write_mask(valid)
            for band, name in enumerate(band_names, start=1):
                dataset.set_band_description(band, name)
        return bytes(memory.getbuffer())


def _creation_options(layer: Layer) -> dict[str, Any]:
    """How blocks are encoded."""
    floating = np.issubdtype(np.dtype(layer.dtype), np.floating)
    return {
        "driver": "GTiff",
        "count": layer.count,
        "dtype": layer.dtype,
        "tiled": True,
        "blockxsize": layer.block,
        "blockysize": layer.block,
        "interleave": "pixel" if layer.count <= FEW_BANDS else "band",
        "compress": "deflate",
        # The last digits of floats are noise: higher levels take twice the time for a tenth of the bytes.
        "zlevel": 1 if floating else 6,
        # Floats of two bytes are none for the predictor of floats in older readers.
        "predictor": 3 if floating and layer.dtype != "float16" else 2,
        "photometric": "minisblack",
    }


def _write_template(path: Path, grid: PixelGrid, layer: Layer, statistics: Statistics) -> None:
    """A TIFF with all tags of the output and no block."""
    place = {"crs": grid.crs, "transform": grid.transform, "height": grid.height, "width": grid.width}
    options = _creation_options(layer) | place | {"nodata": layer.nodata, "SPARSE_OK": "TRUE"}
    with rasterio.open(path, "w", **options, BIGTIFF="IF_SAFER") as dataset:
        dataset.update_tags(**(layer.tags or {}))
        if layer.units:
            dataset.units = (layer.units,) * layer.count
        if layer.scale != 1:
            dataset.scales = (layer.scale,) * layer.count
        if layer.colours is not None:
            dataset.write_colormap(1, {n: (*rgb, 255) for n, rgb in layer.colours.items()})
        for band in range(1, layer.count + 1):
            if layer.band_names:
                dataset.set_band_description(band, layer.band_names[band - 1])
            dataset.update_tags(band, **statistics.gdal_tags(band - 1))


@contextmanager
def _errors(path: Path, advice: str = "") -> Iterator[None]:
    """Re-raises what GDAL and the file system say, with the output's name."""
    try:
        yield
    except RasterError:
        raise
    except PermissionError as error:
        raise RasterError(f"cannot write {path}: the folder is not writable ({error.strerror})") from error
    except (OSError, RasterioError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        raise RasterError(f"cannot write {path}: {error}" + (f"; {advice}" if full else "")) from error


def _is_worth_keeping(error: BaseException | None) -> bool:
    """Whether another try can end better: not after an error in what the user gave, but for a full disk."""
    if not isinstance(error, UserError):
        return True
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False


def _sync(path: Path) -> None:
    """Brings a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _format_bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


@contextmanager
def block_cache(limit_bytes: int) -> Iterator[None]:
    """Caps GDAL's block cache meanwhile; long scenes would fill it, by default 5 % of the machine's memory.

    `rasterio.Env` would set the cap but not set it back.
    """
    before = get_gdal_config("GDAL_CACHEMAX")
    set_gdal_config("GDAL_CACHEMAX", min(before, limit_bytes))
    try:
        yield
    finally:
        set_gdal_config("GDAL_CACHEMAX", before)
