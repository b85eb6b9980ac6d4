"""Where tiles run: in this process, or on the workers of a Ray cluster. The bytes are the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rasterio.windows import Window

from dinov3geo.errors import DataError, EmptySceneError, UnknownNameError
from dinov3geo.predict.encodings import Encoding
from dinov3geo.predict.stream import Array, Floats, Mask, RunTiles, output_shape, stream_rows
from dinov3geo.rasters.geotiff import GeoTiffWriter, block_cache
from dinov3geo.rasters.grid import PixelGrid, TilePlan
from dinov3geo.rasters.regridded import RegriddedScene
from dinov3geo.rasters.threads import quick_handover
from dinov3geo.rasters.unfinished import Statistics

Progress = Callable[[int, int], None]
"""Called with tiles done and tiles in all."""

Strips = Generator[tuple[Window, Floats, Mask]]

ENGINES = ("local", "ray")
READERS = 2
"""Threads that read and decode tiles while the model runs."""

# Two rows of blocks, read and written, of a scene 30,000 pixels wide.
CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class TileTask:
    """All that is needed to compute any rows of a map, here or elsewhere.

    Attributes:
        scene: raster file.
        bands: 1-based indexes in the model's order.
        grid: on which the model sees the scene.
        plan: tiles of the grid.
        stride: pixels of the grid per output cell.
        batch_size: tiles per call of the model.
        outputs: values per cell that the model gives.
        make_runner: makes the function that runs tiles; called once by whoever computes.
    """

    scene: Path
    bands: tuple[int, ...]
    grid: PixelGrid
    plan: TilePlan
    stride: int
    batch_size: int
    outputs: int
    make_runner: Callable[[], RunTiles]

    @property
    def shape_hw(self) -> tuple[int, int]:
        """Rows and columns of the map."""
        return output_shape(self.plan, self.stride)

    def rows(self, first: int, stop: int, run: RunTiles, *, readers: int = READERS) -> Strips:
        """Computes rows `first` to `stop`; see `stream_rows`."""
        with ExitStack() as stack:
            stack.enter_context(block_cache(CACHE_BYTES))
            sources = [
                stack.enter_context(RegriddedScene(self.scene, self.grid, bands=self.bands))
                for _ in range(readers)
            ]
            strips = stream_rows(
                sources,
                self.plan,
                run,
                batch_size=self.batch_size,
                num_outputs=self.outputs,
                stride=self.stride,
                rows=(first, stop),
            )
            # Closing ends the reading threads before the readers are closed.
            yield from stack.enter_context(closing(strips))

    def tiles_above(self, row: int) -> int:
        """Tiles that end above a row of the map."""
        height = math.ceil(self.plan.size_hw[0] / self.stride)
        done = sum(math.ceil(start / self.stride) + height <= row for start in self.plan.row_starts)
        return done * len(self.plan.col_starts)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What writing a map did.

    Attributes:
        statistics: of the stored numbers with data.
        tiles: tiles run; those without data, and those of an earlier run that was cut off, are not counted.
    """

    statistics: Statistics
    tiles: int


