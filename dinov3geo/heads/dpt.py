"""Dense prediction head: feature maps of a plain transformer become a pyramid that is fused into one map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.errors import ConfigError
from dinov3geo.heads.base import Head, OutputSpec


class Standardize(nn.Module):
    """Brings each feature channel to mean 0 and deviation 1. [B, D, h, w] -> the same.

    Normed tokens of a small backbone share a large constant part; without it a head learns many times faster.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int) -> None:
        """Begins as the identity."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def fit(self, maps: Sequence[Tensor]) -> None:
        """Takes the statistics of training features, each [D, h, w]."""
        count = sum(m[0].numel() for m in maps)
        # Map by map, and around the mean of the first, so that no digits are lost and no copy of all is made.
        first = maps[0].flatten(1).to(self.mean.device, torch.float32).mean(1)
        total, squares = torch.zeros_like(first), torch.zeros_like(first)
        for feature_map in maps:
            tokens = feature_map.flatten(1).to(self.mean.device, torch.float32) - first[:, None]
            total, squares = total + tokens.sum(1), squares + tokens.square().sum(1)
        self.mean.copy_(first + total / count)
        variance = (squares / count - (total / count) ** 2).clamp(min=0)
        self.deviation.copy_(variance.sqrt().clamp(min=1e-4))

    def forward(self, feature_map: Tensor) -> Tensor:
        """See the class."""
        return (feature_map - self.mean[:, None, None]) / self.deviation[:, None, None]


class Reassemble(nn.Module):
    """One level of the pyramid: [B, D, h, w] -> [B, C, s * h, s * w], s a power of two."""

    def __init__(self, dim: int, channels: int, *, scale: float) -> None:
        """Builds projection and change of resolution.

        Args:
            dim: width D of the feature map.
            channels: width C of the pyramid.
            scale: a power of two, above or below 1.
        """
        super().__init__()
        self.project = nn.Conv2d(dim, channels, 1)
        if scale > 1:
            self.resample: nn.Module = nn.ConvTranspose2d(channels, channels, int(scale), int(scale))
        elif scale == 1:
            self.resample = nn.Identity()
        else:
            # Each halving is a convolution; ceil keeps a last odd row, as the maps' own ceil does.
            halvings = round(math.log2(1 / scale))
            self.resample = nn.Sequential(
                *(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(halvings))
            )
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, feature_map: Tensor) -> Tensor:
        """See the class."""
        output: Tensor = self.mix(self.resample(self.project(feature_map)))
        return output


class ResidualUnit(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; no batch statistics. [B, C, h, w] -> the same."""

    def __init__(self, channels: int) -> None:
        """Builds the two convolutions."""
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        output: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return output


class Fusion(nn.Module):
    """Adds the coarser result to one level of the pyramid and refines the sum."""

    def __init__(self, channels: int, *, has_coarser: bool) -> None:
        """Builds the residual units; the coarsest level has nothing to add."""
        super().__init__()
        self.lateral = ResidualUnit(channels) if has_coarser else None
        self.refine = ResidualUnit(channels)

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        """[B, C, h, w] and a coarser [B, C, h', w'] or None -> [B, C, h, w]."""
        if self.lateral is not None and coarser is not None:
            resized = F.interpolate(coarser, level.shape[-2:], mode="bilinear", align_corners=False)
            level = resized + self.lateral(level)
        output: Tensor = self.refine(level)
        return output


class HeightBins(nn.Module):
    """Scores per bin become metres: the expectation over centres that mix log and linear spacing.

    Source: CHMv2, `hub/depthers.py`; t runs from 1 (log) at the lowest bin to 0 (linear) at the highest.
    """

    centres: Tensor

    def __init__(self, count: int, *, minimum: float, maximum: float) -> None:
        """Computes the centres.

        Args:
            count: number of bins.
            minimum: lowest centre in metres, above 0 (it is spaced in logarithms).
            maximum: highest centre in metres.
        """
        super().__init__()
        share = torch.linspace(1, 0, count)
        logarithmic = torch.exp(torch.linspace(math.log(minimum), math.log(maximum), count))
        centres = share * logarithmic + (1 - share) * torch.linspace(minimum, maximum, count)
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        """[B, bins, h, w] -> [B, 1, h, w] metres."""
        # The shift keeps the sum away from zero where the rectifier silences every bin.
        weights = F.relu(scores) + 1e-4
        expected = torch.einsum("bkhw,k->bhw", weights, self.centres) / weights.sum(1)
        return expected[:, None]


