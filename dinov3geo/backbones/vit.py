"""Vision transformer of DINOv3: RoPE, registers, LayerScale, MLP or SwiGLU.

Source: Siméoni et al. 2025 (DINOv3), appendix on architectures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.backbones.attention import attend
from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.features import Features
from dinov3geo.backbones.filter_bank import FilterStem
from dinov3geo.backbones.rope import RotaryEmbedding, rotate


@dataclass(frozen=True, slots=True)
class VitConfig:
    """Shape of a vision transformer.

    Attributes:
        embed_dim: width D.
        num_blocks: depth.
        num_heads: attention heads; D / heads must be a multiple of 4.
        ffn: `"mlp"` (GELU) or `"swiglu"`.
        ffn_hidden: hidden width of the feed-forward network.
        num_registers: extra tokens R.
        qkv_bias: biases on query and value; there is never one on the key.
        local_cls_norm: own output norm for CLS and registers of local crops, used in training only.
        patch_size: pixels.
        in_channels: bands.
        norm_eps: LayerNorm epsilon.
        layer_scale: initial residual scale.
        rope_base: see `RotaryEmbedding`.
        rope_rescale: see `RotaryEmbedding`.
        rope_rounded_periods: see `RotaryEmbedding`.
        rope_shift: see `RotaryEmbedding`.
        rope_jitter: see `RotaryEmbedding`.
        drop_path: share of the batch that skips a residual branch in training, the same at every depth.
        stem_kernels: (side, number) of the filters of a `FilterStem`; empty for one convolution as large as
            the patch, which every released network has.
    """

    embed_dim: int
    num_blocks: int
    num_heads: int
    ffn: Literal["mlp", "swiglu"]
    ffn_hidden: int
    num_registers: int = 4
    qkv_bias: bool = True
    local_cls_norm: bool = False
    patch_size: int = 16
    in_channels: int = 3
    norm_eps: float = 1e-5
    layer_scale: float = 1e-5
    rope_base: float = 100.0
    rope_rescale: float | None = 2.0
    rope_rounded_periods: bool = False
    rope_shift: float | None = None
    rope_jitter: float | None = None
    drop_path: float = 0.0
    stem_kernels: tuple[tuple[int, int], ...] = ()


class Attention(nn.Module):
    """Self-attention with rotary positions on the patches. [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool) -> None:
        """Builds the projections; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.value_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)

    def qkv_bias(self) -> Tensor | None:
        """Biases of query, key (zero) and value, [3 * D], or None."""
        if self.query_bias is None or self.value_bias is None:
            return None
        return torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attends; cos and sin are [T, head_dim] from `RotaryEmbedding.tables`."""
        qkv = F.linear(x, self.qkv.weight, self.qkv_bias()).unflatten(-1, (3, self.num_heads, -1))
        qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, B, H, T, dh]
        query, key = rotate(qkv[:2], cos.to(qkv.dtype), sin.to(qkv.dtype)).unbind(0)
        mixed = attend(query, key, qkv[2])
        output: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return output


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        """Builds the two projections."""
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        output: Tensor = self.down(F.gelu(self.up(x)))
        return output


