"""Logistic regression against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinov3geo.evaluation.classification import main_score
from dinov3geo.evaluation.logistic import fit_logistic, objective, sweep_logistic


def data(count=300, width=12, classes=5, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    scales = torch.logspace(-spread, spread, width)
    features = (centres[labels] + 1.5 * torch.randn(count, width, generator=generator)) * scales + 3
    return features.double(), labels


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_loss_equals_scikit_learn(c, spread):
    features, labels = data(spread=spread)
    ours = fit_logistic(features, labels, num_classes=5, c=c)
    # Its L-BFGS does not get to the end where columns differ much in scale; its Newton steps do.
    theirs = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-10, max_iter=500)
    theirs.fit(features.numpy(), labels.numpy())
    their_loss = objective(
        torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_), features, labels, c
    )
    own_loss = objective(ours.weight, ours.bias, features, labels, c)
    assert float(own_loss) == pytest.approx(ours.loss, rel=1e-9)
    # In units of one image and C, as scikit-learn reports a loss; ours may only be lower.
    assert float(own_loss - their_loss) / (c * len(labels)) < 1e-6
    assert abs(float(own_loss / their_loss) - 1) < 1e-4
    np.testing.assert_allclose(
        ours.probabilities(features).numpy(), theirs.predict_proba(features.numpy()), atol=2e-3
    )


def test_two_classes_and_more_columns_than_images():
    features, labels = data(count=20, width=40, classes=2)
    ours = fit_logistic(features, labels, num_classes=2, c=0.5)
    # scikit-learn fits one vector for two classes: two opposite halves of it have half its penalty.
    theirs = LogisticRegression(C=1.0, tol=1e-12, max_iter=20_000).fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(
        ours.probabilities(features)[:, 1].numpy(), theirs.predict_proba(features.numpy())[:, 1], atol=1e-3
    )


def test_several_classes_an_image_are_one_regression_each():
    features, _ = data(count=200)
    generator = torch.Generator().manual_seed(3)
    labels = (features[:, :3] + torch.randn(200, 3, generator=generator)) > 3
    ours = fit_logistic(features, labels, num_classes=3, c=0.3)
    for k in range(3):
        theirs = LogisticRegression(C=0.3, tol=1e-12, max_iter=20_000).fit(
            features.numpy(), labels[:, k].numpy()
        )
        np.testing.assert_allclose(
            ours.probabilities(features)[:, k].numpy(),
            theirs.predict_proba(features.numpy())[:, 1],
            atol=1e-3,
        )


def test_a_start_changes_nothing_but_the_time():
    features, labels = data()
    near = fit_logistic(features, labels, num_classes=5, c=0.5)
    cold = fit_logistic(features, labels, num_classes=5, c=1.0)
    warm = fit_logistic(features, labels, num_classes=5, c=1.0, start=near)
    assert warm.loss == pytest.approx(cold.loss, rel=1e-6)
    assert warm.iterations <= cold.iterations


def test_sweep_takes_the_c_that_serves_unseen_images():
    features, labels = data(count=600, width=60, spread=0.0)
    train, held = (features[:100], labels[:100]), (features[100:], labels[100:])
    c, scores = sweep_logistic(*train, held, num_classes=5, score=main_score, cs=[1e3, 1e-6, 1e-2])
    each = [
        main_score(fit_logistic(*train, num_classes=5, c=value).scores(held[0]), held[1])
        for value in (1e-6, 1e-2, 1e3)
    ]
    assert each[(1e-6, 1e-2, 1e3).index(c)] >= max(each) - 0.02 > each[0]
    np.testing.assert_allclose(scores, each, atol=0.02)


def test_bad_numbers():
    features, labels = data()
    with pytest.raises(ValueError, match="C > 0"):
        fit_logistic(features, labels, num_classes=5, c=0)
    with pytest.raises(ValueError, match="N images and labels"):
        fit_logistic(features, labels[:3], num_classes=5)
