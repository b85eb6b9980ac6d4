"""Intervals of a score by drawing the test images again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 200
"""As many as torchgeo-bench draws."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A score and how far it is known.

    Attributes:
        value: on the test images as they are.
        low: 2.5th percentile over resamples.
        high: 97.5th percentile.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.861 [0.849, 0.872]`."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    score: Callable[[NDArray[np.int64]], float],
    count: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """The interval of a score over resampled test images.

    Args:
        score: of the images with these numbers, which may repeat; NaN where they have no score.
        count: of test images.
        resamples: draws with replacement.
        seed: of the draws.
        confidence: share of the resamples inside.

    Returns:
        The score of all images, and percentiles over those resamples that have a score.

    Raises:
        ValueError: no images or no resamples.
    """
    if count < 1 or resamples < 1:
        raise ValueError(f"a bootstrap needs images and resamples, got {count} and {resamples}")
    generator = np.random.default_rng(seed)
    value = score(np.arange(count))
    draws = np.array([score(generator.integers(0, count, count)) for _ in range(resamples)])
    known = draws[np.isfinite(draws)]
    if not known.size:
        return Interval(value, float("nan"), float("nan"))
    edge = 100 * (1 - confidence) / 2
    low, high = np.percentile(known, [edge, 100 - edge])
    return Interval(value, float(low), float(high))


def bootstrap_accuracy(right: NDArray[Any], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The interval of a share of right answers, [N] bool."""
    hits = np.asarray(right, dtype=np.float64)
    return bootstrap(lambda chosen: float(hits[chosen].mean()), len(hits), resamples=resamples, seed=seed)
