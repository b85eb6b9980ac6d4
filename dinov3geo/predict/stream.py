"""Tiles of a scene through a model into blended rows, in memory that the scene's height does not change.

Tiles are read ahead by threads, run in batches in another one, and averaged by blend weights in a ring of
rows one tile high. A row that no later tile touches is finished: it leaves the ring, once, and its place is
used again further down. So reading, computing and whatever the caller does with the rows overlap.

What a network returns for a tile depends, in the last bits, on the batch that the tile is in. So batches are
formed within groups of rows of tiles that the plan alone determines: any range of rows comes out in the same
bytes, whether it is computed with all the others, after a restart or on another machine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from dinov3geo.rasters.grid import TilePlan, blend_weights
from dinov3geo.rasters.threads import step_back

Array = NDArray[np.generic]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
RunTiles = Callable[[Array, Mask], Floats]

BATCHES_AHEAD = 2
"""Batches read while the model runs: one ready, one in the making."""

OUTPUTS_AHEAD = 2
"""Batches computed while the rows before are written."""

GROUP_BATCHES = 4
"""A group has as many rows of tiles as make this many batches, at least one row."""


class WindowSource(Protocol):
    """What the engine asks of a scene; `SceneReader` is one."""

    def read(self, window: Window) -> tuple[Array, Mask]:
        """Pixels [C, h, w] and where they hold data [h, w]."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One square of the scene, ready for the model.

    Attributes:
        row: first row in output cells.
        col: first column in output cells.
        image: [C, h, w] in the file's dtype.
        valid: [h, w], False where the image holds no data.
        cells: [h / stride, w / stride], True where any pixel of the scene in the cell is valid.
    """

    row: int
    col: int
    image: Array
    valid: Mask
    cells: Mask


class RowRing:
    """Weighted means of the rows in flight; row `y` of the output lies at `y % height`.

    A mean is kept up to date, not a sum: tiles that agree on a value then give exactly that value.
    """

    def __init__(self, num_outputs: int, height: int, width: int, first_row: int = 0) -> None:
        """Allocates the ring, the engine's only memory that grows with the scene (with its width).

        Args:
            num_outputs: K, values per cell.
            height: rows in flight, one tile.
            width: of the output in cells.
            first_row: first row of the output that it will hold.
        """
        self.means: Floats = np.zeros((num_outputs, height, width), dtype=np.float32)
        self.weights: Floats = np.zeros((height, width), dtype=np.float32)
        self.valid: Mask = np.zeros((height, width), dtype=np.bool_)
        self.first_row = first_row

    def _pieces(self, row: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Where `count` rows from `row` on lie: (rows of the ring, rows of the block), one piece or two."""
        start = row % len(self.weights)
        head = min(count, len(self.weights) - start)
        yield slice(start, start + head), slice(0, head)
        if head < count:
            yield slice(0, count - head), slice(head, count)

    def add(self, row: int, col: int, values: Floats, weights: Floats, valid: Mask) -> None:
        """Adds one tile.

        Args:
            row: first row in output cells, not above the rows already taken.
            col: first column.
            values: [K, h, w].
            weights: [h, w].
            valid: [h, w].
        """
        assert self.first_row <= row and row + values.shape[1] <= self.first_row + len(self.weights)
        columns = slice(col, col + values.shape[2])
        whole = bool(valid.all())
        for ring, block in self._pieces(row, values.shape[1]):
            known = valid[block]
            total, means = self.weights[ring, columns], self.means[:, ring, columns]
            if whole:
                total += weights[block]
                change = values[:, block] - means
                change *= weights[block] / total
            else:
                total += np.where(known, weights[block], np.float32(0))
                share = np.divide(weights[block], total, out=np.zeros_like(total), where=known)
                # A value where there is no data may be anything, NaN included: it must not reach the means.
                change = share * np.where(known, values[:, block] - means, np.float32(0))
            means += change
            self.valid[ring, columns] |= known

    def take(self, stop_row: int) -> Iterator[tuple[int, Floats, Mask]]:
        """Hands out the rows above `stop_row` and makes their place free.

        Args:
            stop_row: first row that stays; no later tile begins above it.

        Yields:
            First row, values [K, n, width] (NaN where invalid), valid [n, width], at most a ring at a time.
        """
        while self.first_row < stop_row:
            count = min(stop_row - self.first_row, len(self.weights))
            values = np.full((len(self.means), count, self.weights.shape[1]), np.nan, dtype=np.float32)
            valid = np.zeros(values.shape[1:], dtype=np.bool_)
            for ring, block in self._pieces(self.first_row, count):
                valid[block] = self.valid[ring]
                np.copyto(values[:, block], self.means[:, ring], where=self.valid[ring])
                self.means[:, ring] = 0
                self.weights[ring] = 0
                self.valid[ring] = False
            row, self.first_row = self.first_row, self.first_row + count
            yield row, values, valid


