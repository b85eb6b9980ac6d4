"""A network in closed form: patches of the training images as filters, whitened.

Its features need minutes of one core and no gradient, and tell small satellite pictures apart better than
networks trained for hours do; a vision transformer can learn them (`dinov3geo distill`, targets: features).

Source: Coates and Ng 2012 (patches as filters, whitening); Rolf et al. 2021, doi 10.1038/s41467-021-24638-z
(random convolutional features of satellite images). Whitening what was pooled is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.features import Features

STRIDE = 2
# Responses of a few images at a time stay in the cache of a processor.
_NUMBERS_AT_ONCE = 1 << 20


def count_responses(filters: Iterable[int]) -> int:
    """Numbers of a place: of every filter what is above the threshold, and what is below its negative."""
    return 2 * sum(filters)


@dataclass(frozen=True, slots=True)
class FilterBankConfig:
    """Shape of a filter bank.

    Attributes:
        embed_dim: width D of the features.
        kernels: (side, number of filters) of each group; sides are odd.
        patch_size: side in pixels of the cells that responses are averaged over; even.
        in_channels: bands.
    """

    embed_dim: int = 192
    kernels: tuple[tuple[int, int], ...] = ((3, 128), (5, 256), (9, 256))
    patch_size: int = 8
    in_channels: int = 3

    @property
    def num_responses(self) -> int:
        """See `count_responses`."""
        return count_responses(count for _, count in self.kernels)


class Filters(nn.Module):
    """Filters of one size and both halves of their responses. [B, C, H, W] -> [B, 2 * n, H / p, W / p]."""

    threshold: Tensor

    def __init__(self, in_channels: int, side: int, count: int, patch_size: int) -> None:
        """Makes room for filters [n, C, k, k] and biases [n].

        Raises:
            ValueError: a filter of even side, or a cell that the stride does not divide.
        """
        if side % 2 == 0 or patch_size % STRIDE:
            raise ValueError(f"filters have odd sides and cells an even one, got {side} and {patch_size}")
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, in_channels, side, side))
        self.bias = nn.Parameter(torch.zeros(count))
        self.register_buffer("threshold", torch.zeros(1))
        self.cell = patch_size // STRIDE

    def forward(self, x: Tensor) -> Tensor:
        """See the class; the edge is repeated for filters that reach over it."""
        reach = self.weight.shape[-1] // 2
        # Whitening magnifies what bfloat16 would round away.
        with torch.autocast(x.device.type, enabled=False):
            padded = F.pad(x.float(), (reach,) * 4, mode="replicate")
            found = F.conv2d(padded, self.weight, self.bias, stride=STRIDE)
            above = F.avg_pool2d((found - self.threshold).relu_(), self.cell)
            below = F.avg_pool2d(found.neg_().sub_(self.threshold).relu_(), self.cell)
        return torch.cat([above, below], dim=1)


class FilterStem(nn.Module):
    """Patch embedding of a vision transformer: a bank's responses in a cell, and a linear map of their roots.

    The filters stay as they are, only the map learns, which begins as the bank's own whitening. A patch of
    plain pixels under a linear map tells little about texture; here it is known from the first step on.

    Source: Chen et al. 2021 (MoCo v3) for an embedding that does not learn; the filters see `FilterBank`.
    """

    def __init__(
        self, in_channels: int, dim: int, patch_size: int, kernels: Sequence[tuple[int, int]]
    ) -> None:
        """Makes room for filters (side, number of filters) and a map to `dim`."""
        super().__init__()
        self.filters = nn.ModuleList(
            Filters(in_channels, side, count, patch_size) for side, count in kernels
        ).requires_grad_(False)
        self.proj = nn.Linear(count_responses(count for _, count in kernels), dim)

    @torch.no_grad()
    def copy_from(self, bank: FilterBank) -> None:
        """Takes filters and whitening; where the width differs, as many directions as fit, the widest first.

        Raises:
            RuntimeError: the bank's filters have other sizes, numbers or bands.
        """
        if self.proj.weight.is_meta:
            return
        self.filters.load_state_dict(bank.filters.state_dict())
        width = min(self.proj.out_features, bank.embed_dim)
        self.proj.weight[:width] = bank.cells.weight[:width]
        self.proj.bias[:width] = bank.cells.bias[:width]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] of whole patches -> [B, D, h, w]."""
        with torch.no_grad():
            found = respond(self.filters, x).sqrt()
        output: Tensor = self.proj(found.permute(0, 2, 3, 1))
        return output.permute(0, 3, 1, 2)


