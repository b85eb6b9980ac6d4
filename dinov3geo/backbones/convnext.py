"""ConvNeXt of DINOv3: four stages of depthwise convolutions under the contract of `Features`.

Source: Liu et al. 2022 (ConvNeXt); Siméoni et al. 2025 (DINOv3), section on distilled ConvNeXt models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.features import Features

STEM_STRIDE = 4
_KERNEL = 7


@dataclass(frozen=True, slots=True)
class ConvNextConfig:
    """Shape of a ConvNeXt.

    Attributes:
        depths: blocks of each stage.
        dims: width of each stage.
        in_channels: bands.
        norm_eps: LayerNorm epsilon.
        layer_scale: initial residual scale.
        drop_path: share of the batch that skips a residual branch in training, the same at every depth.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_channels: int = 3
    norm_eps: float = 1e-6
    layer_scale: float = 1e-6
    drop_path: float = 0.0

    @property
    def stride(self) -> int:
        """Pixels per cell of the last map."""
        return STEM_STRIDE << (len(self.dims) - 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image. [B, C, h, w] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise convolution and pointwise feed-forward around a shortcut. [B, C, h, w] -> the same."""

    def __init__(self, dim: int, config: ConvNextConfig) -> None:
        """Builds one block."""
        super().__init__()
        self.drop_path = config.drop_path
        self.depthwise = nn.Conv2d(dim, dim, _KERNEL, padding=_KERNEL // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.expand = nn.Linear(dim, 4 * dim)
        self.project = nn.Linear(4 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), config.layer_scale))

    def _branch(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, h, w, C], before the residual scale."""
        # In the memory format channels_last this permutation is a view and nothing is copied.
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        output: Tensor = self.project(F.gelu(self.expand(hidden)))
        return output

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        batch = x.shape[0]
        if not (self.training and self.drop_path) or batch == 1:
            rows = torch.addcmul(x.permute(0, 2, 3, 1), self._branch(x), self.scale)
            return rows.permute(0, 3, 1, 2)
        kept = max(int(batch * (1 - self.drop_path)), 1)
        chosen = torch.randperm(batch, device=x.device)[:kept]
        branch = (self.scale * self._branch(x[chosen])).permute(0, 3, 1, 2)
        return x.index_add(0, chosen, branch, alpha=batch / kept)


class ConvNext(Backbone):
    """Images to `Features` of a grid with stride 32.

    There are no registers; the CLS vector is the mean of the last map, normed by the same LayerNorm as the
    patches. `intermediate` gives the four stages on their own grids (strides 4, 8, 16, 32) and in their own
    widths (`block_dims`); only the last is normed, as the official model has no norm for the others.
    """

    def __init__(self, config: ConvNextConfig) -> None:
        """Builds and initialises the network."""
        super().__init__()
        self.config = config
        dims, eps = config.dims, config.norm_eps
        self.stem = _sequence(
            conv=nn.Conv2d(config.in_channels, dims[0], STEM_STRIDE, STEM_STRIDE),
            norm=ChannelNorm(dims[0], eps=eps),
        )
        self.downsamples = nn.ModuleList(
            _sequence(norm=ChannelNorm(before, eps=eps), conv=nn.Conv2d(before, after, 2, 2))
            for before, after in zip(dims[:-1], dims[1:], strict=True)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNextBlock(dim, config) for _ in range(depth)))
            for dim, depth in zip(dims, config.depths, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=eps)
        self.reset_parameters()

    @property
    def embed_dim(self) -> int:
        """Width of the last stage."""
        return self.config.dims[-1]

    @property
    def patch_size(self) -> int:
        """Stride of the last map in pixels."""
        return self.config.stride

    @property
    def num_blocks(self) -> int:
        """Number of stages."""
        return len(self.stages)

    @property
    def in_channels(self) -> int:
        """Bands of an input image."""
        return self.config.in_channels

    @property
    def block_dims(self) -> tuple[int, ...]:
        """Width of each stage."""
        return self.config.dims

    def reset_parameters(self) -> None:
        """Draws the initial weights with torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Features:
        """Features of the last stage; see `Backbone.forward`."""
        return self.intermediate(images, [self.num_blocks - 1])[0]

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Features of several stages, each on its own grid; see the class and `Backbone.intermediate`."""
        wanted = self._check_blocks(blocks)
        x = self._fit(images).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        collected = []
        for number, stage in enumerate(self.stages[: wanted[-1] + 1]):
            if number:
                x = self.downsamples[number - 1](x)
            x = stage(x)
            if number in wanted:
                collected.append(self._features(x, normed=number == self.num_blocks - 1))
        return collected

    def _features(self, x: Tensor, *, normed: bool) -> Features:
        patches = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, D]
        cls = patches.mean(1)
        if normed:
            cls, patches = self.norm(cls), self.norm(patches)
        registers = patches.new_empty(patches.shape[0], 0, patches.shape[2])
        return Features(cls, registers, patches, (x.shape[2], x.shape[3]))


def _sequence(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))
