"""The contract of a head: frozen feature maps in, a map of the ground out."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What the numbers of a head mean.

    Attributes:
        name: product, e.g. `"canopy_height"`.
        unit: unit of a continuous output (`"m"`), or `""` for classes.
        class_names: names in channel order, empty for a continuous output.
        colours: red, green and blue of each class, None for one of a palette; empty for the palette alone.
        dtype: of the written raster, a NumPy name.
        nodata: of the written raster; never a possible value.
        minimum: smallest value written, or None.
        maximum: largest value written, or None.
    """

    name: str
    unit: str = ""
    class_names: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int] | None, ...] = ()
    dtype: str = "float32"
    nodata: float = -9999.0
    minimum: float | None = None
    maximum: float | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> OutputSpec:
        """From what `dataclasses.asdict` and JSON made of one.

        Raises:
            TypeError: unknown names.
        """
        colours = tuple(None if c is None else (c[0], c[1], c[2]) for c in values.get("colours", ()))
        names = tuple(values.get("class_names", ()))
        return cls(**{**values, "class_names": names, "colours": colours})


class Head(nn.Module):
    """A small trainable network on frozen features."""

    output: OutputSpec

    @abstractmethod
    def forward(self, feature_maps: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        """Predicts a map.

        Args:
            feature_maps: one [B, D, h, w] per requested block, all of one grid.
            size_hw: rows and columns of the output in pixels.

        Returns:
            [B, K, H, W]; K is 1 for a continuous output in `output.unit`, else class logits.
        """


class HeightModel(Protocol):
    """Everything that turns an image into heights.

    Attributes:
        backbone: frozen, with a card.
        card: what is known of the model.
    """

    backbone: Backbone
    card: dict[str, Any]

    @property
    def output(self) -> OutputSpec:
        """What the numbers mean."""

    def predict(self, numbers: Tensor, valid: Tensor | None = None) -> Tensor:
        """Heights of each pixel.

        Args:
            numbers: [B, C, H, W] as the file holds them, on the model's device.
            valid: [B, H, W] bool, or None if all pixels hold data.

        Returns:
            [B, 1, H, W] float32 metres; heights where `valid` is false mean nothing.

        Raises:
            DataError: another number of bands than the backbone takes.
        """

    def to(self, device: torch.device | str) -> Self:
        """Moves everything in place and returns the model."""
