"""The architectures by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.convnext import ConvNext, ConvNextConfig
from dinov3geo.backbones.filter_bank import FilterBank, FilterBankConfig, FilterStem
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.errors import ConfigError, DataError, UnknownNameError

Config = VitConfig | ConvNextConfig | FilterBankConfig

# Source: DINOv3 paper, table of the model family; tiny (the shape that timm calls ViT-Ti) and micro (studies
# of the recipe on one CPU core) are ours. There are no released weights of so400m, huge2 and giant2.
VARIANTS: dict[str, VitConfig | ConvNextConfig] = {
    "vit_micro": VitConfig(96, 4, 3, "mlp", 384),
    "vit_mini": VitConfig(192, 4, 3, "mlp", 768),
    "vit_tiny": VitConfig(192, 12, 3, "mlp", 768),
    "vit_small": VitConfig(384, 12, 6, "mlp", 1536),
    "vit_small_plus": VitConfig(384, 12, 6, "swiglu", 1536),
    "vit_base": VitConfig(768, 12, 12, "mlp", 3072),
    "vit_large": VitConfig(1024, 24, 16, "mlp", 4096),
    "vit_large_plus": VitConfig(1024, 24, 16, "swiglu", 4096),
    "vit_so400m": VitConfig(1152, 27, 18, "mlp", 4352),
    "vit_huge2": VitConfig(1280, 32, 20, "mlp", 5120),
    "vit_huge_plus": VitConfig(1280, 32, 20, "swiglu", 5120),
    "vit_giant2": VitConfig(1536, 40, 24, "mlp", 6144),
    "vit_7b": VitConfig(4096, 40, 32, "swiglu", 8192, qkv_bias=False, local_cls_norm=True),
    "convnext_tiny": ConvNextConfig((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ConvNextConfig((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ConvNextConfig((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ConvNextConfig((3, 3, 27, 3), (192, 384, 768, 1536)),
}

# Shapes whose weights are computed, not trained.
FITTED: dict[str, FilterBankConfig] = {"filter_bank": FilterBankConfig()}


def build_backbone(
    variant: str,
    *,
    in_channels: int = 3,
    patch_size: int | None = None,
    drop_path: float = 0.0,
    num_registers: int | None = None,
    layer_scale: float | None = None,
    filters: FilterBank | None = None,
) -> Backbone:
    """An untrained network of a named shape.

    Args:
        variant: a name in `VARIANTS`.
        in_channels: bands.
        patch_size: pixels; None for the variant's own. A ConvNeXt has a fixed stride.
        drop_path: stochastic depth in training.
        num_registers: register tokens; None for the variant's own. A ConvNeXt has none.
        layer_scale: initial factor of every residual branch; None for the variant's own.
        filters: bank that becomes the patch embedding of a vision transformer, see `FilterStem`.

    Raises:
        UnknownNameError: no such variant.
        ConfigError: another stride, registers or filters for a ConvNeXt; filters of another patch or bands.
    """
    if variant not in VARIANTS:
        raise UnknownNameError("backbone variant", variant, VARIANTS)
    config = VARIANTS[variant]
    changes: dict[str, Any] = {"in_channels": in_channels, "drop_path": drop_path}
    if layer_scale is not None:
        changes["layer_scale"] = layer_scale
    if isinstance(config, VitConfig):
        chosen = {"patch_size": patch_size, "num_registers": num_registers}
        changes |= {name: value for name, value in chosen.items() if value is not None}
        if filters is not None:
            changes["stem_kernels"] = filters.config.kernels
    elif patch_size not in (None, config.stride) or num_registers or filters is not None:
        raise ConfigError(
            f"{variant} has stride {config.stride}, no registers and no filters; leave them out"
        )
    backbone = build_network(dataclasses.replace(config, **changes))
    if filters is not None:
        _take_filters(backbone, filters)
    return backbone


def _take_filters(backbone: Backbone, filters: FilterBank) -> None:
    theirs = f"patch {filters.patch_size} and {filters.in_channels} bands"
    if (backbone.patch_size, backbone.in_channels) != (filters.patch_size, filters.in_channels):
        raise ConfigError(
            f"the filters have {theirs}, the network has patch {backbone.patch_size} and "
            f"{backbone.in_channels} bands; both must be the same"
        )
    assert isinstance(backbone, VisionTransformer) and isinstance(backbone.patch_embed, FilterStem)
    backbone.patch_embed.copy_from(filters)


def build_vit(
    variant: str,
    *,
    in_channels: int = 3,
    patch_size: int = 16,
    drop_path: float = 0.0,
    num_registers: int = 4,
    layer_scale: float = 1e-5,
) -> VisionTransformer:
    """An untrained vision transformer, which masked training needs; arguments as in `build_backbone`.

    Raises:
        UnknownNameError: no such variant, or one of another family.
    """
    transformers = [name for name, config in VARIANTS.items() if isinstance(config, VitConfig)]
    if variant not in transformers:
        raise UnknownNameError("vision transformer", variant, transformers)
    backbone = build_backbone(
        variant,
        in_channels=in_channels,
        patch_size=patch_size,
        drop_path=drop_path,
        num_registers=num_registers,
        layer_scale=layer_scale,
    )
    assert isinstance(backbone, VisionTransformer)
    return backbone


def build_network(config: Config) -> Backbone:
    """An untrained network of any shape."""
    if isinstance(config, FilterBankConfig):
        return FilterBank(config)
    return VisionTransformer(config) if isinstance(config, VitConfig) else ConvNext(config)


def variant_of(config: Config) -> str:
    """The variant of a shape, whatever its bands, patch size, registers and optional parts.

    Raises:
        DataError: none has this shape.
    """
    if isinstance(config, FilterBankConfig):
        return next(iter(FITTED))
    shape = _shape(config)
    for name, other in VARIANTS.items():
        if _shape(other) == shape:
            return name
    raise DataError(f"no variant has this shape: {shape}; known are {', '.join(VARIANTS)}")


def _shape(config: VitConfig | ConvNextConfig) -> str:
    if isinstance(config, VitConfig):
        return f"width {config.embed_dim}, {config.num_blocks} blocks, {config.ffn} of {config.ffn_hidden}"
    return f"depths {config.depths}, widths {config.dims}"
