"""Endless, seeded, rank-sharded orders in which chips are drawn; any position can be resumed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence, Sized
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import pyproj
import shapely
from numpy.typing import NDArray
from torch.utils.data import Sampler
from torchgeo.datasets import GeoDataset
from torchgeo.datasets.utils import GeoSlice
from torchgeo.samplers import GeoSampler

from dinov3geo.data.catalog import EQUAL_AREA
from dinov3geo.data.places import Places, cells, whole_scenes
from dinov3geo.errors import DataError
from dinov3geo.rasters.crs import to_pyproj

Weights = Literal["area", "file"] | Sequence[float] | NDArray[np.float64] | Places

# A footprint that fills its bounding box to within this fraction lies along the axes of the index.
_RECTANGLE_TOLERANCE = 1e-6


class Endless[T](Sampler[T]):
    """One global sequence, epoch after epoch, of which every rank takes each `world_size`-th position."""

    def __init__(self, length: int, *, seed: int, rank: int, world_size: int) -> None:
        """Keeps length and place among the processes."""
        if not 0 <= rank < world_size:
            raise DataError(f"rank must lie in 0..{world_size - 1} for {world_size} processes, got {rank}")
        if length < world_size:
            raise DataError(f"{length} samples in an epoch do not suffice for {world_size} processes")
        self._epoch_length = length
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0

    def __len__(self) -> int:
        """Samples of this rank in an epoch."""
        return self._epoch_length // self._world_size

    def __iter__(self) -> Iterator[T]:
        """Yields this rank's samples of the present epoch."""
        stream = self.stream(self._epoch * len(self))
        for _ in range(len(self)):
            yield next(stream)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that iteration gives."""
        self._epoch = epoch

    def stream(self, start: int = 0) -> Iterator[T]:
        """Yields this rank's samples without end.

        Args:
            start: samples that this rank has consumed already; the same number continues the same stream.
        """
        position = start * self._world_size + self._rank
        while True:
            epoch, offset = divmod(position, self._epoch_length)
            samples = self._draw(np.random.default_rng([self._seed, epoch]))
            while offset < self._epoch_length:
                yield samples[offset]
                offset += self._world_size
                position += self._world_size

    @abstractmethod
    def _draw(self, generator: np.random.Generator) -> Sequence[T]:
        """All samples of one epoch."""


class ChipSampler(Endless[GeoSlice], GeoSampler):
    """Random chips of a torchgeo data set, every pixel of every scene about equally likely.

    A scene is drawn in proportion to its area and a chip uniformly inside it, on whole pixels. torchgeo's
    `RandomPatchSampler` keeps half a chip's diagonal away from the edges, so that the rim of a scene is
    rarely seen and scenes smaller than that never, and it searches for points by rejection in the bounding
    box of all scenes, which takes for ever where they lie far apart; here smaller scenes are centred in the
    chip (which the data set pads), and a dated scene's time goes into the query.
    """

    def __init__(
        self,
        dataset: GeoDataset,
        *,
        chip_size: int,
        chips_per_epoch: int,
        seed: int,
        weights: Weights = "area",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Reads the footprints of all scenes.

        Args:
            dataset: `SceneDataset`, `ScenePairs` or another of torchgeo's.
            chip_size: side in pixels.
            chips_per_epoch: of all ranks together.
            seed: of the run; two ranks with one seed never draw the same position.
            weights: how often scenes are drawn: in proportion to their area, every file alike, one number
                per row of the data set's index, or parts of scenes with weights of their own (`cells`).
            rank: of this process.
            world_size: number of processes.

        Raises:
            DataError: no such rank, an epoch of less than one chip per rank, a chip without pixels, or
                weights that cannot be.
        """
        super().__init__(chips_per_epoch, seed=seed, rank=rank, world_size=world_size)
        if chip_size < 1:
            raise DataError(f"a chip needs at least 1 pixel, got chip_size {chip_size}")
        geometries = np.asarray(dataset.index.geometry.values, dtype=object)
        self._bounds: NDArray[np.float64] = shapely.bounds(geometries)
        areas: NDArray[np.float64] = shapely.area(geometries)
        self._places = weights if isinstance(weights, Places) else whole_scenes(_shares(weights, areas))
        self._probabilities = _normalized(self._places.weights)
        self._resolution = np.array(dataset.res, dtype=np.float64)
        self._chip_size = chip_size
        boxes = np.prod(self._bounds[:, 2:] - self._bounds[:, :2], axis=1)
        self._snaps = bool(np.all(areas >= (1 - _RECTANGLE_TOLERANCE) * boxes))
        self._times = _times(dataset)
        self._stretch = _stretch(dataset, self._bounds)

    def _draw(self, generator: np.random.Generator) -> Sequence[GeoSlice]:
        count = self._epoch_length
        parts = generator.choice(len(self._probabilities), size=count, p=self._probabilities)
        position = self._places.inside(parts, generator.random((count, 2)))
        return self._chips(self._places.rows[parts], position)

    def cells(self, side: int, group_side: int, most: int) -> Places:
        """The scenes cut into squares of `side` pixels, weighted by area; see `places.cells`."""
        return cells(self._steps(np.arange(len(self._bounds))), side, group_side, most)

    def middles(self, places: Places) -> Sequence[GeoSlice]:
        """The chip that begins in the middle of each part of a scene."""
        return self._chips(places.rows, (places.low + places.high) / 2)

    def _steps(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n, 2] whole pixels by which a chip can be moved in its scene."""
        steps: NDArray[np.float64] = np.maximum(np.rint(self._room(rows) / self._resolution), 0)
        return steps

    def _room(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n, 2] lengths by which a chip can be moved in its scene, negative where it is larger than that."""
        size = self._chip_size * self._resolution
        # What the chip covers on the plane of the index.
        covered = size * self._stretch[rows]
        room: NDArray[np.float64] = self._bounds[rows, 2:] - self._bounds[rows, :2] - covered
        return room

    def _chips(self, rows: NDArray[np.int64], position: NDArray[np.float64]) -> Sequence[GeoSlice]:
        """Queries of chips at positions in [0, 1) along the room of their scenes."""
        low, high = self._bounds[rows, :2], self._bounds[rows, 2:]
        size = self._chip_size * self._resolution
        room = self._room(rows)
        if self._snaps:
            # Counted from the upper left corner, where the pixels of a scene begin.
            steps = np.floor(position * (self._steps(rows) + 1)) * self._resolution
            snapped = np.stack([low[:, 0] + steps[:, 0], high[:, 1] - steps[:, 1] - size[1]], axis=1)
            corner = np.where(room > 0, snapped, low + room / 2)
        else:
            center = (low + high) / 2 + (position - 0.5) * np.maximum(room, 0)
            corner = center - size / 2
        return _Queries(
            corner, corner + size, None if self._times is None else [self._times[r] for r in rows]
        )


