"""Checkpoints of every dialect into this library's tensors, and back.

Dialects are `official` (the release, and `teacher` checkpoints of its trainer), `hf` (transformers),
`timm` and `ours`. They are told apart by names and shapes, never by the name of a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3geo.backbones.convnext import STEM_STRIDE, ConvNextConfig
from dinov3geo.backbones.filter_bank import FilterBankConfig
from dinov3geo.backbones.keymaps import Renaming, convnext_pairs, vit_pairs
from dinov3geo.backbones.rope import rotation_periods
from dinov3geo.backbones.vit import VitConfig
from dinov3geo.errors import DataError

DIALECTS = ("official", "hf", "timm", "ours")
Tensors = dict[str, Tensor]

# Tensors that only one dialect and family has.
_MARKERS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("ours", "vit", re.compile(r"blocks\.\d+\.attention\.qkv\.weight")),
    ("ours", "convnext", re.compile(r"stages\.\d+\.\d+\.depthwise\.weight")),
    ("ours", "filters", re.compile(r"filters\.\d+\.weight")),
    ("official", "vit", re.compile(r"blocks\.\d+\.ls1\.gamma")),
    ("official", "convnext", re.compile(r"stages\.\d+\.\d+\.dwconv\.weight")),
    ("hf", "vit", re.compile(r"(?:model\.)?layer\.\d+\.layer_scale1\.lambda1")),
    ("hf", "convnext", re.compile(r"(?:model\.)?stages\.\d+\.layers\.\d+\.depthwise_conv\.weight")),
    ("timm", "vit", re.compile(r"blocks\.\d+\.gamma_1")),
    ("timm", "convnext", re.compile(r"stages\.\d+\.blocks\.\d+\.conv_dw\.weight")),
)
_TRAINING_HEADS = ("dino_head.", "ibot_head.")
_QKV = re.compile(r"layer\.(\d+)\.attention\.([qkv])_proj\.weight")
_MAX_NAMES = 4
# Width of the 7B network, which has heads of 128 channels and no biases on query and value; all others have
# heads of 64 and both biases.
_WIDE = 4096


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in this library's names, and what they say about the network.

    Attributes:
        dialect: where they came from, one of `DIALECTS`.
        config: the shape, with everything that the tensors tell.
        tensors: for `load_state_dict`; dtypes are those of the file.
        dropped: names that this library has no use for, by design (heads of training, duplicates).
    """

    dialect: str
    config: VitConfig | ConvNextConfig | FilterBankConfig
    tensors: Tensors
    dropped: tuple[str, ...] = ()


def recognise(names: Mapping[str, object]) -> tuple[str, str]:
    """Dialect and family (`"vit"`, `"convnext"` or, of ours, `"filters"`) of a checkpoint.

    Args:
        names: tensors without prefixes, see `unwrap`.

    Raises:
        DataError: none of those known here.
    """
    for dialect, family, marker in _MARKERS:
        if any(marker.fullmatch(name) for name in names):
            return dialect, family
    raise DataError(
        f"these {len(names)} tensors ({_some(names)}) are no DINOv3 ViT or ConvNeXt of the official, "
        "Hugging Face, timm or dinov3geo naming"
    )


