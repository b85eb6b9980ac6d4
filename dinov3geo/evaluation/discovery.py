"""Objects found without labels in pictures: boxes, drawings, and how often they are right (CorLoc)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageDraw
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dinov3geo.errors import DataError
from dinov3geo.evaluation.dense_sets import STEM, FolderPart, match_names, read_numbers
from dinov3geo.evaluation.frames import overlay
from dinov3geo.evaluation.image_sets import read_image
from dinov3geo.features.objects import find_objects
from dinov3geo.paths import written_whole

Box = tuple[float, float, float, float]
RIGHT_IOU = 0.5
_COLOUR = (255, 235, 59)


class DiscoverySource(BaseModel):
    """Pictures with masks of their objects: every number but 0 is one object."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path
    images: str = Field(description="glob relative to the root")
    masks: str = Field(description="glob relative to the root; pictures without a mask are left out")
    image_key: str = Field(STEM, description="regular expression whose groups name an image")
    mask_key: str = Field(STEM, description="likewise of its mask")
    short_side: int = Field(320, ge=32, description="images are resized to it, pixels")
    threshold: float = Field(0.2, ge=-1, le=1, description="cosine from which on patches are alike")


def object_boxes(
    numbers: Tensor, encode: Callable[[Tensor], Tensor], *, count: int = 1, threshold: float = 0.2
) -> list[tuple[Box, NDArray[np.bool_]]]:
    """The objects of an image.

    Args:
        numbers: [C, H, W].
        encode: features [D, h, w] of an image.
        count: objects to look for at most.
        threshold: see `find_objects`.

    Returns:
        For each xmin, ymin, xmax, ymax in pixels, and its mask [H, W].

    Raises:
        DataError: an image of fewer than 3 patches.
    """
    features = encode(numbers).permute(1, 2, 0)
    rows, cols = features.shape[:2]
    if rows * cols < 3:
        raise DataError(f"an image of {rows} x {cols} patches is too small to hold an object; enlarge it")
    height, width = numbers.shape[-2:]
    found = []
    for one in find_objects(features, count=count, threshold=threshold):
        top, left, bottom, right = one.box
        box = left * width / cols, top * height / rows, right * width / cols, bottom * height / rows
        large = torch.nn.functional.interpolate(one.mask[None, None].float(), (height, width))[0, 0] > 0
        found.append((box, large.cpu().numpy()))
    return found


def draw_objects(numbers: Tensor, found: Sequence[tuple[Box, NDArray[np.bool_]]], path: Path) -> None:
    """Writes an image with its objects coloured and framed as a PNG.

    Raises:
        RasterError: it cannot be written.
    """
    labels = np.zeros(numbers.shape[-2:], dtype=np.uint8)
    for number, (_, mask) in reversed(list(enumerate(found, start=1))):
        labels[mask] = number
    picture = overlay(numbers, labels)
    pen = ImageDraw.Draw(picture)
    for box, _ in found:
        pen.rectangle([box[0], box[1], box[2] - 1, box[3] - 1], outline=_COLOUR, width=2)
    with written_whole(path) as temporary:
        picture.save(temporary, format="PNG")


def true_boxes(mask: NDArray[np.generic]) -> list[Box]:
    """Boxes of the objects of a mask, one per number but 0."""
    boxes: list[Box] = []
    for number in np.unique(mask):
        if number:
            rows, cols = np.nonzero(mask == number)
            boxes.append((cols.min(), rows.min(), cols.max() + 1.0, rows.max() + 1.0))
    return boxes


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    inside = max(width, 0.0) * max(height, 0.0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return inside / (sum(areas) - inside)


def correct_localisation(
    source: DiscoverySource,
    encode: Callable[[Tensor], Tensor] | None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.bool_]:
    """Per picture whether the one box meets any object's box with an IoU of at least 0.5 (CorLoc).

    Source: Deselaers et al. 2010; as LOST and TokenCut report it.

    Args:
        source: pictures and masks.
        encode: features [D, h, w] of an image; None for the box of the whole picture, which needs none.
        progress: called with how many pictures are done.

    Raises:
        UserError: files that cannot be used.
    """
    part = FolderPart(images=source.images, targets=source.masks)
    pairs = match_names(
        source.root, part, source.image_key, source.mask_key, name="discovery", drops_images=True
    )
    hits = []
    for done, (image_file, mask_file) in enumerate(pairs):
        numbers, truth = read_image(image_file), true_boxes(read_numbers(mask_file))
        if not truth:
            raise DataError(f"{mask_file} holds no object: all of it is 0, the background")
        box: Box = (0.0, 0.0, float(numbers.shape[-1]), float(numbers.shape[-2]))
        if encode is not None:
            box = object_boxes(numbers, encode, threshold=source.threshold)[0][0]
        hits.append(max(box_iou(box, one) for one in truth) >= RIGHT_IOU)
        if progress is not None:
            progress(done + 1, len(pairs))
    return np.array(hits)
