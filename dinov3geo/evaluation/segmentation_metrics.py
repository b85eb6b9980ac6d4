"""Scores of class maps, gathered map by map as a confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Scores of one class.

    Attributes:
        name: of the class.
        pixels: true ones.
        iou: intersection over union; NaN where neither truth nor prediction has the class.
        precision: hits over predicted pixels; NaN without any.
        recall: hits over true pixels; NaN without any.
    """

    name: str
    pixels: int
    iou: float
    precision: float
    recall: float


@dataclass(frozen=True, slots=True)
class SegmentationScores:
    """Scores over all valid pixels.

    Attributes:
        pixels: number.
        miou: mean IoU over the classes that the truth holds.
        accuracy: share of right pixels.
        mean_f1: mean F1 over the classes that the truth holds.
        classes: one entry per class.
    """

    pixels: int
    miou: float
    accuracy: float
    mean_f1: float
    classes: tuple[ClassScores, ...]


class ConfusionMatrix:
    """Counts pixels by true class (rows) and predicted class (columns).

    Attributes:
        names: of the classes.
        counts: [K, K] int64.
    """

    def __init__(self, names: Sequence[str], counts: Array | None = None) -> None:
        """Starts empty, or from counts."""
        self.names = tuple(names)
        size = len(self.names)
        self.counts = np.zeros((size, size), dtype=np.int64) if counts is None else np.array(counts, np.int64)
        if self.counts.shape != (size, size):
            raise ValueError(f"expected counts [{size}, {size}], got {list(self.counts.shape)}")

    def update(self, predicted: Array, target: Array, valid: Array | None = None) -> None:
        """Adds a map.

        Args:
            predicted: positions of classes, any shape.
            target: the same shape.
            valid: bool of the same shape, or None if all pixels count.

        Raises:
            ValueError: the shapes differ.
        """
        if predicted.shape != target.shape or (valid is not None and valid.shape != target.shape):
            shapes = predicted.shape, target.shape, None if valid is None else valid.shape
            raise ValueError(f"predicted, target and valid must have one shape, got {shapes}")
        chosen = np.ones(target.shape, dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
        size = len(self.names)
        pairs = target[chosen].astype(np.int64) * size + predicted[chosen].astype(np.int64)
        self.counts += np.bincount(pairs, minlength=size**2).reshape(size, size)

    def scores(self) -> SegmentationScores:
        """Scores of all pixels so far; NaN where there is nothing to divide by."""
        hits = self.counts.diagonal().astype(np.float64)
        true, guessed = self.counts.sum(1), self.counts.sum(0)
        iou = _share(hits, true + guessed - hits)
        precision, recall = _share(hits, guessed), _share(hits, true)
        f1 = _share(2 * hits, true + guessed)
        there = true > 0
        total = int(self.counts.sum())
        classes = tuple(
            ClassScores(name, int(true[k]), float(iou[k]), float(precision[k]), float(recall[k]))
            for k, name in enumerate(self.names)
        )
        return SegmentationScores(
            pixels=total,
            miou=float(iou[there].mean()) if there.any() else math.nan,
            accuracy=float(hits.sum()) / total if total else math.nan,
            mean_f1=float(f1[there].mean()) if there.any() else math.nan,
            classes=classes,
        )


def _share(part: Array, whole: Array) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / np.asarray(whole, dtype=np.float64), np.nan)
