"""Heads for classes: shapes, what they can learn, and L-BFGS beside scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinov3geo.errors import ConfigError
from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.classes import ClassFitSettings, ClassObjective, UnionErrors, loss_weights
from dinov3geo.heads.fit import FitSample, FitView, fit_head, predict_cells
from dinov3geo.heads.landcover import ClassHeadSettings
from dinov3geo.heads.objectives import weighted_cross_entropy

NAMES = ("a", "b", "c")
OUTPUT = OutputSpec("land_cover", class_names=NAMES, dtype="uint8", nodata=255)
KINDS = ["linear", "batchnorm", "upernet", "dpt"]


def sample(seed, grid=(6, 6), patch=2, maps=2):
    """The largest of the first three features names the class of a patch."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(5, *grid, generator=generator) for _ in range(maps)]
    classes = features[0][:3].argmax(0).to(torch.uint8)
    target = classes.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    covered = (grid[0] * patch, grid[1] * patch)
    view = FitView(tuple(features), covered, target, torch.ones(covered, dtype=torch.bool))
    return FitSample((view,), 1, f"place{seed}")


def new_head(kind, maps=2):
    torch.manual_seed(0)
    return ClassHeadSettings(kind=kind, channels=16, finest=1, dropout=0.0).build([5] * maps, output=OUTPUT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(6, 6), (3, 7), (1, 1)])
def test_scores_have_the_asked_size_whatever_the_grid(kind, grid):
    head = new_head(kind, maps=4).eval()
    maps = [torch.randn(2, 5, *grid) for _ in range(4)]
    assert head(maps, (13, 11)).shape == (2, 3, 13, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_learns_what_the_features_say(kind):
    samples = [sample(i) for i in range(16)]
    head = new_head(kind)
    head.fit_statistics([s.views[0].maps for s in samples])
    settings = ClassFitSettings(epochs=30, learning_rate=1e-2, batch_pixels=4 * 144)
    fit_head(head, samples, ClassObjective([1, 1, 1]), settings=settings)
    held = [sample(100 + i).views[0] for i in range(4)]
    right = [(predict_cells(head, [v], 1)[0].argmax(0) == v.target).float().mean() for v in held]
    # By chance a third; decoders that smooth over patches learn independent ones less well.
    assert float(torch.stack(right).mean()) > 0.6


def test_a_linear_head_is_standardisation_and_a_convolution():
    samples = [sample(i) for i in range(3)]
    head = new_head("linear")
    head.fit_statistics([s.views[0].maps for s in samples])
    torch.nn.init.normal_(head.score.weight)
    torch.nn.init.normal_(head.score.bias)
    maps = [torch.stack(m) for m in zip(*(s.views[0].maps for s in samples), strict=True)]
    scaled = torch.cat([scale(m) for scale, m in zip(head.standards, maps, strict=True)], dim=1)
    torch.testing.assert_close(head(maps, (6, 6)), head.score(scaled), atol=1e-5, rtol=1e-5)


def test_lbfgs_finds_the_loss_of_scikit_learn():
    """One pixel per patch makes the head logistic regression; C = 1 / (l2 N) on standardised features."""
    samples = [sample(i, grid=(8, 8), patch=1, maps=1) for i in range(4)]
    head = new_head("linear", maps=1)
    head.fit_statistics([s.views[0].maps for s in samples])
    l2 = 1e-2
    settings = ClassFitSettings(optimizer="lbfgs", epochs=200, l2=l2, class_weights="none")
    result = fit_head(head, samples, ClassObjective([1, 1, 1]), settings=settings)
    rows = np.concatenate([s.views[0].maps[0].flatten(1).T.numpy() for s in samples])
    rows = (rows - rows.mean(0)) / rows.std(0)
    classes = np.concatenate([s.views[0].target.flatten().numpy() for s in samples])
    judge = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-10, max_iter=10_000).fit(rows, classes)
    shares = judge.predict_proba(rows)[np.arange(len(rows)), classes]
    expected = -np.log(shares).mean() + 0.5 * l2 * (judge.coef_**2).sum()
    assert result.losses[-1] == pytest.approx(expected, abs=1e-4)


def test_lbfgs_weighs_pixels_as_one_batch_would():
    samples = [sample(i, patch=1, maps=1) for i in range(3)]
    weights = [0.2, 1.0, 3.0]
    losses = []
    for order in (samples, samples[::-1]):
        head = new_head("linear", maps=1)
        settings = ClassFitSettings(optimizer="lbfgs", epochs=60)
        losses.append(fit_head(head, order, ClassObjective(weights), settings=settings).losses[-1])
    views = [s.views[0] for s in samples]
    logits = torch.cat([predict_cells(head, [v], 1) for v in views])
    target = torch.stack([v.target for v in views])
    whole = weighted_cross_entropy(
        logits, target, torch.ones_like(target, dtype=torch.bool), torch.tensor(weights)
    )
    penalty = 0.5 * settings.l2 * head.score.weight.square().sum()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[1] == pytest.approx(float((whole + penalty).detach()), abs=1e-4)


def test_weighted_cross_entropy_against_a_loop():
    torch.manual_seed(0)
    logits, classes = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    valid, weights = torch.rand(2, 4, 5) > 0.3, torch.tensor([0.5, 1.0, 2.0])
    classes[~valid] = 255 % 3
    total = mass = 0.0
    for b, i, j in np.ndindex(2, 4, 5):
        if valid[b, i, j]:
            w = float(weights[classes[b, i, j]])
            total += w * -float(logits[b, :, i, j].log_softmax(0)[classes[b, i, j]])
            mass += w
    assert float(weighted_cross_entropy(logits, classes, valid, weights)) == pytest.approx(
        total / mass, rel=1e-5
    )


def test_class_weights_have_mean_one_over_the_pixels():
    counts = np.array([900, 90, 10, 0])
    for kind in ("none", "sqrt", "balanced"):
        weights = loss_weights(counts, [1, 1, 1, 1], kind)
        assert (weights * counts).sum() / counts.sum() == pytest.approx(1) and weights[3] == 0
    balanced = loss_weights(counts, [1, 1, 1, 1], "balanced")
    np.testing.assert_allclose(balanced[:3] * counts[:3], balanced[0] * 900)
    assert loss_weights(counts, [1, 2, 1, 1], "none")[1] == pytest.approx(
        2 * loss_weights(counts, [1, 2, 1, 1], "none")[0]
    )


def test_the_validation_error_is_one_less_mean_iou():
    scorer = UnionErrors(3)
    predicted = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 2]]), 3).permute(2, 0, 1).float()
    scorer.update(predicted, torch.tensor([[0, 1, 1, 1]]), torch.tensor([[True, True, True, False]]))
    assert scorer.error() == pytest.approx(1 - (1 / 2 + 1 / 2) / 2)
    assert UnionErrors(3).error() == 1.0


def test_pyramids_that_cannot_be_built_are_refused():
    from dinov3geo.heads.segmentation import UPerNetHead

    with pytest.raises(ConfigError, match="multiple of 8"):
        UPerNetHead([4], output=OUTPUT, channels=12)
