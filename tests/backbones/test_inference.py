"""The view for inference computes what the backbone computes."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.backbones import inference, precision
from dinov3geo.backbones.attention import attend
from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.convnext import ConvNextConfig
from dinov3geo.backbones.inference import PackedConvNext, PackedVit, can_pack, for_inference
from dinov3geo.backbones.precision import bfloat16_gain, choose_dtype
from dinov3geo.backbones.variants import VARIANTS, build_network
from dinov3geo.backbones.vit import VitConfig
from dinov3geo.backbones.zoo import load_backbone
from dinov3geo.errors import ConfigError

CPU = torch.device("cpu")
SHAPES = {
    "mlp": VitConfig(128, 3, 2, "mlp", 256),
    "swiglu": VitConfig(128, 3, 2, "swiglu", 192, num_registers=0),
    "without biases": VitConfig(256, 3, 2, "swiglu", 192, qkv_bias=False, local_cls_norm=True),
    "rounded, five bands": VitConfig(64, 3, 1, "mlp", 96, in_channels=5, rope_rounded_periods=True),
    "convnext": ConvNextConfig((1, 2, 1, 1), (16, 32, 48, 64), in_channels=4),
}


def randomised(shape: VitConfig | ConvNextConfig) -> Backbone:
    torch.manual_seed(0)
    network = build_network(shape).eval().requires_grad_(False)
    for name, tensor in network.named_parameters():
        matrix = tensor.ndim > 1 and "token" not in name
        tensor.normal_(std=tensor[0].numel() ** -0.5 if matrix else 0.3)
        if "norm" in name and name.endswith("weight"):
            tensor.add_(1)
    return network


def largest(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).abs().max()) if found.numel() else 0.0


@pytest.mark.parametrize("name", SHAPES)
def test_same_features(name: str) -> None:
    network = randomised(SHAPES[name])
    before = {n: t.clone() for n, t in network.state_dict().items()}
    view = for_inference(network)
    if can_pack(torch.float32):
        assert isinstance(view.inner, PackedVit | PackedConvNext)
    blocks = range(network.num_blocks)
    for size_hw in ((64, 96), (50, 70), (64, 96)):
        images = torch.randn(2, network.in_channels, *size_hw)
        found, expected = view(images), network(images)
        assert expected.patches.std() > 0.2 and found.grid_hw == expected.grid_hw
        for part in ("cls", "registers", "patches"):
            assert largest(getattr(found, part), getattr(expected, part)) < 1e-5
        for ours, theirs in zip(
            view.intermediate(images, blocks), network.intermediate(images, blocks), strict=True
        ):
            assert largest(ours.patches, theirs.patches) < 1e-5
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    assert view.block_dims == network.block_dims and view.patch_size == network.patch_size
    assert (view.embed_dim, view.in_channels) == (network.embed_dim, network.in_channels)


@pytest.mark.parametrize("name", ["mlp", "swiglu", "convnext"])
def test_bfloat16_stays_close_and_gives_the_images_dtype(name: str) -> None:
    network = randomised(SHAPES[name])
    images = torch.randn(2, network.in_channels, 64, 96)
    expected = network(images).patches
    found = for_inference(network, dtype=torch.bfloat16)(images).patches
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_machine_without_the_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "can_pack", lambda _: False)
    network = randomised(SHAPES["mlp"])
    images = torch.randn(1, 3, 32, 32)
    view = for_inference(network)
    assert view.inner is network
    with torch.no_grad():
        assert torch.equal(view(images).cls, network(images).cls)
    half = for_inference(network, dtype=torch.bfloat16)(images).cls
    assert half.dtype == torch.float32 and network.cls_token.dtype == torch.float32


def test_a_view_is_neither_moved_nor_saved() -> None:
    view = for_inference(load_backbone())
    assert view.card is not None and view.card.name == "vit-tiny-aerial"
    assert for_inference(view) is view
    with pytest.raises(TypeError, match="cannot be saved"):
        view.state_dict()
    with pytest.raises(TypeError, match="stays where it is"):
        view.to(torch.bfloat16)


def test_views_run_under_inference_mode_and_after_it() -> None:
    network = randomised(SHAPES["mlp"])
    view = for_inference(network)
    images = torch.randn(1, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(view(images).patches, view(images).patches)
    with torch.inference_mode():
        first = view(images).patches.clone()
    assert torch.equal(view(images).patches, first)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "convnext"])
def test_compiled_blocks_compute_the_same(name: str) -> None:
    network = randomised(SHAPES[name])
    view = for_inference(network, compiled=True)
    for size_hw in ((64, 96), (96, 64)):
        images = torch.randn(2, network.in_channels, *size_hw)
        assert largest(view(images).patches, network(images).patches) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["vit_small", "vit_base", "vit_huge_plus", "convnext_tiny"])
def test_real_shapes(variant: str) -> None:
    config = VARIANTS[variant]
    if isinstance(config, VitConfig):
        config = dataclasses.replace(
            config, num_blocks=min(config.num_blocks, 12 if "huge" not in variant else 3)
        )
    network = randomised(config)
    images = torch.randn(1, 3, 250, 330)
    assert largest(for_inference(network)(images).patches, network(images).patches) < 3e-5


@pytest.mark.parametrize(("batch", "heads", "length"), [(2, 3, 37), (1, 2, 2900), (3, 20, 600)])
def test_attention_in_bfloat16(batch: int, heads: int, length: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, batch, length, heads, 16).transpose(2, 3).unbind(0)
    expected = F.scaled_dot_product_attention(query, key, value)
    found = attend(query.bfloat16(), key.bfloat16(), value.bfloat16()).float()
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert torch.equal(attend(query, key, value), expected)


def test_precision_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = iter([3.0, 1.0, 1.1, 1.0])
    monkeypatch.setattr(precision, "_measure", lambda *_: next(seconds))
    assert bfloat16_gain(CPU) == 3.0
    assert bfloat16_gain(CPU) == 3.0
    assert choose_dtype("auto", CPU) == torch.float32  # the same map on every machine
    file = tmp_path / "dinov3geo" / "bfloat16.json"
    (key,) = json.loads(file.read_text())
    assert torch.__version__ in key
    file.write_text("{")
    assert bfloat16_gain(CPU) == 1.1
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match="auto, float32, bfloat16"):
        choose_dtype("half", CPU)


def test_the_gain_is_a_real_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert 0.01 < bfloat16_gain(CPU) < 100


def test_a_view_of_a_network_in_training_neither_draws_nor_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "can_pack", lambda _: False)  # as on a GPU
    network = randomised(SHAPES["mlp"]).train()
    view, images = for_inference(network).eval(), torch.randn(2, 3, 32, 32)
    assert network.training
    assert torch.equal(view(images).cls, view(images).cls)
    assert largest(view(images).cls, network.eval()(images).cls) < 1e-5


def test_the_backbone_may_go_on_training_beside_its_view() -> None:
    network = randomised(SHAPES["mlp"]).requires_grad_(True).train()
    view = for_inference(network)
    twin = copy.deepcopy(network)
    assert isinstance(twin, nn.Module)
    network(torch.randn(2, 3, 32, 32)).cls.sum().backward()
    assert not view(torch.randn(2, 3, 32, 32)).cls.requires_grad
