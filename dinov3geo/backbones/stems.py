"""The first convolution for another set of bands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov3geo.backbones.card import RGB
from dinov3geo.errors import ConfigError

STEMS = ("mean", "zero")


def needs_choice(source: Sequence[str], target: Sequence[str]) -> bool:
    """Whether kernels must be made up or left out: not if the bands are only in another order."""
    return sorted(source) != sorted(target)


def adapt_stem(kernels: Tensor, source: Sequence[str], target: Sequence[str], *, how: str | None) -> Tensor:
    """Kernels for other bands.

    Bands of the same name keep their kernels. With `how="mean"` new bands get the mean of the red, green and
    blue kernels (of all, if one of these is missing), and everything is multiplied by C / N so that
    activations keep their size; with `"zero"` new bands begin at zero, and nothing is rescaled.

    Source: DINOv3 paper on Open-Canopy (mean of the RGB kernels); its FINO branch (rescaling).

    Args:
        kernels: [D, C, k, k].
        source: names of the C bands.
        target: names of the N bands wanted.
        how: one of `STEMS`; None only if the bands are the same in any order.

    Returns:
        [D, N, k, k].

    Raises:
        ConfigError: no choice where one is needed, a band named twice, or no band.
    """
    if not target or len(set(target)) != len(target):
        raise ConfigError(f"bands must be named once each, got {', '.join(target) or 'none'}")
    if not needs_choice(source, target):
        return kernels[:, [source.index(band) for band in target]]
    if how not in STEMS:
        raise ConfigError(
            f"the weights take {len(source)} bands ({', '.join(source)}) and {len(target)} are wanted "
            f"({', '.join(target)}); say how to adapt the stem: {' or '.join(STEMS)}"
            + ("" if how is None else f", not {how!r}")
        )
    visible = [source.index(b) for b in RGB] if set(RGB) <= set(source) else list(range(len(source)))
    new = kernels[:, visible].mean(1) if how == "mean" else torch.zeros_like(kernels[:, 0])
    adapted = torch.stack([kernels[:, source.index(b)] if b in source else new for b in target], dim=1)
    return adapted * (len(source) / len(target)) if how == "mean" else adapted
