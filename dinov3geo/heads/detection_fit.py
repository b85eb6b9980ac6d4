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
from dinov3geo.data.boxes import BoxedImage, BoxSet, clip_boxes, read_box_image
from dinov3geo.errors import DataError
from dinov3geo.features.extract import (
    FeatureCache,
    apply_view,
    default_blocks,
    extract_feature_maps,
    feature_key,
    weights_digest,
)
from dinov3geo.heads.curves import CURVE_FILE, draw_curves
from dinov3geo.heads.detection import (
    DetectionFitSettings,
    DetectionHead,
    DetectionSettings,
    object_classes,
    turn_boxes,
)
from dinov3geo.heads.fit import FitResult
from dinov3geo.heads.folders import check_free, model_card, save_model
from dinov3geo.heads.samples import StageProgress


@dataclass(frozen=True, slots=True)
class BoxView:
    """One view of a window: maps [D, h, w], boxes [N, 4] in the pixels that the backbone sees, labels [N]."""

    maps: tuple[Tensor, ...]
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class DetectionFitReport:
    """What `fit_detection` did: the model's folder, its windows, boxes of each class, and the fit."""

    folder: Path
    windows: int
    counts: dict[str, int]
    result: FitResult


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
    source = DEFAULT_BACKBONE if backbone is None else backbone
    frozen = load_backbone(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = default_blocks(frozen.num_blocks, settings.num_maps)
    samples = box_samples(data, frozen.to(device), settings, cache=cache, progress=progress)
    output = object_classes(data.classes)
    with torch.random.fork_rng():
        torch.manual_seed(settings.fit.seed)
        dims = [m.shape[0] for m in samples[0][0].maps]
        head = DetectionHead(dims, output=output, patch=frozen.patch_size, settings=settings).to(device)
    head.fit_statistics([views[0].maps for views in samples])
    result = fit_boxes(head, samples, settings.fit, progress=progress)
    card = model_card(frozen, source, output) | {
        "name": out.name,
        "blocks": list(blocks),
        "trained_on": {"images": len(data.images), "windows": len(samples), "boxes": data.counts},
        "settings": settings.model_dump(),
        "fit": {"epochs": len(result.losses), "losses": [round(x, 6) for x in result.losses]},
        "command": command,
    }
    pictures = {CURVE_FILE: draw_curves(result, error="")}
    save_model(out, frozen, head, card, what="detection", overwrite=overwrite, pictures=pictures)
    return DetectionFitReport(out, len(samples), data.counts, result)


def box_samples(
    data: BoxSet,
    backbone: Backbone,
    settings: DetectionSettings,
    *,
    cache: FeatureCache | None = None,
    progress: StageProgress | None = None,
) -> list[list[BoxView]]:
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
    for number, image in enumerate(data.images):
        if progress is not None:
            progress("features", number, len(data.images))
        numbers, valid = read_box_image(
            image.path, backbone.card.normalization.bands, model=backbone.card.name
        )
        _check_inside(image, numbers.shape[-2:])
        for window in windows(numbers.shape[-2:], settings.max_window):
            samples.append(
                _views(image, numbers, valid, window, backbone, settings, digest, cache or FeatureCache(None))
            )
    if not any(len(views[0].boxes) for views in samples):
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
    samples: Sequence[Sequence[BoxView]],
    settings: DetectionFitSettings,
    *,
    progress: StageProgress | None = None,
) -> FitResult:
    """Fits a detector in place; equal seeds give equal weights on one machine and thread count.

    Args:
        head: on the device to fit on.
        samples: the views of each window.
        settings: how.
        progress: called after each epoch.

    Raises:
        DataError: the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    device = next(head.parameters()).device
    groups: list[dict[str, Any]] = [
        {"params": [p for p in head.parameters() if p.ndim > 1]},
        {"params": [p for p in head.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    total = settings.epochs * -(-len(samples) // settings.batch_size)
    losses: list[float] = []
    step = 0
    head.train()
    for epoch in range(settings.epochs):
        sums = []
        for batch in _batches(samples, settings.batch_size, generator):
            maps = [
                torch.stack(m).to(device, torch.float32) for m in zip(*(v.maps for v in batch), strict=True)
            ]
            loss = head.losses(
                maps, [v.boxes.to(device) for v in batch], [v.labels.to(device) for v in batch]
            )
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss is no longer finite in epoch {epoch + 1}; lower fit.learning_rate "
                    f"({settings.learning_rate:g})"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), settings.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate(step / total, settings.warmup_share)
            optimizer.step()
            step += 1
            sums.append(float(loss.detach()))
        losses.append(float(np.mean(sums)))
        if progress is not None:
            progress(f"detector (loss {losses[-1]:.3f})", epoch + 1, settings.epochs)
    head.eval()
    return FitResult(tuple(losses), (), settings.epochs - 1)


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
        views.append(BoxView(tuple(cache.get_or_compute(key, compute)), turned, labels))
    return views


def _maps(
    backbone: Backbone, pixels: Tensor, known: Tensor, view: int, blocks: Sequence[int], scale: float
) -> list[Tensor]:
    device = next(backbone.parameters()).device
    image, valid = (apply_view(tensor, view)[None].to(device) for tensor in (pixels, known))
    return [m[0] for m in extract_feature_maps(backbone, image, valid, blocks=blocks, image_scale=scale)]


def _batches(
    samples: Sequence[Sequence[BoxView]], size: int, generator: torch.Generator
) -> list[list[BoxView]]:
    """One pass in random order, one random view each; a batch holds maps of one shape."""
    waiting: dict[tuple[int, ...], list[BoxView]] = {}
    full = []
    for index in torch.randperm(len(samples), generator=generator).tolist():
        views = samples[index]
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
