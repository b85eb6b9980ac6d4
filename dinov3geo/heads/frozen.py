"""What all fitted models share: a frozen backbone, a head, and the way from an image to the head's map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.features.extract import extract_feature_maps, pixels_per_patch
from dinov3geo.heads.base import Head, OutputSpec


@dataclass
class FrozenModel[H: nn.Module]:
    """A backbone that is not trained, and a head on its features.

    Attributes:
        backbone: frozen, with a card.
        head: in evaluation mode.
    """

    backbone: Backbone
    head: H

    @property
    def output(self) -> OutputSpec:
        """What the numbers of the head mean."""
        return cast(OutputSpec, self.head.output)

    def to(self, device: torch.device | str) -> Self:
        """Moves backbone and head in place and returns the model."""
        self.backbone.to(device)
        self.head.to(device)
        return self


def head_map[H: Head](
    model: FrozenModel[H],
    numbers: Tensor,
    valid: Tensor | None,
    *,
    blocks: Sequence[int],
    image_scale: float,
    colours: bool = False,
) -> Tensor:
    """What a head says of each pixel.

    Args:
        model: backbone and head.
        numbers: [B, C, H, W] as the file holds them, on the model's device.
        valid: [B, H, W] bool, or None if all pixels hold data.
        blocks: see `extract_feature_maps`.
        image_scale: likewise.
        colours: likewise.

    Returns:
        [B, K, H, W].

    Raises:
        DataError: another number of bands than the backbone takes.
    """
    maps = extract_feature_maps(
        model.backbone, numbers, valid, blocks=blocks, image_scale=image_scale, colours=colours
    )
    side = pixels_per_patch(model.backbone.patch_size, image_scale)
    covered_hw = (maps[0].shape[-2] * side, maps[0].shape[-1] * side)
    with torch.no_grad():
        scores: Tensor = model.head(maps, covered_hw)
    return scores[..., : numbers.shape[-2], : numbers.shape[-1]]
