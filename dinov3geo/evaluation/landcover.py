"""How well land cover is predicted: folds by place beside baselines, or a saved model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone
from dinov3geo.data.labels import ClassScheme
from dinov3geo.data.pairs import PairArrays, PairMatch, Spec
from dinov3geo.errors import ConfigError, DataError, UnknownNameError
from dinov3geo.evaluation.folds import balanced_folds
from dinov3geo.evaluation.landcover_baselines import PixelForest, ScratchUNet
from dinov3geo.evaluation.landcover_example import Example, choose_example, show_example
from dinov3geo.evaluation.landcover_parts import Classes, Part, PartStore
from dinov3geo.evaluation.segmentation_metrics import ConfusionMatrix, SegmentationScores
from dinov3geo.features.extract import FeatureCache, default_blocks, extract_feature_maps, weights_digest
from dinov3geo.heads.classes import loss_weights
from dinov3geo.heads.fit import FitSample
from dinov3geo.heads.landcover import (
    HEAD_KINDS,
    LandcoverModel,
    LandcoverSettings,
    check_labels,
    check_settings,
    fit_class_head,
    label_samples,
    load_class_pair,
    match_masks,
    predict_classes,
    scheme_of,
)
from dinov3geo.heads.samples import StageProgress, cell_validity

REPORT_FORMAT = "dinov3geo-landcover-evaluation/1"
FOREST, FOREST_AROUND, UNET = "forest", "forest-around", "unet"
BASELINES = (FOREST, FOREST_AROUND, UNET)
METHODS = (*HEAD_KINDS, *BASELINES)
TITLES = {
    "linear": "frozen features, linear head",
    "batchnorm": "frozen features, BatchNorm + 1x1",
    "upernet": "frozen features, UPerNet",
    "dpt": "frozen features, DPT",
    FOREST: "random forest on pixels",
    FOREST_AROUND: "random forest on pixels and surroundings",
    UNET: "U-Net from scratch, same wall time",
}
_TIMED_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method's row of the table.

    Attributes:
        method: a name in `METHODS`, or `"model"`.
        scores: over all held-out pixels of all folds.
        matrix: their confusion matrix.
        fold_miou: mIoU of each fold alone.
        seconds: to fit (and to compute features, where it needs any), summed over folds.
    """

    method: str
    scores: SegmentationScores
    matrix: ConfusionMatrix
    fold_miou: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class LandcoverEvaluation:
    """Result of an evaluation.

    Attributes:
        results: one per method.
        example: one held-out scene as everyone sees it, or None.
        details: data, folds, seeds and settings.
        warnings: what the user should know, one line each.
    """

    results: tuple[MethodResult, ...]
    example: Example | None
    details: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def result(self, method: str) -> MethodResult:
        """The row of a method.

        Raises:
            KeyError: no such row.
        """
        for row in self.results:
            if row.method == method:
                return row
        raise KeyError(method)


@dataclass
class _Data:
    """Everything that the folds share."""

    match: PairMatch
    scheme: ClassScheme
    backbone: Backbone
    settings: LandcoverSettings
    arrays: list[PairArrays]
    samples: list[FitSample]
    fold_of: list[int]
    seed: int
    feature_seconds: float
    unet_seconds: float | None
    example: list[int] = field(default_factory=list)


