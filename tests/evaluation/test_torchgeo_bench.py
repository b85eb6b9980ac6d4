"""The adapter for torchgeo-bench: embeddings and maps are the backbone's own."""

import pytest
import torch

pytest.importorskip("torchgeo_bench", reason="pip install 'dinov3geo[bench]'")

from torchgeo_bench.datasets.base import BandSpec
from torchgeo_bench.segmentation_probe import SegmentationProbe

from dinov3geo.backbones.zoo import load_backbone
from dinov3geo.errors import UserError
from dinov3geo.evaluation.torchgeo_bench import FrozenBench


def specs(*names):
    return [
        BandSpec("s2", name, name.upper(), 1000.0 + 100 * k, 300.0, 0.0, 9000.0, 0.5)
        for k, name in enumerate(names)
    ]


def test_embeddings_of_three_bands_are_the_class_tokens():
    images = torch.rand(2, 3, 64, 64) * 3000
    model = FrozenBench(specs("b04", "b03", "b02"), num_maps=2)
    assert model.num_channels == 3
    backbone = load_backbone("vit-tiny-aerial")
    mean = torch.tensor([1000.0, 1100, 1200])[:, None, None]
    expected = backbone((images - mean) / 300).cls
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)


def test_five_bands_and_maps_for_segmentation():
    model = FrozenBench(specs("b02", "b03", "b04", "b08", "b11"), num_maps=2)
    probe = SegmentationProbe(model, ["maps.0", "maps.1"], num_classes=4)
    assert probe.channels_list == [192, 192] and probe.feature_hw_list == [(14, 14)] * 2
    assert probe(torch.rand(1, 5, 64, 64) * 3000).shape == (1, 4, 64, 64)


def test_weights_that_are_not_there():
    with pytest.raises(UserError):
        FrozenBench(specs("red", "green", "blue"), weights="none.safetensors")
