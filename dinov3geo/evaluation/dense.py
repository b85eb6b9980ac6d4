"""The protocol of dense evaluation on frozen features: one head per encoder, scored on places kept apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dinov3geo.data.image_folder import hash_share
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.evaluation.bootstrap import RESAMPLES, Interval, bootstrap
from dinov3geo.evaluation.dense_encoders import DenseEncoder, Lattice
from dinov3geo.evaluation.dense_sets import DenseImage, DenseSet, DenseSource, Quantity
from dinov3geo.evaluation.encoders import short_digest
from dinov3geo.evaluation.folds import balanced_folds
from dinov3geo.evaluation.image_sets import TEST, TEST_SHARE, Indexes
from dinov3geo.evaluation.segmentation_metrics import ConfusionMatrix
from dinov3geo.features.extract import FeatureCache
from dinov3geo.heads.base import Head, OutputSpec
from dinov3geo.heads.classes import ClassFitSettings
from dinov3geo.heads.dpt import DPTHead
from dinov3geo.heads.fit import FitResult, FitSample, FitView, fit_head, predict_cells
from dinov3geo.heads.heights import HeightFitSettings, HeightObjective
from dinov3geo.heads.landcover import ClassHeadSettings, LandcoverSettings, check_settings, fit_class_head
from dinov3geo.heads.segmentation import LinearHead

HeadKind = Literal["linear", "batchnorm", "upernet", "dpt"]
QUANTITY_HEADS: tuple[HeadKind, ...] = ("linear", "dpt")
Progress = Callable[[str, int, int], None]
Sums = NDArray[np.float64]


class DenseSettings(BaseModel):
    """What is fitted and measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: tuple[HeadKind, ...] = Field(("linear",), min_length=1)
    num_maps: int = Field(1, ge=1, description="blocks whose features are taken; 1 is the last")
    image_scale: float = Field(1.0, gt=0, description="images are made this many times larger")
    short_side: int | None = Field(None, ge=16, description="images are resized to it instead, pixels")
    max_window: int = Field(512, ge=16, description="larger images are cut, unless they are resized")
    channels: int = Field(64, ge=8, multiple_of=8, description="of the pyramid of upernet and dpt")
    finest: Literal[1, 2, 4] = Field(2, description="its finest level in units of the patch grid")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of channels silenced, not in linear")
    bins: int = Field(0, ge=0, description="of a quantity by dpt; 0 regresses directly")
    class_fit: ClassFitSettings = ClassFitSettings()
    quantity_fit: HeightFitSettings = HeightFitSettings()
    folds: int | None = Field(None, ge=2, description="every place is held out once; None for one split")
    test_share: float = Field(TEST_SHARE, gt=0, lt=1, description="of places, where there is no split")
    main: Literal["mae", "rmse", "r2"] = Field("mae", description="of a quantity, what is compared by")
    resamples: int = Field(RESAMPLES, ge=1, description="of the intervals, by place")
    seed: int = Field(0, ge=0, description="of folds, filters and intervals; fits have their own")

    @model_validator(mode="after")
    def _one_size(self) -> DenseSettings:
        if self.short_side is not None and self.image_scale != 1:
            raise ValueError("give either short_side or image_scale: both set the size of the images")
        return self

    @property
    def lattice(self) -> Lattice:
        """How images are laid out in patches."""
        return Lattice(self.image_scale, self.short_side)


@dataclass(frozen=True, slots=True)
class DenseResult:
    """One head on one encoder.

    Attributes:
        head: its kind.
        scores: by metric; the first one is the one to compare.
        details: sizes of the parts, and per class the IoU.
    """

    head: str
    scores: Mapping[str, Interval]
    details: Mapping[str, Any] = field(default_factory=dict)


def check_heads(source: DenseSource, settings: DenseSettings) -> None:
    """Refuses heads that do not fit the targets, before anything is computed.

    Raises:
        ConfigError: a head of classes for a quantity, or L-BFGS for one that is not linear.
    """
    for kind in settings.heads:
        if source.quantity is not None and kind not in QUANTITY_HEADS:
            raise ConfigError(f"the head {kind!r} gives classes; for a quantity: {', '.join(QUANTITY_HEADS)}")
        if source.quantity is not None and kind != "linear" and settings.quantity_fit.optimizer == "lbfgs":
            raise ConfigError("quantity_fit.optimizer=lbfgs needs a linear problem, but the head is dpt")
        if source.classes is not None:
            check_settings(_class_settings(kind, settings))