def evaluate_landcover_folds(
    images: Spec,
    masks: Spec,
    scheme: ClassScheme,
    *,
    methods: Sequence[str] = METHODS,
    backbone: str | Path | None = None,
    folds: int = 3,
    seed: int = 0,
    settings: LandcoverSettings | None = None,
    unet_seconds: float | None = None,
    parts: Path | None = None,
    cache: FeatureCache | None = None,
    command: str = "",
    progress: StageProgress | None = None,
) -> LandcoverEvaluation:
    """Cross-validates heads beside baselines; every place is held out once.

    Images that overlap on the ground are one place, so no held-out pixel was seen in training.

    Args:
        images: folder, glob, file or list of them.
        masks: likewise; matched to the images by georeference.
        scheme: what the masks' numbers mean.
        methods: names in `METHODS`.
        backbone: name or path, or None for the bundled one.
        folds: number of parts.
        seed: of folds and baselines; heads have their own in `settings.fit`.
        settings: of the heads, whose kind each method sets; None for the defaults.
        unet_seconds: training time of the U-Net per fold; None for that of the slowest head of `methods`
            with the time to compute its training features.
        parts: folder that keeps finished parts, so that an evaluation that was cut off goes on; or None.
        cache: of features, or None to keep none.
        command: that was typed, for the report.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        UserError: a file, name or number that cannot be used.
    """
    settings = settings or LandcoverSettings()
    _check_methods(methods, settings, unet_seconds)
    source = DEFAULT_BACKBONE if backbone is None else backbone
    frozen = load_backbone(source)
    match = match_masks(images, masks, settings)
    check_labels(match, scheme, frozen)
    data = _load(match, scheme, frozen, settings, folds, seed, unet_seconds)
    needs_features = any(m in HEAD_KINDS for m in methods)
    if needs_features:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        frozen.to(device)
        data.samples = label_samples(match, scheme, frozen, settings, cache=cache, progress=progress)
        data.feature_seconds = _time_features(data)
    store = PartStore(parts, _facts(data))
    found: dict[str, list[Part]] = {m: [] for m in methods}
    for fold in range(folds):
        for method in sorted(methods, key=METHODS.index):
            named = _prefixed(progress, f"fold {fold + 1}/{folds}, {method}: ")
            part = store.read(method, fold)
            if part is None:
                part = _run(method, fold, data, found, named)
                store.write(method, fold, part)
            found[method].append(part)
    results = tuple(_result(m, found[m], scheme) for m in methods)
    details = _details(match, data, command) | {
        "backbone": "" if frozen.card is None else frozen.card.name,
        "folds": folds,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "settings": settings.model_dump(),
        "notes": {m: [p.note for p in found[m] if p.note] for m in methods},
    }
    return LandcoverEvaluation(
        results,
        show_example(data.match.pairs, data.arrays, data.example, found),
        details,
        tuple(_fold_warnings(data)),
    )


def evaluate_landcover_model(
    images: Spec,
    masks: Spec,
    *,
    model: LandcoverModel,
    command: str = "",
    progress: StageProgress | None = None,
) -> LandcoverEvaluation:
    """Scores a saved model on masks that it should not have been fitted on.

    Args:
        images: folder, glob, file or list of them.
        masks: likewise.
        model: from `load_landcover_model`.
        command: that was typed, for the report.
        progress: called with a stage's name, how much is done, and of how much.

    Returns:
        The table, with the one method "model".

    Raises:
        UserError: a file or number that cannot be used.
    """
    scheme = scheme_of(model)
    settings = LandcoverSettings.model_validate(model.card["settings"])
    match = match_masks(images, masks, settings)
    matrix = ConfusionMatrix(scheme.names)
    assert model.backbone.card is not None
    began = time.monotonic()
    for done, pair in enumerate(match.pairs):
        if progress is not None:
            progress("windows", done, len(match.pairs))
        arrays, _ = load_class_pair(pair, scheme, model.backbone.card)
        device = next(model.head.parameters()).device
        numbers, valid = torch.from_numpy(arrays.image)[None], torch.from_numpy(arrays.valid)[None]
        shares = model.predict(numbers.to(device), valid.to(device))
        cells = torch.nn.functional.avg_pool2d(shares, pair.factor)[0].argmax(0).cpu().numpy()
        matrix.update(cells, arrays.target, cell_validity(arrays, pair.factor))
    if not matrix.counts.any():
        raise DataError(
            f"none of the {len(match.pairs)} masks holds a labelled pixel: all is ignored or nodata"
        )
    scores = matrix.scores()
    result = MethodResult("model", scores, matrix, (scores.miou,), time.monotonic() - began)
    details = {
        "format": REPORT_FORMAT,
        "command": command,
        "backbone": model.card["backbone"]["name"],
        "windows": len(match.pairs),
        "unmatched_images": len(match.unmatched_images),
        "unmatched_masks": len(match.unmatched_targets),
        "classes": scheme.model_dump(),
    }
    return LandcoverEvaluation((result,), None, details)


