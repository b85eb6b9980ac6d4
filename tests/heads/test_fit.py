import pytest
import torch
from pydantic import ValidationError

from dinov3geo.errors import DataError
from dinov3geo.features.extract import apply_view
from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.dpt import DPTHead
from dinov3geo.heads.fit import FitSample, FitView, fit_head, predict_cells, split_groups
from dinov3geo.heads.heights import HeightFitSettings as FitSettings
from dinov3geo.heads.heights import HeightObjective

OUTPUT = OutputSpec("canopy_height", "m", minimum=0.0, maximum=80.0)
QUICK = FitSettings(epochs=3, batch_pixels=2 * 32 * 32, warmup_share=0.2)


def sample(seed, *, cells_hw=(8, 8), views=2, valid=None):
    """Heights that the first feature gives, at 4 pixels per cell and 2 cells per patch."""
    generator = torch.Generator().manual_seed(seed)
    grid = cells_hw[0] // 2, cells_hw[1] // 2
    features = torch.randn(4, *grid, generator=generator)
    target = 15 + 5 * features[0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    known = torch.ones(cells_hw, dtype=torch.bool) if valid is None else valid
    turned = [
        FitView(
            (apply_view(features, v).half(), apply_view(-features, v).half()),
            (8 * apply_view(features, v).shape[-2], 8 * apply_view(features, v).shape[-1]),
            apply_view(target, v),
            apply_view(known, v),
        )
        for v in range(views)
    ]
    return FitSample(tuple(turned), 4, f"plot{seed}")


def new_head():
    torch.manual_seed(1)
    return DPTHead([4, 4], output=OUTPUT, channels=8, dropout=0.1)


def fitted(samples, settings):
    head = new_head()
    return head, fit_head(head, samples, HeightObjective(settings), settings=settings)


def test_a_head_learns_what_the_features_say():
    samples = [sample(i) for i in range(12)]
    settings = FitSettings(epochs=40, batch_pixels=2 * 32 * 32, learning_rate=1e-2, weight_decay=0.0)
    head, _ = fitted(samples, settings)
    held = sample(99).views[0]
    error = (predict_cells(head, [held], 4)[0, 0] - held.target).abs().mean()
    assert error < 0.6 * (held.target - held.target.mean()).abs().mean()


def test_equal_seeds_give_equal_weights():
    samples = [sample(i, cells_hw=(8, 8) if i % 2 else (12, 12)) for i in range(5)]
    first, _ = fitted(samples, QUICK)
    torch.rand(7)
    second, _ = fitted(samples, QUICK)
    third, _ = fitted(samples, QUICK.model_copy(update={"seed": 1}))
    weights = [torch.cat([p.detach().flatten() for p in h.parameters()]) for h in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_random_state_outside_is_untouched():
    head = new_head()
    before = torch.get_rng_state()
    fit_head(head, [sample(0)], HeightObjective(QUICK), settings=QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_oblong_samples_in_turned_views_fit():
    samples = [sample(i, cells_hw=(8, 12), views=8) for i in range(4)]
    _, result = fitted(samples, QUICK)
    assert len(result.losses) == 3 and all(loss > 0 for loss in result.losses)


def test_cells_without_height_teach_nothing():
    valid = torch.zeros(8, 8, dtype=torch.bool)
    valid[:4] = True
    clean = sample(0, valid=valid)
    dirty = FitSample(
        tuple(
            FitView(v.maps, v.covered_hw, torch.where(v.valid, v.target, torch.nan), v.valid)
            for v in clean.views
        ),
        4,
        clean.group,
    )
    first, _ = fitted([clean], QUICK)
    second, _ = fitted([dirty], QUICK)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_no_valid_height_at_all_is_an_error():
    with pytest.raises(DataError, match="none of the 1 windows"):
        fitted([sample(0, valid=torch.zeros(8, 8, dtype=torch.bool))], QUICK)


def test_early_stopping_keeps_the_best_weights():
    samples = [sample(i) for i in range(6)]
    settings = FitSettings(epochs=30, learning_rate=0.3, validation_share=0.3, patience=3, batch_pixels=4096)
    head, result = fitted(samples, settings)
    assert len(result.validation_errors) < 30
    assert result.best_epoch == len(result.validation_errors) - 1 - 3
    assert result.validation_errors[result.best_epoch] == min(result.validation_errors)
    _, held = split_groups([s.group for s in samples], 0.3, seed=0)
    errors = [
        (predict_cells(head, [samples[i].views[0]], 4)[0, 0] - samples[i].views[0].target).abs().mean()
        for i in held
    ]
    assert torch.stack(errors).mean().item() == pytest.approx(min(result.validation_errors), rel=1e-4)


def test_moving_average_lies_between_the_weights_it_saw():
    samples = [sample(i) for i in range(4)]
    start = torch.cat([p.detach().flatten() for p in new_head().parameters()])
    last, _ = fitted(samples, QUICK)
    mean, _ = fitted(samples, QUICK.model_copy(update={"average_decay": 0.9}))
    moved = [(torch.cat([p.detach().flatten() for p in h.parameters()]) - start).norm() for h in (last, mean)]
    assert 0 < moved[1] < moved[0]


def test_groups_stay_together():
    groups = ["a", "a", "b", "c", "c", "d"]
    train, held = split_groups(groups, 0.5, seed=0)
    assert sorted(train + held) == list(range(6))
    assert not {groups[i] for i in train} & {groups[i] for i in held}
    assert split_groups(groups, 0.0, seed=0) == (list(range(6)), [])
    with pytest.raises(DataError, match="leaves none"):
        split_groups(["a", "a"], 0.5, seed=0)


def test_progress_is_told_each_epoch():
    seen = []
    objective = HeightObjective(QUICK)
    fit_head(new_head(), [sample(0)], objective, settings=QUICK, progress=lambda *a: seen.append(a[:2]))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError):
        FitSettings(epoch=3)
