"""Every architecture against transformers and timm with their own random weights."""

import copy
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.convert import from_ours, to_ours
from dinov3geo.backbones.convnext import ConvNext, ConvNextConfig
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.backbones.zoo import VARIANTS, build_backbone, build_network, build_vit, variant_of
from dinov3geo.errors import ConfigError, DataError, UnknownNameError

SIZES = [(224, 224), (96, 160), (90, 150)]
REAL_SIZES = [(224, 224), (512, 384), (250, 330)]
RELEASED = ["vit_small", "vit_small_plus", "vit_base", "vit_large", "vit_huge_plus"]
CONVNEXTS = [name for name in VARIANTS if name.startswith("convnext")]
BLOCKS = 2


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def randomise(module: nn.Module) -> None:
    """Weights whose outputs are of the order of 1, so that no branch hides behind another."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.named_parameters():
        fan = tensor[0].numel() if tensor.ndim > 1 and "token" not in name else 1
        scale = 0.3 if tensor.ndim == 1 or "token" in name else fan**-0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
        if "norm" in name and name.endswith("weight"):
            tensor.add_(1)


def padded(images: Tensor, multiple: int) -> Tensor:
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.2
    assert float((found - expected).abs().max()) < 1e-5


def transformers_vit(config: VitConfig) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = transformers.DINOv3ViTConfig(
        hidden_size=config.embed_dim,
        intermediate_size=config.ffn_hidden,
        num_hidden_layers=config.num_blocks,
        num_attention_heads=config.num_heads,
        use_gated_mlp=config.ffn == "swiglu",
        hidden_act="silu" if config.ffn == "swiglu" else "gelu",
        num_register_tokens=config.num_registers,
        query_bias=config.qkv_bias,
        value_bias=config.qkv_bias,
    )
    oracle = transformers.DINOv3ViTModel(shape).eval()
    randomise(oracle)
    return oracle


def convert_and_load(oracle: nn.Module) -> Backbone:
    checkpoint = to_ours(oracle.state_dict())
    backbone = build_network(checkpoint.config)
    backbone.load_state_dict(checkpoint.tensors)
    return backbone.eval()


def few_blocks(variant: str, blocks: int = BLOCKS) -> VitConfig:
    config = VARIANTS[variant]
    assert isinstance(config, VitConfig)
    return dataclasses.replace(config, num_blocks=blocks)


def check_transformers(config: VitConfig, sizes: list[tuple[int, int]]) -> None:
    oracle = transformers_vit(config)
    backbone = convert_and_load(oracle)
    assert backbone.config.num_heads == config.num_heads
    for size_hw in sizes:
        images = torch.randn(1, 3, *size_hw)
        expected = oracle(padded(images, 16)).last_hidden_state
        features = backbone(images)
        close(features.cls, expected[:, 0])
        close(features.registers, expected[:, 1:5])
        close(features.patches, expected[:, 5:])


@pytest.mark.parametrize("variant", RELEASED)
def test_equals_transformers(variant: str) -> None:
    check_transformers(
        few_blocks(variant), SIZES if "large" not in variant and "huge" not in variant else SIZES[1:]
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*RELEASED, "vit_7b"])
def test_equals_transformers_at_real_sizes(variant: str) -> None:
    check_transformers(few_blocks(variant, 1 if variant == "vit_7b" else BLOCKS), REAL_SIZES)


def check_timm(name: str, blocks: int, sizes: list[tuple[int, int]]) -> None:
    timm = pytest.importorskip("timm")
    oracle = timm.create_model(f"vit_{name}_patch16_dinov3_qkvb", depth=blocks, dynamic_img_size=True).eval()
    randomise(oracle)
    backbone = convert_and_load(oracle)
    for size_hw in sizes:
        images = torch.randn(1, 3, *size_hw)
        expected = oracle.forward_features(padded(images, 16))
        features = backbone(images)
        close(features.cls, expected[:, 0])
        close(features.registers, expected[:, 1:5])
        close(features.patches, expected[:, 5:])


TIMM_VITS = ["small", "small_plus", "base", "large", "huge_plus"]


@pytest.mark.parametrize("name", TIMM_VITS)
def test_equals_timm(name: str) -> None:
    check_timm(name, BLOCKS, SIZES[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_VITS)
def test_equals_timm_at_real_sizes(name: str) -> None:
    check_timm(name, BLOCKS, REAL_SIZES)


def test_timm_without_biases_gets_zeros() -> None:
    timm = pytest.importorskip("timm")
    oracle = timm.create_model("vit_small_patch16_dinov3", depth=BLOCKS, dynamic_img_size=True).eval()
    randomise(oracle)
    images = torch.randn(1, 3, 96, 160)
    backbone = convert_and_load(oracle)
    close(backbone(images).patches, oracle.forward_features(images)[:, 5:])
    assert not backbone.blocks[0].attention.query_bias.any()


def test_intermediate_equals_the_backbone_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.DINOv3ViTBackbone(
        transformers.DINOv3ViTConfig(
            num_hidden_layers=4, num_register_tokens=4, out_indices=[1, 3, 4], return_class_token=True
        )
    ).eval()
    randomise(oracle)
    backbone = convert_and_load(oracle)
    images = torch.randn(1, 3, 64, 96)
    expected = oracle(images)
    found = backbone.intermediate(images, [0, 2, 3])
    for features, feature_map in zip(found, expected.feature_maps, strict=True):
        close(features.map(), feature_map)


def transformers_convnext(config: ConvNextConfig) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.DINOv3ConvNextModel(
        transformers.DINOv3ConvNextConfig(depths=list(config.depths), hidden_sizes=list(config.dims))
    ).eval()
    randomise(oracle)
    return oracle


def timm_convnext(config: ConvNextConfig) -> nn.Module:
    timm = pytest.importorskip("timm")
    oracle = timm.models.convnext.ConvNeXt(depths=config.depths, dims=config.dims, num_classes=0).eval()
    randomise(oracle)
    return oracle


def shallow(variant: str) -> ConvNextConfig:
    config = VARIANTS[variant]
    assert isinstance(config, ConvNextConfig)
    return dataclasses.replace(config, depths=(2, 1, 2, 1))


@pytest.mark.parametrize("variant", CONVNEXTS)
def test_convnext_equals_transformers(variant: str) -> None:
    oracle = transformers_convnext(shallow(variant))
    backbone = convert_and_load(oracle)
    assert backbone.config.dims == VARIANTS[variant].dims
    for size_hw in SIZES[1:]:
        images = torch.randn(2, 3, *size_hw)
        expected = oracle(padded(images, 32), output_hidden_states=True)
        features = backbone(images)
        close(features.cls, expected.last_hidden_state[:, 0])
        close(features.patches, expected.last_hidden_state[:, 1:])
        assert features.registers.shape == (2, 0, backbone.embed_dim)
        assert features.grid_hw == (-(-size_hw[0] // 32), -(-size_hw[1] // 32))
        stages = backbone.intermediate(images, [0, 1, 2, 3])
        for stage, raw in zip(stages[:3], expected.hidden_states[-4:], strict=False):
            assert float((stage.map() - raw).abs().max() / raw.abs().max()) < 1e-5
        assert [s.patches.shape[2] for s in stages] == list(backbone.block_dims)
        assert torch.equal(stages[3].patches, features.patches)


@pytest.mark.parametrize("variant", CONVNEXTS)
def test_convnext_equals_timm(variant: str) -> None:
    oracle = timm_convnext(shallow(variant))
    backbone = convert_and_load(oracle)
    images = torch.randn(1, 3, 96, 150)
    close(backbone(images).cls, oracle(padded(images, 32)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONVNEXTS)
def test_convnexts_equal_both_at_real_sizes(variant: str) -> None:
    oracle, other = transformers_convnext(shallow(variant)), timm_convnext(shallow(variant))
    backbone, same = convert_and_load(oracle), convert_and_load(other)
    for size_hw in REAL_SIZES:
        images = torch.randn(1, 3, *size_hw)
        expected = oracle(padded(images, 32)).last_hidden_state
        close(backbone(images).cls, expected[:, 0])
        close(backbone(images).patches, expected[:, 1:])
        close(same(images).cls, other(padded(images, 32)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONVNEXTS)
def test_whole_convnext_equals_transformers(variant: str) -> None:
    config = VARIANTS[variant]
    assert isinstance(config, ConvNextConfig)
    oracle = transformers_convnext(config)
    images = torch.randn(1, 3, 224, 224)
    close(convert_and_load(oracle)(images).patches, oracle(images).last_hidden_state[:, 1:])


def test_convnext_stochastic_depth_runs() -> None:
    config = dataclasses.replace(shallow("convnext_tiny"), drop_path=0.5)
    with torch.enable_grad():
        network = ConvNext(config).train()
        network(torch.randn(4, 3, 64, 64)).cls.sum().backward()
    assert network.stem.conv.weight.grad is not None


@pytest.mark.parametrize(
    ("variant", "millions"),
    [("vit_small_plus", 29), ("vit_huge_plus", 840), ("vit_7b", 6716), ("convnext_large", 198)],
)
def test_sizes_are_the_published_ones(variant: str, millions: int) -> None:
    with torch.device("meta"):
        backbone = build_backbone(variant)
    count = sum(p.numel() for n, p in backbone.named_parameters() if not n.startswith("local_norm")) / 1e6
    # The published ConvNeXt sizes count a classifier of 1000 classes.
    count += 1.001 * backbone.embed_dim / 1e3 if variant.startswith("convnext") else 0
    assert count == pytest.approx(millions, rel=0.015 if millions < 100 else 2e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_recognised_by_its_shape(variant: str) -> None:
    with torch.device("meta"):
        tensors = build_backbone(variant, in_channels=4).state_dict()
    config = to_ours(tensors).config
    assert variant_of(config) == variant
    assert dataclasses.replace(config, in_channels=3) == VARIANTS[variant]


def official(config: VitConfig | ConvNextConfig) -> tuple[dict[str, Tensor], Backbone]:
    backbone = build_network(config).eval()
    randomise(backbone)
    return from_ours(backbone.state_dict(), config, "official"), backbone


@pytest.mark.parametrize(
    "config",
    [
        few_blocks("vit_small"),
        few_blocks("vit_small_plus"),
        dataclasses.replace(few_blocks("vit_tiny"), num_registers=0, in_channels=5, patch_size=8),
        shallow("convnext_tiny"),
    ],
    ids=["mlp", "swiglu", "five bands", "convnext"],
)
def test_round_trip_is_bit_identical(config: VitConfig | ConvNextConfig) -> None:
    start, _ = official(config)
    tensors, dialects = start, ["hf", "timm", "ours", "official"]
    for dialect in dialects:
        checkpoint = to_ours(tensors)
        assert checkpoint.config.in_channels == config.in_channels
        tensors = from_ours(checkpoint.tensors, checkpoint.config, dialect)
    assert tensors.keys() == start.keys()
    for name, tensor in start.items():
        if name == "mask_token":  # timm keeps none
            assert not tensors[name].any()
        else:
            assert torch.equal(tensors[name], tensor), name


def test_round_trip_without_timm_keeps_everything_else() -> None:
    config = dataclasses.replace(few_blocks("vit_small"), local_cls_norm=True, rope_rounded_periods=True)
    start, _ = official(config)
    through_ours = to_ours(start)
    assert through_ours.config == config
    back = from_ours(through_ours.tensors, through_ours.config, "official")
    assert all(torch.equal(back[name], tensor) for name, tensor in start.items())
    kept = to_ours(from_ours(through_ours.tensors, config, "hf"))
    assert kept.tensors.keys() == through_ours.tensors.keys() - {"local_norm.weight", "local_norm.bias"}
    assert all(torch.equal(through_ours.tensors[n], t) for n, t in kept.tensors.items())


def test_the_largest_has_a_complete_key_map() -> None:
    config = VARIANTS["vit_7b"]
    assert isinstance(config, VitConfig)
    with torch.device("meta"):
        expected = build_network(config).state_dict()
    for dialect in ("official", "hf", "timm"):
        checkpoint = to_ours(from_ours(expected, config, dialect))
        lost = expected.keys() - checkpoint.tensors.keys()
        assert lost == (set() if dialect == "official" else {"local_norm.weight", "local_norm.bias"})
        assert variant_of(checkpoint.config) == "vit_7b"
        assert all(checkpoint.tensors[n].shape == expected[n].shape for n in checkpoint.tensors)


def test_names_of_transformers_4_and_5() -> None:
    oracle = transformers_vit(few_blocks("vit_small"))
    new = oracle.state_dict()
    old = {name.removeprefix("model."): tensor for name, tensor in new.items()}
    assert old.keys() != new.keys()
    assert all(torch.equal(t, to_ours(new).tensors[n]) for n, t in to_ours(old).tensors.items())


def changed(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    tensors, _ = official(few_blocks("vit_tiny"))
    change(tensors)
    return tensors


def test_official_biases_are_masked() -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.attn.qkv.bias"][192:384] = float("nan")
        tensors["blocks.1.attn.qkv.bias_mask"].fill_(float("nan"))
        tensors["blocks.1.attn.qkv.bias"][192:384] = 7.0

    clean = to_ours(changed(lambda _: None)).tensors
    dirty = to_ours(changed(poison)).tensors
    assert all(torch.equal(dirty[name], tensor) for name, tensor in clean.items())
    zero = to_ours(changed(lambda t: t["blocks.0.attn.qkv.bias_mask"].zero_())).tensors
    assert not zero["blocks.0.attention.query_bias"].any()


def test_rounded_periods_are_seen() -> None:
    def rounded(tensors: dict[str, Tensor]) -> None:
        tensors["rope_embed.periods"] = tensors["rope_embed.periods"].bfloat16()

    config = to_ours(changed(rounded)).config
    assert isinstance(config, VitConfig) and config.rope_rounded_periods
    assert not to_ours(changed(lambda _: None)).config.rope_rounded_periods  # type: ignore[union-attr]


def test_teacher_of_a_training_checkpoint() -> None:
    bare = changed(lambda _: None)
    wrapped = {f"backbone.{name}": tensor for name, tensor in bare.items()}
    wrapped |= {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight": torch.zeros(2, 2)}
    checkpoint = to_ours(wrapped)
    assert checkpoint.dropped == ("dino_head.mlp.0.weight", "ibot_head.last_layer.weight")
    assert checkpoint.tensors.keys() == to_ours(bare).tensors.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"pos_embed": torch.zeros(1)}), "pos_embed"),
        (lambda t: t.pop("patch_embed.proj.weight"), "not complete"),
        (lambda t: t.update({"rope_embed.periods": torch.ones(16)}), "base 100"),
        (lambda t: t["blocks.0.attn.qkv.bias"].fill_(1) * t.pop("blocks.0.attn.qkv.bias_mask"), "key"),
    ],
)
def test_what_cannot_be_converted(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_ours(changed(change))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", torch.ones(192), "with the prefix 'model.' and without it"),
        ("layer.1.attention.k_proj.weight", torch.ones(192, 7), r"several shapes: k \[192, 7\], q"),
        ("embeddings.register_tokens", torch.ones(192), "no usable name or shape"),
    ],
)
def test_tensors_of_hugging_face_that_do_not_fit_together(name: str, tensor: Tensor, message: str) -> None:
    config = few_blocks("vit_tiny")
    tensors = from_ours(build_network(config).state_dict(), config, "hf")
    assert to_ours(tensors).config == config
    with pytest.raises(DataError, match=message):
        to_ours(tensors | {name: tensor})


def test_a_backbone_that_is_there_twice() -> None:
    bare = changed(lambda _: None)
    with pytest.raises(DataError, match="with the prefix 'backbone.' and without it"):
        to_ours(bare | {"backbone.norm.weight": torch.ones(192)})


def test_another_model_is_refused() -> None:
    with pytest.raises(DataError, match="no DINOv3"):
        to_ours({"layer1.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)})
    with pytest.raises(DataError, match="duplicate"):
        tensors, _ = official(shallow("convnext_tiny"))
        to_ours(tensors | {"norms.3.weight": torch.zeros(768)})


def test_variants_say_what_they_cannot_be() -> None:
    with pytest.raises(ConfigError, match="stride 32"):
        build_backbone("convnext_tiny", patch_size=16)
    with pytest.raises(UnknownNameError, match="vit_tiny"):
        build_vit("convnext_tiny")
    with pytest.raises(DataError, match="no variant"):
        variant_of(few_blocks("vit_small"))
    assert isinstance(build_vit("vit_tiny"), VisionTransformer)
    copied = copy.deepcopy(build_backbone("vit_tiny"))
    assert copied.block_dims == (192,) * 12


def test_coordinates_move_in_training_only() -> None:
    for name, value in (("rope_shift", 0.5), ("rope_jitter", 1.5)):
        config = dataclasses.replace(
            few_blocks("vit_tiny"), rope_rescale=None, layer_scale=0.5, **{name: value}
        )
        network = build_network(config)
        image = torch.randn(1, 3, 64, 64)
        assert not torch.equal(network.train()(image).cls, network(image).cls)
        assert torch.equal(network.eval()(image).cls, network(image).cls)


@pytest.mark.parametrize("variant", ["vit_small", "vit_small_plus"])
def test_the_path_without_gradients_computes_the_same(variant: str) -> None:
    network = build_network(few_blocks(variant)).eval()
    randomise(network)
    image = torch.randn(2, 3, 48, 80)
    with torch.enable_grad():
        expected = network(image).patches.detach()
    close(network(image).patches, expected)
    half = copy.deepcopy(network).bfloat16()(image.bfloat16()).patches.float()
    assert float((half - expected).norm() / expected.norm()) < 0.05
