"""The choice between heads within a fold: what is fitted on what, and what is chosen."""

import numpy as np
import pytest
import torch

from dinov3geo.errors import DataError
from dinov3geo.evaluation import canopy_choice
from dinov3geo.evaluation.canopy_choice import Chooser, inner_parts
from dinov3geo.evaluation.canopy_parts import PredictionStore
from dinov3geo.heads.canopy import CanopySettings
from dinov3geo.heads.fit import FitSample, FitView

SITES = "AAAABBBBCCCC"
GROUPS = [f"place {k // 2}" for k in range(12)]
TRAIN = list(range(10))


def plot(height):
    """A plot of 2 x 2 cells, of which one is unknown."""
    valid = torch.tensor([[True, True], [True, False]])
    view = FitView((torch.zeros(4, 2, 2),), (32, 32), torch.full((2, 2), float(height)), valid)
    return FitSample((view,), 16, GROUPS[height])


@pytest.fixture
def fits(monkeypatch):
    """In the place of fits: predictions wrong by as many metres as there are epochs; what was asked for."""
    calls = []

    def fit_and_predict(samples, train, held, settings, device, progress):
        calls.append((list(train), list(held)))
        error = np.float32(settings.fit.epochs if settings.fit.epochs < 100 else np.nan)
        return {i: np.full((2, 2), i + error, np.float32) for i in held}

    monkeypatch.setattr(canopy_choice, "fit_and_predict", fit_and_predict)
    return calls


def chooser(folder, **epochs):
    variants = {
        name: CanopySettings.model_validate({"fit": {"epochs": count}}) for name, count in epochs.items()
    }
    samples = [plot(k) for k in range(12)]
    return Chooser(
        variants, dict.fromkeys(variants, samples), PredictionStore(folder, []), torch.device("cpu")
    )


@pytest.mark.parametrize("by_site", [False, True])
def test_every_training_plot_is_held_out_once_with_its_place(by_site):
    parts = inner_parts(TRAIN, GROUPS, SITES, by_site=by_site, seed=0)
    assert len(parts) == 3 and sorted(i for part in parts for i in part) == TRAIN
    for part in parts:
        others = {GROUPS[i] for i in TRAIN if i not in part}
        assert not others & {GROUPS[i] for i in part}
    sites = [{SITES[i] for i in part} for part in parts]
    assert (sites == [{"A"}, {"B"}, {"C"}]) is by_site
    assert inner_parts(TRAIN[:8], GROUPS, SITES, by_site=True, seed=0) == [TRAIN[:4], TRAIN[4:8]]
    # One site is left, so its places are dealt out.
    assert len(inner_parts(TRAIN[:4], GROUPS, SITES, by_site=True, seed=0)) == 2


@pytest.mark.parametrize(("by_site", "advice"), [(True, "add plots$"), (False, "raise the number of folds")])
def test_one_place_cannot_be_dealt_out(by_site, advice):
    with pytest.raises(DataError, match=f"1 places with heights.*{advice}"):
        inner_parts([0, 1], GROUPS, SITES, by_site=by_site, seed=0)


def test_no_head_is_judged_where_it_was_fitted(fits, tmp_path):
    parts = inner_parts(TRAIN, GROUPS, SITES, by_site=False, seed=0)
    choice = chooser(tmp_path, worse=3, better=2).choose(4, TRAIN, parts, None)
    assert (choice.fold, choice.chosen, choice.mae_m) == (5, "better", {"worse": 3.0, "better": 2.0})
    assert [held for _, held in fits] == parts * 2
    for train, held in fits:
        assert not set(train) & set(held) and sorted(train + held) == TRAIN
    # All of it was kept, each part by itself.
    assert chooser(tmp_path, worse=3, better=2).choose(4, TRAIN, parts, None) == choice
    assert len(fits) == 6 and len(list(tmp_path.iterdir())) == 6


def test_heights_that_are_not_finite_are_not_chosen(fits):
    parts = inner_parts(TRAIN, GROUPS, SITES, by_site=False, seed=0)
    choice = chooser(None, diverged=100, sound=7).choose(0, TRAIN, parts, None)
    assert choice.chosen == "sound" and np.isnan(choice.mae_m["diverged"])
    with pytest.raises(DataError, match="no variant gave finite heights within the training part of fold 1"):
        chooser(None, diverged=100).choose(0, TRAIN, parts, None)


def test_a_damaged_part_is_made_anew(tmp_path):
    store = PredictionStore(tmp_path, ["facts"])
    made = {3: np.ones((2, 2), np.float32)}
    assert store.get_or_compute(0, {}, lambda: made) is made
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-30]):
        file.write_bytes(content)
        assert store.get_or_compute(0, {}, lambda: made) is made
    assert store.get_or_compute(0, {}, dict).keys() == made.keys()