def unwrap(tensors: Mapping[str, Tensor]) -> tuple[Tensors, tuple[str, ...]]:
    """The backbone of a training checkpoint without its prefix, and the names of the heads beside it."""
    if not any(name.startswith("backbone.") for name in tensors):
        return dict(tensors), ()
    heads = tuple(name for name in tensors if name.startswith(_TRAINING_HEADS))
    return _without_prefix({n: t for n, t in tensors.items() if n not in heads}, "backbone."), heads


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """Tensors under shorter names.

    Raises:
        DataError: a name is there with the prefix and without it, so one of the two would be lost.
    """
    twice = [name for name in tensors if name.startswith(prefix) and name.removeprefix(prefix) in tensors]
    if twice:
        raise DataError(
            f"{len(twice)} tensors are there with the prefix {prefix!r} and without it: {_some(twice)}; "
            "expected one network"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def to_ours(tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Converts a checkpoint of any dialect.

    Args:
        tensors: all tensors of the file; those on the meta device convert too.

    Raises:
        DataError: another model's tensors, a tensor without counterpart here (all are listed), or
            values that this architecture cannot hold (a bias on the key, other rotation periods).
    """
    bare, dropped = unwrap(tensors)
    dialect, family = recognise(bare)
    if dialect == "ours":
        return Checkpoint(dialect, _describe(bare, family, rounded=False), bare, dropped)
    rest = _without_prefix(bare, "model.") if dialect == "hf" else bare
    ours: Tensors = {}
    rounded = False
    if family == "convnext":
        pairs = convnext_pairs(dialect)
        dropped += _take_duplicates(rest) if dialect == "official" else ()
    else:
        gated = any(re.search(r"\.mlp\.(w1|fc1_g|gate_proj)\.", name) for name in rest)
        pairs = vit_pairs(dialect, gated=gated)
        if dialect == "official":
            rounded = _take_official(rest, ours)
        elif dialect == "hf":
            _take_hf(rest, ours)
    rename = Renaming(pairs, to_ours=True)
    renamed = {name: rename(name) for name in rest}
    unknown = [name for name, found in renamed.items() if found is None]
    ours |= {found: rest[name] for name, found in renamed.items() if found is not None}
    if unknown:
        raise DataError(
            f"{len(unknown)} tensors of this {dialect} {family} have no place here: {_some(unknown)}; "
            f"the other {len(ours)} have"
        )
    if family == "vit":
        _add_dropped(ours, dialect)
    return Checkpoint(dialect, _describe(ours, family, rounded=rounded), ours, dropped)


def from_ours(
    tensors: Mapping[str, Tensor], config: VitConfig | ConvNextConfig | FilterBankConfig, dialect: str
) -> Tensors:
    """Tensors of this library in another dialect.

    What the dialect has no place for is left out: the norm of local crops in `hf` and `timm`, the mask token
    in `timm`. Its models without `_qkvb` in the name lack query and value biases, which are kept here.

    Args:
        tensors: complete, in this library's names.
        config: their shape.
        dialect: one of `DIALECTS`; `hf` gives the names that transformers 4 and 5 both read.

    Raises:
        DataError: a tensor without counterpart there.
    """
    if dialect == "ours":
        return dict(tensors)
    if isinstance(config, FilterBankConfig):
        raise DataError(f"a filter bank is of this library alone and has no form in the {dialect} dialect")
    rest = dict(tensors)
    theirs: Tensors = {}
    if isinstance(config, ConvNextConfig):
        pairs = convnext_pairs(dialect)
        if dialect == "official":
            theirs = {f"norms.3.{x}": rest[f"norm.{x}"].clone() for x in ("weight", "bias")}
    else:
        pairs = vit_pairs(dialect, gated=config.ffn == "swiglu")
        {"official": _give_official, "hf": _give_hf, "timm": _give_timm}[dialect](rest, theirs, config)
    rename = Renaming(pairs, to_ours=False)
    renamed = {name: rename(name) for name in rest}
    unknown = [name for name, found in renamed.items() if found is None]
    if unknown:
        raise DataError(f"{len(unknown)} tensors have no place in the {dialect} dialect: {_some(unknown)}")
    return theirs | {found: rest[name] for name, found in renamed.items() if found is not None}


def _take_duplicates(rest: Tensors) -> tuple[str, ...]:
    """The official ConvNeXt holds its last norm twice."""
    twins = tuple(name for name in rest if re.fullmatch(r"norms\.3\.(weight|bias)", name))
    for name in twins:
        twin, original = rest.pop(name), rest.get(name.replace("norms.3", "norm"))
        if original is not None and not twin.is_meta and not torch.equal(twin, original):
            raise DataError(f"{name} differs from its duplicate {name.replace('norms.3', 'norm')}")
    return twins


def _take_official(rest: Tensors, ours: Tensors) -> bool:
    """Moves what is more than a name; returns whether the rotation periods were rounded."""
    if "mask_token" in rest:
        ours["mask_token"] = rest.pop("mask_token").flatten()
    for name in [n for n in rest if n.endswith(".attn.qkv.bias")]:
        block = name.removesuffix(".attn.qkv.bias")
        bias, mask = rest.pop(name), rest.pop(f"{block}.attn.qkv.bias_mask", None)
        query, key, value = _effective_bias(bias, mask).chunk(3)
        _refuse_key_bias(key, name)
        ours[f"{block}.attention.query_bias"], ours[f"{block}.attention.value_bias"] = query, value
    periods = rest.pop("rope_embed.periods", None)
    if periods is None or periods.is_meta:
        return False
    exact, rounded = (
        rotation_periods(4 * len(periods), 100.0, rounded=r, device=periods.device) for r in (False, True)
    )
    # Exact ones may have been computed on another device, one unit in the last place away.
    if torch.allclose(periods.float(), exact, rtol=1e-6, atol=0):
        return False
    if torch.allclose(periods.float(), rounded, rtol=1e-6, atol=0):
        return True
    raise DataError(f"rope_embed.periods are not those of base 100: {periods.flatten()[:3].tolist()} ...")


def _effective_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Bias times mask, where a module that was never initialised left NaN in the mask."""
    if mask is None:
        return bias
    third = len(bias) // 3
    structure = torch.ones_like(mask)
    structure[third : 2 * third] = 0
    mask = torch.where(mask.isnan(), structure, mask)
    return torch.where(mask == 0, torch.zeros_like(bias), bias * mask)


def _refuse_key_bias(bias: Tensor, name: str) -> None:
    if not bias.is_meta and bool(bias.any()):
        raise DataError(f"{name} has a bias on the key, which no DINOv3 release has and this network lacks")


def _take_hf(rest: Tensors, ours: Tensors) -> None:
    if "embeddings.mask_token" in rest:
        ours["mask_token"] = rest.pop("embeddings.mask_token").flatten()
    for name in [n for n in rest if re.fullmatch(r"layer\.\d+\.attention\.k_proj\.bias", n)]:
        _refuse_key_bias(rest.pop(name), name)
    parts: dict[str, Tensors] = {}
    for name in list(rest):
        match = _QKV.fullmatch(name)
        if match is not None:
            parts.setdefault(match[1], {})[match[2]] = rest.pop(name)
    for number, qkv in parts.items():
        if sorted(qkv) != ["k", "q", "v"]:
            raise DataError(f"block {number} has only {sorted(qkv)} of the q, k and v projections")
        if len({tuple(part.shape) for part in qkv.values()}) > 1:
            shapes = ", ".join(f"{letter} {list(part.shape)}" for letter, part in sorted(qkv.items()))
            raise DataError(f"block {number} has projections of several shapes: {shapes}")
        ours[f"blocks.{number}.attention.qkv.weight"] = torch.cat([qkv["q"], qkv["k"], qkv["v"]])


def _add_dropped(ours: Tensors, dialect: str) -> None:
    """Adds what a dialect leaves out by design.

    That is a mask token, registers of a network without any, and in timm query and value biases: they are
    zero in every release (the 7B network has none at all).
    """
    if "cls_token" not in ours:
        return
    like = ours["cls_token"]
    dim = like.shape[-1]
    ours.setdefault("mask_token", like.new_zeros(dim))
    ours.setdefault("register_tokens", like.new_empty(1, 0, dim))
    if dialect == "timm" and dim < _WIDE and not any(name.endswith(".query_bias") for name in ours):
        for block in [n.removesuffix("qkv.weight") for n in ours if n.endswith(".qkv.weight")]:
            ours[f"{block}query_bias"] = like.new_zeros(dim)
            ours[f"{block}value_bias"] = like.new_zeros(dim)


def _give_official(rest: Tensors, theirs: Tensors, config: VitConfig) -> None:
    theirs["mask_token"] = rest.pop("mask_token")[None]
    _drop_empty_registers(rest)
    for number in range(config.num_blocks if config.qkv_bias else 0):
        query, value = (rest.pop(f"blocks.{number}.attention.{part}_bias") for part in ("query", "value"))
        zeros, ones = torch.zeros_like(query), torch.ones_like(query)
        theirs[f"blocks.{number}.attn.qkv.bias"] = torch.cat([query, zeros, value])
        theirs[f"blocks.{number}.attn.qkv.bias_mask"] = torch.cat([ones, zeros, ones])
    theirs["rope_embed.periods"] = rotation_periods(
        config.embed_dim // config.num_heads,
        config.rope_base,
        rounded=config.rope_rounded_periods,
        device=torch.device("cpu"),
    )


def _give_hf(rest: Tensors, theirs: Tensors, config: VitConfig) -> None:
    theirs["embeddings.mask_token"] = rest.pop("mask_token")[None, None]
    _drop_empty_registers(rest)
    _drop_local_norm(rest)
    for number in range(config.num_blocks):
        parts = rest.pop(f"blocks.{number}.attention.qkv.weight").chunk(3)
        for letter, part in zip("qkv", parts, strict=True):
            theirs[f"layer.{number}.attention.{letter}_proj.weight"] = part.contiguous()


def _give_timm(rest: Tensors, theirs: Tensors, config: VitConfig) -> None:
    del rest["mask_token"]
    _drop_empty_registers(rest)
    _drop_local_norm(rest)


def _drop_empty_registers(rest: Tensors) -> None:
    if rest["register_tokens"].shape[1] == 0:
        del rest["register_tokens"]


def _drop_local_norm(rest: Tensors) -> None:
    for name in ("local_norm.weight", "local_norm.bias"):
        rest.pop(name, None)


def _describe(ours: Tensors, family: str, *, rounded: bool) -> VitConfig | ConvNextConfig | FilterBankConfig:
    """The shape that tensors belong to.

    Raises:
        DataError: a tensor is missing without which the shape cannot be told.
    """
    try:
        if family == "filters":
            return _describe_filters(ours)
        return _describe_convnext(ours) if family == "convnext" else _describe_vit(ours, rounded=rounded)
    except KeyError as error:
        raise DataError(f"the checkpoint is not complete: it has no tensor {error}") from error
    except (IndexError, ValueError) as error:
        raise DataError(f"the checkpoint has tensors of no usable name or shape ({error})") from error


def _describe_vit(ours: Tensors, *, rounded: bool) -> VitConfig:
    kernels = _kernels(ours, "patch_embed.filters")
    if kernels:
        dim, bands = ours["patch_embed.proj.weight"].shape[0], ours["patch_embed.filters.0.weight"].shape[1]
        patch = 16  # the tensors do not tell: the card does
    else:
        dim, bands, patch, _ = ours["patch_embed.weight"].shape
    blocks = 1 + max(int(n.split(".")[1]) for n in ours if n.startswith("blocks."))
    gated = any(".ffn.gate." in n for n in ours)
    return VitConfig(
        embed_dim=dim,
        num_blocks=blocks,
        num_heads=dim // (128 if dim >= _WIDE else 32 if dim % 64 else 64),  # the tensors do not tell
        ffn="swiglu" if gated else "mlp",
        ffn_hidden=ours["blocks.0.ffn.up.weight"].shape[0],
        num_registers=ours["register_tokens"].shape[1],
        qkv_bias=any(n.endswith(".query_bias") for n in ours),
        local_cls_norm="local_norm.weight" in ours,
        patch_size=patch,
        in_channels=bands,
        rope_rounded_periods=rounded,
        stem_kernels=kernels,
    )


def _describe_convnext(ours: Tensors) -> ConvNextConfig:
    dim, bands, stride, _ = ours["stem.conv.weight"].shape
    if stride != STEM_STRIDE:
        raise DataError(f"the stem has stride {stride}, expected {STEM_STRIDE}")
    deepest: dict[int, int] = {}
    for stage, block in (n.split(".")[1:3] for n in ours if n.startswith("stages.")):
        deepest[int(stage)] = max(deepest.get(int(stage), 0), int(block))
    stages = range(max(deepest) + 1)
    dims = (dim, *(ours[f"downsamples.{s - 1}.conv.weight"].shape[0] for s in stages[1:]))
    return ConvNextConfig(tuple(deepest[s] + 1 for s in stages), dims, in_channels=bands)


def _describe_filters(ours: Tensors) -> FilterBankConfig:
    return FilterBankConfig(
        embed_dim=len(ours["whole.weight"]),
        kernels=_kernels(ours, "filters"),
        in_channels=ours["filters.0.weight"].shape[1],
    )


def _kernels(ours: Tensors, prefix: str) -> tuple[tuple[int, int], ...]:
    """(side, number of filters) of every group of filters, in order."""
    found: list[tuple[int, int]] = []
    while (name := f"{prefix}.{len(found)}.weight") in ours:
        found.append((ours[name].shape[2], ours[name].shape[0]))
    return tuple(found)


def _some(names: Mapping[str, object] | list[str]) -> str:
    listed = sorted(names)
    more = f", ... {len(listed) - _MAX_NAMES} more" if len(listed) > _MAX_NAMES else ""
    return ", ".join(listed[:_MAX_NAMES]) + more
