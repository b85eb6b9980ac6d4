"""Shifts between heights and images are found again, exactly where the truth is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3geo.features.extract import apply_view
from dinov3geo.heads.fit import FitSample, FitView
from dinov3geo.heads.registration import (
    Shift,
    ShiftFinder,
    displaced,
    find_shift,
    inner_folds,
    move_back,
)


def crowns(seed, size=30):
    """Smooth bumps, as crowns seen by a blurred model."""
    generator = np.random.default_rng(seed)
    rows, cols = np.mgrid[0:size, 0:size]
    field = np.zeros((size, size))
    for row, col, height in zip(
        *generator.uniform(0, size, (2, 12)), generator.uniform(5, 25, 12), strict=True
    ):
        field = np.maximum(field, height * np.exp(-((rows - row) ** 2 + (cols - col) ** 2) / 18))
    return field.astype(np.float32)


@settings(max_examples=25)
@given(st.integers(-3, 3), st.integers(-3, 3), st.integers(0, 99))
def test_a_displacement_is_found_again(rows, cols, seed):
    heights = crowns(seed)
    moved, known = displaced(heights, np.ones_like(heights, dtype=bool), rows, cols)
    noisy = heights + np.random.default_rng(seed).normal(0, 2, heights.shape).astype(np.float32)
    found = find_shift(noisy, moved, known, reach=5)
    assert (round(found.rows), round(found.cols)) == (rows, cols)
    assert found.is_believable or (abs(rows) <= 1 and abs(cols) <= 1)


def test_parts_of_a_cell_are_told():
    """Heights of the same crowns sampled between cells."""
    heights = crowns(3, 40)
    shifted = 0.5 * (heights[:, :-1] + heights[:, 1:])
    found = find_shift(heights[:, :-1], shifted, np.ones_like(shifted, dtype=bool), reach=3)
    assert found.cols == pytest.approx(-0.5, abs=0.15) and found.rows == pytest.approx(0, abs=0.15)


def test_correlations_equal_a_naive_loop():
    generator = np.random.default_rng(0)
    guess, truth = generator.normal(size=(2, 9, 11)).astype(np.float32)
    valid = generator.random((9, 11)) > 0.2
    finder = ShiftFinder(2)
    finder.add(guess, truth, valid)
    for row in range(-2, 3):
        for col in range(-2, 3):
            pairs = [
                (guess[r, c], truth[r + row, c + col])
                for r in range(9)
                for c in range(11)
                if 0 <= r + row < 9 and 0 <= c + col < 11 and valid[r + row, c + col]
            ]
            expected = np.corrcoef(np.array(pairs).T)[0, 1]
            assert finder.correlations()[row + 2, col + 2] == pytest.approx(expected, abs=1e-5)


def test_plots_together_tell_what_a_noisy_one_cannot():
    finder = ShiftFinder(4)
    for seed in range(12):
        heights = crowns(seed, 20)
        noise = np.random.default_rng(seed).normal(0, 15, heights.shape).astype(np.float32)
        finder.add(heights + noise + 30 * seed, *displaced(heights, np.ones((20, 20), bool), 2, -1))
    found = finder.find()
    assert (round(found.rows), round(found.cols)) == (2, -1)


def test_nothing_known_is_no_shift_to_believe():
    empty = find_shift(
        np.ones((8, 8), np.float32), np.ones((8, 8), np.float32), np.zeros((8, 8), bool), reach=2
    )
    assert empty.correlation == -1 and not empty.is_believable
    assert not Shift(0.2, 0.1, 0.9, 0.2).is_believable
    assert not Shift(2.0, 0.0, 0.25, 0.1).is_believable and Shift(2.0, 0.0, 0.5, 0.3).is_believable
    with pytest.raises(ValueError, match="at least 1 cell"):
        ShiftFinder(0)
    with pytest.raises(ValueError, match="one shape"):
        find_shift(np.ones((8, 8)), np.ones((8, 7)), np.ones((8, 7), bool), reach=1)


def test_heights_are_moved_back_in_every_view():
    heights = torch.arange(30.0).reshape(5, 6)
    moved, known = displaced(heights.numpy(), np.ones((5, 6), bool), 1, -2)
    views = tuple(
        FitView((), (5, 6), apply_view(torch.from_numpy(moved), v), apply_view(torch.from_numpy(known), v))
        for v in range(8)
    )
    back = move_back(FitSample(views, 1, "p"), 1, -2)
    for number, view in enumerate(back.views):
        expected = apply_view(heights, number)
        assert torch.equal(view.target[view.valid], expected[view.valid])
        assert int(view.valid.sum()) == 4 * 4


def test_inner_folds_keep_places_whole():
    samples = [FitSample((), 1, f"g{k // 2}") for k in range(14)]
    folds = inner_folds(samples, 0)
    assert sorted(sum(folds, [])) == list(range(14)) and all(folds)
    assert all(len({k for k, f in enumerate(folds) if i in f or i + 1 in f}) == 1 for i in range(0, 14, 2))
