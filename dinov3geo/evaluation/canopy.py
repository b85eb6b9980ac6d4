"""How well canopy heights are predicted: cross-validation by plot beside baselines, or a saved model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.zoo import load_backbone
from dinov3geo.data.pairs import PairArrays, PairMatch, RasterPair, Spec, match_pairs
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.evaluation.baselines import (
    SITE_PATTERN,
    color_statistics,
    fit_gradient_boosting,
    group_means,
    site_name,
)
from dinov3geo.evaluation.canopy_choice import CHOSEN, Choice, Chooser, inner_parts
from dinov3geo.evaluation.canopy_parts import Heights, PredictionStore, fit_and_predict, prefixed
from dinov3geo.evaluation.folds import assign_folds, site_folds
from dinov3geo.evaluation.registration import RegistrationReport
from dinov3geo.evaluation.regression_metrics import (
    BinAccumulator,
    BinErrors,
    BlockAccumulator,
    CalibrationAccumulator,
    CalibrationPoint,
    EdgeAccumulator,
    RegressionAccumulator,
    RegressionScores,
)
from dinov3geo.evaluation.reports import finite, write_bytes
from dinov3geo.features.extract import FeatureCache, default_blocks, weights_digest
from dinov3geo.heads.base import HeightModel
from dinov3geo.heads.canopy import CANOPY_BACKBONE, CanopySettings
from dinov3geo.heads.fit import FitSample
from dinov3geo.heads.samples import StageProgress, build_samples, cell_validity, load_model_pair

REPORT_FORMAT = "dinov3geo-canopy-evaluation/1"
# 10 m on the 1 m heights of NEON, whose plots of 20 to 40 m have no room for CHMv2's 50 cells.
DEFAULT_BLOCK = 10
FROZEN_FEATURES = "frozen features"
CHOICE_TITLE = "MAE [m] on held-out parts of each fold's training plots"
MEAN, SITE_MEAN = "mean", "site mean"
BOOSTING, BOOSTING_ABSOLUTE = "gradient boosting", "gradient boosting (absolute error)"
BASELINES = (MEAN, SITE_MEAN, BOOSTING, BOOSTING_ABSOLUTE)


class CanopyVariants(BaseModel):
    """Several settings to compare; a file of `configs/heads`.

    Attributes:
        variants: settings by the name of their row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    variants: dict[str, CanopySettings] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class MethodScores:
    """One method's row of the table.

    Attributes:
        method: what predicted.
        site: where, or `"all"` for every site together.
        scores: over all held-out cells, metres.
        block_r2: R2 between means of square blocks.
        edge_error: see `EdgeAccumulator`.
    """

    method: str
    site: str
    scores: RegressionScores
    block_r2: float
    edge_error: float = float("nan")


