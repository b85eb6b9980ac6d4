"""How well masks agree: region J and boundary F of the DAVIS benchmark."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

BOUND_SHARE = 0.008
"""Of the diagonal: how far a boundary may be off."""


def region_similarity(predicted: Tensor, truth: Tensor) -> float:
    """J, intersection over union of [H, W] bool masks; 1 where both are empty."""
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else 1.0


def boundary_map(mask: Tensor) -> Tensor:
    """[H, W] bool, True at pixels that differ from the one to the right, below, or both."""
    padded = F.pad(mask[None].float(), (0, 1, 0, 1), mode="replicate")[0].bool()
    right, below, across = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ across)


def boundary_f(predicted: Tensor, truth: Tensor, *, bound_share: float = BOUND_SHARE) -> float:
    """F, harmonic mean of precision and recall of boundary pixels within a tolerance.

    Args:
        predicted: [H, W] bool.
        truth: [H, W] bool.
        bound_share: tolerance as a share of the diagonal, rounded up to whole pixels.

    Source: Perazzi et al. 2016 (DAVIS).
    """
    reach = math.ceil(bound_share * math.hypot(*truth.shape))
    own, true = boundary_map(predicted), boundary_map(truth)
    if not own.any() or not true.any():
        return float(not own.any() and not true.any())
    precision = int((own & _dilate(true, reach)).sum()) / int(own.sum())
    recall = int((true & _dilate(own, reach)).sum()) / int(true.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def j_and_f(predicted: Tensor, truth: Tensor, *, labels: list[int] | None = None) -> tuple[float, float]:
    """Mean J and mean F over the objects.

    Args:
        predicted: [H, W] labels, 0 for the background.
        truth: likewise.
        labels: objects to score, None for those in `truth`.

    Raises:
        ValueError: no object to score, or masks of different sizes.
    """
    objects = [k for k in truth.unique().tolist() if k] if labels is None else labels
    if not objects or predicted.shape != truth.shape:
        raise ValueError(f"nothing to compare: objects {objects}, {predicted.shape}, {truth.shape}")
    pairs = [(predicted == k, truth == k) for k in objects]
    j = sum(region_similarity(*pair) for pair in pairs) / len(pairs)
    f = sum(boundary_f(*pair) for pair in pairs) / len(pairs)
    return j, f


def _dilate(mask: Tensor, reach: int) -> Tensor:
    """Grows a mask by a disk, row of the disk by row."""
    height, width = mask.shape
    grown = mask.clone()
    for step in range(-reach, reach + 1):
        half = math.isqrt(reach**2 - step**2)
        wide = F.max_pool2d(mask[None].float(), (1, 2 * half + 1), stride=1, padding=(0, half))[0].bool()
        top, bottom = max(step, 0), min(height, height + step)
        grown[top:bottom] |= wide[top - step : bottom - step]
    return grown[:, :width]