def has_filters(module: nn.Module) -> bool:
    """Whether a network begins with filters, which need float32."""
    return any(isinstance(each, Filters) for each in module.modules())


def respond(groups: nn.ModuleList, images: Tensor) -> Tensor:
    """Averages over the cells of groups of `Filters`. [B, C, H, W] -> [B, F, h, w], not negative."""
    # A GPU needs no parts, and an exported file must not depend on the size of the example.
    exported = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if exported or images.device.type != "cpu":
        return torch.cat([group(images) for group in groups], dim=1)
    widest = max(len(group.weight) for group in groups)  # type: ignore[arg-type]
    area = images.shape[2] * images.shape[3] // STRIDE**2
    images = images.contiguous(memory_format=torch.channels_last)
    parts = images.split(max(_NUMBERS_AT_ONCE // (widest * area), 1))
    return torch.cat([torch.cat([group(part) for group in groups], dim=1) for part in parts])


class FilterBank(Backbone):
    """Images to `Features`: a patch is a cell, CLS is the whole image, and there are no registers.

    A cell is described by the square roots of its responses; the image by the roots of their means, and the
    means of the cells' roots, which differ the more the less evenly a texture is spread. Both are whitened
    over the images that the bank was fitted on. CLS is brought to the length sqrt(D), a cell keeps its own:
    it tells how unusual the cell is. `training.filter_fit` finds filters and whitening.
    """

    def __init__(self, config: FilterBankConfig) -> None:
        """Makes room for the numbers; errors as in `Filters`."""
        super().__init__()
        self.config = config
        self.filters = nn.ModuleList(
            Filters(config.in_channels, side, count, config.patch_size) for side, count in config.kernels
        )
        self.whole = nn.Linear(2 * config.num_responses, config.embed_dim)
        self.cells = nn.Linear(config.num_responses, config.embed_dim)

    @property
    def embed_dim(self) -> int:
        """Width D."""
        return self.config.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a cell in pixels."""
        return self.config.patch_size

    @property
    def num_blocks(self) -> int:
        """One."""
        return 1

    @property
    def in_channels(self) -> int:
        """Bands of an input image."""
        return self.config.in_channels

    @torch.no_grad()
    def responses(self, images: Tensor) -> Tensor:
        """Averages over the cells, before any whitening. [B, C, H, W] -> [B, F, h, w], not negative."""
        return respond(self.filters, self._fit(images))

    @staticmethod
    def describe(responses: Tensor) -> Tensor:
        """What is whitened to the features of an image. [B, F, h, w] -> [B, 2 * F]."""
        return torch.cat([responses.mean((2, 3)).sqrt(), responses.sqrt().mean((2, 3))], dim=1)

    def forward(self, images: Tensor) -> Features:
        """Features of cells and image; see `Backbone.forward`."""
        found = self.responses(images)
        with torch.autocast(found.device.type, enabled=False):
            cls = self.whole(self.describe(found))
            patches = self.cells(found.sqrt().flatten(2).transpose(1, 2))
        # White vectors have hubs, to which everything is near: what neighbours are sought by has one length.
        cls = F.normalize(cls, dim=-1, eps=1e-6) * math.sqrt(self.embed_dim)
        registers = patches.new_empty(patches.shape[0], 0, self.embed_dim)
        return Features(cls, registers, patches, (found.shape[2], found.shape[3]))

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """The same as `forward`; see `Backbone.intermediate`."""
        self._check_blocks(blocks)
        return [self(images)]
