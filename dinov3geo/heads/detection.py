"""Boxes of objects: torchvision's FCOS on a pyramid made from the maps of a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList

from dinov3geo.features.extract import extract_feature_maps
from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.dpt import Reassemble, Standardize
from dinov3geo.heads.folders import find_model, load_head_weights, open_model
from dinov3geo.heads.frozen import FrozenModel
from dinov3geo.heads.segmentation import fit_standards

PRODUCT = "objects"
# Levels of the pyramid, each half as fine as the one before.
LEVELS = 4


class DetectionHeadSettings(BaseModel):
    """Shape of the detector.

    Attributes:
        channels: width of the pyramid; FCOS norms them in 32 groups.
        convs: convolutions before scores and sides of a box.
        finest: its finest level in units of the patch grid.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(default=64, ge=32, multiple_of=32)
    convs: int = Field(default=2, ge=1)
    finest: Literal[1, 2, 4] = 4


class DetectionFitSettings(BaseModel):
    """How the detector is fitted.

    Attributes:
        epochs: passes over the windows, each with one random view per window.
        batch_size: windows per step.
        learning_rate: peak of AdamW; a linear rise and a cosine to 0.
        weight_decay: on weights but not on biases.
        warmup_share: of the steps that raise the rate.
        clip_norm: largest norm of the gradient.
        validation_share: share of the images, by place, kept out to stop early and to measure average
            precision; 0 for a fixed length.
        monitor: what stops the fit, of the images kept out: `"loss"`, or `"map"` (mean average precision).
        patience: epochs without a better one before the fit stops.
        seed: of everything random in a fit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=60, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    clip_norm: float = Field(default=5.0, gt=0)
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    monitor: Literal["loss", "map"] = "loss"
    patience: int = Field(default=15, ge=1)
    seed: int = 0


class DetectionSettings(BaseModel):
    """How a detector is made and used.

    Attributes:
        image_scale: images are made this many times larger for the backbone.
        num_maps: blocks whose features are taken.
        views: flips and turns of each window that the head is fitted on.
        max_window: images are cut into windows of at most so many pixels.
        min_score: boxes below are not given.
        overlap_limit: of two boxes of one class whose IoU is larger, the better one stays.
        max_boxes: given per window.
        head: shape.
        fit: how it is fitted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_scale: float = Field(default=1.0, gt=0)
    num_maps: int = Field(default=4, ge=1)
    views: Literal[1, 2, 4, 8] = 8
    max_window: int = Field(default=512, ge=16)
    min_score: float = Field(default=0.05, ge=0, lt=1)
    overlap_limit: float = Field(default=0.5, gt=0, le=1)
    max_boxes: int = Field(default=300, ge=1)
    head: DetectionHeadSettings = DetectionHeadSettings()
    fit: DetectionFitSettings = DetectionFitSettings()


@dataclass(frozen=True, slots=True)
class Boxes:
    """Objects of one image.

    Attributes:
        boxes: [N, 4] xmin, ymin, xmax, ymax in pixels.
        scores: [N], 0 to 1, decreasing.
        labels: [N] int64 positions of classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class _Pyramid(nn.Module):
    """What FCOS asks of a backbone: the number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


