"""Names of the same tensors in every dialect of checkpoints.

A pair holds our name and theirs. `{i}` and `{j}` stand for numbers, `{x}` for `weight` or `bias`. What
differs in more than its name is converted in `convert`.

Source: key tables of the DINOv3 release and of its ports in transformers and timm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Pair = tuple[str, str]

_NORMS: tuple[Pair, ...] = (
    ("norm.{x}", "norm.{x}"),
    ("blocks.{i}.norm{j}.{x}", "blocks.{i}.norm{j}.{x}"),
)

_OFFICIAL_VIT: tuple[Pair, ...] = (
    *_NORMS,
    ("cls_token", "cls_token"),
    ("register_tokens", "storage_tokens"),
    ("patch_embed.{x}", "patch_embed.proj.{x}"),
    ("local_norm.{x}", "local_cls_norm.{x}"),
    ("blocks.{i}.attention.qkv.weight", "blocks.{i}.attn.qkv.weight"),
    ("blocks.{i}.attention.proj.{x}", "blocks.{i}.attn.proj.{x}"),
    ("blocks.{i}.scale{j}", "blocks.{i}.ls{j}.gamma"),
)
_TIMM_VIT: tuple[Pair, ...] = (
    *_NORMS,
    ("cls_token", "cls_token"),
    ("register_tokens", "reg_token"),
    ("patch_embed.{x}", "patch_embed.proj.{x}"),
    ("blocks.{i}.attention.qkv.weight", "blocks.{i}.attn.qkv.weight"),
    ("blocks.{i}.attention.query_bias", "blocks.{i}.attn.q_bias"),
    ("blocks.{i}.attention.value_bias", "blocks.{i}.attn.v_bias"),
    ("blocks.{i}.attention.proj.{x}", "blocks.{i}.attn.proj.{x}"),
    ("blocks.{i}.scale{j}", "blocks.{i}.gamma_{j}"),
)
_HF_VIT: tuple[Pair, ...] = (
    ("norm.{x}", "norm.{x}"),
    ("blocks.{i}.norm{j}.{x}", "layer.{i}.norm{j}.{x}"),
    ("cls_token", "embeddings.cls_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("patch_embed.{x}", "embeddings.patch_embeddings.{x}"),
    ("blocks.{i}.attention.query_bias", "layer.{i}.attention.q_proj.bias"),
    ("blocks.{i}.attention.value_bias", "layer.{i}.attention.v_proj.bias"),
    ("blocks.{i}.attention.proj.{x}", "layer.{i}.attention.o_proj.{x}"),
    ("blocks.{i}.scale{j}", "layer.{i}.layer_scale{j}.lambda1"),
)
# (gate, up, down) of the gated feed-forward, (up, down) of the plain one.
_FEED_FORWARD: dict[str, tuple[str, tuple[str, str, str], tuple[str, str]]] = {
    "official": ("blocks.{i}.mlp.", ("w1", "w2", "w3"), ("fc1", "fc2")),
    "timm": ("blocks.{i}.mlp.", ("fc1_g", "fc1_x", "fc2"), ("fc1", "fc2")),
    "hf": ("layer.{i}.mlp.", ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")),
}

_OFFICIAL_CONVNEXT: tuple[Pair, ...] = (
    ("stem.conv.{x}", "downsample_layers.0.0.{x}"),
    ("stem.norm.{x}", "downsample_layers.0.1.{x}"),
    ("downsamples.{i-1}.norm.{x}", "downsample_layers.{i}.0.{x}"),
    ("downsamples.{i-1}.conv.{x}", "downsample_layers.{i}.1.{x}"),
    ("stages.{i}.{j}.depthwise.{x}", "stages.{i}.{j}.dwconv.{x}"),
    ("stages.{i}.{j}.norm.{x}", "stages.{i}.{j}.norm.{x}"),
    ("stages.{i}.{j}.expand.{x}", "stages.{i}.{j}.pwconv1.{x}"),
    ("stages.{i}.{j}.project.{x}", "stages.{i}.{j}.pwconv2.{x}"),
    ("stages.{i}.{j}.scale", "stages.{i}.{j}.gamma"),
    ("norm.{x}", "norm.{x}"),
)
_HF_CONVNEXT: tuple[Pair, ...] = (
    ("stem.conv.{x}", "stages.0.downsample_layers.0.{x}"),
    ("stem.norm.{x}", "stages.0.downsample_layers.1.{x}"),
    ("downsamples.{i-1}.norm.{x}", "stages.{i}.downsample_layers.0.{x}"),
    ("downsamples.{i-1}.conv.{x}", "stages.{i}.downsample_layers.1.{x}"),
    ("stages.{i}.{j}.depthwise.{x}", "stages.{i}.layers.{j}.depthwise_conv.{x}"),
    ("stages.{i}.{j}.norm.{x}", "stages.{i}.layers.{j}.layer_norm.{x}"),
    ("stages.{i}.{j}.expand.{x}", "stages.{i}.layers.{j}.pointwise_conv1.{x}"),
    ("stages.{i}.{j}.project.{x}", "stages.{i}.layers.{j}.pointwise_conv2.{x}"),
    ("stages.{i}.{j}.scale", "stages.{i}.layers.{j}.gamma"),
    ("norm.{x}", "layer_norm.{x}"),
)
_TIMM_CONVNEXT: tuple[Pair, ...] = (
    ("stem.conv.{x}", "stem.0.{x}"),
    ("stem.norm.{x}", "stem.1.{x}"),
    ("downsamples.{i-1}.norm.{x}", "stages.{i}.downsample.0.{x}"),
    ("downsamples.{i-1}.conv.{x}", "stages.{i}.downsample.1.{x}"),
    ("stages.{i}.{j}.depthwise.{x}", "stages.{i}.blocks.{j}.conv_dw.{x}"),
    ("stages.{i}.{j}.norm.{x}", "stages.{i}.blocks.{j}.norm.{x}"),
    ("stages.{i}.{j}.expand.{x}", "stages.{i}.blocks.{j}.mlp.fc1.{x}"),
    ("stages.{i}.{j}.project.{x}", "stages.{i}.blocks.{j}.mlp.fc2.{x}"),
    ("stages.{i}.{j}.scale", "stages.{i}.blocks.{j}.gamma"),
    ("norm.{x}", "head.norm.{x}"),
)

_VIT = {"official": _OFFICIAL_VIT, "hf": _HF_VIT, "timm": _TIMM_VIT}
_CONVNEXT = {"official": _OFFICIAL_CONVNEXT, "hf": _HF_CONVNEXT, "timm": _TIMM_CONVNEXT}
_PLACES = {"i": r"(?P<i>\d+)", "i-1": r"(?P<h>\d+)", "j": r"(?P<j>\d+)", "x": r"(?P<x>weight|bias)"}


def vit_pairs(dialect: str, *, gated: bool) -> tuple[Pair, ...]:
    """Pairs of a vision transformer.

    Args:
        dialect: `"official"`, `"hf"` or `"timm"`.
        gated: SwiGLU feed-forward instead of the plain one.
    """
    prefix, gated_names, plain_names = _FEED_FORWARD[dialect]
    ours = ("gate", "up", "down") if gated else ("up", "down")
    theirs = gated_names if gated else plain_names
    ffn = tuple(
        (f"blocks.{{i}}.ffn.{a}.{{x}}", f"{prefix}{b}.{{x}}") for a, b in zip(ours, theirs, strict=True)
    )
    return _VIT[dialect] + ffn


def convnext_pairs(dialect: str) -> tuple[Pair, ...]:
    """Pairs of a ConvNeXt in `"official"`, `"hf"` or `"timm"`."""
    return _CONVNEXT[dialect]


class Renaming:
    """Names of one dialect into another's."""

    def __init__(self, pairs: Iterable[Pair], *, to_ours: bool) -> None:
        """Compiles the pairs.

        Args:
            pairs: ours and theirs.
            to_ours: direction.
        """
        ordered = [(b, a) if to_ours else (a, b) for a, b in pairs]
        self._rules = [(_pattern(source), target) for source, target in ordered]

    def __call__(self, name: str) -> str | None:
        """The other name, or None if no pair fits."""
        for pattern, target in self._rules:
            match = pattern.fullmatch(name)
            if match is not None:
                return _fill_places(target, match.groupdict())
        return None


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{([^}]+)\}", template)
    return re.compile("".join(_PLACES[p] if k % 2 else re.escape(p) for k, p in enumerate(parts)))


def _fill_places(template: str, found: dict[str, str]) -> str:
    if "i" in found:
        found["i-1"] = str(int(found["i"]) - 1)
    elif "h" in found:
        found["i"], found["i-1"] = str(int(found["h"]) + 1), found["h"]
    return re.sub(r"\{([^}]+)\}", lambda place: found[place[1]], template)
