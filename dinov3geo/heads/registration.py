"""How far heights lie from their image: found by correlation with heights that the image gives.

Source: CHMv2 finds a global shift by cross-correlation. Here the correlation of every whole shift is taken
over the cells that both sides have (so holes and rims do no harm), and refined by a parabola.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov3geo.features.extract import apply_view, undo_view
from dinov3geo.heads.fit import FitSample, FitView

# A shift is believed if it raises the correlation by at least so much, to at least that.
MIN_GAIN, MIN_CORRELATION = 0.05, 0.3
# Shifts that leave fewer common cells say nothing.
_MIN_CELLS = 25
_INNER_FOLDS = 3

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shift:
    """Where heights lie.

    Attributes:
        rows: cells to the south of where the image shows them; negative to the north.
        cols: cells to the east; negative to the west.
        correlation: with the image's heights once moved back.
        unmoved: correlation as they are.
    """

    rows: float
    cols: float
    correlation: float
    unmoved: float

    @property
    def is_believable(self) -> bool:
        """Whether moving the heights back is a clear gain."""
        return (
            self.correlation - self.unmoved >= MIN_GAIN
            and self.correlation >= MIN_CORRELATION
            and max(abs(self.rows), abs(self.cols)) >= 0.5
        )


class ShiftFinder:
    """Correlation of predicted and measured heights at every shift, over one plot or many together."""

    def __init__(self, reach: int) -> None:
        """Starts empty.

        Args:
            reach: largest shift in cells, each way.

        Raises:
            ValueError: below 1.
        """
        if reach < 1:
            raise ValueError(f"shifts need a reach of at least 1 cell, got {reach}")
        self.reach = reach
        side = 2 * reach + 1
        self._sums = np.zeros((3, side, side))

    def add(
        self, predicted: NDArray[np.float32], heights: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> None:
        """Adds a plot; each counts by its own deviations from its mean, so sites may differ in height.

        Args:
            predicted: [h, w] from the image alone, by a model that was not fitted on this plot.
            heights: [h, w] measured.
            valid: [h, w] bool, of the heights.

        Raises:
            ValueError: the shapes differ.
        """
        if not predicted.shape == heights.shape == valid.shape:
            raise ValueError(f"expected one shape, got {predicted.shape}, {heights.shape}, {valid.shape}")
        height, width = heights.shape
        for i, row in enumerate(range(-self.reach, self.reach + 1)):
            for j, col in enumerate(range(-self.reach, self.reach + 1)):
                here = _overlap(height, row), _overlap(width, col)
                there = _overlap(height, -row), _overlap(width, -col)
                known = valid[there]
                if known.sum() < _MIN_CELLS:
                    continue
                guess = predicted[here][known].astype(np.float64)
                truth = heights[there][known].astype(np.float64)
                guess, truth = guess - guess.mean(), truth - truth.mean()
                # Per cell, so that shifts with less overlap do not count less.
                self._sums[:, i, j] += np.array(
                    [(guess * truth).mean(), (guess**2).mean(), (truth**2).mean()]
                )

    def correlations(self) -> Floats:
        """[2 reach + 1, 2 reach + 1], rows then columns of the shift; -1 where nothing is known."""
        product, first, second = self._sums
        size = np.sqrt(first * second)
        return np.where(size > 0, product / np.where(size > 0, size, 1), -1.0)

    def find(self) -> Shift:
        """The shift of the highest correlation."""
        surface = self.correlations()
        i, j = np.unravel_index(int(surface.argmax()), surface.shape)
        rows = i - self.reach + _vertex(surface[:, j], int(i))
        cols = j - self.reach + _vertex(surface[i], int(j))
        unmoved = float(surface[self.reach, self.reach])
        return Shift(float(rows), float(cols), float(surface[i, j]), unmoved)


def find_shift(
    predicted: NDArray[np.float32], heights: NDArray[np.float32], valid: NDArray[np.bool_], *, reach: int
) -> Shift:
    """The shift of one plot; see `ShiftFinder`."""
    finder = ShiftFinder(reach)
    finder.add(predicted, heights, valid)
    return finder.find()


def move_back(sample: FitSample, rows: int, cols: int) -> FitSample:
    """The sample with its heights moved by whole cells, to the north and west for positive numbers."""
    return replace(sample, views=tuple(_moved(view, k, rows, cols) for k, view in enumerate(sample.views)))


def displaced(
    heights: NDArray[np.float32], valid: NDArray[np.bool_], rows: int, cols: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Heights moved south and east by whole cells, with what leaves the plot lost and no data behind.

    Args:
        heights: [h, w].
        valid: [h, w] bool.
        rows: cells to the south.
        cols: cells to the east.
    """
    height, width = heights.shape
    moved, known = np.zeros_like(heights), np.zeros_like(valid)
    source = _overlap(height, rows), _overlap(width, cols)
    target = _overlap(height, -rows), _overlap(width, -cols)
    moved[target], known[target] = heights[source], valid[source]
    return moved, known


def inner_folds(samples: Sequence[FitSample], seed: int) -> list[list[int]]:
    """Samples in three parts by group, for predictions by models that have not seen them."""
    names = sorted({s.group for s in samples})
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    part = {names[i]: k % _INNER_FOLDS for k, i in enumerate(order)}
    return [[i for i, s in enumerate(samples) if part[s.group] == k] for k in range(_INNER_FOLDS)]


def _moved(view: FitView, number: int, rows: int, cols: int) -> FitView:
    target: Tensor = undo_view(view.target, number)
    valid: Tensor = undo_view(view.valid, number)
    heights, known = displaced(target.numpy(), valid.numpy(), -rows, -cols)
    return replace(
        view,
        target=apply_view(torch.from_numpy(heights), number),
        valid=apply_view(torch.from_numpy(known), number),
    )


def _overlap(length: int, shift: int) -> slice:
    """Cells x for which x + shift is inside, too."""
    return slice(max(-shift, 0), max(min(length, length - shift), 0))


def _vertex(values: Floats, index: int) -> float:
    """Where between its neighbours the parabola through a maximum has its vertex, -0.5 to 0.5."""
    if not 0 < index < len(values) - 1:
        return 0.0
    before, at, after = values[index - 1 : index + 2]
    bend = before - 2 * at + after
    if bend >= 0 or min(before, after) <= -1:
        return 0.0
    return float(np.clip(0.5 * (before - after) / bend, -0.5, 0.5))