class DetectionHead(nn.Module):
    """A simple feature pyramid and FCOS on it.

    Source: Li et al. 2022 (ViTDet: a pyramid from the last map of a plain backbone; here from the sum of the
    projections of several blocks) and Tian et al. 2019 (FCOS), as torchvision implements it. Of torchvision's
    model the head, the matching of places to boxes, the losses and the selection of boxes are used; images
    never reach it.
    """

    def __init__(
        self, dims: Sequence[int], *, output: OutputSpec, patch: int, settings: DetectionSettings
    ) -> None:
        """Builds and initialises the head with torch's global generator.

        Args:
            dims: width of each feature map.
            output: with class names.
            patch: side of a patch in the pixels that the backbone sees.
            settings: shape, and which boxes are given.
        """
        super().__init__()
        shape = settings.head
        self.output = output
        self.patch = patch
        self.finest = shape.finest
        self.standards = nn.ModuleList(Standardize(dim) for dim in dims)
        self.join = nn.Conv2d(sum(dims), shape.channels, 1)
        self.levels = nn.ModuleList(
            Reassemble(shape.channels, shape.channels, scale=shape.finest / 2**level)
            for level in range(LEVELS)
        )
        strides = tuple((int(patch / shape.finest * 2**level),) for level in range(LEVELS))
        count = len(output.class_names)
        head = FCOSHead(shape.channels, 1, count, shape.convs)
        # Sides are rectified distances: one that begins below 0 everywhere never learns. The start is half of
        # the largest distance, in strides, that a level is asked for.
        nn.init.constant_(head.regression_head.bbox_reg.bias, 4.0)
        self.detector = FCOS(
            _Pyramid(shape.channels),
            num_classes=count,
            anchor_generator=AnchorGenerator(strides, ((1.0,),) * LEVELS),
            head=head,
            score_thresh=settings.min_score,
            nms_thresh=settings.overlap_limit,
            detections_per_img=settings.max_boxes,
        )

    def fit_statistics(self, maps: Sequence[Sequence[Tensor]]) -> None:
        """See `fit_standards`."""
        fit_standards(self.standards, maps)

    def losses(self, feature_maps: list[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Sum of focal loss, GIoU loss and the loss of centredness.

        Args:
            feature_maps: one [B, D, h, w] per block.
            boxes: per image [N, 4] in the pixels that the backbone sees.
            labels: per image [N].
        """
        outputs, anchors, sizes = self._heads(feature_maps)
        targets = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
        found: dict[str, Tensor] = self.detector.compute_loss(targets, outputs, anchors, sizes)
        return torch.stack(list(found.values())).sum()

    def forward(self, feature_maps: list[Tensor], size_hw: tuple[int, int]) -> list[Boxes]:
        """Boxes of each image.

        Args:
            feature_maps: one [B, D, h, w] per block.
            size_hw: rows and columns of the image in the pixels that the backbone sees; boxes end there.
        """
        outputs, anchors, sizes = self._heads(feature_maps)
        split = {name: list(values.split(sizes, dim=1)) for name, values in outputs.items()}
        each = [list(one.split(sizes)) for one in anchors]
        found = self.detector.postprocess_detections(split, each, [size_hw] * len(anchors))
        return [Boxes(one["boxes"], one["scores"], one["labels"]) for one in found]

    def _heads(self, feature_maps: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """What FCOS says of every place, its anchors per image, and the number of places per level."""
        scaled = [scale(m) for scale, m in zip(self.standards, feature_maps, strict=True)]
        joined = self.join(torch.cat(scaled, dim=1))
        # Strides are whole numbers only where the coarsest level divides the grid.
        step = max(1, 2 ** (LEVELS - 1) // self.finest)
        rows, cols = joined.shape[-2:]
        joined = F.pad(joined, (0, -cols % step, 0, -rows % step))
        levels = [level(joined) for level in self.levels]
        outputs: dict[str, Tensor] = self.detector.head(levels)
        hw = (joined.shape[-2] * self.patch, joined.shape[-1] * self.patch)
        blank = joined.new_empty((len(joined), 1, *hw))
        anchors = self.detector.anchor_generator(ImageList(blank, [hw] * len(joined)), levels)
        return outputs, anchors, [m.shape[-2] * m.shape[-1] for m in levels]


@dataclass
class DetectionModel(FrozenModel[DetectionHead]):
    """Everything that turns an image into boxes.

    Attributes:
        blocks: numbers of the backbone's blocks that the head reads.
        settings: sizes and limits.
        card: what is known of the model.
    """

    blocks: tuple[int, ...]
    settings: DetectionSettings
    card: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in order."""
        return self.output.class_names

    @property
    def bands(self) -> tuple[str, ...]:
        """That the backbone takes."""
        assert self.backbone.card is not None
        return self.backbone.card.normalization.bands

    @torch.no_grad()
    def predict(self, numbers: Tensor, valid: Tensor | None = None) -> Boxes:
        """Objects of one window.

        Args:
            numbers: [C, H, W] as the file holds them.
            valid: [H, W] bool, or None if all pixels hold data.

        Returns:
            Boxes in pixels of the window, on the CPU.

        Raises:
            DataError: another number of bands than the backbone takes.
        """
        device = next(self.head.parameters()).device
        scale = self.settings.image_scale
        maps = extract_feature_maps(
            self.backbone,
            numbers[None].to(device),
            None if valid is None else valid[None].to(device),
            blocks=self.blocks,
            image_scale=scale,
        )
        size_hw = (round(numbers.shape[-2] * scale), round(numbers.shape[-1] * scale))
        (found,) = self.head(maps, size_hw)
        return Boxes(found.boxes.cpu() / scale, found.scores.cpu(), found.labels.cpu())


def turn_boxes(boxes: Tensor, view: int, size_hw: tuple[int, int]) -> Tensor:
    """Boxes of an image as its view shows them; see `features.extract.apply_view`.

    Args:
        boxes: [N, 4] xmin, ymin, xmax, ymax in pixels of the image.
        view: 0 to 7.
        size_hw: rows and columns of the image.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    if view & 1:
        x0, x1 = size_hw[1] - x1, size_hw[1] - x0
    if view & 2:
        y0, y1 = size_hw[0] - y1, size_hw[0] - y0
    sides = (y0, x0, y1, x1) if view & 4 else (x0, y0, x1, y1)
    return torch.stack(sides, dim=-1)


def object_classes(classes: Sequence[str]) -> OutputSpec:
    """The output of a detector."""
    return OutputSpec(PRODUCT, class_names=tuple(classes), dtype="float32")


def load_detection_model(folder: str | Path) -> DetectionModel:
    """A model that `fit_detection` wrote, ready to predict, on the CPU.

    Raises:
        UnknownNameError: no such folder.
        ConfigError: the card is missing, incomplete, or belongs to other backbone weights.
        DataError: the weights are damaged or do not fit.
    """
    found = find_model(folder, (), what="detection", command="detect fit")
    stored = open_model(found, DetectionSettings, product=PRODUCT)
    backbone = stored.backbone
    dims = [backbone.embed_dim] * len(stored.blocks)
    head = DetectionHead(dims, output=stored.output, patch=backbone.patch_size, settings=stored.settings)
    load_head_weights(stored.folder, head)
    return DetectionModel(backbone, head, stored.blocks, stored.settings, stored.card)
