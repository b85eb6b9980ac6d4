"""Errors of predicted quantities, gathered scene by scene without keeping the scenes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of canopy height in metres, as the height classes of published maps; the last one has no upper end.
HEIGHT_BIN_EDGES_M = (0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, math.inf)
# A block with fewer valid cells than this share has no mean worth comparing.
MIN_BLOCK_SHARE = 0.5

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class RegressionScores:
    """Errors over all valid cells, in the target's unit.

    Attributes:
        count: number of cells.
        mae: mean absolute error.
        rmse: root mean square error.
        bias: mean of predicted minus true.
        r2: 1 - squared error / squared deviation of the truth from its mean; NaN if the truth is constant.
    """

    count: int
    mae: float
    rmse: float
    bias: float
    r2: float


@dataclass(frozen=True, slots=True)
class BinErrors:
    """Errors where the truth lies in [low, high).

    Attributes:
        low: lower edge.
        high: upper edge, infinity in the last bin.
        count: number of cells.
        bias: mean of predicted minus true, NaN in an empty bin.
        mae: mean absolute error, NaN in an empty bin.
        rmse: root mean square error, NaN in an empty bin.
    """

    low: float
    high: float
    count: int
    bias: float
    mae: float
    rmse: float


class RegressionAccumulator:
    """Sums from which `RegressionScores` follow; memory does not grow with the number of cells."""

    def __init__(self) -> None:
        """Starts empty."""
        self._count = 0
        self._absolute = 0.0
        self._squared = 0.0
        self._signed = 0.0
        self._mean = 0.0
        self._deviation = 0.0

    def update(self, predicted: Array, target: Array, valid: Array | None = None) -> None:
        """Adds cells.

        Args:
            predicted: any shape.
            target: the same shape.
            valid: bool of the same shape, or None if all cells count.

        Raises:
            ValueError: the shapes differ.
        """
        guess, truth = _select(predicted, target, valid)
        if truth.size == 0:
            return
        difference = guess - truth
        self._absolute += float(np.abs(difference).sum())
        self._squared += float((difference**2).sum())
        self._signed += float(difference.sum())
        # Chan et al. 1983: merging means and deviations loses no digits to a large common mean.
        mean, total = float(truth.mean()), self._count + truth.size
        step = mean - self._mean
        self._deviation += float(((truth - mean) ** 2).sum()) + step**2 * self._count * truth.size / total
        self._mean += step * truth.size / total
        self._count = total

    def scores(self) -> RegressionScores:
        """The scores of all cells so far; NaN where there were none."""
        if self._count == 0:
            return RegressionScores(0, math.nan, math.nan, math.nan, math.nan)
        r2 = 1 - self._squared / self._deviation if self._deviation > 0 else math.nan
        rmse = math.sqrt(self._squared / self._count)
        return RegressionScores(
            self._count, self._absolute / self._count, rmse, self._signed / self._count, r2
        )


class BlockAccumulator:
    """R2 between the means of square blocks: position errors within a block cancel.

    CHMv2 and its forerunners use blocks of 50 x 50 pixels of about 0.6 m. Blocks that the raster's edge cuts
    off are left out, as are blocks less than half of whose cells are valid.
    """

    def __init__(self, block: int) -> None:
        """Starts empty.

        Args:
            block: side of a block in cells.

        Raises:
            ValueError: a side below 1.
        """
        if block < 1:
            raise ValueError(f"the side of a block must be at least 1 cell, got {block}")
        self.block = block
        self._blocks = RegressionAccumulator()

    def update(self, predicted: Array, target: Array, valid: Array | None = None) -> None:
        """Adds one raster, [h, w] each.

        Raises:
            ValueError: the shapes differ.
        """
        known = np.ones(target.shape, dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
        if predicted.shape != target.shape or known.shape != target.shape or target.ndim != 2:
            raise ValueError(f"expected three [h, w], got {predicted.shape}, {target.shape}, {known.shape}")
        counts = self._sum(known.astype(np.float64))
        means = [
            self._sum(np.where(known, values, 0).astype(np.float64)) / np.maximum(counts, 1)
            for values in (predicted, target)
        ]
        self._blocks.update(means[0], means[1], counts >= max(MIN_BLOCK_SHARE * self.block**2, 1))

    def scores(self) -> RegressionScores:
        """Scores of the block means so far."""
        return self._blocks.scores()

    def _sum(self, values: Array) -> Array:
        rows, cols = (length // self.block for length in values.shape)
        whole = values[: rows * self.block, : cols * self.block]
        total: Array = whole.reshape(rows, self.block, cols, self.block).sum(axis=(1, 3))
        return total


class BinAccumulator:
    """Errors by the height of the truth: a mean over all heights hides that tall trees are missed."""

    def __init__(self, edges: Sequence[float] = HEIGHT_BIN_EDGES_M) -> None:
        """Starts empty.

        Args:
            edges: increasing; cells below the first or from the last on are not counted.

        Raises:
            ValueError: fewer than two edges, or not increasing.
        """
        if len(edges) < 2 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError(f"bin edges must increase, got {list(edges)}")
        self.edges = tuple(edges)
        self._bins = [RegressionAccumulator() for _ in self.edges[:-1]]

    def update(self, predicted: Array, target: Array, valid: Array | None = None) -> None:
        """Adds cells; arguments as in `RegressionAccumulator.update`."""
        guess, truth = _select(predicted, target, valid)
        for accumulator, (low, high) in zip(self._bins, itertools.pairwise(self.edges), strict=True):
            inside = (truth >= low) & (truth < high)
            accumulator.update(guess[inside], truth[inside])

    def errors(self) -> list[BinErrors]:
        """One entry per bin."""
        scores = [accumulator.scores() for accumulator in self._bins]
        return [
            BinErrors(low, high, s.count, s.bias, s.mae, s.rmse)
            for s, (low, high) in zip(scores, itertools.pairwise(self.edges), strict=True)
        ]


class EdgeAccumulator:
    """Edge error: how far edges differ, whatever the height on either side of them.

    Sum of |S(predicted) - S(true)| over the sum of S(predicted) + S(true), where S is the norm of the Sobel
    gradient: 0 for equal edges, 1 where one side has edges only where the other has none. Cells count
    where their eight neighbours are valid, too.

    Source: after the edge error of Tolan et al. 2024, which CHMv2 reports.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._difference = self._total = 0.0

    def update(self, predicted: Array, target: Array, valid: Array | None = None) -> None:
        """Adds one raster, [h, w] each.

        Raises:
            ValueError: the shapes differ.
        """
        known = np.ones(target.shape, dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
        if predicted.shape != target.shape or known.shape != target.shape or target.ndim != 2:
            raise ValueError(f"expected three [h, w], got {predicted.shape}, {target.shape}, {known.shape}")
        if min(target.shape) < 3:
            return
        whole = np.lib.stride_tricks.sliding_window_view(known, (3, 3)).all(axis=(2, 3))
        norms = [_sobel_norm(np.where(known, values, 0)) for values in (predicted, target)]
        self._difference += float(np.abs(norms[0] - norms[1])[whole].sum())
        self._total += float((norms[0] + norms[1])[whole].sum())

    def error(self) -> float:
        """The error so far; NaN where there was no edge."""
        return self._difference / self._total if self._total > 0 else math.nan


def _sobel_norm(values: Array) -> NDArray[np.float64]:
    """[h, w] -> [h - 2, w - 2]."""
    v = values.astype(np.float64)
    down = v[2:] - v[:-2]
    right = v[:, 2:] - v[:, :-2]
    rows = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    cols = right[:-2] + 2 * right[1:-1] + right[2:]
    return np.asarray(np.hypot(rows, cols) / 8, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class CalibrationPoint:
    """Cells whose prediction lies in [low, high).

    Attributes:
        low: lower edge.
        high: upper edge, infinity in the last bin.
        count: number of cells.
        predicted: mean prediction, NaN in an empty bin.
        true: mean truth, NaN in an empty bin.
    """

    low: float
    high: float
    count: int
    predicted: float
    true: float


class CalibrationAccumulator:
    """Means of truth by the prediction: on the diagonal where predictions can be taken at their word."""

    def __init__(self, edges: Sequence[float] = HEIGHT_BIN_EDGES_M) -> None:
        """Starts empty; `edges` as in `BinAccumulator`."""
        self.edges = tuple(edges)
        self._sums = np.zeros((3, len(self.edges) - 1))

    def update(self, predicted: Array, target: Array, valid: Array | None = None) -> None:
        """Adds cells; arguments as in `RegressionAccumulator.update`."""
        guess, truth = _select(predicted, target, valid)
        places = np.digitize(guess, self.edges[1:-1])
        for row, weights in enumerate((None, guess, truth)):
            self._sums[row] += np.bincount(places, weights, minlength=self._sums.shape[1])

    def points(self) -> list[CalibrationPoint]:
        """One entry per bin."""
        counts, guesses, truths = self._sums
        return [
            CalibrationPoint(low, high, int(n), float(p / n), float(t / n))
            if n
            else CalibrationPoint(low, high, 0, math.nan, math.nan)
            for (low, high), n, p, t in zip(
                itertools.pairwise(self.edges), counts, guesses, truths, strict=True
            )
        ]


def regression_scores(predicted: Array, target: Array, valid: Array | None = None) -> RegressionScores:
    """Scores of arrays that are at hand at once; arguments as in `RegressionAccumulator.update`."""
    accumulator = RegressionAccumulator()
    accumulator.update(predicted, target, valid)
    return accumulator.scores()


def _select(predicted: Array, target: Array, valid: Array | None) -> tuple[Array, Array]:
    """Valid cells in float64."""
    if predicted.shape != target.shape or (valid is not None and valid.shape != target.shape):
        shapes = predicted.shape, target.shape, None if valid is None else valid.shape
        raise ValueError(f"predicted, target and valid must have one shape, got {shapes}")
    if valid is None:
        return predicted.astype(np.float64).ravel(), target.astype(np.float64).ravel()
    chosen = np.asarray(valid, dtype=bool)
    return predicted[chosen].astype(np.float64), target[chosen].astype(np.float64)
