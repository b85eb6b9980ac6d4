"""The picture that shows at a glance what patches have learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.errors import DataError
from dinov3geo.features.visualize import fit_pca

_LOW_HIGH_PERCENT = (2, 98)


@torch.no_grad()
def pca_grid(backbone: Backbone, images: Tensor) -> NDArray[np.uint8]:
    """Images above, the first three principal components of their patches below.

    One basis serves all images, so that equal colours mean equal features.

    Args:
        backbone: in evaluation mode.
        images: [B, C, H, W], normalised.

    Returns:
        [2 H, B W, 3].
    """
    features = backbone(images)
    patches = features.patches.float().cpu().numpy()
    try:
        basis = fit_pca(patches.reshape(-1, patches.shape[-1]))
        colours = basis.scale(basis.project(patches))
    except DataError:  # a picture of equal features is one grey
        colours = np.full((*patches.shape[:2], 3), 0.5)
    maps = torch.from_numpy(colours).float().transpose(1, 2).unflatten(2, features.grid_hw)
    below = F.interpolate(maps, images.shape[2:], mode="nearest")
    shown = images[:, :3].float().cpu()
    shown = shown if shown.shape[1] == 3 else shown[:, :1].expand(-1, 3, -1, -1)
    low, high = np.percentile(shown.numpy(), _LOW_HIGH_PERCENT, axis=(0, 2, 3))
    above = (shown.numpy() - low[:, None, None]) / np.maximum(high - low, 1e-6)[:, None, None]
    rows = [np.concatenate(list(row), axis=2) for row in (above, below.numpy())]
    grid = np.concatenate(rows, axis=1).transpose(1, 2, 0)
    return (grid.clip(0, 1) * 255).astype(np.uint8)


def normalise(numbers: Tensor, valid: Tensor, normalization: Normalization) -> Tensor:
    """Chips as a network sees them, without any augmentation; pixels without data are 0.

    Args:
        numbers: [B, C, H, W] in the file's dtype.
        valid: [B, H, W] bool.
        normalization: of the run.
    """
    scale, offset, mean, std = (
        torch.tensor(values, device=numbers.device)[:, None, None]
        for values in (
            normalization.scale,
            normalization.offset,
            normalization.mean,
            normalization.std,
        )
    )
    return torch.where(valid[:, None], (numbers.float() * scale + offset - mean) / std, 0.0)


def save_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Writes a PNG under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray(pixels).save(temporary, format="PNG")
    temporary.replace(path)
