import math

import pytest
import torch

from dinov3geo.heads.objectives import charbonnier_loss, masked_mean, silog_loss


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(3)
    predicted = torch.rand(2, 1, 4, 5, generator=generator) * 30
    target = torch.rand(2, 1, 4, 5, generator=generator) * 30
    valid = torch.rand(2, 1, 4, 5, generator=generator) > 0.3
    return predicted, target, valid


def pairs(maps):
    predicted, target, valid = (m.flatten().tolist() for m in maps)
    return [(p, t) for p, t, v in zip(predicted, target, valid, strict=True) if v]


def test_silog_equals_its_formula(maps):
    differences = [math.log(p + 0.5) - math.log(t + 0.5) for p, t in pairs(maps)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / len(differences)
    expected = math.sqrt(variance + 0.15 * mean**2)
    assert silog_loss(*maps, floor=0.5, mean_weight=0.15).item() == pytest.approx(expected, rel=1e-5)


def test_silog_without_mean_ignores_a_common_factor():
    target = torch.rand(1, 1, 5, 5) + 1
    valid = torch.ones_like(target, dtype=torch.bool)
    loss = silog_loss(3 * target, target, valid, floor=1e-9, mean_weight=0.0)
    assert loss.item() == pytest.approx(0, abs=1e-3)


def test_charbonnier_equals_its_formula(maps):
    errors = [math.sqrt((p - t) ** 2 + 4) - 2 for p, t in pairs(maps)]
    assert charbonnier_loss(*maps, scale=2.0).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_charbonnier_is_squared_when_small_and_absolute_when_large():
    target, valid = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    small = charbonnier_loss(target + 0.01, target, valid, scale=1.0)
    large = charbonnier_loss(target + 1000, target, valid, scale=1.0)
    assert small.item() == pytest.approx(0.01**2 / 2, rel=1e-2)
    assert large.item() == pytest.approx(999, rel=1e-4)


@pytest.mark.parametrize("loss", [charbonnier_loss, silog_loss])
def test_holes_give_neither_loss_nor_gradient(loss):
    options = {"scale": 1.0} if loss is charbonnier_loss else {"floor": 1.0, "mean_weight": 0.5}
    predicted = torch.full((1, 1, 2, 2), 5.0, requires_grad=True)
    target = torch.tensor([[[[3.0, float("nan")], [float("inf"), -9999.0]]]])
    valid = torch.tensor([[[[True, False], [False, False]]]])
    value = loss(predicted, target, valid, **options)
    value.backward()
    assert value.isfinite() and predicted.grad.isfinite().all()
    assert predicted.grad[0, 0, 0, 0] != 0
    assert (predicted.grad[~valid] == 0).all()


def test_nothing_valid_gives_zero():
    nothing = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    predicted = torch.ones(1, 1, 2, 2, requires_grad=True)
    assert masked_mean(predicted, nothing) == 0
    loss = charbonnier_loss(predicted, torch.full((1, 1, 2, 2), float("nan")), nothing, scale=1.0)
    loss.backward()
    assert loss == 0 and (predicted.grad == 0).all()
