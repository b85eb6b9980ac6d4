"""Scores of class maps beside torchmetrics and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from dinov3geo.errors import DataError
from dinov3geo.evaluation.folds import balanced_folds
from dinov3geo.evaluation.segmentation_metrics import ConfusionMatrix

NAMES = ("a", "b", "c", "d")


def test_scores_equal_those_of_scikit_learn_and_torchmetrics():
    generator = np.random.default_rng(0)
    truth, guess = generator.integers(0, 4, (2, 5, 30, 20))
    valid = generator.random((5, 30, 20)) > 0.2
    matrix = ConfusionMatrix(NAMES)
    for k in range(5):
        matrix.update(guess[k], truth[k], valid[k])
    scores = matrix.scores()
    y, p = truth[valid], guess[valid]
    np.testing.assert_array_equal(matrix.counts, confusion_matrix(y, p))
    np.testing.assert_allclose([c.iou for c in scores.classes], jaccard_score(y, p, average=None))
    assert scores.miou == pytest.approx(jaccard_score(y, p, average="macro"))
    assert scores.mean_f1 == pytest.approx(f1_score(y, p, average="macro"))
    assert scores.accuracy == pytest.approx(accuracy_score(y, p))
    judge = MulticlassJaccardIndex(4, average="macro")(torch.from_numpy(p), torch.from_numpy(y))
    assert scores.miou == pytest.approx(float(judge), rel=1e-5)


def test_classes_that_do_not_occur_are_left_out_of_the_mean():
    matrix = ConfusionMatrix(NAMES)
    matrix.update(np.array([0, 0, 1, 3]), np.array([0, 0, 0, 1]))
    scores = matrix.scores()
    assert scores.miou == pytest.approx((2 / 3 + 0) / 2)
    assert math.isnan(scores.classes[2].iou) and scores.classes[3].iou == 0
    assert math.isnan(ConfusionMatrix(NAMES).scores().miou)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        ConfusionMatrix(NAMES).update(np.zeros(3, int), np.zeros(4, int))
    with pytest.raises(ValueError, match="expected counts"):
        ConfusionMatrix(NAMES, np.zeros((2, 2)))


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 50)), min_size=2, max_size=40), st.integers(2, 5))
def test_folds_keep_groups_whole_and_hold_something(samples, folds):
    groups = [str(group) for group, _ in samples]
    sizes = [size for _, size in samples]
    if len(set(groups)) < folds:
        with pytest.raises(DataError, match=f"{folds} folds were asked for"):
            balanced_folds(groups, sizes, folds, seed=0)
        return
    found = balanced_folds(groups, sizes, folds, seed=0)
    assert len({(g, f) for g, f in zip(groups, found, strict=True)}) == len(set(groups))
    totals = [sum(s for s, f in zip(sizes, found, strict=True) if f == k) for k in range(folds)]
    largest = max(sum(s for s, g in zip(sizes, groups, strict=True) if g == name) for name in set(groups))
    assert max(totals) - min(totals) <= largest + 1e-6


def test_the_seed_changes_folds_only_among_equals():
    groups, sizes = [str(k) for k in range(12)], [100.0, *[1.0] * 11]
    first, second = (balanced_folds(groups, sizes, 3, seed=seed) for seed in (0, 1))
    assert first == balanced_folds(groups, sizes, 3, seed=0) != second
    assert first.count(first[0]) == 1
