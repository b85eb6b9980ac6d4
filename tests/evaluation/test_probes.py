"""Probes of frozen features on problems with known answers."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.variants import build_vit
from dinov3geo.errors import DataError
from dinov3geo.evaluation.probes import (
    LabelledImages,
    class_tokens,
    height_probe,
    knn_accuracy,
    load_labelled,
)

RGB = Normalization(("red", "green", "blue"), (1 / 255,) * 3, (0.0,) * 3, (0.4,) * 3, (0.2,) * 3)


def test_knn_finds_clusters_and_nothing_in_noise():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(40)
    is_test = torch.arange(200) % 4 == 0
    data = LabelledImages(torch.zeros(200, 3, 1, 1, dtype=torch.uint8), labels, is_test)
    clusters = torch.eye(5)[labels] + 0.1 * torch.randn(200, 5, generator=generator)
    assert knn_accuracy(clusters, data) == 1.0
    assert knn_accuracy(torch.randn(200, 5, generator=generator), data) < 0.5


def test_labelled_images_are_split_within_classes(tmp_path):
    for name, level in (("dark", 20), ("light", 220)):
        (tmp_path / name).mkdir()
        for number in range(12):
            pixels = np.full((20, 24, 3), level + number, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    data = load_labelled(tmp_path, size=16, per_class=8)
    assert data.images.shape == (16, 3, 16, 16)
    assert data.is_test.sum() == 4 and set(data.labels[data.is_test].tolist()) == {0, 1}
    torch.manual_seed(0)
    backbone = build_vit("vit_tiny", layer_scale=1.0).eval()
    tokens = class_tokens(backbone, data.images, RGB)
    assert tokens.shape == (16, 192) and torch.isfinite(tokens).all()
    with pytest.raises(DataError, match="expected one sub-folder"):
        load_labelled(tmp_path / "dark", size=16, per_class=8)


def test_heights_that_follow_brightness_are_found(write_raster, tmp_path):
    generator = np.random.default_rng(0)
    for number in range(8):
        heights = generator.uniform(0, 30, (6, 6)).astype(np.float32)
        bright = np.kron(heights, np.ones((16, 16))) * 7 + 20
        place = {"origin": (400_000.0 + 100 * number, 3_280_000.0)}
        write_raster(f"rgb/{number}.tif", array=np.stack([bright] * 3).astype(np.uint8), **place)
        write_raster(f"chm/{number}.tif", array=heights[None], pixel_size=1.6, **place)
    torch.manual_seed(0)
    backbone = build_vit("vit_tiny", layer_scale=1e-5).eval()
    assert height_probe(backbone, tmp_path / "rgb", tmp_path / "chm", RGB) > 0.6
