"""Scores of boxes: mean average precision and recall as COCO defines them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3geo.data.boxes import BoxSet
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.heads.detection import Boxes, DetectionModel
from dinov3geo.heads.scene_boxes import find_objects

COUNTED = 100
"""Boxes of an image that COCO's metrics look at; further ones are missed objects or none."""


@dataclass(frozen=True, slots=True)
class DetectionScores:
    """Of all classes and images.

    Attributes:
        images: number.
        boxes: true ones.
        map: mean average precision over IoU 0.50 to 0.95.
        map_50: at IoU 0.50.
        map_75: at IoU 0.75.
        recall: mean largest recall over IoU 0.50 to 0.95.
        per_class: `map` of each class; NaN where the truth has none.
    """

    images: int
    boxes: int
    map: float
    map_50: float
    map_75: float
    recall: float
    per_class: dict[str, float]


def score_boxes(
    found: Sequence[Boxes], truth: Sequence[tuple[Tensor, Tensor]], classes: Sequence[str]
) -> DetectionScores:
    """Scores predictions of images; the best 100 boxes of an image count, as COCO has it.

    Args:
        found: per image.
        truth: per image boxes [N, 4] and labels [N].
        classes: names.

    Raises:
        ConfigError: torchmetrics or pycocotools is not installed.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(class_metrics=True, backend="pycocotools")
    except ImportError as error:
        raise ConfigError(f"scores of boxes need pip install 'dinov3geo[detect]' ({error})") from error
    metric.warn_on_many_detections = False
    metric.update(
        [{"boxes": one.boxes, "scores": one.scores, "labels": one.labels} for one in found],
        [{"boxes": boxes, "labels": labels} for boxes, labels in truth],
    )
    scores = metric.compute()
    own = dict(
        zip(scores["classes"].reshape(-1).tolist(), scores["map_per_class"].reshape(-1).tolist(), strict=True)
    )
    # -1 is pycocotools' word for: none of this class.
    per_class = {name: own[k] if own.get(k, -1.0) >= 0 else float("nan") for k, name in enumerate(classes)}
    return DetectionScores(
        images=len(truth),
        boxes=sum(len(boxes) for boxes, _ in truth),
        map=float(scores["map"]),
        map_50=float(scores["map_50"]),
        map_75=float(scores["map_75"]),
        recall=float(scores[f"mar_{COUNTED}"]),
        per_class=per_class,
    )


def evaluate_detection(
    data: BoxSet, model: DetectionModel, *, progress: Callable[[int, int], None] | None = None
) -> DetectionScores:
    """Scores a model on images that it should not have been fitted on.

    Args:
        data: images with boxes, whose classes are the model's.
        model: on the device to compute on.
        progress: called with how many images are done.

    Raises:
        DataError: other classes.
        UserError: an image that cannot be used.
    """
    if set(data.classes) - set(model.classes):
        raise DataError(
            f"the annotations have the classes {', '.join(data.classes)}, "
            f"the model {', '.join(model.classes)}"
        )
    position = torch.tensor([model.classes.index(name) for name in data.classes])
    found, truth = [], []
    for done, image in enumerate(data.images):
        found.append(find_objects(image.path, model, min_score=model.settings.min_score).boxes)
        truth.append((torch.from_numpy(image.boxes), position[torch.from_numpy(image.labels)]))
        if progress is not None:
            progress(done + 1, len(data.images))
    return score_boxes(found, truth, model.classes)
