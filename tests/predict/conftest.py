"""A backbone and a canopy model, untrained and small, but real."""

import pytest
import torch

from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.canopy import CanopyModel
from dinov3geo.heads.dpt import DPTHead


@pytest.fixture(scope="session")
def backbone() -> VisionTransformer:
    """Two blocks, 24 wide, patches of 16 pixels, trained (so says its card) on 8-bit RGB of 0.1 m."""
    torch.manual_seed(0)
    network = VisionTransformer(VitConfig(24, 2, 2, "mlp", 48, layer_scale=0.5))
    normalization = Normalization(
        bands=("red", "green", "blue"),
        scale=(1 / 255,) * 3,
        offset=(0.0,) * 3,
        mean=(0.5, 0.6, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    network.card = BackboneCard("vit-test", "vit_tiny", 16, normalization, gsd_m=(0.1, 2.0))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def model(backbone: VisionTransformer) -> CanopyModel:
    """The backbone with a DPT head on both blocks; heights are 0 to 60 m."""
    torch.manual_seed(1)
    output = OutputSpec("canopy_height", unit="m", minimum=0.0, maximum=60.0)
    head = DPTHead([24, 24], output=output, channels=8).eval().requires_grad_(False)
    card = {"name": "canopy-test", "gsd_m": [0.1, 0.1]}
    return CanopyModel(backbone, head, blocks=(0, 1), image_scale=1.0, views=1, card=card)