def _check_methods(methods: Sequence[str], settings: LandcoverSettings, unet_seconds: float | None) -> None:
    if not methods:
        raise ConfigError(f"name at least one method: {', '.join(METHODS)}")
    for name in methods:
        if name not in METHODS:
            raise UnknownNameError("method", name, METHODS)
        if name in HEAD_KINDS:
            check_settings(_with_kind(settings, name))
    if UNET in methods and unet_seconds is None and not any(m in HEAD_KINDS for m in methods):
        raise ConfigError(
            "the U-Net is trained as long as the heads; add one to the methods, or --unet-seconds"
        )


def _with_kind(settings: LandcoverSettings, kind: str) -> LandcoverSettings:
    head = settings.head.model_copy(update={"kind": kind})
    return settings.model_copy(update={"head": head})


def _load(
    match: PairMatch,
    scheme: ClassScheme,
    backbone: Backbone,
    settings: LandcoverSettings,
    folds: int,
    seed: int,
    unet_seconds: float | None,
) -> _Data:
    assert backbone.card is not None
    arrays = [load_class_pair(pair, scheme, backbone.card)[0] for pair in match.pairs]
    known = [cell_validity(a, p.factor) for a, p in zip(arrays, match.pairs, strict=True)]
    arrays = [PairArrays(a.image, a.valid, a.target, k) for a, k in zip(arrays, known, strict=True)]
    groups = [pair.group for pair in match.pairs]
    fold_of = balanced_folds(groups, [float(k.sum()) for k in known], folds, seed=seed)
    data = _Data(match, scheme, backbone, settings, arrays, [], fold_of, seed, 0.0, unet_seconds)
    data.example = choose_example(match.pairs, arrays)
    return data