def splits_of(images: DenseSet, settings: DenseSettings) -> list[tuple[Indexes, Indexes]]:
    """Images to fit on and to score, once or per fold.

    Args:
        images: with their own split, else split by place.
        settings: number of folds, or the share by a hash of the place's name.

    Raises:
        ConfigError: folds of a set that has its own split.
        DataError: a part without images.
    """
    groups = np.array(images.groups)
    if settings.folds is not None:
        if images.parts is not None:
            raise ConfigError(f"{images.name} has its own split; leave folds out")
        sizes = [1.0] * len(images)
        fold_of = np.array(balanced_folds(images.groups, sizes, settings.folds, seed=settings.seed))
        return [(np.flatnonzero(fold_of != f), np.flatnonzero(fold_of == f)) for f in range(settings.folds)]
    if images.parts is not None:
        is_test = np.array(images.parts) == TEST
    else:
        is_test = np.array([hash_share(str(group)) < settings.test_share for group in groups])
    if is_test.all() or not is_test.any():
        part = "train" if is_test.all() else "test"
        raise DataError(
            f"{images.name} has {len(images)} images of {len(set(groups))} places and none of them in the "
            f"part {part!r}; name it, set another test_share, or use folds"
        )
    return [(np.flatnonzero(~is_test), np.flatnonzero(is_test))]


def dense_samples(
    encoder: DenseEncoder,
    images: DenseSet,
    settings: DenseSettings,
    *,
    cache: FeatureCache,
    progress: Progress | None = None,
) -> list[list[FitSample]]:
    """Features and targets of each image, as one sample per window.

    With a cache on disk the features stay in its files, which the system reads when they are needed: a set
    may be larger than the memory.

    Args:
        encoder: prepared.
        images: to look at.
        settings: sizes.
        cache: of feature maps.
        progress: called with a stage's name, how much is done, and of how much.
    """
    digest = encoder.digest()
    found = []
    for index in range(len(images)):
        if progress is not None:
            progress(f"{encoder.name}: features", index, len(images))
        samples = []
        whole = images.load(index)
        for number, image in enumerate(_windows(whole, settings)):
            key = short_digest(f"{digest} {images.stamp} {index} {number} {settings.max_window}")
            maps = cache.get_or_compute(key, partial(encoder, image))
            # From the file: the tensors that were just computed would stay in memory.
            maps = cache.get(key) or maps
            size_hw = (image.image.shape[-2], image.image.shape[-1])
            _, covered_hw = settings.lattice.grid(size_hw, encoder.patch)
            view = FitView(tuple(maps), covered_hw, image.target, image.known)
            samples.append(FitSample((view,), image.factor, images.groups[index]))
        found.append(samples)
    return found


