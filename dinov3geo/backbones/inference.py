"""Frozen backbones prepared for inference: the same features in less time.

On the CPU weights are laid out once as oneDNN wants them, GELU and the residual sum are computed while a
product is still in the cache, LayerScale is folded into the projections, and positions rotate queries and
keys in place. `benchmarks/backbone_speed.py` measures it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.backbones.attention import attend
from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import BackboneCard
from dinov3geo.backbones.convnext import ConvNext, ConvNextBlock
from dinov3geo.backbones.features import Features
from dinov3geo.backbones.filter_bank import has_filters
from dinov3geo.backbones.rope import rotate
from dinov3geo.backbones.vit import Block, SwiGlu, VisionTransformer

_TABLES_KEPT = 16


def for_inference(
    backbone: Backbone, *, dtype: torch.dtype | None = None, compiled: bool = False
) -> InferenceView:
    """A view of a backbone for frozen use, whose features differ by rounding only.

    On the CPU it computes with packed weights (as much memory again), elsewhere it is the backbone itself in
    `dtype`. It takes and returns the images' own dtype, cannot be trained, moved or saved, and need not
    follow later changes of the backbone.

    Args:
        backbone: stays as it is; on the device to compute on. A view is returned as it is.
        dtype: to compute in; None for that of the weights. Networks with filters compute in float32.
        compiled: let torch.compile fuse what lies within each block instead. The first images of every size
            then take many seconds.
    """
    if isinstance(backbone, InferenceView):
        return backbone
    first = next(backbone.parameters())
    # Filters magnify what bfloat16 rounds away, and are no large part of the work.
    dtype = torch.float32 if has_filters(backbone) else dtype or first.dtype
    inner: Backbone | None = None
    if first.device.type == "cpu" and not compiled and can_pack(dtype):
        if isinstance(backbone, VisionTransformer):
            inner = PackedVit(backbone, dtype)
        elif isinstance(backbone, ConvNext):
            inner = PackedConvNext(backbone, dtype)
    return InferenceView(inner or _plain(backbone, dtype, compiled=compiled), backbone.card, dtype)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's fused linear layers, and this processor the dtype.

    They are the operators that torch.compile itself uses on the CPU; they are no part of torch's public
    interface, so they are looked for, and everything works without them.
    """
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    operators = torch.ops.mkldnn
    if not (hasattr(operators, "_linear_pointwise") and hasattr(operators, "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or bool(operators._is_mkldnn_bf16_supported())


class InferenceView(Backbone):
    """A backbone that somebody else keeps, prepared for frozen use; see `for_inference`."""

    def __init__(self, inner: Backbone, card: BackboneCard | None, dtype: torch.dtype) -> None:
        """Wraps a prepared network that computes in `dtype`."""
        super().__init__()
        self.inner = inner
        self.card = card
        self.dtype = dtype

    @property
    def embed_dim(self) -> int:
        """See `Backbone`."""
        return self.inner.embed_dim

    @property
    def patch_size(self) -> int:
        """See `Backbone`."""
        return self.inner.patch_size

    @property
    def num_blocks(self) -> int:
        """See `Backbone`."""
        return self.inner.num_blocks

    @property
    def in_channels(self) -> int:
        """See `Backbone`."""
        return self.inner.in_channels

    @property
    def block_dims(self) -> tuple[int, ...]:
        """See `Backbone`."""
        return self.inner.block_dims

    def forward(self, images: Tensor) -> Features:
        """See `Backbone.forward`; the features have the images' dtype."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return _cast(self.inner(images.to(self.dtype)), images.dtype)

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """See `Backbone.intermediate`; the features have the images' dtype."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            found = self.inner.intermediate(images.to(self.dtype), blocks)
        return [_cast(features, images.dtype) for features in found]

    def state_dict(self, *_: object, **__: object) -> NoReturn:
        """A view has no weights of its own to save."""
        raise TypeError("a view for inference cannot be saved; save the backbone that it was made from")

    def _apply(self, *_: object, **__: object) -> NoReturn:
        """Packed weights cannot be moved."""
        raise TypeError("a view for inference stays where it is; move the backbone and make the view again")


def _cast(features: Features, dtype: torch.dtype) -> Features:
    if features.patches.dtype == dtype:
        return features
    cls, registers, patches = (t.to(dtype) for t in (features.cls, features.registers, features.patches))
    return Features(cls, registers, patches, features.grid_hw)


def _plain(source: Backbone, dtype: torch.dtype, *, compiled: bool) -> Backbone:
    """The backbone in another dtype, its blocks compiled if asked; itself where nothing changes.

    One that is being trained is copied, since paths are dropped and positions move in that mode.
    """
    if not (compiled or source.training) and dtype == next(source.parameters()).dtype:
        return source
    inner = copy.deepcopy(source).to(dtype).eval().requires_grad_(False)
    if compiled:
        for module in inner.modules():
            if isinstance(module, Block | ConvNextBlock):
                module.compile()
    return inner


class PackedLinear:
    """A linear layer, [..., I] -> [..., O], in the layout of oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Packs copies of [O, I] and [O]."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous())
        self.bias = None if bias is None else bias.detach().to(dtype).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return output

    def gelu(self, x: Tensor) -> Tensor:
        """The exact GELU of the product."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")
        return output

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product and [..., O] on top."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return output


class PackedBlock(nn.Module):
    """`vit.Block` with packed weights."""

    def __init__(self, block: Block, dtype: torch.dtype, *, interleaved: bool) -> None:
        """Packs a block; with `interleaved`, the two channels that rotate together become neighbours."""
        super().__init__()
        attention, ffn = block.attention, block.ffn
        self.num_heads = attention.num_heads
        self.norm1, self.norm2 = (copy.deepcopy(norm).to(dtype) for norm in (block.norm1, block.norm2))
        weight, bias = attention.qkv.weight, attention.qkv_bias()
        if interleaved:
            # Queries and keys change alike, so their products stay what they are.
            order = _interleave(weight.shape[1], self.num_heads).to(weight.device)
            weight = weight[order]
            bias = None if bias is None else bias[order]
        self.qkv = PackedLinear(weight, bias, dtype)
        self.proj = _scaled(attention.proj, block.scale1, dtype)
        self.gate = PackedLinear(ffn.gate.weight, ffn.gate.bias, dtype) if isinstance(ffn, SwiGlu) else None
        self.up = PackedLinear(ffn.up.weight, ffn.up.bias, dtype)  # type: ignore[union-attr, arg-type]
        self.down = _scaled(ffn.down, block.scale2, dtype)  # type: ignore[arg-type]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; the tables are those of `PackedVit`."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, H, dh]
        if cos.is_complex():
            prefix = x.shape[1] - cos.shape[0]
            torch.view_as_complex(qkv[:, prefix:, :2].unflatten(-1, (-1, 2))).mul_(cos)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            both = qkv.permute(2, 0, 3, 1, 4)
            query, key = rotate(both[:2], cos, sin).unbind(0)
            value = both[2]
        x = self.proj.plus(attend(query, key, value).transpose(1, 2).flatten(2), x)
        normed = self.norm2(x)
        if self.gate is None:
            return self.down.plus(self.up.gelu(normed), x)
        return self.down.plus(F.silu(self.gate(normed), inplace=True).mul_(self.up(normed)), x)


def _interleave(dim: int, num_heads: int) -> Tensor:
    """Rows of the qkv projection, [3 * D]: channels j and j + dh / 2 of queries and keys side by side."""
    rows = torch.arange(3 * dim).view(3, num_heads, 2, -1)
    rows[:2] = rows[:2].transpose(2, 3).reshape(rows[:2].shape)
    return rows.flatten()


def _scaled(linear: nn.Linear, scale: Tensor, dtype: torch.dtype) -> PackedLinear:
    """A linear layer and the LayerScale behind it."""
    return PackedLinear(linear.weight * scale[:, None], linear.bias * scale, dtype)


class PackedVit(VisionTransformer):
    """`VisionTransformer` with packed blocks."""

    def __init__(self, source: VisionTransformer, dtype: torch.dtype) -> None:
        """Packs a network."""
        nn.Module.__init__(self)
        self.config = source.config
        self.rope = source.rope
        self.patch_embed = copy.deepcopy(source.patch_embed).to(dtype)
        self.norm = copy.deepcopy(source.norm).to(dtype)
        self.local_norm = None
        for name in ("cls_token", "register_tokens", "mask_token"):
            setattr(self, name, nn.Parameter(getattr(source, name).detach().to(dtype), requires_grad=False))
        self._interleaved = dtype == torch.float32  # there are no complex bfloat16 numbers
        with torch.no_grad():
            self.blocks = nn.ModuleList(
                PackedBlock(block, dtype, interleaved=self._interleaved)  # type: ignore[arg-type]
                for block in source.blocks
            )
        self._complex: dict[tuple[tuple[int, int], torch.device], Tensor] = {}
        self.eval().requires_grad_(False)

    def _rotations(self, like: Tensor, grid_hw: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """The usual tables, or cos + i sin of the patches, [N, 1, 1, dh / 2], in the place of both."""
        cos, sin = self.rope.tables(grid_hw, num_prefix=self.num_prefix, training=False, like=like)
        if self._interleaved:
            cos = sin = self._rotation(cos, sin, grid_hw)
        while True:
            yield cos, sin

    def _rotation(self, cos: Tensor, sin: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        key = (grid_hw, cos.device)
        if key not in self._complex:
            if len(self._complex) >= _TABLES_KEPT:
                self._complex.pop(next(iter(self._complex)))
            half = cos.shape[1] // 2
            turned = torch.complex(cos[self.num_prefix :, :half], sin[self.num_prefix :, half:])
            self._complex[key] = turned[:, None, None]
        return self._complex[key]


class PackedConvNextBlock(nn.Module):
    """`ConvNextBlock` with packed weights."""

    def __init__(self, block: ConvNextBlock, dtype: torch.dtype) -> None:
        """Packs a block."""
        super().__init__()
        self.depthwise = copy.deepcopy(block.depthwise).to(dtype)
        self.norm = copy.deepcopy(block.norm).to(dtype)
        self.expand = PackedLinear(block.expand.weight, block.expand.bias, dtype)
        self.project = _scaled(block.project, block.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same."""
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        rows = self.project.plus(self.expand.gelu(hidden), x.permute(0, 2, 3, 1))
        return rows.permute(0, 3, 1, 2)


class PackedConvNext(ConvNext):
    """`ConvNext` with packed blocks."""

    def __init__(self, source: ConvNext, dtype: torch.dtype) -> None:
        """Packs a network."""
        nn.Module.__init__(self)
        self.config = source.config
        for name in ("stem", "downsamples", "norm"):
            setattr(self, name, copy.deepcopy(getattr(source, name)).to(dtype))
        with torch.no_grad():
            self.stages = nn.ModuleList(
                nn.Sequential(*(PackedConvNextBlock(block, dtype) for block in stage.children()))  # type: ignore[arg-type]
                for stage in source.stages
            )
        self.eval().requires_grad_(False)
