import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from dinov3geo.evaluation.regression_metrics import (
    BinAccumulator,
    BlockAccumulator,
    CalibrationAccumulator,
    EdgeAccumulator,
    RegressionAccumulator,
    regression_scores,
)


@pytest.fixture
def maps():
    generator = np.random.default_rng(5)
    target = generator.gamma(2, 6, (6, 13, 17)).astype(np.float32)
    predicted = (target + generator.normal(0.5, 3, target.shape)).astype(np.float32)
    return predicted, target, generator.random(target.shape) > 0.2


def test_scores_equal_those_of_scikit_learn(maps):
    predicted, target, valid = maps
    accumulator = RegressionAccumulator()
    for p, t, v in zip(predicted, target, valid, strict=True):
        accumulator.update(p, t, v)
    scores = accumulator.scores()
    p, t = predicted[valid].astype(float), target[valid].astype(float)
    assert scores.count == valid.sum()
    assert scores.mae == pytest.approx(mean_absolute_error(t, p))
    assert scores.rmse == pytest.approx(root_mean_squared_error(t, p))
    assert scores.r2 == pytest.approx(r2_score(t, p))
    assert scores.bias == pytest.approx((p - t).mean())


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    shift=st.sampled_from([0.0, 1e6]),
)
def test_parts_add_up_to_the_whole(values, cuts, shift):
    predicted, target = np.array(values).T + shift
    accumulator = RegressionAccumulator()
    edges = sorted({0, len(values), *(c for c in cuts if c < len(values))})
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        accumulator.update(predicted[low:high], target[low:high])
    parts, whole = accumulator.scores(), regression_scores(predicted, target)
    assert parts.mae == pytest.approx(whole.mae) and parts.bias == pytest.approx(whole.bias, abs=1e-6)
    # A truth that is constant but for rounding has no meaningful R2.
    if np.ptp(target) > 1e-3:
        assert parts.r2 == pytest.approx(whole.r2, rel=1e-6, abs=1e-6)


def test_nothing_valid_gives_no_number():
    scores = regression_scores(np.ones(3), np.ones(3), np.zeros(3, bool))
    assert scores.count == 0 and math.isnan(scores.mae) and math.isnan(scores.r2)


def test_a_constant_truth_has_no_r2():
    assert math.isnan(regression_scores(np.array([1.0, 2.0]), np.array([3.0, 3.0])).r2)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        regression_scores(np.ones(3), np.ones(4))


@pytest.mark.parametrize("block", [1, 4, 5])
def test_block_r2_equals_a_naive_loop(maps, block):
    predicted, target, valid = maps
    accumulator = BlockAccumulator(block)
    guesses, truths = [], []
    for p, t, v in zip(predicted, target, valid, strict=True):
        accumulator.update(p, t, v)
        for row in range(0, t.shape[0] - block + 1, block):
            for col in range(0, t.shape[1] - block + 1, block):
                here = (slice(row, row + block), slice(col, col + block))
                if v[here].sum() >= max(block * block / 2, 1):
                    guesses.append(p[here][v[here]].astype(float).mean())
                    truths.append(t[here][v[here]].astype(float).mean())
    scores = accumulator.scores()
    assert scores.count == len(truths)
    assert scores.r2 == pytest.approx(r2_score(truths, guesses))


def test_block_r2_ignores_numbers_in_holes(maps):
    predicted, target, valid = maps
    clean, dirty = BlockAccumulator(4), BlockAccumulator(4)
    clean.update(predicted[0], target[0], valid[0])
    dirty.update(predicted[0], np.where(valid[0], target[0], np.nan), valid[0])
    assert clean.scores() == dirty.scores()


def test_bins_equal_a_naive_loop(maps):
    predicted, target, valid = maps
    edges = (0, 2, 5, 10, 20, math.inf)
    accumulator = BinAccumulator(edges)
    for p, t, v in zip(predicted, target, valid, strict=True):
        accumulator.update(p, t, v)
    errors = accumulator.errors()
    for number, found in enumerate(errors):
        low, high = edges[number], edges[number + 1]
        differences = [
            float(p) - float(t)
            for p, t, v in zip(predicted.flat, target.flat, valid.flat, strict=True)
            if v and low <= t < high
        ]
        assert (found.low, found.high, found.count) == (low, high, len(differences))
        assert found.bias == pytest.approx(np.mean(differences))
        assert found.mae == pytest.approx(np.mean(np.abs(differences)))
        assert found.rmse == pytest.approx(np.sqrt(np.mean(np.square(differences))))
    assert sum(e.count for e in errors) == valid.sum()


def test_empty_bins_have_no_errors():
    accumulator = BinAccumulator((0, 1, 2))
    accumulator.update(np.array([0.5]), np.array([0.5]))
    first, second = accumulator.errors()
    assert first.count == 1 and second.count == 0 and math.isnan(second.mae)


@pytest.mark.parametrize("edges", [(0,), (0, 0), (2, 1)])
def test_edges_must_increase(edges):
    with pytest.raises(ValueError, match="increase"):
        BinAccumulator(edges)


def test_edge_error_against_a_loop():
    generator = np.random.default_rng(0)
    guess, truth = generator.uniform(0, 20, (2, 7, 9))
    valid = generator.random((7, 9)) > 0.1
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    difference = total = 0.0
    for r in range(1, 6):
        for c in range(1, 8):
            box = slice(r - 1, r + 2), slice(c - 1, c + 2)
            if valid[box].all():
                p, t = (np.hypot((kernel * a[box]).sum(), (kernel.T * a[box]).sum()) for a in (guess, truth))
                difference, total = difference + abs(p - t), total + p + t
    edges = EdgeAccumulator()
    edges.update(guess, truth, valid)
    assert edges.error() == pytest.approx(difference / total)
    flat = EdgeAccumulator()
    flat.update(np.full((5, 5), 3.0), truth[:5, :5])
    assert flat.error() == pytest.approx(1) and math.isnan(EdgeAccumulator().error())
    same = EdgeAccumulator()
    same.update(truth + 4, truth)
    same.update(truth[:2], truth[:2])
    assert same.error() == pytest.approx(0, abs=1e-12)


def test_calibration_gives_means_by_prediction():
    calibration = CalibrationAccumulator((0.0, 5.0, 10.0, math.inf))
    calibration.update(np.array([1.0, 3.0, 12.0, 99.0]), np.array([2.0, 6.0, 8.0, 9.0]))
    calibration.update(np.array([20.0]), np.array([7.0]), np.array([False]))
    low, middle, high = calibration.points()
    assert (low.count, low.predicted, low.true) == (2, 2.0, 4.0)
    assert middle.count == 0 and math.isnan(middle.true)
    assert (high.count, high.predicted, high.true) == (2, 55.5, 8.5)