@dataclass(frozen=True, slots=True)
class CanopyEvaluation:
    """Result of an evaluation.

    Attributes:
        rows: one per method over all sites, then one per method and site.
        bins: errors by true height of each method over all sites.
        calibration: truth by predicted height of each method over all sites.
        details: data, folds, seeds and settings.
    """

    rows: tuple[MethodScores, ...]
    bins: Mapping[str, tuple[BinErrors, ...]]
    details: Mapping[str, Any]
    calibration: Mapping[str, tuple[CalibrationPoint, ...]] = field(default_factory=dict)

    def row(self, method: str, site: str = "all") -> MethodScores:
        """The row of a method at a site.

        Raises:
            KeyError: no such row.
        """
        for row in self.rows:
            if (row.method, row.site) == (method, site):
                return row
        raise KeyError((method, site))

    def choice_rows(self) -> list[list[str]]:
        """Header and a line per fold of the variants' errors [m] and the choice; empty without one."""
        choices = self.details.get("choices")
        if not choices:
            return []
        lines = [
            [str(c["fold"]), *(f"{error:.2f}" for error in c["mae_m"].values()), c["chosen"]] for c in choices
        ]
        return [["fold", *choices[0]["mae_m"], "chosen"], *lines]

    def to_json(self) -> str:
        """The report as indented JSON; numbers that do not exist (an empty bin's error) are null."""
        report = {
            "format": REPORT_FORMAT,
            **self.details,
            "rows": [
                {
                    "method": r.method,
                    "site": r.site,
                    **asdict(r.scores),
                    "block_r2": r.block_r2,
                    "edge_error": r.edge_error,
                }
                for r in self.rows
            ],
            "height_bins": {m: [asdict(b) for b in bins] for m, bins in self.bins.items()},
            "calibration": {m: [asdict(p) for p in points] for m, points in self.calibration.items()},
        }
        return json.dumps(finite(report), indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class _Plot:
    """One pair with its numbers in memory."""

    pair: RasterPair
    arrays: PairArrays
    known: NDArray[np.bool_]
    site: str

    @property
    def heights(self) -> Heights:
        """[N] true heights of the known cells."""
        return self.arrays.target[self.known]


class _Table:
    """Collects predictions of several methods, plot by plot."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._cells: dict[tuple[str, str], RegressionAccumulator] = {}
        self._blocks: dict[tuple[str, str], BlockAccumulator] = {}
        self._edges: dict[tuple[str, str], EdgeAccumulator] = {}
        self._bins: dict[str, BinAccumulator] = {}
        self._calibration: dict[str, CalibrationAccumulator] = {}

    def add(self, method: str, plot: _Plot, predicted: NDArray[Any] | float) -> None:
        """Adds a method's heights of one plot, [h, w] or one number for all cells."""
        guess = np.broadcast_to(predicted, plot.arrays.target.shape)
        for site in dict.fromkeys(("all", plot.site)):
            cells = self._cells.setdefault((method, site), RegressionAccumulator())
            cells.update(guess, plot.arrays.target, plot.known)
            blocks = self._blocks.setdefault((method, site), BlockAccumulator(self.block))
            blocks.update(guess, plot.arrays.target, plot.known)
            edges = self._edges.setdefault((method, site), EdgeAccumulator())
            edges.update(guess, plot.arrays.target, plot.known)
        self._bins.setdefault(method, BinAccumulator()).update(guess, plot.arrays.target, plot.known)
        calibration = self._calibration.setdefault(method, CalibrationAccumulator())
        calibration.update(guess, plot.arrays.target, plot.known)

    def evaluation(self, details: Mapping[str, Any]) -> CanopyEvaluation:
        """The finished table."""
        keys = sorted(self._cells, key=lambda key: (key[1] != "all", key[1]))
        rows = tuple(
            MethodScores(
                method,
                site,
                self._cells[method, site].scores(),
                self._blocks[method, site].scores().r2,
                self._edges[method, site].error(),
            )
            for method, site in keys
        )
        bins = {m: tuple(b.errors()) for m, b in self._bins.items()}
        calibration = {m: tuple(c.points()) for m, c in self._calibration.items()}
        return CanopyEvaluation(rows, bins, details, calibration)


def evaluate_folds(
    images: Spec,
    heights: Spec,
    *,
    backbone: str | Path | None = None,
    folds: int = 5,
    seed: int = 0,
    settings: CanopySettings | None = None,
    variants: Mapping[str, CanopySettings] | None = None,
    across_sites: bool = False,
    choose: bool = False,
    register_cells: int = 0,
    site_pattern: str = SITE_PATTERN,
    block: int = DEFAULT_BLOCK,
    cache: FeatureCache | None = None,
    parts: Path | None = None,
    json_path: Path | None = None,
    command: str = "",
    progress: StageProgress | None = None,
) -> CanopyEvaluation:
    """Cross-validates the head beside its baselines; every plot is held out once.

    Folds are drawn by plot (overlapping images stay together) and within each site, so that every fold
    trains on every site. Scores pool the cells of all held-out plots.

    Args:
        images: folder, glob, file or list of them.
        heights: likewise; matched to the images by georeference.
        backbone: name or path, or None for `CANOPY_BACKBONE`.
        folds: number of parts.
        seed: of the folds and of gradient boosting; the head has its own in `settings.fit`.
        settings: of the head; None for the defaults.
        variants: settings by name, each a row of its own in the place of "frozen features"; their
            `max_window` must be that of `settings`.
        across_sites: hold out one site after the other in the place of `folds`.
        choose: also score, as a method of its own, the variant of each fold that erred least (mean absolute
            error) when parts of the fold's training plots were held out: what choosing between variants by
            their rows would flatter. Up to three more fits per variant and fold.
        register_cells: also look how far each plot's heights lie from its image, up to so many cells, by the
            first variant's predictions; told in the report, not corrected. 0 for not.
        site_pattern: regular expression that finds the site in an image's file name.
        block: side of the blocks of block R2, in height cells.
        cache: of features, or None to keep none.
        parts: folder that keeps predictions of finished parts, so that what was cut off goes on; or None.
        json_path: file for the report, replaced if it exists.
        command: that was typed, for the report.
        progress: called with a stage's name, how much is done, and of how much.

    Returns:
        The table, with the methods "mean", "site mean", "gradient boosting" (squared error), "gradient
        boosting (absolute error)" and "frozen features", or the variants, and `CHOSEN`.

    Raises:
        UserError: a file, name or number that cannot be used.
    """
    settings = settings or CanopySettings()
    chosen = dict(variants or {FROZEN_FEATURES: settings})
    _check_variants(chosen, settings)
    frozen = load_backbone(CANOPY_BACKBONE if backbone is None else backbone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = match_pairs(images, heights, max_size=settings.max_window)
    plots = _load_plots(match.pairs, site_pattern, frozen)
    if across_sites:
        numbers = site_folds([p.site for p in plots])
    else:
        numbers = assign_folds([p.pair.group for p in plots], [p.site for p in plots], folds, seed=seed)
    training = [[i for i, n in enumerate(numbers) if n != fold] for fold in range(max(numbers) + 1)]
    inner = _inner(plots, training, across_sites, seed) if choose else []
    frozen.to(device)
    store = cache or FeatureCache(None)
    samples = {n: _samples(match, frozen, own, store, progress) for n, own in chosen.items()}
    colours = [color_statistics(p.arrays.image, p.arrays.valid, p.pair.factor) for p in plots]
    kept = PredictionStore(parts, [numbers, weights_digest(frozen), _facts(match)])
    table, report = _Table(block), RegistrationReport(register_cells) if register_cells else None
    chooser, choices = Chooser(chosen, samples, kept, device), list[Choice]()
    for fold, train in enumerate(training):
        held = [i for i, n in enumerate(numbers) if n == fold]
        _add_baselines(table, plots, colours, train, held, seed)
        predictions: dict[str, dict[int, Heights]] = {}
        for name, own in chosen.items():
            named = prefixed(progress, f"fold {fold + 1}/{len(training)}, {name}, ")
            fit = partial(fit_and_predict, samples[name], train, held, own, device, named)
            predictions[name] = kept.get_or_compute(fold, own.model_dump(), fit)
            for index, predicted in predictions[name].items():
                table.add(name, plots[index], predicted)
                if report is not None and name == next(iter(chosen)):
                    _register(report, plots[index], predicted)
        if choose:
            choices.append(chooser.choose(fold, train, inner[fold], progress))
            for index, predicted in predictions[choices[-1].chosen].items():
                table.add(CHOSEN, plots[index], predicted)
    details = _details(match, plots, command) | {
        "backbone": "" if frozen.card is None else frozen.card.name,
        "folds": len(training),
        "held_out": "sites" if across_sites else "plots",
        "seed": seed,
        "block_cells": block,
        "settings": {name: own.model_dump() for name, own in chosen.items()},
        "choices": [asdict(choice) for choice in choices],
        "registration": None if report is None else report.to_json(),
    }
    return _finish(table, details, json_path)


def _samples(
    match: PairMatch,
    backbone: Backbone,
    settings: CanopySettings,
    cache: FeatureCache,
    progress: StageProgress | None,
) -> list[FitSample]:
    return build_samples(
        match.pairs,
        backbone,
        blocks=default_blocks(backbone.num_blocks, settings.num_maps),
        image_scale=settings.image_scale,
        views=max(settings.views, settings.predict_views),
        colours=settings.colours,
        cache=cache,
        progress=progress,
    )


def _facts(match: PairMatch) -> list[Any]:
    files = {path for pair in match.pairs for path in (pair.image, pair.target)}
    windows = [[str(pair.image), str(pair.target), str(pair.window)] for pair in match.pairs]
    return [windows, sorted([str(path), path.stat().st_mtime_ns] for path in files)]


def _inner(plots: list[_Plot], training: list[list[int]], by_site: bool, seed: int) -> list[list[list[int]]]:
    """Parts of each fold's training plots for `Chooser`; plots without heights are in none."""
    groups, sites = [p.pair.group for p in plots], [p.site for p in plots]
    known = [[i for i in train if plots[i].known.any()] for train in training]
    return [inner_parts(train, groups, sites, by_site=by_site, seed=seed) for train in known]


def _check_variants(variants: Mapping[str, CanopySettings], settings: CanopySettings) -> None:
    for name, own in variants.items():
        if name in (*BASELINES, CHOSEN):
            raise ConfigError(f"a variant may not be called {name!r}: that is the name of another row")
        if own.max_window != settings.max_window:
            raise ConfigError(
                f"variant {name!r} has max_window {own.max_window}, expected {settings.max_window} for all: "
                "plots are cut once"
            )


def _register(report: RegistrationReport, plot: _Plot, predicted: Heights) -> None:
    report.add(plot.site, plot.pair.image.stem, predicted, plot.arrays.target, plot.known)


def evaluate_model(
    images: Spec,
    heights: Spec,
    *,
    model: HeightModel,
    site_pattern: str = SITE_PATTERN,
    block: int = DEFAULT_BLOCK,
    max_window: int = 512,
    json_path: Path | None = None,
    command: str = "",
    progress: StageProgress | None = None,
) -> CanopyEvaluation:
    """Scores a saved model on heights that it should not have been fitted on.

    Args:
        images: folder, glob, file or list of them.
        heights: likewise.
        model: from `load_height_model`.
        site_pattern: regular expression that finds the site in an image's file name.
        block: side of the blocks of block R2, in height cells.
        max_window: larger images are predicted in parts, pixels.
        json_path: file for the report, replaced if it exists.
        command: that was typed, for the report.
        progress: called with a stage's name, how much is done, and of how much.

    Returns:
        The table, with the one method "model".

    Raises:
        UserError: a file or number that cannot be used.
    """
    match = match_pairs(images, heights, max_size=max_window)
    table = _Table(block)
    plots = _load_plots(match.pairs, site_pattern, model.backbone)
    for done, plot in enumerate(plots):
        if progress is not None:
            progress("plots", done, len(plots))
        pixels = model.predict(
            torch.from_numpy(plot.arrays.image)[None], torch.from_numpy(plot.arrays.valid)[None]
        )
        cells = torch.nn.functional.avg_pool2d(pixels, plot.pair.factor)[0, 0]
        table.add("model", plot, cells.cpu().numpy())
    details = _details(match, plots, command) | {
        "backbone": model.card.get("backbone", {}).get("name", ""),
        "block_cells": block,
    }
    return _finish(table, details, json_path)


def _load_plots(pairs: Sequence[RasterPair], site_pattern: str, backbone: Backbone) -> list[_Plot]:
    assert backbone.card is not None
    plots = []
    for pair in pairs:
        arrays, _ = load_model_pair(pair, backbone.card)
        known = cell_validity(arrays, pair.factor)
        plots.append(_Plot(pair, arrays, known, site_name(pair.image, site_pattern)))
    if not any(plot.known.any() for plot in plots):
        raise DataError(f"none of the {len(plots)} height windows holds a valid height; is all of it nodata?")
    return plots


def _add_baselines(
    table: _Table,
    plots: list[_Plot],
    colours: list[NDArray[np.float32]],
    train: list[int],
    held: list[int],
    seed: int,
) -> None:
    """Fits the baselines on the training plots and adds their predictions of the others."""
    values = [plots[i].heights for i in train]
    truth = np.concatenate(values)
    if truth.size == 0:
        raise DataError("a fold has no valid height to train on; use fewer folds or more plots")
    sites = group_means(values, [plots[i].site for i in train], [plots[i].site for i in held])
    for index, mean in zip(held, sites, strict=True):
        table.add(MEAN, plots[index], float(truth.mean()))
        table.add(SITE_MEAN, plots[index], mean)
    features = np.concatenate([colours[i][plots[i].known] for i in train])
    boosted = {
        BOOSTING: fit_gradient_boosting(features, truth, loss="squared_error", seed=seed),
        BOOSTING_ABSOLUTE: fit_gradient_boosting(features, truth, loss="absolute_error", seed=seed),
    }
    for name, regressor in boosted.items():
        for index in held:
            shape = plots[index].known.shape
            flat = colours[index].reshape(-1, colours[index].shape[-1])
            table.add(name, plots[index], regressor.predict(flat).reshape(shape))


def _details(match: PairMatch, plots: list[_Plot], command: str) -> dict[str, Any]:
    return {
        "command": command,
        "plots": len({p.pair.group for p in plots}),
        "plots_per_site": {
            site: len({p.pair.group for p in plots if p.site == site})
            for site in sorted({p.site for p in plots})
        },
        "cells": sum(int(p.known.sum()) for p in plots),
        "unmatched_images": len(match.unmatched_images),
        "unmatched_heights": len(match.unmatched_targets),
    }


def _finish(table: _Table, details: Mapping[str, Any], json_path: Path | None) -> CanopyEvaluation:
    evaluation = table.evaluation(details)
    if json_path is not None:
        write_bytes(json_path, evaluation.to_json().encode())
    return evaluation