def _time_features(data: _Data) -> float:
    """Seconds to compute the features of one window, measured anew whatever the cache holds."""
    pairs = list(range(len(data.arrays)))[:: max(len(data.arrays) // _TIMED_WINDOWS, 1)][:_TIMED_WINDOWS]
    device = next(data.backbone.parameters()).device
    began = time.monotonic()
    for index in pairs:
        extract_feature_maps(
            data.backbone,
            torch.from_numpy(data.arrays[index].image)[None].to(device),
            torch.from_numpy(data.arrays[index].valid)[None].to(device),
            blocks=default_blocks(data.backbone.num_blocks, data.settings.num_maps),
            image_scale=data.settings.image_scale,
        )
    return (time.monotonic() - began) / len(pairs)


def _run(
    method: str,
    fold: int,
    data: _Data,
    found: Mapping[str, Sequence[Part]],
    progress: StageProgress | None,
) -> Part:
    """Fits a method on all folds but one and predicts that one."""
    train = [i for i, n in enumerate(data.fold_of) if n != fold]
    held = [i for i, n in enumerate(data.fold_of) if n == fold]
    if not any(data.arrays[i].target_valid.any() for i in train):
        raise DataError(f"fold {fold + 1} has no labelled pixel to train on; use fewer folds or more masks")
    began = time.monotonic()
    predict, note = _fit(method, train, fold, data, found, progress)
    seconds = time.monotonic() - began
    if method in HEAD_KINDS:
        seconds += data.feature_seconds * len(train)
    matrix = ConfusionMatrix(data.scheme.names)
    shown: dict[int, Classes] = {}
    for index in held:
        classes = predict(index)
        matrix.update(classes, data.arrays[index].target, data.arrays[index].target_valid)
        if index in data.example:
            shown[index] = classes
    return Part(matrix.counts, seconds, shown, note)


def _fit(
    method: str,
    train: list[int],
    fold: int,
    data: _Data,
    found: Mapping[str, Sequence[Part]],
    progress: StageProgress | None,
) -> tuple[Callable[[int], Classes], str]:
    """Fits a method; gives what predicts the window of an index, and a note for the report."""
    factors = [pair.factor for pair in data.match.pairs]
    plots = [data.arrays[i] for i in train]
    own = [factors[i] for i in train]
    if method in HEAD_KINDS:
        device = next(data.backbone.parameters()).device
        settings = _with_kind(data.settings, method)
        samples = [data.samples[i] for i in train]
        head, result = fit_class_head(samples, data.scheme, settings, device=device, progress=progress)
        note = f"fold {fold + 1}: epoch {result.best_epoch + 1} of {len(result.losses)} kept"
        return lambda index: predict_classes(head, data.samples[index]), note
    if method == UNET:
        seconds = data.unet_seconds or max(p[fold].seconds for m, p in found.items() if m in HEAD_KINDS)
        net = _new_unet(data, train, seconds)
        net.fit(plots, own)
        return lambda i: net.predict(data.arrays[i], factors[i]), (
            f"fold {fold + 1}: {net.steps} steps in {seconds:.0f} s"
        )
    forest = PixelForest(surroundings=method == FOREST_AROUND, seed=data.seed)
    forest.fit(plots, own)
    return lambda i: forest.predict(data.arrays[i], factors[i]), ""


def _new_unet(data: _Data, train: list[int], seconds: float) -> ScratchUNet:
    assert data.backbone.card is not None
    size = len(data.scheme.classes)
    counts = np.zeros(size, dtype=np.int64)
    for index in train:
        arrays = data.arrays[index]
        counts += np.bincount(arrays.target[arrays.target_valid], minlength=size)
    weights = loss_weights(counts, [c.weight for c in data.scheme.classes], data.settings.fit.class_weights)
    return ScratchUNet(data.backbone.card.normalization, weights.tolist(), seconds, data.seed)


def _result(method: str, parts: Sequence[Part], scheme: ClassScheme) -> MethodResult:
    matrix = ConfusionMatrix(scheme.names, sum((p.counts for p in parts), np.zeros_like(parts[0].counts)))
    each = tuple(ConfusionMatrix(scheme.names, p.counts).scores().miou for p in parts)
    return MethodResult(method, matrix.scores(), matrix, each, sum(p.seconds for p in parts))


def _fold_warnings(data: _Data) -> list[str]:
    """A line for each class that a fold does not show in training."""
    lines = []
    size = len(data.scheme.classes)
    for fold in sorted(set(data.fold_of)):
        train = [a for a, n in zip(data.arrays, data.fold_of, strict=True) if n != fold]
        counts = sum(
            (np.bincount(a.target[a.target_valid], minlength=size) for a in train), np.zeros(size, np.int64)
        )
        lines += [
            f"fold {fold + 1} trains without any pixel of {name}; its places hold all of them"
            for name, n in zip(data.scheme.names, counts, strict=True)
            if n == 0
        ]
    return lines


def _details(match: PairMatch, data: _Data, command: str) -> dict[str, Any]:
    folds: list[list[str]] = [[] for _ in range(max(data.fold_of) + 1)]
    for pair, fold in zip(match.pairs, data.fold_of, strict=True):
        if pair.image.name not in folds[fold]:
            folds[fold].append(pair.image.name)
    pixels = [int(a.target_valid.sum()) for a in data.arrays]
    return {
        "format": REPORT_FORMAT,
        "command": command,
        "images": len({p.image for p in match.pairs}),
        "windows": len(match.pairs),
        "places": len({p.group for p in match.pairs}),
        "pixels": sum(pixels),
        "images_per_fold": folds,
        "unmatched_images": len(match.unmatched_images),
        "unmatched_masks": len(match.unmatched_targets),
        "classes": data.scheme.model_dump(),
        "feature_seconds_per_window": round(data.feature_seconds, 4),
    }


def _prefixed(progress: StageProgress | None, prefix: str) -> StageProgress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(prefix + stage, done, total)


def _facts(data: _Data) -> list[Any]:
    """Everything that the numbers of a part depend on."""
    facts: list[Any] = [data.settings.model_dump(), data.scheme.model_dump(), data.fold_of, data.seed]
    facts += [[str(p.image), p.image.stat().st_mtime_ns, str(p.window)] for p in data.match.pairs]
    facts += [[str(p.target), p.target.stat().st_mtime_ns] for p in data.match.pairs]
    return [*facts, weights_digest(data.backbone), data.unet_seconds]