def write_map(
    output: Path,
    task: TileTask,
    grid: PixelGrid,
    encoding: Encoding,
    *,
    job: Mapping[str, object],
    engine: str = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Computes one map and writes it; see `write_maps`."""
    return write_maps(
        [(output, encoding)], task, grid, job=job, engine=engine, overwrite=overwrite, progress=progress
    )


def write_maps(
    outputs: Sequence[tuple[Path, Encoding]],
    task: TileTask,
    grid: PixelGrid,
    *,
    job: Mapping[str, object],
    engine: str = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Computes a model's outputs once and writes maps of them; a run that was killed goes on where it was.

    Args:
        outputs: GeoTIFFs to write, with what each of them stores.
        task: what to compute.
        grid: of the maps.
        job: names the model and its settings; scene, tiles and encodings are added.
        engine: a name in `ENGINES`.
        overwrite: whether existing outputs may be replaced.
        progress: told about tiles done.

    Returns:
        Outcome of the first map.

    Raises:
        UnknownNameError: no such engine.
        DataError: no valid pixel at all, or a model that gives NaN.
        RasterError: the scene cannot be read or an output not written.
    """
    check_engine(engine)
    with ExitStack() as stack:
        stack.enter_context(quick_handover())
        writers = [
            stack.enter_context(
                GeoTiffWriter(
                    path, grid, encoding.layer, job=job_name(task, encoding, job), overwrite=overwrite
                )
            )
            for path, encoding in outputs
        ]
        first_row = min(writer.next_row for writer in writers)
        counter = Counter(task, first_row, progress)
        with closing(compute_rows(engine, task, first_row, counter)) as strips:
            for window, values, valid in strips:
                check_finite(values, valid, task.scene)
                for writer, (_, encoding) in zip(writers, outputs, strict=True):
                    # Encoding may write into its argument, and another writer may be further than this one.
                    known = max(writer.next_row - int(window.row_off), 0)
                    writer.write(encoding.encode(values[:, known:].copy(), valid[known:]))
        for writer in writers:
            writer.flush()
        if not any(writers[0].statistics.count):
            raise EmptySceneError(
                f"scene {task.scene} holds no valid pixel: all of it is nodata; nothing was written"
            )
    counter.finish()
    return Outcome(writers[0].statistics, counter.done - counter.before)


def compute_rows(engine: str, task: TileTask, first_row: int, counter: Counter) -> Strips:
    """Rows from one on, computed here or on a cluster."""
    stop = task.shape_hw[0]
    if engine == "ray":
        from dinov3geo.predict.ray_engine import ray_rows

        return ray_rows(task, first_row, stop, tell=counter.reached)
    return task.rows(first_row, stop, counter.counting(task.make_runner()))


def check_finite(values: Floats, valid: Mask, scene: Path) -> None:
    """Raises `DataError` if a model gave NaN or infinity where there is data."""
    if not (np.isfinite(values) | ~valid).all():
        raise DataError(f"the model gave NaN or infinity on scene {scene}; its weights may be damaged")


def job_name(task: TileTask, encoding: Encoding, job: Mapping[str, object]) -> str:
    """A name that differs whenever a single number of the map could differ."""
    state = task.scene.stat()
    plan = [task.plan.size_hw, task.plan.row_starts, task.plan.col_starts, task.plan.overlap]
    layer = encoding.layer
    facts = {
        **job,
        "scene": [str(task.scene.resolve()), state.st_size, state.st_mtime_ns],
        "bands": task.bands,
        "grid": list(task.grid.transform)[:6],
        "plan": hashlib.sha256(repr(plan).encode()).hexdigest(),
        "stride": task.stride,
        "batch": task.batch_size,
        "layer": [layer.count, layer.dtype, str(layer.nodata), layer.scale, layer.band_names],
    }
    return json.dumps(facts, sort_keys=True, default=str)


class Counter:
    """Counts tiles and tells the progress."""

    def __init__(self, task: TileTask, first_row: int, progress: Progress | None) -> None:
        """Begins with the tiles above a row as done."""
        self.before = self.done = task.tiles_above(first_row)
        self._total = len(task.plan)
        self._progress = progress

    def counting(self, run: RunTiles) -> RunTiles:
        """The same function, counted."""

        def counted(images: Array, valid: Mask) -> Floats:
            outputs = run(images, valid)
            self.reached(self.done + len(images))
            return outputs

        return counted

    def reached(self, done: int) -> None:
        """So many tiles are done."""
        self.done = done
        self._tell(min(done, self._total))

    def finish(self) -> None:
        """The rest of the tiles held no data."""
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)


def check_engine(name: str) -> None:
    """Raises `UnknownNameError` unless this is an engine."""
    if name not in ENGINES:
        raise UnknownNameError("engine", name, ENGINES)


def split_rows(task: TileTask, first: int, stop: int, parts: int) -> Sequence[tuple[int, int]]:
    """Ranges of rows of about equal height that cover `first` to `stop`, at least one tile high each."""
    tile = math.ceil(task.plan.size_hw[0] / task.stride)
    count = max(1, min(parts, (stop - first) // max(2 * tile, 1)))
    edges = [first + round(index * (stop - first) / count) for index in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))
