"""The context head on features whose meaning is known."""

import pytest
import torch

from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.canopy import HeadSettings
from dinov3geo.heads.context import SURROUNDINGS, ContextHead
from dinov3geo.heads.dpt import DPTHead

OUTPUT = OutputSpec("canopy_height", "m", minimum=0.0, maximum=80.0)


def fitted_head(samples, **changes):
    torch.manual_seed(0)
    head = ContextHead([6, 4], output=OUTPUT, components=8, hidden=16, typical=7.0, **changes)
    head.fit_statistics(samples)
    return head.eval()


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(d, 12, 10, generator=generator) for d in (6, 4)] for _ in range(5)]


def test_output_has_the_asked_size_and_begins_near_the_typical_value(samples):
    head = fitted_head(samples)
    heights = head([m[None] for m in samples[0]], (192, 160))
    assert heights.shape == (1, 1, 192, 160)
    assert abs(float(heights.mean()) - 7) < 1.5


def test_components_are_uncorrelated_and_the_first_has_deviation_one(samples):
    head = fitted_head(samples)
    around = torch.cat([head._surroundings([m[None] for m in s])[0].flatten(1).T for s in samples])
    components = (around - head.centre) @ head.basis.T
    covariance = components.T @ components / len(components)
    deviations = covariance.diagonal().sqrt()
    assert float(deviations[0]) == pytest.approx(1, abs=1e-3)
    assert (deviations.diff() <= 1e-5).all()
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3


def test_a_patch_sees_its_surroundings(samples):
    head = fitted_head(samples)
    maps = [m[None].clone() for m in samples[0]]
    before = head(maps, (12, 10))
    maps[0][..., 0, 0] += 5
    changed = (head(maps, (12, 10)) - before).abs()[0, 0]
    assert float(changed[2, 2]) > 1e-6 and max(SURROUNDINGS) // 2 >= 2


def test_settings_build_either_kind():
    assert isinstance(HeadSettings(kind="context").build([4, 4], output=OUTPUT), ContextHead)
    assert isinstance(HeadSettings().build([4, 4], output=OUTPUT), DPTHead)
