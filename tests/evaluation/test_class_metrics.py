"""Metrics of classes against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.classification as theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3geo.evaluation import class_metrics as ours
from dinov3geo.evaluation.bootstrap import bootstrap, bootstrap_accuracy
from dinov3geo.evaluation.class_metrics import confusion_matrix

CLASSES = 5


def labels(seed, count=200):
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, CLASSES, count)
    noise = generator.integers(0, CLASSES, count)
    return truth, np.where(generator.random(count) < 0.6, truth, noise)


@pytest.mark.parametrize("seed", range(3))
def test_one_class_per_image(seed):
    truth, guess = labels(seed)
    confusion = confusion_matrix(truth, guess, CLASSES)
    np.testing.assert_array_equal(confusion, sklearn.metrics.confusion_matrix(truth, guess))
    t, g = torch.from_numpy(truth), torch.from_numpy(guess)
    assert ours.accuracy(confusion) == pytest.approx(sklearn.metrics.accuracy_score(truth, guess))
    balanced = sklearn.metrics.balanced_accuracy_score(truth, guess)
    assert ours.balanced_accuracy(confusion) == pytest.approx(balanced)
    assert ours.macro_f1(confusion) == pytest.approx(sklearn.metrics.f1_score(truth, guess, average="macro"))
    assert ours.mean_iou(confusion) == pytest.approx(float(theirs.MulticlassJaccardIndex(CLASSES)(g, t)))
    np.testing.assert_allclose(
        ours.iou_per_class(confusion), sklearn.metrics.jaccard_score(truth, guess, average=None)
    )
    np.testing.assert_allclose(
        ours.recall_per_class(confusion), sklearn.metrics.recall_score(truth, guess, average=None)
    )


@pytest.mark.parametrize("seed", range(3))
def test_several_classes_per_image(seed):
    generator = np.random.default_rng(seed)
    truth = generator.random((90, CLASSES)) < 0.3
    # Few values, so that scores are equal often.
    scores = np.round(generator.random((90, CLASSES)) + 0.4 * truth, 1)
    t, s = torch.from_numpy(truth).long(), torch.from_numpy(scores) / 2
    micro = sklearn.metrics.average_precision_score(truth, scores, average="micro")
    assert ours.micro_average_precision(truth, scores) == pytest.approx(micro)
    macro = float(theirs.MultilabelAveragePrecision(CLASSES, average="macro")(s, t))
    assert ours.macro_average_precision(truth, scores) == pytest.approx(macro, abs=1e-6)
    f1 = sklearn.metrics.f1_score(truth, scores > 0.5, average="micro")
    assert ours.micro_f1(truth, scores > 0.5) == pytest.approx(f1)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=30))
def test_average_precision_of_any_list(pairs):
    truth, scores = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if not truth.any():
        assert np.isnan(ours.average_precision(truth, scores))
        return
    expected = sklearn.metrics.average_precision_score(truth, scores)
    assert ours.average_precision(truth, scores) == pytest.approx(expected)


def test_classes_without_images_have_no_score():
    confusion = confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 4)
    assert np.isnan(ours.iou_per_class(confusion)[2:]).all()
    assert ours.balanced_accuracy(confusion) == 0.75
    assert np.isnan(ours.accuracy(np.zeros((2, 2))))
    with pytest.raises(ValueError, match="as many predictions"):
        confusion_matrix(np.zeros(3, int), np.zeros(2, int), 2)


def test_interval_of_a_share_is_that_of_the_binomial():
    right = np.arange(400) < 300
    found = bootstrap_accuracy(right, resamples=2000)
    assert found.value == 0.75
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert found.low == pytest.approx(0.75 - half, abs=0.006)
    assert found.high == pytest.approx(0.75 + half, abs=0.006)
    assert str(found).startswith("0.750 [0.70")
    assert bootstrap_accuracy(right) == bootstrap_accuracy(right)


def test_resamples_without_a_score_do_not_count():
    found = bootstrap(lambda chosen: float("nan") if (chosen != 0).all() else 0.5, 3)
    assert found == type(found)(0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="needs images"):
        bootstrap_accuracy(np.zeros(0, bool))
