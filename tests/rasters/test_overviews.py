"""Halving against a loop over 2 x 2 pixels."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3geo.rasters.overviews import halve


def naive(rows: np.ndarray, nodata: float | None, method: str) -> np.ndarray:
    bands, height, width = rows.shape
    result = np.zeros((bands, (height + 1) // 2, (width + 1) // 2), dtype=rows.dtype)
    for band, row, col in np.ndindex(result.shape):
        # The edge is repeated where the raster ends.
        cells = [
            rows[band, min(2 * row + r, height - 1), min(2 * col + c, width - 1)]
            for r in (0, 1)
            for c in (0, 1)
        ]
        known = [
            c for c in cells if nodata is None or not (c == nodata or (np.isnan(nodata) and np.isnan(c)))
        ]
        if method == "nearest":
            value = cells[0]
        elif not known:
            value = nodata
        elif method == "mode":
            counts = Counter(known)
            value = max(known, key=lambda c: (counts[c], -known.index(c)))
        elif np.issubdtype(rows.dtype, np.integer):
            value = int(np.floor(sum(int(c) for c in known) / len(known) + 0.5))
        else:
            value = sum(float(c) for c in known) / len(known)
        result[band, row, col] = value
    return result


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    method=st.sampled_from(["average", "mode", "nearest"]),
    kind=st.sampled_from(
        [("uint8", 0), ("uint8", None), ("float32", -9999), ("float32", np.nan), ("int16", -1)]
    ),
    seed=st.integers(0, 999),
)
def test_halving(shape: tuple[int, int, int], method: str, kind: tuple, seed: int) -> None:
    dtype, nodata = kind
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 4, shape).astype(dtype)
    if nodata is not None:
        rows[rng.random(shape) < 0.4] = nodata
    reduced = halve(rows, nodata, method)
    assert reduced.dtype == rows.dtype
    np.testing.assert_allclose(reduced, naive(rows, nodata, method), rtol=1e-6)


@pytest.mark.parametrize("method", ["average", "mode", "nearest"])
def test_equal_numbers_stay(method: str) -> None:
    rows = np.full((1, 5, 7), 250, dtype=np.uint8)
    assert (halve(rows, 0, method) == 250).all()
