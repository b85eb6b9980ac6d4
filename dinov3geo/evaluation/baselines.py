"""What must be beaten: the mean, the site's mean, and gradient boosting on local colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor

from dinov3geo.errors import ConfigError

Array = NDArray[Any]

NEIGHBOURHOODS = (1, 3, 7, 15)
# Letters at the beginning of a file name: "OSBS_029.tif" was taken at OSBS.
SITE_PATTERN = r"^[A-Za-z]+"
ALL_SITES = "all"


def site_name(path: Path, pattern: str = SITE_PATTERN) -> str:
    """The site that a file's name gives, or `"all"` where it gives none.

    Args:
        path: of an image.
        pattern: regular expression searched in the name without suffix; its first group counts if it has one.

    Raises:
        ConfigError: not a regular expression.
    """
    try:
        found = re.search(pattern, path.stem)
    except re.error as error:
        raise ConfigError(f"the site pattern {pattern!r} is not a regular expression: {error}") from error
    if found is None:
        return ALL_SITES
    return str(found.group(1) if found.re.groups else found.group()) or ALL_SITES


def group_means(
    train_values: Sequence[Array], train_groups: Sequence[str], groups: Sequence[str]
) -> list[float]:
    """The mean of each asked group's training values; the mean of all where a group was not seen.

    Args:
        train_values: one array of any shape per training sample.
        train_groups: group of each training sample.
        groups: asked ones.
    """
    overall = float(np.concatenate([v.ravel() for v in train_values]).mean())
    means = {}
    for name in set(train_groups):
        own = [v.ravel() for v, g in zip(train_values, train_groups, strict=True) if g == name]
        values = np.concatenate(own)
        means[name] = float(values.mean()) if values.size else overall
    return [means.get(name, overall) for name in groups]


def color_statistics(
    image: Array, valid: Array, factor: int, neighbourhoods: Sequence[int] = NEIGHBOURHOODS
) -> NDArray[np.float32]:
    """Mean and standard deviation of each band in and around each cell, over valid pixels only.

    Args:
        image: [C, H, W], H and W multiples of `factor`.
        valid: [H, W] bool.
        factor: pixels per cell.
        neighbourhoods: sides of the squares in cells, odd; they are cut off at the image's edge.

    Returns:
        [h, w, 2 * C * len(neighbourhoods)]; NaN where a square holds no valid pixel.
    """
    numbers = np.where(valid, image, 0).astype(np.float64)
    cells = [_cell_sums(plane, factor) for plane in (valid.astype(np.float64), *numbers, *(numbers**2))]
    columns = []
    for side in neighbourhoods:
        count, *sums = (_square_sums(plane, side) for plane in cells)
        known = count > 0
        share = np.where(known, count, 1)
        for band in range(len(image)):
            mean = sums[band] / share
            variance = np.maximum(sums[len(image) + band] / share - mean**2, 0)
            columns += [np.where(known, mean, np.nan), np.where(known, np.sqrt(variance), np.nan)]
    return np.stack(columns, axis=-1).astype(np.float32)


def fit_gradient_boosting(
    features: Array, heights: Array, *, loss: Literal["squared_error", "absolute_error"], seed: int
) -> HistGradientBoostingRegressor:
    """Gradient boosting with scikit-learn's own settings on all training cells.

    Args:
        features: [N, F]; NaN is a value of its own.
        heights: [N].
        loss: squared error aims at the mean (R2), absolute error at the median (MAE).
        seed: of the estimator.
    """
    return HistGradientBoostingRegressor(loss=loss, random_state=seed).fit(features, heights)


def _cell_sums(plane: Array, factor: int) -> Array:
    height, width = plane.shape
    total: Array = plane.reshape(height // factor, factor, width // factor, factor).sum(axis=(1, 3))
    return total


def _square_sums(plane: Array, side: int) -> Array:
    """Sums over the square of `side` cells around each cell, by an integral image."""
    reach = side // 2
    integral = np.pad(plane.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    rows, cols = (np.arange(length) for length in plane.shape)
    top, bottom = np.maximum(rows - reach, 0), np.minimum(rows + reach + 1, plane.shape[0])
    left, right = np.maximum(cols - reach, 0), np.minimum(cols + reach + 1, plane.shape[1])
    total: Array = (
        integral[np.ix_(bottom, right)]
        - integral[np.ix_(top, right)]
        - integral[np.ix_(bottom, left)]
        + integral[np.ix_(top, left)]
    )
    return total
