"""Exact statistics of bands over all valid pixels, in one or two passes and little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.errors import DataError

Array = NDArray[Any]
# Arrays [C, h, w] and what of them is data [h, w].
Pieces = Callable[[], Iterable[tuple[Array, NDArray[np.bool_]]]]
_BINS = 2**16


@dataclass(frozen=True, slots=True)
class BandStatistics:
    """Of the stored numbers of one band.

    Attributes:
        count: valid pixels.
        mean: of them.
        std: population standard deviation.
        minimum: of them.
        maximum: of them.
        percentiles: by percent; each is a number that some pixel holds (the lower one where two qualify).
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    percentiles: dict[float, float]


def band_statistics(pieces: Pieces, percents: Sequence[float]) -> list[BandStatistics]:
    """Statistics per band.

    Numbers of up to 16 bits are counted, one bin each, so that all results are exact. Others are summed in
    64 bits, and their percentiles found by two passes over the bit patterns of float32.

    Args:
        pieces: gives all pieces, the same every time it is called; they must not overlap.
        percents: in [0, 100].

    Raises:
        DataError: no valid pixel.
    """
    counters: list[_Counter] = []
    for numbers, valid in pieces():
        counters = counters or [_counter(numbers.dtype) for _ in numbers]
        for counter, band in zip(counters, numbers, strict=True):
            counter.add(band[valid])
    if not counters or not counters[0].count:
        raise DataError("no valid pixel, so there are no statistics; look at nodata and quality bits")
    if any(isinstance(counter, _FloatCounter) for counter in counters):
        for counter in counters:
            counter.look_for(percents)
        for numbers, valid in pieces():
            for counter, band in zip(counters, numbers, strict=True):
                counter.add_again(band[valid])
    return [counter.result(percents) for counter in counters]


class _Counter:
    """Counts every number of an integer type of up to 16 bits."""

    def __init__(self, lowest: int) -> None:
        self._lowest = lowest
        self._bins = np.zeros(_BINS, dtype=np.int64)

    @property
    def count(self) -> int:
        return int(self._bins.sum())

    def add(self, values: Array) -> None:
        shifted = values.astype(np.int64) - self._lowest
        self._bins += np.bincount(shifted, minlength=_BINS)

    def look_for(self, percents: Sequence[float]) -> None:
        """Nothing to look for: one pass is enough."""

    def add_again(self, values: Array) -> None:
        """Nothing to add."""

    def result(self, percents: Sequence[float]) -> BandStatistics:
        present = np.flatnonzero(self._bins)
        weights = self._bins[present].astype(np.float64)
        values = (present + self._lowest).astype(np.float64)
        mean = float(np.average(values, weights=weights))
        std = float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))
        below = np.cumsum(self._bins[present])
        found = {p: float(values[np.searchsorted(below, _rank(p, self.count) + 1)]) for p in percents}
        return BandStatistics(self.count, mean, std, float(values[0]), float(values[-1]), found)


class _FloatCounter(_Counter):
    """Sums and bit patterns of float32; the order of positive floats is that of their bits."""

    def __init__(self) -> None:
        super().__init__(0)
        self._mean = self._squares = 0.0
        self._number = 0
        self._minimum, self._maximum = np.inf, -np.inf
        self._fine: dict[int, NDArray[np.int64]] = {}

    @property
    def count(self) -> int:
        return self._number

    def add(self, values: Array) -> None:
        if not values.size:
            return
        wide = values.astype(np.float64)
        mean, total = float(wide.mean()), self._number + wide.size
        # Chan, Golub and LeVeque 1979: sums of squares about the mean, added without cancellation.
        step = mean - self._mean
        self._squares += float(((wide - mean) ** 2).sum()) + step**2 * self._number * wide.size / total
        self._mean += step * wide.size / total
        self._number = total
        self._minimum = min(self._minimum, float(wide.min()))
        self._maximum = max(self._maximum, float(wide.max()))
        self._bins += np.bincount(_ordered(values) >> 16, minlength=_BINS)

    def look_for(self, percents: Sequence[float]) -> None:
        below = np.cumsum(self._bins)
        for percent in percents:
            bin_number = int(np.searchsorted(below, _rank(percent, self.count) + 1))
            self._fine[bin_number] = np.zeros(_BINS, dtype=np.int64)

    def add_again(self, values: Array) -> None:
        bits = _ordered(values)
        high = bits >> 16
        for bin_number, fine in self._fine.items():
            fine += np.bincount(bits[high == bin_number] & 0xFFFF, minlength=_BINS)

    def result(self, percents: Sequence[float]) -> BandStatistics:
        below = np.cumsum(self._bins)
        found = {}
        for percent in percents:
            rank = _rank(percent, self.count)
            high = int(np.searchsorted(below, rank + 1))
            within = rank - int(below[high] - self._bins[high])
            low = int(np.searchsorted(np.cumsum(self._fine[high]), within + 1))
            found[percent] = _from_ordered(high << 16 | low)
        std = float(np.sqrt(self._squares / self._number))
        return BandStatistics(self._number, self._mean, std, self._minimum, self._maximum, found)


def _counter(dtype: np.dtype[Any]) -> _Counter:
    if np.issubdtype(dtype, np.integer) and dtype.itemsize <= 2:
        return _Counter(int(np.iinfo(dtype).min))
    return _FloatCounter()


def _rank(percent: float, count: int) -> int:
    """Position of a percentile among sorted values, from 0: the lower neighbour."""
    return int(np.floor(percent / 100 * (count - 1)))


def _ordered(values: Array) -> NDArray[np.int64]:
    """Whole numbers in [0, 2^32) in the order of the values as float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.int64)
    return np.where(bits >> 31, 0xFFFFFFFF - bits, bits + 0x80000000)


def _from_ordered(number: int) -> float:
    bits = number - 0x80000000 if number >= 0x80000000 else 0xFFFFFFFF - number
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def windows_of(height: int, width: int, side: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Row, column and (height, width) of windows that cover a raster once."""
    for row in range(0, height, side):
        for col in range(0, width, side):
            yield row, col, (min(side, height - row), min(side, width - col))