class SwiGlu(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        """Builds the three projections."""
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if torch.is_grad_enabled():
            output: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        else:
            output = self.down(F.silu(self.gate(x), inplace=True).mul_(self.up(x)))
        return output


class Block(nn.Module):
    """Pre-norm attention and feed-forward with LayerScale and stochastic depth."""

    def __init__(self, config: VitConfig) -> None:
        """Builds one block."""
        super().__init__()
        dim = config.embed_dim
        self.drop_path = config.drop_path
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attention = Attention(dim, config.num_heads, qkv_bias=config.qkv_bias)
        self.scale1 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.ffn: nn.Module = (Mlp if config.ffn == "mlp" else SwiGlu)(dim, config.ffn_hidden)
        self.scale2 = nn.Parameter(torch.full((dim,), config.layer_scale))

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        output: Tensor = self.attention(self.norm1(x), cos, sin)
        return output

    def _feed(self, x: Tensor) -> Tensor:
        output: Tensor = self.ffn(self.norm2(x))
        return output

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch = x.shape[0]
        if not (self.training and self.drop_path) or batch == 1:
            x = torch.addcmul(x, self._attend(x, cos, sin), self.scale1)
            return torch.addcmul(x, self._feed(x), self.scale2)
        kept = max(int(batch * (1 - self.drop_path)), 1)
        # Only the kept images run through a branch: it costs less, and the sum keeps its expectation.
        chosen = torch.randperm(batch, device=x.device)[:kept]
        x = x.index_add(0, chosen, self.scale1 * self._attend(x[chosen], cos, sin), alpha=batch / kept)
        chosen = torch.randperm(batch, device=x.device)[:kept]
        return x.index_add(0, chosen, self.scale2 * self._feed(x[chosen]), alpha=batch / kept)


class VisionTransformer(Backbone):
    """Images to `Features`.

    Attributes:
        config: the shape.
    """

    def __init__(self, config: VitConfig) -> None:
        """Builds and initialises the network."""
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed: nn.Conv2d | FilterStem = (
            FilterStem(config.in_channels, dim, config.patch_size, config.stem_kernels)
            if config.stem_kernels
            else nn.Conv2d(config.in_channels, dim, config.patch_size, config.patch_size)
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.rope = RotaryEmbedding(
            dim // config.num_heads,
            base=config.rope_base,
            rescale=config.rope_rescale,
            shift=config.rope_shift,
            jitter=config.rope_jitter,
            rounded_periods=config.rope_rounded_periods,
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.local_norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.local_cls_norm else None
        self.reset_parameters()

    @property
    def embed_dim(self) -> int:
        """Width D of every token."""
        return self.config.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    @property
    def num_blocks(self) -> int:
        """Depth."""
        return len(self.blocks)

    @property
    def in_channels(self) -> int:
        """Bands of an input image."""
        return self.config.in_channels

    @property
    def num_prefix(self) -> int:
        """CLS and registers in front of the patches."""
        return 1 + self.config.num_registers

    def reset_parameters(self) -> None:
        """Draws the initial weights with torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.patch_embed, nn.Conv2d):
            bound = 1 / math.sqrt(self.config.in_channels * self.config.patch_size**2)
            nn.init.uniform_(self.patch_embed.weight, -bound, bound)
            if self.patch_embed.bias is not None:
                nn.init.uniform_(self.patch_embed.bias, -bound, bound)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.register_tokens, std=0.02)

    def forward(
        self, images: Tensor, patch_masks: Tensor | None = None, *, local_crops: bool = False
    ) -> Features:
        """Features of the last block.

        Args:
            images: [B, C, H, W], normalised, any size; the right and lower edge is padded by
                replication to a multiple of the patch.
            patch_masks: [B, N] bool; true patches are replaced by the mask token.
            local_crops: the images are local crops (matters in training of models with `local_cls_norm`).

        Returns:
            Normed features, N = ceil(H / p) * ceil(W / p).

        Raises:
            ValueError: the images have another number of bands than the network.
        """
        tokens, grid_hw = self._embed(images, patch_masks)
        tables = self._rotations(tokens, grid_hw)
        for block in self.blocks:
            tokens = block(tokens, *next(tables))
        return self._features(tokens, grid_hw, local_crops=local_crops)

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Normed features of several blocks.

        Args:
            images: as in `forward`.
            blocks: increasing 0-based block numbers.

        Returns:
            One `Features` per requested block.

        Raises:
            ValueError: a block number that the network does not have, or not increasing.
        """
        wanted = self._check_blocks(blocks)
        tokens, grid_hw = self._embed(images, None)
        tables = self._rotations(tokens, grid_hw)
        collected = []
        for number, block in enumerate(self.blocks[: wanted[-1] + 1]):
            tokens = block(tokens, *next(tables))
            if number in wanted:
                collected.append(self._features(tokens, grid_hw, local_crops=False))
        return collected

    def _embed(self, images: Tensor, patch_masks: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        grid = self.patch_embed(self._fit(images))  # [B, D, h, w]
        # The residual stream keeps the weights' precision, also under autocast.
        patches = grid.flatten(2).transpose(1, 2).to(self.cls_token.dtype)
        if patch_masks is not None:
            patches = torch.where(patch_masks[..., None], self.mask_token.to(patches.dtype), patches)
        prefix = torch.cat([self.cls_token, self.register_tokens], dim=1).to(patches.dtype)
        tokens = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
        return tokens, (grid.shape[2], grid.shape[3])

    def _rotations(self, like: Tensor, grid_hw: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Tables for block after block: in training each draws its own."""
        training = self.training and self.rope.draws
        while True:
            tables = self.rope.tables(grid_hw, num_prefix=self.num_prefix, training=training, like=like)
            yield tables
            while not training:
                yield tables

    def _features(self, tokens: Tensor, grid_hw: tuple[int, int], *, local_crops: bool) -> Features:
        normed = self.norm(tokens)
        prefix, patches = normed[:, : self.num_prefix], normed[:, self.num_prefix :]
        if self.local_norm is not None and local_crops and self.training:
            prefix = self.local_norm(tokens[:, : self.num_prefix])
        return Features(prefix[:, 0], prefix[:, 1:], patches, grid_hw)
