"""Fitting a detector on cached features of a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone
from dinov3geo.data.boxes import BoxedImage, BoxSet, box_groups, clip_boxes, read_box_image
from dinov3geo.errors import DataError
from dinov3geo.features.extract import (
    FeatureCache,
    apply_view,
    default_blocks,
    extract_feature_maps,
    feature_key,
    weights_digest,
)
from dinov3geo.heads.box_scores import DetectionScores, check_scores, score_boxes
from dinov3geo.heads.curves import CURVE_FILE, draw_curves
from dinov3geo.heads.detection import (
    Boxes,
    DetectionFitSettings,
    DetectionHead,
    DetectionSettings,
    object_classes,
    turn_boxes,
)
from dinov3geo.heads.epochs import EpochFit, FitResult, adamw, split_groups
from dinov3geo.heads.folders import check_free, model_card, save_model
from dinov3geo.heads.progress_file import ProgressFile
from dinov3geo.heads.samples import StageProgress

_ERRORS = {"loss": "loss", "map": "1 - mAP"}


@dataclass(frozen=True, slots=True)
class BoxView:
    """One view of a window, all of it in the pixels that the backbone sees.

    Attributes:
        maps: one [D, h, w] per block.
        boxes: [N, 4] xmin, ymin, xmax, ymax.
        labels: [N] positions of classes.
        size_hw: rows and columns.
    """

    maps: tuple[Tensor, ...]
    boxes: Tensor
    labels: Tensor
    size_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BoxSample:
    """One window, seen from one or more sides; windows of one group never lie on both sides of a split."""

    views: tuple[BoxView, ...]
    group: str


@dataclass(frozen=True, slots=True)
class DetectionFitReport:
    """What `fit_detection` did.

    Attributes:
        folder: of the model.
        windows: number, those kept out included.
        counts: boxes of each class.
        result: of the fit.
        scores: of the weights kept on the windows kept out, or None without such.
    """

    folder: Path
    windows: int
    counts: dict[str, int]
    result: FitResult
    scores: DetectionScores | None


def fit_detection(
    data: BoxSet,
    *,
    out: Path,
    backbone: str | Path | None = None,
    settings: DetectionSettings | None = None,
    overwrite: bool = False,
    cache: FeatureCache | None = None,
    command: str = "",
    progress: StageProgress | None = None,
) -> DetectionFitReport:
    """Fits a detector and saves the model.

    A fit that was cut off goes on where it was when it is asked for again.

    Args:
        data: images with boxes.
        out: folder of the model.
        backbone: name or path, or None for the bundled one.
        settings: how; None for the defaults.
        overwrite: replace an existing folder.
        cache: of features, or None to keep none.
        command: that was typed, for the card.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        UserError: a file, name or number that cannot be used; nothing is written then.
    """
    settings = settings or DetectionSettings()
    check_free(out, what="detection", overwrite=overwrite)
    check_held_out(data, settings)
    source = DEFAULT_BACKBONE if backbone is None else backbone
    frozen = load_backbone(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = default_blocks(frozen.num_blocks, settings.num_maps)
    samples = box_samples(data, frozen.to(device), settings, cache=cache, progress=progress)
    output = object_classes(data.classes)
    with torch.random.fork_rng():
        torch.manual_seed(settings.fit.seed)
        dims = [m.shape[0] for m in samples[0].views[0].maps]
        head = DetectionHead(dims, output=output, patch=frozen.patch_size, settings=settings).to(device)
    head.fit_statistics([sample.views[0].maps for sample in samples])
    train, held = _parts(samples, settings.fit)
    result = fit_boxes(
        head, train, settings.fit, held=held, progress=progress, state_file=out.with_name(f".{out.name}.fit")
    )
    scores = score_windows(head, held) if held else None
    card = model_card(frozen, source, output) | {
        "name": out.name,
        "blocks": list(blocks),
        "trained_on": {"images": len(data.images), "windows": len(samples), "boxes": data.counts},
        "settings": settings.model_dump(),
        "fit": {
            "epochs": len(result.losses),
            "best_epoch": result.best_epoch + 1,
            "validation_errors": [round(e, 5) for e in result.validation_errors],
            "losses": [round(x, 6) for x in result.losses],
            "held_out": None if scores is None else _summary(scores),
        },
        "command": command,
    }
    pictures = {CURVE_FILE: draw_curves(result, error=_ERRORS[settings.fit.monitor])}
    save_model(out, frozen, head, card, what="detection", overwrite=overwrite, pictures=pictures)
    return DetectionFitReport(out, len(samples), data.counts, result, scores)


def _summary(scores: DetectionScores) -> dict[str, float]:
    return {
        "windows": scores.images,
        "boxes": scores.boxes,
        "map": round(scores.map, 4),
        "map_50": round(scores.map_50, 4),
        "map_75": round(scores.map_75, 4),
        "recall": round(scores.recall, 4),
    }


def check_held_out(data: BoxSet, settings: DetectionSettings) -> int:
    """Whether a part of the images can be kept out and scored; asked before hours of work.

    Returns:
        Number of images kept out.

    Raises:
        DataError: too few places to keep any out.
        ConfigError: what computes scores is not installed.
    """
    own = settings.fit
    if not own.validation_share:
        return 0
    check_scores()
    return len(split_groups(box_groups(data.images), own.validation_share, seed=own.seed)[1])


def _parts(
    samples: Sequence[BoxSample], settings: DetectionFitSettings
) -> tuple[list[BoxSample], list[BoxSample]]:
    """Windows to train on, and those kept out; both must show a box."""
    parts = split_groups([s.group for s in samples], settings.validation_share, seed=settings.seed)
    train, held = ([samples[i] for i in part] for part in parts)
    for part, name in ((train, "training"), (held, "validation")):
        if part and not any(len(sample.views[0].boxes) for sample in part):
            raise DataError(
                f"no window of the {name} part shows a box; change fit.validation_share "
                f"({settings.validation_share:g}) or fit.seed ({settings.seed})"
            )
    return train, held


def box_samples(
    data: BoxSet,
    backbone: Backbone,
    settings: DetectionSettings,
    *,
    cache: FeatureCache | None = None,
    progress: StageProgress | None = None,
) -> list[BoxSample]:
    """Features and boxes of each window of each image, in several views.

    Args:
        data: images with boxes.
        backbone: with a card, on the device to run on.
        settings: sizes and number of views.
        cache: features that are in it are not computed again.
        progress: called as `progress("features", done, total)`.

    Raises:
        RasterError, DataError: an image cannot be read, has other bands, or no window shows a box.
    """
    assert backbone.card is not None
    digest = weights_digest(backbone)
    samples = []
    groups = box_groups(data.images)
    for number, image in enumerate(data.images):
        if progress is not None:
            progress("features", number, len(data.images))
        numbers, valid = read_box_image(
            image.path, backbone.card.normalization.bands, model=backbone.card.name
        )
        _check_inside(image, numbers.shape[-2:])
        for window in windows(numbers.shape[-2:], settings.max_window):
            views = _views(
                image, numbers, valid, window, backbone, settings, digest, cache or FeatureCache(None)
            )
            samples.append(BoxSample(tuple(views), groups[number]))
    if not any(len(sample.views[0].boxes) for sample in samples):
        raise DataError(
            f"no window of {len(data.images)} images shows a box; is max_window smaller than they?"
        )
    return samples


def windows(size_hw: Sequence[int], largest: int) -> list[tuple[int, int, int, int]]:
    """An image as near-equal windows xmin, ymin, xmax, ymax of at most `largest` pixels."""
    edges = [
        np.linspace(0, length, -(-length // largest) + 1).round().astype(int).tolist() for length in size_hw
    ]
    return [
        (x0, y0, x1, y1)
        for y0, y1 in zip(edges[0][:-1], edges[0][1:], strict=True)
        for x0, x1 in zip(edges[1][:-1], edges[1][1:], strict=True)
    ]


def fit_boxes(
    head: DetectionHead,
    samples: Sequence[BoxSample],
    settings: DetectionFitSettings,
    *,
    held: Sequence[BoxSample] = (),
    progress: StageProgress | None = None,
    state_file: Path | None = None,
) -> FitResult:
    """Fits a detector in place; equal seeds give equal weights on one machine and thread count.

    Args:
        head: on the device to fit on.
        samples: windows to train on.
        settings: how.
        held: windows that tell when to stop and which epoch's weights are kept; none for a fixed length.
        progress: called after each epoch.
        state_file: see `fit_head`.

    Raises:
        DataError: the loss is no longer finite.
        ConfigError: `monitor` is `"map"`, and what computes it is not installed.
    """

    def report(done: int, total: int, loss: float) -> None:
        if progress is not None:
            progress(f"detector (loss {loss:.3f})", done, total)

    fit = _BoxFit(head, samples, held, settings)
    return fit.run(report, None if state_file is None else ProgressFile(state_file))


def score_windows(head: DetectionHead, samples: Sequence[BoxSample]) -> DetectionScores:
    """Scores a detector on windows as the backbone sees them, each for itself.

    Raises:
        ConfigError: torchmetrics or pycocotools is not installed.
    """
    views = [sample.views[0] for sample in samples]
    with torch.no_grad():
        found = [head(_stacked([view], head), view.size_hw)[0] for view in views]
    own = [Boxes(one.boxes.cpu(), one.scores.cpu(), one.labels.cpu()) for one in found]
    return score_boxes(own, [(view.boxes, view.labels) for view in views], head.output.class_names)


class _BoxFit(EpochFit):
    """The state of a fit of a detector."""

    head: DetectionHead

    def __init__(
        self,
        head: DetectionHead,
        train: Sequence[BoxSample],
        held: Sequence[BoxSample],
        settings: DetectionFitSettings,
    ) -> None:
        super().__init__(
            head,
            adamw(head, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay),
            epochs=settings.epochs,
            patience=settings.patience,
            seed=settings.seed,
            validates=bool(held),
        )
        self.train, self.held, self.settings = train, held, settings
        self.total = settings.epochs * -(-len(train) // settings.batch_size)

    def pass_over(self) -> float:
        self.head.train()
        losses = []
        for batch in _batches(self.train, self.settings.batch_size, self.generator):
            loss = self._loss(batch)
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss is no longer finite in epoch {self.epoch + 1}; lower fit.learning_rate "
                    f"({self.settings.learning_rate:g})"
                )
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.settings.clip_norm)
            rate = self.settings.learning_rate * _rate(self.step / self.total, self.settings.warmup_share)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.step += 1
            losses.append(float(loss.detach()))
        return float(np.mean(losses))

    def held_error(self) -> float:
        if self.settings.monitor == "map":
            return 1 - score_windows(self.head, self.held).map
        return float(np.mean([float(self._loss([sample.views[0]])) for sample in self.held]))

    def facts(self) -> list[object]:
        chosen = self.head.detector
        found: list[object] = [self.settings.model_dump_json(), len(self.train), chosen.score_thresh]
        found += [chosen.nms_thresh, chosen.detections_per_img]
        for sample in (*self.train, *self.held):
            view = sample.views[0]
            found += [sample.group, len(sample.views), view.labels.tolist(), float(view.boxes.double().sum())]
            found += [float(view.maps[0].double().sum())]
        return found

    def _loss(self, batch: Sequence[BoxView]) -> Tensor:
        maps = _stacked(batch, self.head)
        boxes, labels = (
            [own.to(maps[0].device) for own in each]
            for each in zip(*((view.boxes, view.labels) for view in batch), strict=True)
        )
        return self.head.losses(maps, boxes, labels)


def _stacked(views: Sequence[BoxView], head: DetectionHead) -> list[Tensor]:
    """Maps of views of one shape, [B, D, h, w] float32 per block where the head is."""
    device = next(head.parameters()).device
    return [torch.stack(m).to(device, torch.float32) for m in zip(*(v.maps for v in views), strict=True)]


def _views(
    image: BoxedImage,
    numbers: NDArray[Any],
    valid: NDArray[np.bool_],
    window: tuple[int, int, int, int],
    backbone: Backbone,
    settings: DetectionSettings,
    digest: str,
    cache: FeatureCache,
) -> list[BoxView]:
    x0, y0, x1, y1 = window
    assert backbone.card is not None
    inside, kept = clip_boxes(image.boxes, window)
    boxes, labels = torch.from_numpy(inside), torch.from_numpy(image.labels[kept])
    pixels = torch.from_numpy(np.ascontiguousarray(numbers[:, y0:y1, x0:x1]))
    known = torch.from_numpy(valid[y0:y1, x0:x1].copy())
    blocks = default_blocks(backbone.num_blocks, settings.num_maps)
    views = []
    for view in range(settings.views):
        key = feature_key(
            digest,
            image.path,
            bands=range(1, len(pixels) + 1),
            normalization=backbone.card.normalization,
            window=(x0, y0, x1 - x0, y1 - y0),
            blocks=blocks,
            view=view,
            image_scale=settings.image_scale,
        )
        compute = partial(_maps, backbone, pixels, known, view, blocks, settings.image_scale)
        turned = turn_boxes(boxes, view, (y1 - y0, x1 - x0)) * settings.image_scale
        size = [round(side * settings.image_scale) for side in (y1 - y0, x1 - x0)]
        height, width = size[::-1] if view & 4 else size
        views.append(BoxView(tuple(cache.get_or_compute(key, compute)), turned, labels, (height, width)))
    return views


def _maps(
    backbone: Backbone, pixels: Tensor, known: Tensor, view: int, blocks: Sequence[int], scale: float
) -> list[Tensor]:
    device = next(backbone.parameters()).device
    image, valid = (apply_view(tensor, view)[None].to(device) for tensor in (pixels, known))
    return [m[0] for m in extract_feature_maps(backbone, image, valid, blocks=blocks, image_scale=scale)]


def _batches(samples: Sequence[BoxSample], size: int, generator: torch.Generator) -> list[list[BoxView]]:
    """One pass in random order, one random view each; a batch holds maps of one shape."""
    waiting: dict[tuple[int, ...], list[BoxView]] = {}
    full = []
    for index in torch.randperm(len(samples), generator=generator).tolist():
        views = samples[index].views
        view = views[int(torch.randint(len(views), (1,), generator=generator))]
        own = waiting.setdefault(tuple(view.maps[0].shape), [])
        own.append(view)
        if len(own) == size:
            full.append(waiting.pop(tuple(view.maps[0].shape)))
    return [*full, *waiting.values()]


def _rate(done: float, warmup: float) -> float:
    if done < warmup:
        return (done + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1.0)))


def _check_inside(image: BoxedImage, size_hw: Sequence[int]) -> None:
    height, width = size_hw
    outside = (image.boxes[:, 2] > width + 1) | (image.boxes[:, 3] > height + 1)
    if outside.any():
        raise DataError(
            f"{image.path} has {height} x {width} pixels, but a box ends at "
            f"{image.boxes[outside][0][2:].tolist()} (x, y); are the annotations of another size?"
        )
