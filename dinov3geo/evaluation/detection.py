"""Scores of a detector on images that are new to it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dinov3geo.data.boxes import BoxSet
from dinov3geo.errors import DataError
from dinov3geo.heads.box_scores import DetectionScores, score_boxes
from dinov3geo.heads.detection import DetectionModel
from dinov3geo.heads.scene_boxes import find_objects


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
