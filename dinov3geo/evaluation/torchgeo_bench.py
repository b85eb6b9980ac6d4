"""Our backbones as models of torchgeo-bench, which brings its own data sets, protocols and tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchgeo_bench.datasets.base import BandSpec
from torchgeo_bench.models.interface import BenchModel

from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.inference import for_inference
from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone
from dinov3geo.evaluation.named_encoders import measured_sensor
from dinov3geo.features.extract import default_blocks

# What torchgeo-bench calls bands that our weights know by another name.
_NAMES = {"b02": "blue", "b03": "green", "b04": "red", "b08": "nir"}


class FrozenBench(BenchModel):  # type: ignore[misc]  # untyped where it is not installed
    """A frozen backbone: its class token as embedding, and feature maps where torchgeo-bench can take them.

    Bands are normalised with the statistics of the data set, and bands that the weights do not know get
    kernels by `stem`. For segmentation name the layers `maps.0`, `maps.1`, ...: one map per block.
    """

    def __init__(
        self,
        bands: list[BandSpec],
        *,
        weights: str = DEFAULT_BACKBONE,
        stem: str | None = "mean",
        num_maps: int = 4,
        **_: object,
    ) -> None:
        """Loads the weights; torchgeo-bench calls it once per data set.

        Args:
            bands: of the data set, in the order of the images.
            weights: what `load_backbone` takes.
            stem: see `load_backbone`.
            num_maps: blocks whose maps are given, evenly spread over the depth.

        Raises:
            UserError: weights that cannot be used.
        """
        super().__init__(bands=bands, normalization="identity")
        sensor = measured_sensor(statistics_of(bands))
        backbone = load_backbone(weights, bands=sensor.band_names, sensor=sensor, stem=stem)
        assert backbone.card is not None
        self.normalization_of_card = backbone.card.normalization
        self.network = backbone.requires_grad_(False)
        self.blocks = default_blocks(backbone.num_blocks, num_maps)
        # Places that a hook can hold on to.
        self.maps = nn.ModuleList(nn.Identity() for _ in self.blocks)

    @torch.no_grad()
    def _forward_patch_features(self, images: Tensor) -> Tensor:
        found = for_inference(self.network).intermediate(self.normalization_of_card(images), self.blocks)
        for place, features in zip(self.maps, found, strict=True):
            place(features.map())
        cls: Tensor = found[-1].cls
        return cls


def statistics_of(bands: Sequence[BandSpec]) -> Normalization:
    """Names, means and deviations of the bands as torchgeo-bench measured them on training images."""
    names = tuple(_NAMES.get(band.name.lower(), band.name.lower()) for band in bands)
    ones, zeros = (1.0,) * len(names), (0.0,) * len(names)
    deviations = tuple(float(band.std) if band.std > 0 else 1.0 for band in bands)
    return Normalization(names, ones, zeros, tuple(float(band.mean) for band in bands), deviations)