class SuperblockSampler(ChipSampler):
    """Chips in an order in which neighbours are read soon after each other, and every block decoded once.

    Scenes are cut into superblocks. The sampler visits them in random order, each in proportion to its area
    and the weight of its scene, and draws several chips in each; `SceneDataset` keeps the blocks that they
    share. So that neighbours do not fill a batch, the chips of several visits are shuffled together.

    With reading processes, which torch hands whole batches in turn, `lanes` such shuffled sequences are
    dealt out batch by batch: with as many lanes as processes (or a multiple) no two decode the same blocks.
    """

    def __init__(
        self,
        dataset: GeoDataset,
        *,
        chip_size: int,
        chips_per_epoch: int,
        seed: int,
        superblock: int = 1024,
        chips_per_visit: int = 16,
        shuffled_visits: int = 16,
        lanes: int = 1,
        batch_size: int = 1,
        weights: Weights = "area",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Reads the footprints of all scenes.

        Args:
            dataset: as `ChipSampler`.
            chip_size: side in pixels.
            chips_per_epoch: of all ranks together.
            seed: of the run.
            superblock: side in pixels of the squares in which the upper left corners of a visit's chips lie.
            chips_per_visit: more means less decoding, and more chips of one neighbourhood.
            shuffled_visits: visits whose chips are mixed; their blocks should fit the cache of blocks.
            lanes: sequences that are dealt out batch by batch.
            batch_size: keys per batch of one rank; matters only with several lanes.
            weights: as `ChipSampler`.
            rank: of this process.
            world_size: number of processes.

        Raises:
            DataError: as `ChipSampler`, or a number below 1.
        """
        super().__init__(
            dataset,
            chip_size=chip_size,
            chips_per_epoch=chips_per_epoch,
            seed=seed,
            weights=weights,
            rank=rank,
            world_size=world_size,
        )
        numbers = {
            "superblock": superblock,
            "chips_per_visit": chips_per_visit,
            "shuffled_visits": shuffled_visits,
            "lanes": lanes,
            "batch_size": batch_size,
        }
        for name, number in numbers.items():
            if number < 1:
                raise DataError(f"{name} must be at least 1, got {number}")
        self._superblock = superblock
        self._in_cells = isinstance(weights, Places)
        self._chips_per_visit = chips_per_visit
        self._group = chips_per_visit * shuffled_visits
        self._lanes = lanes
        self._batch_size = batch_size

    def _draw(self, generator: np.random.Generator) -> Sequence[GeoSlice]:
        order = self._order()
        num_groups = int(order.max()) // self._group + 1
        visits = num_groups * self._group // self._chips_per_visit
        draw = self._draw_cells if self._in_cells else self._draw_squares
        scene, position = draw(generator, visits)
        shuffled = generator.permuted(np.arange(len(position)).reshape(num_groups, -1), axis=1).ravel()
        chosen = shuffled[order]
        return self._chips(scene[chosen // self._chips_per_visit], position[chosen])

    def _draw_squares(
        self, generator: np.random.Generator, visits: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Scene per visit and position per chip, evenly within the superblock of a visit."""
        scene = generator.choice(len(self._bounds), size=visits, p=self._probabilities)
        # A superblock is drawn by drawing a corner, so that cut ones come less often.
        pixels = self._steps(scene) + 1
        first = np.floor(generator.random((visits, 2)) * pixels / self._superblock) * self._superblock
        side = np.minimum(pixels - first, self._superblock)
        inside = generator.random((visits, self._chips_per_visit, 2))
        return scene, ((first[:, None] + inside * side[:, None]) / pixels[:, None]).reshape(-1, 2)

    def _draw_cells(
        self, generator: np.random.Generator, visits: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """As `_draw_squares`, by the weights of cells: a visit's chips lie in the cells of one group."""
        groups = self._places.groups
        first = generator.choice(len(groups), size=visits, p=self._probabilities)
        # On a line on which every cell is as long as it is likely, a group is an interval.
        ends = np.concatenate([[0.0], np.cumsum(self._probabilities)])
        start = ends[np.searchsorted(groups, groups[first], side="left")][:, None]
        stop = ends[np.searchsorted(groups, groups[first], side="right")][:, None]
        points = start + generator.random((visits, self._chips_per_visit)) * (stop - start)
        points = np.minimum(points, np.nextafter(stop, 0.0))  # rounding must not lead into the next group
        part = np.searchsorted(ends, points.ravel(), side="right") - 1
        return self._places.rows[first], self._places.inside(part, generator.random((len(part), 2)))

    def _order(self) -> NDArray[np.int64]:
        """For each position of the epoch the number of its chip, whose groups belong to one lane each."""
        batch, within = np.divmod(np.arange(self._epoch_length) // self._world_size, self._batch_size)
        rank = np.arange(self._epoch_length) % self._world_size
        turn, lane = np.divmod(batch, self._lanes)
        group, offset = np.divmod(turn * self._batch_size + within, self._group)
        number = (group * self._world_size + rank) * self._lanes + lane
        order: NDArray[np.int64] = number * self._group + offset
        return order


class IndexSampler(Endless[int]):
    """Indexes of a map-style data set: every one once per epoch, shuffled anew."""

    def __init__(self, dataset: Sized, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Takes the data set's length.

        Args:
            dataset: anything with a length.
            seed: of the run.
            rank: of this process.
            world_size: number of processes.

        Raises:
            DataError: no such rank, or fewer samples than ranks.
        """
        super().__init__(len(dataset), seed=seed, rank=rank, world_size=world_size)

    def _draw(self, generator: np.random.Generator) -> Sequence[int]:
        return cast(list[int], generator.permutation(self._epoch_length).tolist())


class WeightedSampler(Endless[int]):
    """Indexes drawn in proportion to weights: in each epoch as many as there are, some of them repeatedly."""

    def __init__(
        self, weights: NDArray[np.float64], *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Keeps the weights.

        Args:
            weights: [N] at least 0, not all 0.
            seed: of the run.
            rank: of this process.
            world_size: number of processes.

        Raises:
            DataError: no such rank, fewer samples than ranks, or weights that cannot be.
        """
        super().__init__(len(weights), seed=seed, rank=rank, world_size=world_size)
        # Where each index begins on a line of the length of the epoch.
        self._ends = np.cumsum(_normalized(np.asarray(weights, dtype=np.float64)))

    def _draw(self, generator: np.random.Generator) -> Sequence[int]:
        # Evenly spaced points with one random shift: an index comes as often as its weight says, within one.
        points = (np.arange(self._epoch_length) + generator.random()) / self._epoch_length
        drawn = np.searchsorted(self._ends, points * self._ends[-1], side="right")
        return cast(list[int], generator.permutation(np.minimum(drawn, len(self._ends) - 1)).tolist())


class _Queries(Sequence[GeoSlice]):
    """Queries from arrays, made only when asked for."""

    def __init__(
        self, low: NDArray[np.float64], high: NDArray[np.float64], times: list[slice | None] | None
    ) -> None:
        self._low, self._high, self._times = low, high, times

    def __len__(self) -> int:
        return len(self._low)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        (x0, y0), (x1, y1) = self._low[index].tolist(), self._high[index].tolist()
        time = None if self._times is None else self._times[index]
        place = (slice(x0, x1), slice(y0, y1))
        return place if time is None else (*place, time)


def _shares(
    weights: Literal["area", "file"] | Sequence[float] | NDArray[np.float64], areas: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Per scene how often it is drawn, relative to the others."""
    if isinstance(weights, str):
        if weights not in ("area", "file"):
            raise DataError(f"weights must be 'area', 'file' or a number per scene, got {weights!r}")
        numbers = areas if weights == "area" else np.ones_like(areas)
    else:
        numbers = np.asarray(weights, dtype=np.float64)
        if numbers.shape != areas.shape:
            raise DataError(f"{len(numbers)} weights for {len(areas)} scenes, expected one for each")
    return numbers


def _normalized(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights as probabilities."""
    if not (np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.sum() > 0):
        raise DataError("weights must be finite, at least 0 and not all 0")
    shares: NDArray[np.float64] = numbers / numbers.sum()
    return shares


def _times(dataset: GeoDataset) -> list[slice | None] | None:
    """The time of each scene that has one; None if none has."""
    intervals = dataset.index.index
    undated = (pd.Timestamp.min, pd.Timestamp.max)
    times = [
        None if (left, right) == undated else slice(left, right)
        for left, right in zip(intervals.left, intervals.right, strict=True)
    ]
    return None if all(time is None for time in times) else times


def _stretch(dataset: GeoDataset, bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """[scenes, 2] lengths on the plane of the index per metre on the ground, where the two differ by design.

    Scenes of several CRS share an equal-area plane, which is stretched sideways away from 30 degrees.
    """
    plane = to_pyproj(EQUAL_AREA)
    if dataset.crs != plane:
        return np.ones((len(bounds), 2))
    x, y = (bounds[:, :2] + bounds[:, 2:]).T / 2
    projection = pyproj.Proj(plane)
    factors = projection.get_factors(*projection(x, y, inverse=True))
    return np.stack([factors.parallel_scale, factors.meridional_scale], axis=1)
