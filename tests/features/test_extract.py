import os
import time
from dataclasses import replace

import pytest
import torch

from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.features.extract import (
    FeatureCache,
    apply_view,
    default_blocks,
    extract_feature_maps,
    feature_key,
    pixels_per_patch,
    undo_view,
    weights_digest,
)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    network = VisionTransformer(VitConfig(24, 3, 2, "mlp", 48, num_registers=1, layer_scale=0.5)).eval()
    numbers = (1 / 255,) * 3, (0.0,) * 3, (0.4, 0.5, 0.3), (0.2, 0.1, 0.2)
    network.card = BackboneCard("test", "test", 16, Normalization(("red", "green", "blue"), *numbers))
    return network


@pytest.fixture
def image():
    return torch.randint(
        0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_blocks_are_spread_evenly_and_end_with_the_last():
    assert default_blocks(12) == (2, 5, 8, 11)
    assert default_blocks(24) == (5, 11, 17, 23)
    assert default_blocks(3) == (0, 1, 2)
    assert default_blocks(12, 1) == (11,)
    with pytest.raises(ConfigError):
        default_blocks(12, 0)


@pytest.mark.parametrize("view", range(8))
def test_views_can_be_undone(view):
    image = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(undo_view(apply_view(image, view), view), image)


def test_views_are_eight_different_ones():
    image = torch.arange(9).reshape(3, 3)
    views = {tuple(apply_view(image, view).flatten().tolist()) for view in range(8)}
    assert len(views) == 8
    assert torch.equal(apply_view(image, 3), torch.rot90(image, 2))
    with pytest.raises(ValueError, match=r"0\.\.7"):
        apply_view(image, 8)


def test_maps_are_the_normed_patches_of_each_block(backbone, image):
    maps = extract_feature_maps(backbone, image, blocks=(0, 2))
    normed = backbone.card.normalization(image)
    expected = backbone(normed)
    assert [m.shape for m in maps] == [(2, 24, 3, 4)] * 2
    for row in range(3):
        for col in range(4):
            torch.testing.assert_close(maps[1][:, :, row, col], expected.patches[:, 4 * row + col])
    assert not maps[0].requires_grad


def test_numbers_under_nodata_do_not_matter(backbone, image):
    valid = torch.ones(2, 40, 56, dtype=torch.bool)
    valid[:, 10:20, 30:40] = False
    other = torch.where(valid[:, None], image, 255 - image)
    first = extract_feature_maps(backbone, image, valid, blocks=(2,), image_scale=2)
    second = extract_feature_maps(backbone, other, valid, blocks=(2,), image_scale=2)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("scale", "grid"), [(0.5, (2, 2)), (1, (3, 4)), (2, (5, 7)), (4, (10, 14))])
def test_scaled_maps_line_up_with_pixels(backbone, image, scale, grid):
    (maps,) = extract_feature_maps(backbone, image, blocks=(2,), image_scale=scale)
    side = pixels_per_patch(16, scale)
    assert maps.shape[-2:] == grid == (-(-40 // side), -(-56 // side))


def test_a_scaled_image_is_what_the_backbone_sees(backbone):
    image = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    (scaled,) = extract_feature_maps(backbone, image, blocks=(2,), image_scale=2)
    (large,) = extract_feature_maps(backbone, image.repeat(1, 1, 2, 2), blocks=(2,))
    torch.testing.assert_close(scaled, large)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, 32.0])
def test_scales_that_do_not_divide_the_patch_are_refused(scale):
    with pytest.raises(ConfigError, match="use for example one of 0.5, 1, 2, 4"):
        pixels_per_patch(16, scale)


def test_wrong_number_of_bands_names_the_right_ones(backbone, image):
    with pytest.raises(DataError, match=r"3 bands \(red, green, blue\), but the image has 1 bands"):
        extract_feature_maps(backbone, image[:, :1], blocks=(2,))


def test_a_backbone_without_card_is_refused(image):
    bare = VisionTransformer(VitConfig(24, 1, 2, "mlp", 48))
    with pytest.raises(DataError, match="no card"):
        extract_feature_maps(bare, image, blocks=(0,))


def test_digest_changes_with_any_weight(backbone):
    before = weights_digest(backbone)
    assert before == weights_digest(backbone)
    with torch.no_grad():
        backbone.norm.bias[3] += 1e-6
        changed = weights_digest(backbone)
        backbone.norm.bias[3] -= 1e-6
    assert changed != before


def test_keys_differ_in_every_part(tmp_path):
    path = tmp_path / "image.tif"
    path.write_bytes(b"12345")
    norm = Normalization(bands=("red",), scale=(1.0,), offset=(0.0,), mean=(0.0,), std=(1.0,))
    same = dict(bands=(1,), normalization=norm, window=(0, 0, 8, 8), blocks=(1, 2), view=0, image_scale=1.0)
    keys = {feature_key("w", path, **same)}
    assert feature_key("w", path, **same) in keys
    for change in (dict(window=(0, 0, 8, 9)), dict(blocks=(2,)), dict(view=1), dict(image_scale=2.0)):
        keys.add(feature_key("w", path, **{**same, **change}))
    keys.add(feature_key("w", path, **{**same, "bands": (2,)}))
    keys.add(feature_key("w", path, **{**same, "normalization": replace(norm, mean=(0.5,))}))
    keys.add(feature_key("v", path, **same))
    path.write_bytes(b"123456")
    keys.add(feature_key("w", path, **same))
    os.utime(path, ns=(time.time_ns(), 5))
    keys.add(feature_key("w", path, **same))
    assert len(keys) == 10
    with pytest.raises(DataError, match="nowhere"):
        feature_key("w", tmp_path / "nowhere.tif", **same)


def test_cache_computes_once_and_leaves_no_temporary_files(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    maps = [torch.randn(4, 2, 3) for _ in range(12)]
    calls = []

    def compute():
        calls.append(1)
        return maps

    first = cache.get_or_compute("key", compute)
    second = cache.get_or_compute("key", compute)
    assert len(calls) == 1
    for one, two, full in zip(first, second, maps, strict=True):
        assert one.dtype == two.dtype == torch.float16
        assert torch.equal(one, two) and torch.equal(one, full.half())
    assert [p.name for p in cache.folder.iterdir()] == ["key.safetensors"]


def test_a_damaged_entry_is_computed_again(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put("key", [torch.ones(2, 2, 2)])
    path = tmp_path / "key.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    assert cache.get("key") is None
    (again,) = cache.get_or_compute("key", lambda: [torch.zeros(2, 2, 2)])
    assert torch.equal(again, torch.zeros(2, 2, 2, dtype=torch.float16))
    assert cache.get("key") is not None


def test_a_cache_without_folder_keeps_nothing():
    cache = FeatureCache(None)
    cache.put("key", [torch.ones(1, 1, 1)])
    assert cache.get("key") is None


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        FeatureCache(tmp_path / "file" / "cache").put("key", [torch.ones(1, 1, 1)])
