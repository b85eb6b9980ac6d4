"""What a head for heights minimises, and which plots are drawn how often."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dinov3geo.errors import ConfigError
from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.canopy import CanopySettings, HeadSettings, fit_canopy_head
from dinov3geo.heads.context import ContextHead
from dinov3geo.heads.fit import FitSample, FitView
from dinov3geo.heads.heights import HeightFitSettings, HeightObjective
from dinov3geo.heads.objectives import charbonnier_loss, patch_gradient_loss, silog_loss

OUTPUT = OutputSpec("canopy_height", "m", minimum=0.0, maximum=80.0)


def naive_scale(p, t, valid):
    """The patch-gradient loss of one resolution, cell by cell, on logarithms."""
    height, width = valid.shape
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    norms, cosines, known = {}, {}, {}
    for r in range(1, height - 1):
        for c in range(1, width - 1):
            box = slice(r - 1, r + 2), slice(c - 1, c + 2)
            known[r, c] = bool(valid[box].all())
            px, py, tx, ty = (float((k * a[box]).sum()) for a in (p, t) for k in (kernel, kernel.T))
            norms[r, c] = np.sqrt(px**2 + py**2 + 1e-8), np.sqrt(tx**2 + ty**2 + 1e-8)
            cosines[r, c] = (px * tx + py * ty + 1e-8) / (norms[r, c][0] * norms[r, c][1])
    cells = [rc for rc in norms if known[rc]]
    m = np.mean([abs(norms[rc][0] - norms[rc][1]) for rc in cells])
    cosine = np.mean([1 - cosines[rc] for rc in cells])
    ranges = []
    for r in range(2, height - 2):
        for c in range(2, width - 2):
            box = [(i, j) for i in range(r - 1, r + 2) for j in range(c - 1, c + 2)]
            if all(known[rc] for rc in box):
                both = [max(norms[rc][k] for rc in box) - min(norms[rc][k] for rc in box) for k in (0, 1)]
                ranges.append(abs(both[0] - both[1]))
    return 0.3 * m + 0.6 * np.mean(ranges) + 0.4 * cosine


def test_patch_gradient_against_a_loop():
    torch.manual_seed(0)
    predicted, target = 20 * torch.rand(2, 1, 1, 12, 10)
    valid = torch.ones(1, 1, 12, 10, dtype=torch.bool)
    valid[..., 1, 2] = False
    target[~valid] = torch.nan
    logs = [
        torch.log(x + 1) - torch.log(x[valid] + 1).mean() for x in (predicted, torch.where(valid, target, 0))
    ]
    p, t = (x[0, 0].numpy() for x in logs)
    known = valid[0, 0].numpy()
    halves = [np.where(known, x, 0).reshape(6, 2, 5, 2).mean((1, 3)) for x in (p, t)]
    whole = known.reshape(6, 2, 5, 2).all((1, 3))
    expected = (naive_scale(p, t, known) + naive_scale(*halves, whole)) / 2
    found = patch_gradient_loss(predicted, target, valid, floor=1.0)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_patch_gradient_of_equal_maps_is_nothing_and_a_gradient_exists():
    predicted = (10 * torch.rand(1, 1, 16, 16)).requires_grad_()
    valid = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    assert float(patch_gradient_loss(predicted, predicted.detach(), valid, floor=1.0)) < 1e-4
    for target in (torch.zeros(1, 1, 16, 16), torch.rand(1, 1, 16, 16)):
        (gradient,) = torch.autograd.grad(patch_gradient_loss(predicted, target, valid, floor=1.0), predicted)
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    small = torch.rand(1, 1, 4, 4)
    assert float(patch_gradient_loss(small, small, small > 2, floor=1.0)) == 0


def test_the_curriculum_goes_from_silog_to_charbonnier_and_adds_edges():
    settings = HeightFitSettings(silog_share=0.5, silog_weight=10, edge_weight=0.2, edge_share=0.5)
    objective = HeightObjective(settings)
    p, t = 20 * torch.rand(2, 1, 1, 8, 8)
    valid = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    silog = 10 * silog_loss(p, t, valid, floor=1.0, mean_weight=1.0)
    charbonnier = charbonnier_loss(p, t, valid, scale=3.0)
    edge = 0.2 * patch_gradient_loss(p, t, valid, floor=1.0)
    for done, expected in ((0, silog), (0.05, 0.9 * silog + 0.1 * charbonnier), (1, charbonnier + edge)):
        found = objective.loss(p, t[:, 0], valid[:, 0], done)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def plot(heights, name):
    target = torch.as_tensor(heights, dtype=torch.float32).reshape(2, 5)
    maps = (torch.zeros(4, 2, 5),)
    return FitSample((FitView(maps, (2, 5), target, torch.ones(2, 5, dtype=torch.bool)),), 1, name)


def test_low_and_tall_plots_are_drawn_as_often_as_asked():
    samples = [plot([0.2] * 9 + [30], "low and tall")] + [plot([10] * 10, f"p{k}") for k in range(9)]
    draws = HeightObjective(HeightFitSettings(low_share=0.1, tall_share=0.2)).draws(samples)
    assert sum(draws) == pytest.approx(1)
    assert draws[0] == pytest.approx(0.1 + 0.2 + 0.7 / 10) and draws[1] == pytest.approx(0.07)
    assert HeightObjective(HeightFitSettings()).draws(samples) is None
    without = HeightObjective(HeightFitSettings(low_share=0.5)).draws(samples[1:])
    assert without == pytest.approx([1 / 9] * 9)
    with pytest.raises(ValidationError, match="must leave draws"):
        HeightFitSettings(low_share=0.5, tall_share=0.5)


def test_members_are_fitted_apart_and_averaged():
    generator = torch.Generator().manual_seed(0)
    samples = []
    for k in range(6):
        features = torch.randn(4, 6, 6, generator=generator)
        view = FitView((features,), (6, 6), 10 + 3 * features[0], torch.ones(6, 6, dtype=torch.bool))
        samples.append(FitSample((view,), 1, f"p{k}"))
    head_settings = HeadSettings(kind="context", components=8, hidden=8, members=3)
    settings = CanopySettings(head=head_settings, fit=HeightFitSettings(epochs=5, batch_pixels=72))
    head, _ = fit_canopy_head(samples, settings, device=torch.device("cpu"))
    assert isinstance(head, ContextHead) and len(head.members) == 3
    maps = [samples[0].views[0].maps[0][None]]
    each = [m([head.components(maps)], (6, 6)) for m in head.members]
    assert not torch.allclose(each[0], each[1])
    torch.testing.assert_close(head(maps, (6, 6)), torch.stack(each).mean(0))
    one = settings.model_copy(update={"head": head_settings.model_copy(update={"members": 1})})
    alone, _ = fit_canopy_head(samples, one, device=torch.device("cpu"))
    assert alone(maps, (6, 6)).shape == (1, 1, 6, 6)
    with pytest.raises(ValidationError, match="members are those of a context head"):
        HeadSettings(kind="dpt", members=2)


def test_bins_keep_heights_within_their_range():
    head = ContextHead([4], output=OUTPUT, components=4, hidden=8, bins=16)
    head.fit_statistics([[torch.randn(4, 8, 8)]])
    heights = head([100 * torch.randn(1, 4, 8, 8)], (16, 16))
    assert float(heights.min()) >= 0 and float(heights.max()) <= 80
    with pytest.raises(ConfigError, match="need an output maximum"):
        ContextHead([4], output=OutputSpec("x", "m"), bins=4)