def stream_rows(
    readers: WindowSource | Sequence[WindowSource],
    plan: TilePlan,
    run_tiles: RunTiles,
    *,
    batch_size: int,
    num_outputs: int,
    stride: int = 1,
    rows: tuple[int, int] | None = None,
) -> Generator[tuple[Window, Floats, Mask]]:
    """Runs a model over the tiles and yields the blended output in strips of rows, top to bottom.

    Every output row comes exactly once. Tiles without a valid pixel are not run. An exception of a thread
    arrives here; all threads have ended when the iterator is exhausted or closed.

    Args:
        readers: the scene; each reader is used by one thread at a time, and from the first strip on by nobody
            else.
        plan: tiles that cover the scene; with a stride above 1, made with `multiple=stride`.
        run_tiles: images [B, C, h, w] in the file's dtype and valid [B, h, w] to outputs
            [B, K, ceil(h / stride), ceil(w / stride)] float32. It runs in a thread of its own.
        batch_size: tiles per call of `run_tiles`.
        num_outputs: K.
        stride: scene pixels per output cell along a side, e.g. the patch size for features.
        rows: first output row wanted and the one after the last; None for all. They are the same whatever
            the range.

    Yields:
        Window in output cells over the whole width, values [K, rows, width] (NaN where invalid) and
        valid [rows, width]: a cell is valid if any scene pixel in it is.

    Raises:
        ValueError: the plan does not fit the stride, or `run_tiles` returned another shape.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _check_plan(plan, stride)
    tile_cells = (math.ceil(plan.size_hw[0] / stride), math.ceil(plan.size_hw[1] / stride))
    height, width = output_shape(plan, stride)
    first, stop = rows or (0, height)
    if not 0 <= first <= stop <= height:
        raise ValueError(f"rows must be within 0 and {height}, got {rows}")
    weights = blend_weights(tile_cells, plan.overlap // stride)
    sources = list(readers) if isinstance(readers, Sequence) else [readers]
    work = _Work(sources, plan, stride, batch_size, first, stop, tile_cells[0])
    ring = RowRing(num_outputs, tile_cells[0], width, work.top)

    def strips(until: int) -> Iterator[tuple[Window, Floats, Mask]]:
        for row, values, valid in ring.take(min(until, stop)):
            skipped = max(first - row, 0)
            if skipped < values.shape[1]:
                kept = values[:, skipped:]
                yield Window(0, row + skipped, width, kept.shape[1]), kept, valid[skipped:]

    def run() -> Iterator[tuple[list[Tile], Floats]]:
        with closing(work.batches()) as batches:
            for batch in batches:
                outputs = run_tiles(np.stack([t.image for t in batch]), np.stack([t.valid for t in batch]))
                expected = (len(batch), num_outputs, *tile_cells)
                if outputs.shape != expected:
                    raise ValueError(f"run_tiles returned shape {outputs.shape}, expected {expected}")
                yield batch, outputs

    with closing(prefetched(run(), depth=OUTPUTS_AHEAD, name="run-model")) as done:
        for batch, outputs in done:
            for tile, values in zip(batch, outputs, strict=True):
                if work.is_wanted(tile.row):
                    yield from strips(tile.row)
                    ring.add(tile.row, tile.col, values, weights, tile.cells)
    yield from strips(stop)


def row_groups(plan: TilePlan, batch_size: int) -> list[tuple[int, ...]]:
    """Row starts of a plan in groups; no batch holds tiles of two groups."""
    size = max(1, -(-GROUP_BATCHES * batch_size // len(plan.col_starts)))
    return [plan.row_starts[start : start + size] for start in range(0, len(plan.row_starts), size)]


@dataclass(frozen=True, slots=True)
class _Work:
    """The tiles that a range of rows needs, read ahead and in batches."""

    readers: list[WindowSource]
    plan: TilePlan
    stride: int
    batch_size: int
    first: int
    stop: int
    tile_rows: int

    @property
    def top(self) -> int:
        """First row of the first tile that touches the range."""
        wanted = (self._row(start) for start in self.plan.row_starts if self.is_wanted(self._row(start)))
        return min(next(wanted, self.first), self.first)

    def is_wanted(self, row: int) -> bool:
        """Whether a tile whose first row this is touches the range."""
        return row < self.stop and row + self.tile_rows > self.first

    def batches(self) -> Generator[list[Tile]]:
        """Batches with any wanted tile; each holds the same tiles whatever the range."""
        groups = row_groups(self.plan, self.batch_size)
        wanted = [g for g in groups if any(self.is_wanted(self._row(start)) for start in g)]
        starts = [(row, col) for group in wanted for row in group for col in self.plan.col_starts]
        last_rows = {group[-1]: group for group in wanted}
        batch: list[Tile] = []
        with closing(self._read_ahead(starts)) as tiles:
            for (row, col), tile in zip(starts, tiles, strict=True):
                if tile.valid.any():
                    batch.append(tile)
                group_ends = row in last_rows and col == self.plan.col_starts[-1]
                if len(batch) == self.batch_size or (group_ends and batch):
                    if any(self.is_wanted(t.row) for t in batch):
                        yield batch
                    batch = []

    def _row(self, start: int) -> int:
        return math.ceil(start / self.stride)

    def _read_ahead(self, starts: Iterable[tuple[int, int]]) -> Generator[Tile]:
        """Tiles in order, read by as many threads as there are readers."""
        free: SimpleQueue[WindowSource] = SimpleQueue()
        for reader in self.readers:
            free.put(reader)

        def read(start: tuple[int, int]) -> Tile:
            reader = free.get()
            try:
                return read_tile(reader, self.plan, start, stride=self.stride)
            finally:
                free.put(reader)

        depth = BATCHES_AHEAD * self.batch_size + len(self.readers) - 1
        ahead: deque[Future[Tile]] = deque()
        with ThreadPoolExecutor(
            max_workers=len(self.readers), thread_name_prefix="read-tiles", initializer=step_back
        ) as pool:
            try:
                for start in starts:
                    ahead.append(pool.submit(read, start))
                    if len(ahead) > depth:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def read_tile(
    reader: WindowSource, plan: TilePlan, start_row_col: tuple[int, int], *, stride: int = 1
) -> Tile:
    """Reads one tile of a plan.

    Args:
        reader: the scene.
        plan: the tile belongs to it.
        start_row_col: one of the plan's row starts and one of its column starts.
        stride: scene pixels per output cell.
    """
    scene_h, scene_w = _scene_shape(plan)
    height, width = plan.size_hw
    # The last tile is flush with the scene's edge; its start is moved on to the next whole cell.
    row, col = (math.ceil(start / stride) for start in start_row_col)
    window = Window(
        col * stride, row * stride, min(width, scene_w - col * stride), min(height, scene_h - row * stride)
    )
    image, valid = reader.read(window)
    return _make_tile(row, col, image, valid, plan.size_hw, stride)


def output_shape(plan: TilePlan, stride: int) -> tuple[int, int]:
    """Rows and columns of the output in cells, `ceil(scene / stride)`."""
    scene_h, scene_w = _scene_shape(plan)
    return math.ceil(scene_h / stride), math.ceil(scene_w / stride)


def prefetched[T](items: Iterator[T], *, depth: int, name: str = "prefetch") -> Generator[T]:
    """Yields the items of an iterator that is advanced in a thread, up to `depth` items ahead.

    An exception of the iterator is raised here in its turn. The thread ends with this iterator, and a
    generator is closed then.

    Args:
        items: advanced in the thread only.
        depth: items in the making or waiting, at least 1.
        name: of the thread.
    """
    end = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=name) as pool:
        ahead: deque[Future[T | object]] = deque(pool.submit(next, items, end) for _ in range(depth))
        try:
            while (item := ahead.popleft().result()) is not end:
                ahead.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(items, Generator):
                items.close()


def _scene_shape(plan: TilePlan) -> tuple[int, int]:
    """Rows and columns of the scene: the last tiles are flush with its edges."""
    return plan.row_starts[-1] + plan.size_hw[0], plan.col_starts[-1] + plan.size_hw[1]


def _check_plan(plan: TilePlan, stride: int) -> None:
    """Refuses a plan whose tiles do not begin on output cells."""
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    for starts, size in zip((plan.row_starts, plan.col_starts), plan.size_hw, strict=True):
        if len(starts) > 1 and (size % stride or any(start % stride for start in starts[:-1])):
            raise ValueError(f"tile size {size} and tile starts must be multiples of the stride {stride}")


def _make_tile(row: int, col: int, image: Array, valid: Mask, size_hw: tuple[int, int], stride: int) -> Tile:
    """Pads what was read to the tile's size by its edge pixels and marks the valid cells."""
    below, right = size_hw[0] - valid.shape[0], size_hw[1] - valid.shape[1]
    cells = _any_in_cell(np.pad(valid, ((0, below), (0, right))), stride)
    if below or right:
        image = np.pad(image, ((0, 0), (0, below), (0, right)), mode="edge")
        valid = np.pad(valid, ((0, below), (0, right)), mode="edge")
    return Tile(row, col, image, valid, cells)


def _any_in_cell(valid: Mask, stride: int) -> Mask:
    """[h, w] to [ceil(h / stride), ceil(w / stride)]: True if any pixel of the cell is."""
    if stride == 1:
        return valid
    height, width = (math.ceil(size / stride) for size in valid.shape)
    padding = (height * stride - valid.shape[0], width * stride - valid.shape[1])
    padded = np.pad(valid, ((0, padding[0]), (0, padding[1])))
    return np.asarray(padded.reshape(height, stride, width, stride).any(axis=(1, 3)))
