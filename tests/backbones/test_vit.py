"""What the vision transformer promises; `test_family` compares it with transformers and timm."""

import math
from pathlib import Path

import pytest
import torch

from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.rope import RotaryEmbedding, rotate
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.backbones.zoo import build_backbone, load_backbone, save_backbone
from dinov3geo.errors import ConfigError, DataError, UnknownNameError

RGB = Normalization(("red", "green", "blue"), (1 / 255,) * 3, (0.0,) * 3, (0.4, 0.4, 0.3), (0.2,) * 3)


def tiny(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", layer_scale=0.5, **changes)  # type: ignore[arg-type]
    del backbone.blocks[3:]
    return backbone


@pytest.mark.parametrize(
    ("variant", "millions"),
    [
        ("vit_tiny", 5.5),
        ("vit_small", 21.6),
        ("vit_small_plus", 28.7),
        ("vit_base", 85.7),
        ("vit_large", 303.1),
    ],
)
def test_parameter_counts(variant: str, millions: float) -> None:
    with torch.device("meta"):
        backbone = build_backbone(variant)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_rope_follows_the_formula() -> None:
    cos, _ = RotaryEmbedding(64).tables((2, 3), num_prefix=1, training=False, like=torch.zeros(1))
    assert torch.equal(cos[0], torch.ones(64))
    row, col, period_index = 1, 2, 5
    angle_y = 2 * math.pi * ((row + 0.5) / 2 * 2 - 1) / 100 ** (4 * period_index / 64)
    angle_x = 2 * math.pi * ((col + 0.5) / 3 * 2 - 1) / 100 ** (4 * period_index / 64)
    token = 1 + row * 3 + col
    assert float(cos[token, period_index]) == pytest.approx(math.cos(angle_y), abs=1e-5)
    assert float(cos[token, 16 + period_index]) == pytest.approx(math.cos(angle_x), abs=1e-5)
    assert float(cos[token, 32 + period_index]) == pytest.approx(math.cos(angle_y), abs=1e-5)


def test_rotation_keeps_lengths_and_leaves_the_prefix_alone() -> None:
    x = torch.randn(2, 3, 5 + 12, 64)
    cos, sin = RotaryEmbedding(64).tables((3, 4), num_prefix=5, training=False, like=x)
    rotated = rotate(x, cos, sin)
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), atol=1e-4)
    assert torch.equal(rotated[:, :, :5], x[:, :, :5])


def test_rope_draws_in_training_only() -> None:
    rope = RotaryEmbedding(64)
    like = torch.zeros(1)
    still = [rope.tables((4, 4), num_prefix=0, training=False, like=like)[0] for _ in range(2)]
    moving = [rope.tables((4, 4), num_prefix=0, training=True, like=like)[0] for _ in range(2)]
    assert still[0] is still[1]
    assert not torch.equal(*moving)


def test_odd_sizes_are_padded_never_cut() -> None:
    backbone = tiny().eval()
    features = backbone(torch.randn(1, 3, 33, 50))
    assert features.grid_hw == (3, 4)
    assert features.map().shape == (1, 192, 3, 4)


def test_padding_repeats_the_edge() -> None:
    backbone = tiny().eval()
    image = torch.randn(1, 3, 32, 40)
    padded = torch.cat([image, image[..., -1:].expand(-1, -1, -1, 8)], dim=3)
    assert torch.equal(backbone(image).patches, backbone(padded).patches)


def test_masked_patches_are_not_seen() -> None:
    backbone = tiny().eval()
    image, mask = torch.randn(1, 3, 32, 32), torch.tensor([[False, True, False, False]])
    changed = image.clone()
    changed[:, :, :16, 16:] = 9.0
    assert torch.equal(backbone(image, mask).cls, backbone(changed, mask).cls)
    assert not torch.equal(backbone(image).cls, backbone(changed).cls)


def test_intermediate_ends_with_the_output() -> None:
    backbone = tiny().eval()
    image = torch.randn(1, 3, 32, 32)
    blocks = backbone.intermediate(image, [0, 2])
    assert torch.equal(blocks[1].patches, backbone(image).patches)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        backbone.intermediate(image, [1, 3])


def test_drop_path_keeps_the_expectation() -> None:
    block = tiny(drop_path=0.5).blocks[0]
    torch.nn.init.zeros_(block.scale2)
    tokens = torch.randn(8, 6, 192)
    cos, sin = torch.ones(6, 64), torch.zeros(6, 64)
    with torch.no_grad():
        whole = block.eval()(tokens, cos, sin)
        block.train()
        dropped = torch.stack([block(tokens, cos, sin) for _ in range(2000)])
    branch = (whole - tokens).norm()
    assert float((dropped.mean(0) - whole).norm() / branch) < 0.1
    assert float((dropped[0] - whole).norm() / branch) > 0.5


def test_bfloat16_training_attention_equals_the_fused_kernel() -> None:
    backbone = tiny().train()
    backbone.rope.rescale = None
    image = torch.randn(2, 3, 48, 48)
    exact = backbone(image).patches
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = backbone(image).patches
    assert float((rounded - exact).norm() / exact.norm()) < 0.02


def test_dropped_paths_work_in_bfloat16() -> None:
    backbone = tiny(drop_path=0.5).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone(torch.randn(4, 3, 32, 32))
    features.cls.float().square().mean().backward()
    assert features.patches.dtype == torch.float32
    assert backbone.patch_embed.weight.grad is not None


def test_wrong_bands_say_so() -> None:
    with pytest.raises(ValueError, match="3 input bands"):
        tiny()(torch.zeros(1, 4, 32, 32))


def card(variant: str = "vit_tiny") -> BackboneCard:
    return BackboneCard(
        "test", variant, 16, RGB, gsd_m=(0.1, 0.2), trained_on=("nothing",), scores={"knn": 0.5}
    )


def test_saved_weights_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny").eval()
    save_backbone(tmp_path / "w.safetensors", backbone, card())
    loaded = load_backbone(tmp_path / "w.safetensors")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image).cls, backbone(image).cls)
    assert loaded.card == card()
    assert not list(tmp_path.glob("*.tmp"))


def test_loading_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    backbone = build_backbone("vit_tiny")
    with pytest.raises(UnknownNameError, match="valid names: .*vit-tiny-aerial"):
        load_backbone("vit-tiny-arial")
    with pytest.raises(DataError, match=r"backbone\.safetensors"):
        load_backbone(tmp_path)
    save_backbone(path, backbone, card("vit_small"))
    with pytest.raises(DataError, match="another shape"):
        load_backbone(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ConfigError, match="card"):
        load_backbone(path)
    path.with_suffix(".json").write_text(card().to_json())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="cut short"):
        load_backbone(path)


def test_normalization_hides_pixels_without_data() -> None:
    numbers = torch.tensor([255, 0], dtype=torch.uint8).expand(1, 3, 1, 2)
    valid = torch.tensor([[[True, False]]])
    normalized = RGB(numbers, valid)
    assert torch.allclose(normalized[0, :, 0, 0], torch.tensor([3.0, 3.0, 3.5]))
    assert torch.equal(normalized[0, :, 0, 1], torch.zeros(3))
