import pytest
import torch

from dinov3geo.errors import ConfigError
from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.dpt import DPTHead, HeightBins

OUTPUT = OutputSpec("canopy_height", "m", minimum=0.0, maximum=80.0)


def build(dims=(8, 8, 8, 8), **options):
    torch.manual_seed(0)
    return DPTHead(dims, output=OUTPUT, **{"channels": 8, "dropout": 0.0, **options})


@pytest.mark.parametrize("finest", [1, 2, 4])
@pytest.mark.parametrize("bins", [0, 16])
@pytest.mark.parametrize("grid", [(1, 1), (5, 3), (13, 13)])
def test_output_has_the_size_asked_for_and_is_not_negative(finest, bins, grid):
    head = build(finest=finest, bins=bins)
    maps = [5 * torch.randn(2, 8, *grid) for _ in range(4)]
    heights = head(maps, (16 * grid[0], 16 * grid[1]))
    assert heights.shape == (2, 1, 16 * grid[0], 16 * grid[1])
    assert (heights >= 0).all()
    if bins:
        assert (heights <= OUTPUT.maximum).all()


def test_one_to_many_maps_of_different_width():
    maps = [torch.randn(1, width, 4, 4) for width in (4, 6, 8)]
    for count in (1, 2, 3):
        head = build([m.shape[1] for m in maps[:count]])
        assert head(maps[:count], (8, 8)).shape == (1, 1, 8, 8)


def test_a_new_head_predicts_the_typical_height():
    heights = build(typical=17.0)([torch.randn(1, 8, 4, 4) for _ in range(4)], (8, 8))
    assert heights.mean().item() == pytest.approx(17, abs=1)


def test_every_parameter_learns():
    head = build()
    for module in head.modules():
        if hasattr(module, "second"):
            torch.nn.init.normal_(module.second.weight)
    head([torch.randn(2, 8, 6, 6) for _ in range(4)], (12, 12)).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_no_batch_statistics():
    head = build().eval()
    maps = [torch.randn(3, 8, 5, 5) for _ in range(4)]
    together = head(maps, (20, 20))
    alone = torch.cat([head([m[i : i + 1] for m in maps], (20, 20)) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_bins_mix_logarithmic_and_linear_spacing():
    bins = HeightBins(5, minimum=0.1, maximum=10.0)
    expected = []
    for i in range(5):
        share = 1 - i / 4
        expected.append(share * 0.1 * 100 ** (i / 4) + (1 - share) * (0.1 + 9.9 * i / 4))
    torch.testing.assert_close(bins.centres, torch.tensor(expected))
    scores = torch.zeros(1, 5, 1, 1)
    scores[0, 3] = 1000
    assert bins(scores).item() == pytest.approx(expected[3], rel=1e-3)
    silent = bins(torch.full((1, 5, 1, 1), -3.0)).item()
    assert silent == pytest.approx(sum(expected) / 5, rel=1e-3)


def test_statistics_make_scale_and_offset_of_features_irrelevant():
    maps = [torch.randn(8, 6, 5) for _ in range(2)]
    moved = [7 + 100 * m for m in maps]
    first, second = build([8, 8]), build([8, 8])
    first.fit_statistics([maps])
    second.fit_statistics([moved])
    heights = [head([m[None] for m in own], (12, 10)) for head, own in ((first, maps), (second, moved))]
    torch.testing.assert_close(heights[0], heights[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first.standards[0].mean, maps[0].mean((1, 2)))
    assert {"standards.0.mean", "standards.1.deviation"} <= first.state_dict().keys()


def test_constant_features_do_no_harm():
    head = build([8])
    head.fit_statistics([[torch.ones(8, 4, 4)]])
    assert head([torch.ones(1, 8, 4, 4)], (8, 8)).isfinite().all()


def test_impossible_shapes_are_refused():
    with pytest.raises(ConfigError, match="got 0 maps"):
        build([])
    with pytest.raises(ConfigError, match="finest 1, 2 or 4"):
        build(finest=3)
    with pytest.raises(ConfigError, match="maximum"):
        DPTHead([8], output=OutputSpec("x", "m"), bins=4)
