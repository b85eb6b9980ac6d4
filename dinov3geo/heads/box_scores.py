"""Scores of boxes: mean average precision and recall as COCO defines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dinov3geo.errors import ConfigError
from dinov3geo.heads.detection import Boxes

if TYPE_CHECKING:
    from torchmetrics.detection import MeanAveragePrecision

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
    metric = _precision()
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


def check_scores() -> None:
    """Says before hours of work that scores cannot be computed after them.

    Raises:
        ConfigError: torchmetrics or pycocotools is not installed.
    """
    _precision()


def _precision() -> MeanAveragePrecision:
    try:
        from torchmetrics.detection import MeanAveragePrecision

        return MeanAveragePrecision(class_metrics=True, backend="pycocotools")
    except ImportError as error:
        raise ConfigError(f"scores of boxes need pip install 'dinov3geo[detect]' ({error})") from error
