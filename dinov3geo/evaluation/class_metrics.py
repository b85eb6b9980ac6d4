"""Scores of classifications: one class an image, or several."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def confusion_matrix(truth: Array, predicted: Array, num_classes: int) -> NDArray[np.int64]:
    """[K, K] counts: rows are true classes, columns predicted ones.

    Args:
        truth: [N] class numbers.
        predicted: [N] class numbers.
        num_classes: K.

    Raises:
        ValueError: the lengths differ.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"expected as many predictions as labels, got {predicted.shape} and {truth.shape}")
    cells = np.bincount(truth.astype(np.int64) * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def accuracy(confusion: Array) -> float:
    """Share of images on the diagonal; NaN of none."""
    total = confusion.sum()
    return float(np.trace(confusion) / total) if total else float("nan")


def recall_per_class(confusion: Array) -> NDArray[np.float64]:
    """[K] share of each class's images that were found; NaN for a class without images."""
    return _ratio(np.diag(confusion), confusion.sum(1))


def balanced_accuracy(confusion: Array) -> float:
    """Mean recall over the classes that have images."""
    return _mean(recall_per_class(confusion))


def f1_per_class(confusion: Array) -> NDArray[np.float64]:
    """[K] `2 TP / (2 TP + FP + FN)`; NaN for a class that neither is nor was predicted."""
    return _ratio(2 * np.diag(confusion), confusion.sum(0) + confusion.sum(1))


def iou_per_class(confusion: Array) -> NDArray[np.float64]:
    """[K] `TP / (TP + FP + FN)`; NaN for a class that neither is nor was predicted."""
    hits = np.diag(confusion)
    return _ratio(hits, confusion.sum(0) + confusion.sum(1) - hits)


def macro_f1(confusion: Array) -> float:
    """Mean F1 over classes that occur."""
    return _mean(f1_per_class(confusion))


def mean_iou(confusion: Array) -> float:
    """Mean intersection over union over classes that occur."""
    return _mean(iou_per_class(confusion))


def average_precision(truth: Array, scores: Array) -> float:
    """Area under the steps of precision over recall: `sum (R_n - R_n-1) P_n`.

    Args:
        truth: [N] bool.
        scores: [N]; equal scores make one step.

    Returns:
        NaN where nothing is true.
    """
    truth = np.asarray(truth, dtype=bool).ravel()
    scores = np.asarray(scores, dtype=np.float64).ravel()
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    # The last place of each run of equal scores.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    recall = hits[ends] / hits[-1]
    precision = hits[ends] / (ends + 1)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def micro_average_precision(truth: Array, scores: Array) -> float:
    """Average precision of all (image, class) cells together; [N, K] each."""
    return average_precision(truth, scores)


def macro_average_precision(truth: Array, scores: Array) -> float:
    """Mean of the classes' average precisions; classes without an image are left out; [N, K] each."""
    columns = zip(np.asarray(truth).T, np.asarray(scores).T, strict=True)
    return _mean(np.array([average_precision(t, s) for t, s in columns]))


def micro_f1(truth: Array, predicted: Array) -> float:
    """`2 TP / (2 TP + FP + FN)` over all (image, class) cells, [N, K] bool each; NaN if all are False."""
    truth, predicted = np.asarray(truth, dtype=bool), np.asarray(predicted, dtype=bool)
    total = truth.sum() + predicted.sum()
    return float(2 * (truth & predicted).sum() / total) if total else float("nan")


def _ratio(part: Array, whole: Array) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