def evaluate_dense(
    samples: Sequence[Sequence[FitSample]],
    images: DenseSet,
    source: DenseSource,
    settings: DenseSettings,
    kind: HeadKind,
    splits: Sequence[tuple[Indexes, Indexes]],
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> DenseResult:
    """Fits a head and scores it, once per split; scores are those of all held-out places together.

    Args:
        samples: of each image, from `dense_samples`.
        images: their names and places.
        source: says what the targets mean.
        settings: of fits and intervals.
        kind: of the head.
        splits: from `splits_of`.
        device: to fit on.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        DataError: no valid target, or none of a class in training.
    """
    tallies: dict[str, Sums] = {}
    epochs = []
    for fold, (train, test) in enumerate(splits):
        told = _told(progress, f"{kind}{f' {fold + 1}/{len(splits)}' if len(splits) > 1 else ''}")
        fitted = [sample for index in train for sample in samples[index]]
        head, result = _fit(fitted, source, settings, kind, device=device, progress=told)
        epochs.append(result.best_epoch + 1)
        for index in test:
            for sample in samples[index]:
                group = images.groups[index]
                tallies[group] = tallies.get(group, 0) + _tally(head, sample, source)
    counted = np.stack(list(tallies.values()))
    if not counted.any():
        raise DataError(f"{images.name}: no held-out image has a valid target")
    details: dict[str, Any] = {"places": len(tallies), "images": len(images), "epochs_kept": epochs}
    if source.classes is not None:
        scores = ConfusionMatrix(images.classes, counted.sum(0)).scores()
        details["iou"] = {c.name: round(c.iou, 5) if np.isfinite(c.iou) else None for c in scores.classes}
        return DenseResult(kind, _class_scores(counted, images.classes, settings), details)
    return DenseResult(kind, _quantity_scores(counted, settings), details)


def _windows(whole: DenseImage, settings: DenseSettings) -> list[DenseImage]:
    """An image cut into near-equal windows of at most `max_window`; whole where it is resized."""
    height, width = whole.target.shape
    largest = settings.max_window // whole.factor
    if settings.short_side is not None or max(height, width) <= largest:
        return [whole]
    rows, cols = (
        np.linspace(0, length, -(-length // largest) + 1).round().astype(int) for length in (height, width)
    )
    k = whole.factor
    return [
        DenseImage(
            whole.image[:, top * k : bottom * k, left * k : right * k],
            whole.valid[top * k : bottom * k, left * k : right * k],
            whole.target[top:bottom, left:right],
            whole.known[top:bottom, left:right],
            k,
        )
        for top, bottom in zip(rows[:-1], rows[1:], strict=True)
        for left, right in zip(cols[:-1], cols[1:], strict=True)
    ]


def _class_settings(kind: HeadKind, settings: DenseSettings) -> LandcoverSettings:
    head = ClassHeadSettings(
        kind=kind, channels=settings.channels, finest=settings.finest, dropout=settings.dropout
    )
    return LandcoverSettings(num_maps=settings.num_maps, head=head, fit=settings.class_fit)


def _fit(
    samples: list[FitSample],
    source: DenseSource,
    settings: DenseSettings,
    kind: HeadKind,
    *,
    device: torch.device,
    progress: Progress | None,
) -> tuple[Head, FitResult]:
    if source.classes is not None:
        return fit_class_head(
            samples, source.classes, _class_settings(kind, settings), device=device, progress=progress
        )
    quantity = source.quantity
    assert quantity is not None
    known = [s.views[0].target[s.views[0].valid] for s in samples]
    if not any(values.numel() for values in known):
        raise DataError(f"none of the {len(samples)} training images holds a valid target")
    head = _quantity_head(samples, quantity, settings, kind, typical=float(torch.cat(known).mean())).to(
        device
    )
    head.fit_statistics([s.views[0].maps for s in samples])
    objective = HeightObjective(settings.quantity_fit)

    def report(done: int, total: int, loss: float) -> None:
        if progress is not None:
            progress(f"head (loss {loss:.3g})", done, total)

    result = fit_head(
        head,
        samples,
        objective,
        settings=settings.quantity_fit,
        weights=objective.draws(samples),
        progress=report,
    )
    return head, result


def _quantity_head(
    samples: Sequence[FitSample],
    quantity: Quantity,
    settings: DenseSettings,
    kind: HeadKind,
    *,
    typical: float,
) -> LinearHead | DPTHead:
    output = OutputSpec("quantity", unit=quantity.unit, minimum=quantity.minimum, maximum=quantity.maximum)
    dims = [m.shape[0] for m in samples[0].views[0].maps]
    with torch.random.fork_rng():
        torch.manual_seed(settings.quantity_fit.seed)
        if kind == "linear":
            return LinearHead(dims, output=output, typical=typical)
        return DPTHead(
            dims,
            output=output,
            channels=settings.channels,
            finest=settings.finest,
            dropout=settings.dropout,
            bins=settings.bins,
            typical=max(typical, 1e-3),
        )


@torch.no_grad()
def _tally(head: Head, sample: FitSample, source: DenseSource) -> Sums:
    """What the scores of one sample add up from: a confusion matrix, or sums of a quantity."""
    view = sample.views[0]
    predicted = predict_cells(head, [view], sample.factor)[0].float().cpu()
    if source.classes is not None:
        matrix = ConfusionMatrix(source.classes.names)
        matrix.update(predicted.argmax(0).numpy(), view.target.numpy(), view.valid.numpy())
        return matrix.counts.astype(np.float64)
    guess = predicted[0].clamp(head.output.minimum, head.output.maximum)[view.valid].double()
    truth = view.target[view.valid].double()
    off = guess - truth
    sums = (off.abs().sum(), off.square().sum(), off.sum(), truth.sum(), truth.square().sum())
    return np.array([float(truth.numel()), *(float(s) for s in sums)])


def _class_scores(counts: Sums, names: Sequence[str], settings: DenseSettings) -> dict[str, Interval]:
    """Of [places, K, K] counts."""

    def interval(metric: Literal["miou", "accuracy", "mean_f1"]) -> Interval:
        def score(chosen: Indexes) -> float:
            found = ConfusionMatrix(names, counts[chosen].sum(0)).scores()
            return float(getattr(found, metric))

        return bootstrap(score, len(counts), resamples=settings.resamples, seed=settings.seed)

    return {"miou": interval("miou"), "accuracy": interval("accuracy"), "mean_f1": interval("mean_f1")}


def _quantity_scores(sums: Sums, settings: DenseSettings) -> dict[str, Interval]:
    """Of [places, 6] sums: number, absolute, squared and signed error, truth and its square."""

    def r2(total: Sums) -> float:
        spread = total[5] - total[4] ** 2 / total[0]
        return float(1 - total[2] / spread) if spread > 0 else float("nan")

    metrics: dict[str, Callable[[Sums], float]] = {
        "mae": lambda total: float(total[1] / total[0]),
        "rmse": lambda total: float(np.sqrt(total[2] / total[0])),
        "r2": r2,
        "bias": lambda total: float(total[3] / total[0]),
    }

    def interval(metric: Callable[[Sums], float]) -> Interval:
        def score(chosen: Indexes) -> float:
            total = sums[chosen].sum(0)
            return metric(total) if total[0] else float("nan")

        return bootstrap(score, len(sums), resamples=settings.resamples, seed=settings.seed)

    names = [settings.main, *(name for name in metrics if name != settings.main)]
    return {name: interval(metrics[name]) for name in names}


def _told(progress: Progress | None, prefix: str) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{prefix}: {stage}", done, total)
