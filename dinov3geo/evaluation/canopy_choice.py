"""Settings of a canopy head chosen within a fold: what is reported of the choice never took part in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dinov3geo.errors import DataError
from dinov3geo.evaluation.canopy_parts import Heights, PredictionStore, fit_and_predict, prefixed
from dinov3geo.evaluation.folds import assign_folds, site_folds
from dinov3geo.heads.canopy import CanopySettings
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


@dataclass(frozen=True, slots=True)
class Chooser:
    """Cross-validates variants on the training plots of a fold.

    Attributes:
        variants: settings by name.
        samples: of all plots, by the variant's name.
        kept: predictions of parts that are done.
        device: to fit on.
    """

    variants: Mapping[str, CanopySettings]
    samples: Mapping[str, list[FitSample]]
    kept: PredictionStore
    device: torch.device

    def choose(
        self, fold: int, train: list[int], parts: list[list[int]], progress: StageProgress | None
    ) -> Choice:
        """The best variant by mean absolute error.

        Args:
            fold: number of the part that is held out, from 0.
            train: numbers of the other plots.
            parts: of `inner_parts`.
            progress: called with a stage's name, how much is done, and of how much.

        Raises:
            DataError: the heights of no variant are finite.
        """
        errors = {name: self._error(name, fold, train, parts, progress) for name in self.variants}
        finite = {name: error for name, error in errors.items() if math.isfinite(error)}
        if not finite:
            raise DataError(
                f"no variant gave finite heights within the training part of fold {fold + 1}; lower "
                "fit.learning_rate"
            )
        return Choice(fold + 1, min(finite, key=lambda name: finite[name]), errors)

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
        return float(np.concatenate(errors).mean(dtype=np.float64))


def inner_parts(
    train: Sequence[int],
    groups: Sequence[str],
    sites: Sequence[str],
    *,
    by_site: bool,
    seed: int,
) -> list[list[int]]:
    """Deals the training plots of a fold out once more, each to one part.

    Args:
        train: numbers of the training plots that hold heights.
        groups: of every plot; plots of one group stay together.
        sites: of every plot.
        by_site: a part for each site, if there are two or more; else up to three parts by place.
        seed: of the draw.

    Raises:
        DataError: the plots are all of one place.
    """
    own, where = [groups[i] for i in train], [sites[i] for i in train]
    if len(set(own)) < 2:
        more = "add plots" if by_site else "add plots, or raise the number of folds"
        raise DataError(
            f"a fold trains on {len(set(own))} places with heights, and a choice within it wants two: {more}"
        )
    if by_site and len(set(where)) > 1:
        numbers = site_folds(where)
    else:
        numbers = assign_folds(own, where, min(_PARTS, len(set(own))), seed=seed)
    parts: list[list[int]] = [[] for _ in set(numbers)]
    for index, number in zip(train, numbers, strict=True):
        parts[number].append(index)
    return parts
