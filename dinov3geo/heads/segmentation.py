"""Heads that give class scores: linear, BatchNorm and 1 x 1 convolution, UPerNet; DPT lies in `heads.dpt`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.errors import ConfigError
from dinov3geo.heads.base import Head, OutputSpec
from dinov3geo.heads.dpt import Reassemble, Standardize

# Sides of the grids that UPerNet's pyramid pooling averages into.
POOLS = (1, 2, 3, 6)


class LinearHead(Head):
    """One linear map of each patch's features, enlarged to pixels (bilinear).

    The features are standardised with the statistics of the training data, which a linear map could undo:
    the optimiser alone gains by it.
    """

    def __init__(self, dims: Sequence[int], *, output: OutputSpec, typical: float = 0.0) -> None:
        """Builds the map; it begins as a constant, so that all classes are alike.

        Args:
            dims: width of each feature map.
            output: with class names, or without any for one quantity.
            typical: the constant, for a quantity its usual size.
        """
        super().__init__()
        self.output = output
        self.standards = nn.ModuleList(Standardize(dim) for dim in dims)
        self.score = nn.Conv2d(sum(dims), len(output.class_names) or 1, 1)
        nn.init.zeros_(self.score.weight)
        assert self.score.bias is not None
        nn.init.constant_(self.score.bias, typical)

    def fit_statistics(self, maps: Sequence[Sequence[Tensor]]) -> None:
        """Takes mean and deviation of each feature channel; see `fit_standards`."""
        fit_standards(self.standards, maps)

    def forward(self, feature_maps: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        """See `Head.forward`."""
        weight, bias = self.score.weight[:, :, 0, 0], self.score.bias
        height, width = feature_maps[0].shape[-2:]
        scores, start = feature_maps[0].new_zeros(()), 0
        for scale, feature_map in zip(self.standards, feature_maps, strict=True):
            assert isinstance(scale, Standardize) and bias is not None
            # Scaling K weights per channel instead of every pixel saves most of the time of a fit.
            own = weight[:, start : start + feature_map.shape[1]] / scale.deviation
            # Image by image: a batched product would copy the features first.
            scores = scores + torch.stack([own @ image for image in feature_map.flatten(2)])
            bias = bias - own @ scale.mean
            start += feature_map.shape[1]
        assert bias is not None
        scores = (scores + bias[:, None]).unflatten(2, (height, width))
        return F.interpolate(scores, size_hw, mode="bilinear", align_corners=False)


class BatchNormHead(Head):
    """Batch norm and a 1 x 1 convolution, the linear segmentation protocol of DINOv2 and DINOv3."""

    def __init__(self, dims: Sequence[int], *, output: OutputSpec, dropout: float = 0.1) -> None:
        """Builds the head.

        Args:
            dims: width of each feature map.
            output: with class names.
            dropout: share of feature channels silenced in training.
        """
        super().__init__()
        self.output = output
        self.norm = nn.BatchNorm2d(sum(dims))
        self.drop = nn.Dropout2d(dropout)
        self.score = nn.Conv2d(sum(dims), len(output.class_names), 1)
        nn.init.normal_(self.score.weight, std=0.01)
        _zero_bias(self.score)

    def fit_statistics(self, maps: Sequence[Sequence[Tensor]]) -> None:
        """Begins the running statistics at those of the training data; see `fit_standards`."""
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        device = self.norm.running_mean.device
        means, variances = [], []
        for block_maps in zip(*maps, strict=True):
            tokens = torch.cat([m.flatten(1) for m in block_maps], dim=1).to(device, torch.float32)
            means.append(tokens.mean(1))
            variances.append(tokens.var(1, correction=0))
        self.norm.running_mean.copy_(torch.cat(means))
        self.norm.running_var.copy_(torch.cat(variances))

    def forward(self, feature_maps: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        """See `Head.forward`."""
        scores = self.score(self.drop(self.norm(torch.cat(feature_maps, dim=1))))
        return F.interpolate(scores, size_hw, mode="bilinear", align_corners=False)


class UPerNetHead(Head):
    """UPerNet on a pyramid made from the maps of a plain transformer.

    Source: Xiao et al. 2018. The maps, early blocks first, become levels of a pyramid, each half as fine as
    the one before; the coarsest is pooled into grids, the others get the coarser result added, and all are
    joined at the finest. Group norm stands for batch norm, since batches are small.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        output: OutputSpec,
        channels: int = 64,
        finest: int = 2,
        dropout: float = 0.1,
    ) -> None:
        """Builds and initialises the head with torch's global generator.

        Args:
            dims: width of each feature map.
            output: with class names.
            channels: width of the pyramid, a multiple of 8.
            finest: resolution of the finest level in units of the patch grid: 1, 2 or 4.
            dropout: share of channels silenced before the scores.

        Raises:
            ConfigError: no feature maps, another `finest`, or channels that are no multiple of 8.
        """
        super().__init__()
        if not dims or finest not in (1, 2, 4) or channels % 8:
            raise ConfigError(
                "the UPerNet head takes feature maps, finest 1, 2 or 4 and a multiple of 8 channels, got "
                f"{len(dims)} maps, {finest} and {channels}"
            )
        self.output = output
        self.standards = nn.ModuleList(Standardize(dim) for dim in dims)
        self.levels = nn.ModuleList(
            Reassemble(dim, channels, scale=finest / 2**i) for i, dim in enumerate(dims)
        )
        self.pools = nn.ModuleList(_block(channels, channels, 1) for _ in POOLS)
        self.pooled = _block(channels * (1 + len(POOLS)), channels, 3)
        self.smooth = nn.ModuleList(_block(channels, channels, 3) for _ in dims[:-1])
        self.fuse = _block(channels * len(dims), channels, 3)
        self.drop = nn.Dropout2d(dropout)
        self.score = nn.Conv2d(channels, len(output.class_names), 1)

    def fit_statistics(self, maps: Sequence[Sequence[Tensor]]) -> None:
        """See `fit_standards`."""
        fit_standards(self.standards, maps)

    def forward(self, feature_maps: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        """See `Head.forward`."""
        steps = zip(self.standards, self.levels, feature_maps, strict=True)
        levels = [level(standard(m)) for standard, level, m in steps]
        levels[-1] = self._pool(levels[-1])
        for index in reversed(range(len(levels) - 1)):
            levels[index] = levels[index] + _resized(levels[index + 1], levels[index])
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=False)]
        joined = [_resized(level, levels[0]) for level in (*smoothed, levels[-1])]
        scores = self.score(self.drop(self.fuse(torch.cat(joined, dim=1))))
        return F.interpolate(scores, size_hw, mode="bilinear", align_corners=False)

    def _pool(self, level: Tensor) -> Tensor:
        pooled = [
            _resized(project(F.adaptive_avg_pool2d(level, side)), level)
            for side, project in zip(POOLS, self.pools, strict=True)
        ]
        joined: Tensor = self.pooled(torch.cat([level, *pooled], dim=1))
        return joined


def fit_standards(standards: nn.ModuleList, maps: Sequence[Sequence[Tensor]]) -> None:
    """Takes mean and deviation of each feature channel.

    Args:
        standards: one `Standardize` per block.
        maps: for each training sample one [D, h, w] per block.
    """
    for standard, block_maps in zip(standards, zip(*maps, strict=True), strict=True):
        assert isinstance(standard, Standardize)
        standard.fit(block_maps)


def _block(inputs: int, outputs: int, side: int) -> nn.Sequential:
    """Convolution, group norm, rectifier."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()
    )


def _resized(source: Tensor, like: Tensor) -> Tensor:
    if source.shape[-2:] == like.shape[-2:]:
        return source
    return F.interpolate(source, like.shape[-2:], mode="bilinear", align_corners=False)


def _zero_bias(layer: nn.Conv2d) -> None:
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
