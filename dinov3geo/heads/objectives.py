"""Regression losses on maps with holes. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid entries; 0 (with a gradient path) where there are none.

    Args:
        values: any shape.
        valid: bool of the same shape.

    Returns:
        A scalar.
    """
    # where, not a product: a NaN in a hole would survive a multiplication by zero.
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def silog_loss(
    predicted: Tensor, target: Tensor, valid: Tensor, *, floor: float, mean_weight: float
) -> Tensor:
    """Scale-invariant logarithmic loss: sqrt(var(d) + w * mean(d)^2), d = log(p + floor) - log(t + floor).

    Source: Eigen et al. 2014, eq. 4, in the form of the DINOv3 depth evaluation (w = 0.15).

    Args:
        predicted: [B, 1, h, w], not negative.
        target: [B, 1, h, w], not negative where valid.
        valid: [B, 1, h, w] bool.
        floor: added before the logarithm, in the target's unit; keeps zeros finite.
        mean_weight: w; 0 ignores a common factor, 1 gives the root mean square.

    Returns:
        A scalar; 0 if nothing is valid.
    """
    safe = torch.where(valid, target, 0.0)
    difference = torch.log(predicted.clamp(min=0) + floor) - torch.log(safe.clamp(min=0) + floor)
    mean = masked_mean(difference, valid)
    variance = masked_mean((difference - mean) ** 2, valid)
    # The square root has no gradient at 0; the offset is far below any loss that matters.
    return torch.sqrt(variance + mean_weight * mean**2 + 1e-8)


def charbonnier_loss(predicted: Tensor, target: Tensor, valid: Tensor, *, scale: float) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c: squared for errors far below c, absolute far above.

    Source: Charbonnier et al. 1994.

    Args:
        predicted: [B, 1, h, w].
        target: [B, 1, h, w].
        valid: [B, 1, h, w] bool.
        scale: c, in the target's unit.

    Returns:
        A scalar; 0 if nothing is valid.
    """
    difference = torch.where(valid, predicted - target, 0.0)
    return masked_mean(torch.sqrt(difference**2 + scale**2) - scale, valid)
