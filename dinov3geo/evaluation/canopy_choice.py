"""Settings of a canopy head chosen within a fold: what is reported of the choice never took part in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dinov3geo.errors import DataError
from dinov3geo.evaluation.canopy_parts import Heights, PredictionStore
from dinov3geo.evaluation.folds import assign_folds, site_folds
from dinov3geo.heads.canopy import CanopySettings, fit_canopy_head, predict_plot
from dinov3geo.heads.fit import FitSample
from dinov3geo.heads.samples import StageProgress

CHOSEN = "chosen within each fold"
# Parts of a fold's training plots; each is predicted once by heads fitted on the others.
_PARTS = 3


@dataclass(frozen=True, slots=True)
class Choice:
    """What a fold's training plots say of the variants.

    Attributes:
        fold: from 1.
        chosen: name of the variant with the smallest error.
        mae_m: error of each on held-out parts of the training plots, metres.
    """

    fold: int
    chosen: str
    mae_m: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Chooser:
    """Cross-validates variants on the training plots of a fold.

    Attributes:
        variants: settings by name.
        samples: of all plots, by the variant's name.
        sites: of each plot.
        by_site: hold out sites among the training plots, as the folds do, if there are two or more.
        seed: of the inner folds.
        kept: predictions of parts that are done.
        device: to fit on.
    """

    variants: Mapping[str, CanopySettings]
    samples: Mapping[str, list[FitSample]]
    sites: Sequence[str]
    by_site: bool
    seed: int
    kept: PredictionStore
    device: torch.device

    def choose(self, fold: int, train: list[int], progress: StageProgress | None) -> Choice:
        """The best variant by mean absolute error.

        Args:
            fold: number of the part that is held out.
            train: numbers of the other plots.
            progress: called with a stage's name, how much is done, and of how much.

        Raises:
            DataError: the training plots cannot be split, or hold no valid height.
        """
        parts = self._parts(train)
        errors = {name: self._error(name, fold, train, parts, progress) for name in self.variants}
        return Choice(fold + 1, min(errors, key=lambda name: errors[name]), errors)

    def _parts(self, train: list[int]) -> list[list[int]]:
        some = next(iter(self.samples.values()))
        groups, sites = [some[i].group for i in train], [self.sites[i] for i in train]
        if len(set(groups)) < 2:
            raise DataError(
                "a fold trains on one place only, and a choice wants two; lower --folds, or add plots"
            )
        if self.by_site and len(set(sites)) > 1:
            numbers = site_folds(sites)
        else:
            numbers = assign_folds(groups, sites, min(_PARTS, len(set(groups))), seed=self.seed)
        parts: list[list[int]] = [[] for _ in set(numbers)]
        for index, number in zip(train, numbers, strict=True):
            parts[number].append(index)
        return parts

    def _error(
        self, name: str, fold: int, train: list[int], parts: list[list[int]], progress: StageProgress | None
    ) -> float:
        own, samples = self.variants[name], self.samples[name]
        errors: list[Heights] = []
        for number, held in enumerate(parts):
            told = prefixed(progress, f"fold {fold + 1}, {name}, choice {number + 1}/{len(parts)}, ")
            others = [i for i in train if i not in held]
            fit = partial(fit_and_predict, samples, others, held, own, self.device, told)
            facts = own.model_dump() | {"without": held}
            for index, predicted in self.kept.get_or_compute(fold, facts, fit).items():
                view = samples[index].views[0]
                errors.append(np.abs(predicted - view.target.numpy())[view.valid.numpy()])
        found = np.concatenate(errors)
        if not found.size:
            raise DataError(f"the training plots of fold {fold + 1} hold no valid height to choose by")
        return float(found.mean(dtype=np.float64))


def fit_and_predict(
    samples: list[FitSample],
    train: list[int],
    held: list[int],
    settings: CanopySettings,
    device: torch.device,
    progress: StageProgress | None,
) -> dict[int, Heights]:
    """Heights [h, w] of the held-out plots by their number, metres.

    Args:
        samples: of all plots.
        train: numbers of those to fit on.
        held: numbers of those to predict.
        settings: of the head.
        device: to fit on.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        DataError: the training plots hold no valid height.
    """
    head, _ = fit_canopy_head([samples[i] for i in train], settings, device=device, progress=progress)
    return {i: predict_plot(head, samples[i], settings.predict_views) for i in held}


def prefixed(progress: StageProgress | None, prefix: str) -> StageProgress | None:
    """Progress whose stages begin with `prefix`."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(prefix + stage, done, total)
