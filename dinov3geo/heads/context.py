"""A head that looks around: principal components of features and of their surroundings, then a small MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.errors import ConfigError
from dinov3geo.heads.base import Head, OutputSpec
from dinov3geo.heads.dpt import HeightBins, Standardize

# Sides in patches of the squares over which features are averaged; 16 pixels of 0.1 m make 8, 14 and 40 m.
SURROUNDINGS = (5, 9, 25)
_MAX_TOKENS = 20_000


class ComponentDecoder(Head):
    """The trained part of a `ContextHead`: an MLP on each patch's components, then bilinear to pixels."""

    def __init__(
        self,
        components: int,
        *,
        output: OutputSpec,
        hidden: int,
        dropout: float,
        typical: float,
        bins: int = 0,
    ) -> None:
        """Builds the MLP; arguments as in `ContextHead`."""
        super().__init__()
        self.output = output
        self.mlp = nn.Sequential(
            nn.Dropout(dropout),
            nn.Conv2d(components, hidden, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Conv2d(hidden, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, bins or 1, 1),
        )
        self.bins = HeightBins(bins, minimum=1e-3, maximum=output.maximum or 0.0) if bins else None
        last = self.mlp[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        if self.bins is None:
            nn.init.constant_(last.bias, typical)

    def forward(self, feature_maps: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        """See `Head.forward`; the one map holds the components."""
        scores: Tensor = self.mlp(feature_maps[0])
        heights = scores if self.bins is None else self.bins(scores)
        return F.interpolate(heights, size_hw, mode="bilinear", align_corners=False)


class ContextHead(Head):
    """Patch features and their means over surrounding squares -> one height per patch -> pixels.

    Most numbers are principal components, which need no labels; only a small MLP with dropout is fitted to
    heights. It sees further than a small `DPTHead`, which is the better one on a bank of filters
    (benchmarks/results/2026-11-29_filters).
    """

    basis: Tensor
    centre: Tensor

    def __init__(
        self,
        dims: Sequence[int],
        *,
        output: OutputSpec,
        components: int = 64,
        hidden: int = 64,
        dropout: float = 0.3,
        typical: float = 10.0,
        bins: int = 0,
        members: int = 1,
    ) -> None:
        """Builds the head; `fit_statistics` must see training features before it is trained.

        Args:
            dims: width D of each feature map.
            output: what the numbers mean.
            components: principal components that are kept.
            hidden: width of the MLP.
            dropout: share of its inputs silenced in training.
            typical: value that the untrained head gives, in the output's unit.
            bins: number of height bins, or 0 to regress directly.
            members: MLPs, each fitted on its own, whose mean is the prediction.

        Raises:
            ConfigError: bins without a maximum.
        """
        if bins and output.maximum is None:
            raise ConfigError("height bins need an output maximum")
        super().__init__()
        self.output = output
        self.standardize = nn.ModuleList(Standardize(dim) for dim in dims)
        width = sum(dims) * (1 + len(SURROUNDINGS))
        self.register_buffer("basis", torch.zeros(components, width))
        self.register_buffer("centre", torch.zeros(width))
        made = [
            ComponentDecoder(
                components, output=output, hidden=hidden, dropout=dropout, typical=typical, bins=bins
            )
            for _ in range(members)
        ]
        self.decoder, self.others = made[0], nn.ModuleList(made[1:])

    @property
    def members(self) -> list[ComponentDecoder]:
        """The trained parts."""
        return [self.decoder, *(m for m in self.others if isinstance(m, ComponentDecoder))]

    def fit_statistics(self, samples: Sequence[Sequence[Tensor]]) -> None:
        """Takes scale and principal components from training features.

        Args:
            samples: per sample one [D, h, w] per map.
        """
        for index, standardize in enumerate(self.standardize):
            assert isinstance(standardize, Standardize)
            standardize.fit([sample[index] for sample in samples])
        device = self.basis.device
        with torch.no_grad():
            tokens = torch.cat(
                [self._surroundings([m.to(device).float()[None] for m in s])[0].flatten(1).T for s in samples]
            )
        tokens = tokens[:: max(len(tokens) // _MAX_TOKENS, 1)]
        self.centre.copy_(tokens.mean(0))
        centred = tokens - self.centre
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        # The first component gets deviation 1, the others keep their size relative to it.
        kept = directions.T.flip(0)[: len(self.basis)] / variances[-1].clamp_min(1e-12).sqrt()
        self.basis.zero_()
        self.basis[: len(kept)] = kept

    def forward(self, feature_maps: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        """See `Head.forward`."""
        components = [self.components(feature_maps)]
        heights = [member(components, size_hw) for member in self.members]
        return torch.stack(heights).mean(0)

    def components(self, feature_maps: list[Tensor]) -> Tensor:
        """The principal components that the decoder reads, [B, K, h, w]; training does not change them."""
        around = self._surroundings(feature_maps) - self.centre[:, None, None]
        return torch.einsum("kd,bdhw->bkhw", self.basis, around)

    def _surroundings(self, feature_maps: list[Tensor]) -> Tensor:
        """Standardised features beside their means over squares, [B, (1 + squares) D, h, w]."""
        scaled = [scale(m) for scale, m in zip(self.standardize, feature_maps, strict=True)]
        features = torch.cat(scaled, dim=1)
        means = [
            F.avg_pool2d(features, side, stride=1, padding=side // 2, count_include_pad=False)
            for side in SURROUNDINGS
        ]
        return torch.cat([features, *means], dim=1)
