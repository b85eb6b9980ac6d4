"""Key maps between checkpoint dialects."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dinov3geo.errors import DataError

_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.weight": "patch_embed.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_BLOCK = {
    "attention.q_proj.bias": "attention.query_bias",
    "attention.v_proj.bias": "attention.value_bias",
    "attention.o_proj.weight": "attention.proj.weight",
    "attention.o_proj.bias": "attention.proj.bias",
    "layer_scale1.lambda1": "scale1",
    "layer_scale2.lambda1": "scale2",
}
_FFN_GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_LAYER = re.compile(r"(?:model\.)?layer\.(\d+)\.(.+)")


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of transformers' `DINOv3ViTModel` in this library's names.

    Args:
        tensors: with the names of transformers 4 (`layer.N`) or 5 (`model.layer.N`).

    Returns:
        Tensors for `VisionTransformer.load_state_dict`.

    Raises:
        DataError: a name that has no counterpart here.
    """
    converted: dict[str, Tensor] = {}
    qkv: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if name == "embeddings.mask_token":
            converted["mask_token"] = tensor.flatten()
        elif name in _TOP:
            converted[_TOP[name]] = tensor
        elif match is None:
            raise DataError(f"tensor {name!r} is not part of a transformers DINOv3 ViT")
        elif match[2] in ("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"):
            qkv.setdefault(int(match[1]), {})[match[2][10]] = tensor
        else:
            converted[f"blocks.{match[1]}.{_block_name(match[2], name)}"] = tensor
    for number, parts in qkv.items():
        if sorted(parts) != ["k", "q", "v"]:
            raise DataError(f"block {number} has only {sorted(parts)} of the q, k and v projections")
        converted[f"blocks.{number}.attention.qkv.weight"] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return converted


def _block_name(name: str, full_name: str) -> str:
    if name in _BLOCK:
        return _BLOCK[name]
    if name.startswith(("norm1.", "norm2.")):
        return name
    part = name.split(".")
    if len(part) == 3 and part[0] == "mlp" and part[1] in _FFN_GATED:
        return f"ffn.{_FFN_GATED[part[1]]}.{part[2]}"
    raise DataError(f"tensor {full_name!r} is not part of a transformers DINOv3 ViT")