class DPTHead(Head):
    """Small DPT for one positive quantity, or for the scores of classes where `output` names any.

    The maps, ordered from early to late blocks, become levels of a pyramid, each half as fine as the one
    before, which are fused from coarse to fine. The result is decoded at the finest level and enlarged to
    the size asked for. DPT's own pyramid begins at 4 times the patch grid; nearly all the work is done
    there, so begin no finer than the targets are.

    Source: Ranftl et al. 2021 (DPT); no batch norm and Kaiming initialisation as in CHMv2.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        output: OutputSpec,
        channels: int = 64,
        finest: int = 2,
        dropout: float = 0.1,
        bins: int = 0,
        typical: float = 10.0,
    ) -> None:
        """Builds and initialises the head with torch's global generator.

        Args:
            dims: width of each feature map.
            output: what the numbers mean; bins end at its maximum.
            channels: width of the pyramid.
            finest: resolution of the finest level in units of the patch grid: 1, 2 or 4.
            dropout: share of feature channels silenced in training.
            bins: number of height bins, or 0 to regress directly through a softplus.
            typical: value that an untrained head with `bins=0` predicts, in the output's unit.

        Raises:
            ConfigError: no feature maps, another `finest`, or bins without a maximum.
        """
        super().__init__()
        if not dims or finest not in (1, 2, 4):
            raise ConfigError(
                f"the DPT head takes feature maps and finest 1, 2 or 4, got {len(dims)} maps and {finest}"
            )
        if bins and (output.maximum is None or output.class_names):
            raise ConfigError("height bins need an output maximum and no class names")
        self.output = output
        self.drop = nn.Dropout2d(dropout)
        self.standards = nn.ModuleList(Standardize(dim) for dim in dims)
        self.levels = nn.ModuleList(
            Reassemble(dim, channels, scale=finest / 2**i) for i, dim in enumerate(dims)
        )
        self.fusions = nn.ModuleList(
            Fusion(channels, has_coarser=i + 1 < len(dims)) for i in range(len(dims))
        )
        self.hidden = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.score = nn.Conv2d(channels // 2, len(output.class_names) or bins or 1, 1)
        self.bins = HeightBins(bins, minimum=1e-3, maximum=output.maximum or 0.0) if bins else None
        self._reset_parameters(typical)

    def _reset_parameters(self, typical: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualUnit):
                # Units begin as the identity, so the sum over levels does not grow with their number.
                nn.init.zeros_(module.second.weight)
        if self.bins is None and self.score.bias is not None:
            nn.init.normal_(self.score.weight, std=0.01)
        if self.bins is None and self.score.bias is not None and not self.output.class_names:
            nn.init.constant_(self.score.bias, typical + math.log(-math.expm1(-typical)))

    def fit_statistics(self, maps: Sequence[Sequence[Tensor]]) -> None:
        """Takes mean and deviation of each feature channel.

        Args:
            maps: for each training sample one [D, h, w] per block.
        """
        for standard, block_maps in zip(self.standards, zip(*maps, strict=True), strict=True):
            assert isinstance(standard, Standardize)
            standard.fit(block_maps)

    def forward(self, feature_maps: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        """Predicts a map.

        Args:
            feature_maps: one [B, D, h, w] per block, early blocks first.
            size_hw: rows and columns that the maps cover, in pixels.

        Returns:
            [B, 1, H, W], not negative, in `output.unit`; or [B, K, H, W] scores of classes.
        """
        steps = zip(self.standards, self.levels, feature_maps, strict=True)
        levels = [level(self.drop(standard(m))) for standard, level, m in steps]
        fused: Tensor | None = None
        for fusion, level in zip(reversed(self.fusions), reversed(levels), strict=True):
            fused = fusion(level, fused)
        assert fused is not None
        scores = self.score(F.relu(self.hidden(F.relu(fused))))
        if self.output.class_names:
            return F.interpolate(scores, size_hw, mode="bilinear", align_corners=False)
        decoded = F.softplus(scores) if self.bins is None else self.bins(scores)
        return F.interpolate(decoded, size_hw, mode="bilinear", align_corners=False)
