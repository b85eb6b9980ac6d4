"""The protocol of image classification on frozen vectors: neighbours, regressions, few labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.evaluation import class_metrics as metrics
from dinov3geo.evaluation.attention_probe import EPOCHS as ATTENTION_EPOCHS
from dinov3geo.evaluation.attention_probe import RATES as ATTENTION_RATES
from dinov3geo.evaluation.attention_probe import attention_scores, choose_attention
from dinov3geo.evaluation.bootstrap import RESAMPLES, Interval, bootstrap
from dinov3geo.evaluation.encoders import (
    CLS_AND_MEAN,
    DEFAULT_SIZE,
    BackboneEncoder,
    Encoder,
    encode,
    encode_patches,
)
from dinov3geo.evaluation.fewshot import DRAWS, SHOTS, few_shot
from dinov3geo.evaluation.image_sets import (
    TEST_SHARE,
    VALIDATION_SHARE,
    ImageSet,
    Split,
    class_folders,
    split_images,
)
from dinov3geo.evaluation.knn import PAPER_KS, PAPER_TEMPERATURE, majority_votes, weighted_votes
from dinov3geo.evaluation.linear_probe import PAPER_RATES, PAPER_STEPS, fit_linear_probes
from dinov3geo.evaluation.logistic import fit_logistic, sweep_logistic

Method = Literal["knn", "logistic", "linear", "attention", "few-shot"]
METHODS: tuple[Method, ...] = ("knn", "logistic", "linear", "attention", "few-shot")
Progress = Callable[[str, int, int], None]
Details = Mapping[str, Any]


class ClassificationSettings(BaseModel):
    """What is measured, and how; the defaults are those of DINOv3's evaluation unless said otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[Method, ...] = Field(("knn", "logistic", "few-shot"), min_length=1)
    ks: tuple[int, ...] = Field(PAPER_KS, min_length=1, description="neighbours of the weighted vote")
    temperature: float = Field(PAPER_TEMPERATURE, gt=0)
    majority_k: int = Field(5, ge=1, description="neighbours of the plain vote (torchgeo-bench)")
    c_exponents: tuple[float, float] = Field((-6.0, 5.0), description="lowest and highest log10 of C")
    c_count: int = Field(45, ge=1)
    rates: tuple[float, ...] = Field(PAPER_RATES, min_length=1, description="of the linear probe")
    linear_steps: int = Field(PAPER_STEPS, ge=1)
    attention_rates: tuple[float, ...] = Field(
        ATTENTION_RATES, min_length=1, description="of attention pooling, chosen on validation"
    )
    attention_epochs: int = Field(ATTENTION_EPOCHS, ge=1)
    shots: tuple[int, ...] = SHOTS
    draws: int = Field(DRAWS, ge=1, description="of the few labelled images")
    few_shot_c: float = Field(1.0, gt=0)
    test_share: float = Field(TEST_SHARE, gt=0, lt=1)
    validation_share: float = Field(VALIDATION_SHARE, gt=0, lt=1)
    resamples: int = Field(RESAMPLES, ge=1, description="of the intervals")
    seed: int = Field(0, ge=0)

    @property
    def cs(self) -> tuple[float, ...]:
        """The grid of C."""
        return tuple(float(c) for c in np.logspace(*self.c_exponents, self.c_count))


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method on one encoder.

    Attributes:
        method: e.g. "kNN k=20".
        scores: by metric; the first one is the one to compare.
        details: what was chosen, e.g. C.
        predicted: [M] class numbers of the test images, or None where there is no single prediction.
    """

    method: str
    scores: Mapping[str, Interval]
    details: Details = field(default_factory=dict)
    predicted: NDArray[np.int64] | None = None


def main_score(scores: Tensor, labels: Tensor) -> float:
    """Accuracy of [M, K] scores for [M] classes, micro average precision for [M, K] memberships."""
    if labels.ndim == 2:
        return metrics.micro_average_precision(labels.numpy(), scores.numpy())
    return float((scores.argmax(1) == labels).float().mean())


def score_predictions(
    scores: Tensor, labels: Tensor, *, threshold: float, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """All metrics of a classification with intervals.

    Args:
        scores: [M, K], the larger the likelier.
        labels: [M] int64, or [M, K] bool.
        threshold: from which on a score means yes, where there are several classes.
        resamples: of the intervals.
        seed: of the resamples.
    """
    classes = scores.shape[1]

    def interval(score: Callable[[NDArray[np.int64]], float]) -> Interval:
        return bootstrap(score, len(labels), resamples=resamples, seed=seed)

    if labels.ndim == 2:
        truth, values = labels.numpy(), scores.numpy()
        return {
            "micro_map": interval(lambda i: metrics.micro_average_precision(truth[i], values[i])),
            "macro_map": interval(lambda i: metrics.macro_average_precision(truth[i], values[i])),
            "micro_f1": interval(lambda i: metrics.micro_f1(truth[i], values[i] > threshold)),
        }
    truth, guess = labels.numpy(), scores.argmax(1).numpy()

    def of_confusion(score: Callable[[NDArray[Any]], float]) -> Interval:
        return interval(lambda i: score(metrics.confusion_matrix(truth[i], guess[i], classes)))

    return {
        "accuracy": of_confusion(metrics.accuracy),
        "balanced_accuracy": of_confusion(metrics.balanced_accuracy),
        "macro_f1": of_confusion(metrics.macro_f1),
    }


@dataclass(frozen=True)
class _Task:
    """Vectors, labels and split, as the methods want them."""

    vectors: Tensor
    columns: Mapping[str, slice]
    labels: Tensor
    classes: int
    split: Split
    settings: ClassificationSettings
    progress: Progress | None

    def part(self, indexes: NDArray[np.int64], columns: str | None = None) -> tuple[Tensor, Tensor]:
        name = columns if columns is not None and columns in self.columns else next(iter(self.columns))
        return self.vectors[indexes][:, self.columns[name]], self.labels[indexes]

    def result(self, method: str, scores: Tensor, *, threshold: float, **details: object) -> MethodResult:
        labels = self.labels[self.split.test]
        found = score_predictions(
            scores,
            labels,
            threshold=threshold,
            resamples=self.settings.resamples,
            seed=self.settings.seed,
        )
        predicted = None if labels.ndim == 2 else scores.argmax(1).numpy()
        return MethodResult(method, found, details, predicted)

    def tell(self, stage: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(stage, done, total)


def evaluate_vectors(
    vectors: Tensor,
    columns: Mapping[str, slice],
    images: ImageSet,
    split: Split,
    settings: ClassificationSettings,
    *,
    progress: Progress | None = None,
) -> tuple[list[MethodResult], list[str]]:
    """Runs the methods on vectors that are at hand.

    Args:
        vectors: [N, D], one per image.
        columns: which of them are which, see `Encoder.columns`.
        images: their labels.
        split: of the images.
        settings: methods and their numbers.
        progress: called with a stage's name, how much is done, and of how much.

    Returns:
        Results in the order of `METHODS`, and notes on what could not be done.
    """
    task = _Task(vectors, columns, images.labels, len(images.classes), split, settings, progress)
    results: list[MethodResult] = []
    notes: list[str] = []
    if "knn" in settings.methods:
        results += _knn(task)
    if "logistic" in settings.methods:
        results.append(_logistic(task))
    if "linear" in settings.methods:
        results.append(_linear(task))
    if "few-shot" in settings.methods:
        found, notes = _few_shot(task, images)
        results += found
    return results, notes


def evaluate_encoder(
    encoder: Encoder,
    images: ImageSet,
    split: Split,
    settings: ClassificationSettings,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[MethodResult], list[str]]:
    """Encodes the images and runs the methods; arguments and result as in `evaluate_vectors`.

    Args:
        encoder: prepared here on the training images.
        images: all of them.
        split: of the images.
        settings: methods and their numbers.
        cache: folder of vectors kept from earlier calls, or None.
        progress: called with a stage's name, how much is done, and of how much.
    """
    encoder.prepare(images, split.fitted)
    tell = None if progress is None else lambda done, total: progress(encoder.name, done, total)
    vectors = encode(encoder, images, cache=cache, progress=tell)
    results, notes = evaluate_vectors(vectors, encoder.columns(), images, split, settings, progress=progress)
    if "attention" not in settings.methods:
        return results, notes
    if not isinstance(encoder, BackboneEncoder):
        return results, [*notes, f"attention was left out: {encoder.name} has one vector per image"]
    patches = encode_patches(encoder, images, cache=cache, progress=tell)
    task = _Task(patches, {}, images.labels, len(images.classes), split, settings, progress)
    return [*results, _attention(task)], notes


def evaluate_backbone(
    backbone: Backbone,
    folder: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    methods: Sequence[Method] = ("knn", "logistic"),
    per_class: int | None = None,
    settings: ClassificationSettings | None = None,
) -> dict[str, Interval]:
    """How well a loaded backbone tells the classes of a folder apart: the short way, for any script.

    Args:
        backbone: with a card, e.g. from `load_backbone`, or a student whose `card` was set.
        folder: one sub-folder of images per class.
        size: side that images are resized to.
        methods: of `METHODS`.
        per_class: images of each class, chosen by a hash of their names; None for all.
        settings: of the methods, None for the defaults.

    Returns:
        The main score of each method, e.g. `{"kNN k=20": 0.841 [0.829, 0.852], "logistic": ...}`.

    Raises:
        UserError: a folder or backbone that cannot be used.
    """
    wanted = (settings or ClassificationSettings()).model_copy(update={"methods": tuple(methods)})
    images = class_folders(folder).limit(per_class)
    split = split_images(images, test_share=wanted.test_share, validation_share=wanted.validation_share)
    results, _ = evaluate_encoder(BackboneEncoder(backbone, size=size), images, split, wanted)
    return {result.method: next(iter(result.scores.values())) for result in results}


def _knn(task: _Task) -> list[MethodResult]:
    train, labels = task.part(task.split.fitted)
    queries, _ = task.part(task.split.test)
    settings = task.settings
    votes = weighted_votes(
        train,
        labels,
        queries,
        num_classes=task.classes,
        ks=settings.ks,
        temperature=settings.temperature,
    )
    results = [
        task.result(f"kNN k={k}", scores, threshold=0.5, temperature=settings.temperature)
        for k, scores in votes.items()
    ]
    plain = majority_votes(train, labels, queries, num_classes=task.classes, k=settings.majority_k)
    return [*results, task.result(f"kNN k={settings.majority_k}, plain", plain, threshold=0.5)]


def _logistic(task: _Task) -> MethodResult:
    c, _ = sweep_logistic(
        *task.part(task.split.train),
        task.part(task.split.validation),
        num_classes=task.classes,
        score=main_score,
        cs=task.settings.cs,
        progress=task.tell("logistic"),
    )
    model = fit_logistic(*task.part(task.split.fitted), num_classes=task.classes, c=c)
    scores = model.scores(task.part(task.split.test)[0])
    return task.result("logistic", scores, threshold=0.0, c=c)


def _linear(task: _Task) -> MethodResult:
    settings = task.settings
    models = fit_linear_probes(
        *task.part(task.split.train, CLS_AND_MEAN),
        num_classes=task.classes,
        rates=settings.rates,
        steps=settings.linear_steps,
        seed=settings.seed,
        progress=task.tell("linear"),
    )
    best = models.best(*task.part(task.split.validation, CLS_AND_MEAN), main_score)
    scores = models.scores(task.part(task.split.test, CLS_AND_MEAN)[0], best)
    return task.result("linear", scores, threshold=0.0, learning_rate=models.rates[best])


def _attention(task: _Task) -> MethodResult:
    """On patches [N, P, D] in the place of vectors."""
    settings, split = task.settings, task.split
    parts = [(task.vectors[i], task.labels[i]) for i in (split.train, split.validation)]
    best = choose_attention(
        *parts,
        num_classes=task.classes,
        score=main_score,
        rates=settings.attention_rates,
        epochs=settings.attention_epochs,
        seed=settings.seed,
        progress=task.tell("attention"),
    )
    scores = attention_scores(best.probe, task.vectors[split.test])
    return task.result("attention", scores, threshold=0.0, learning_rate=best.rate)


def _few_shot(task: _Task, images: ImageSet) -> tuple[list[MethodResult], list[str]]:
    if images.multi_label:
        return [], ["few-shot was left out: images show several classes"]
    train = task.part(task.split.fitted)
    counts = torch.bincount(train[1], minlength=task.classes)
    results, notes = [], []
    for shots in task.settings.shots:
        if shots > int(counts.min()):
            rarest = images.classes[int(counts.argmin())]
            notes.append(f"few-shot {shots} was left out: {rarest} has {int(counts.min())} training images")
            continue
        found = few_shot(
            train,
            task.part(task.split.test),
            num_classes=task.classes,
            shots=shots,
            draws=task.settings.draws,
            c=task.settings.few_shot_c,
            resamples=task.settings.resamples,
            seed=task.settings.seed,
        )
        results.append(
            MethodResult(
                f"{shots}-shot",
                {"accuracy": found.accuracy},
                {"c": task.settings.few_shot_c, "draws": task.settings.draws, "deviation": found.deviation},
            )
        )
    return results, notes
