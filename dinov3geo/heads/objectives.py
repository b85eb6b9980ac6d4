"""Losses on maps with holes. Pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def patch_gradient_loss(
    predicted: Tensor, target: Tensor, valid: Tensor, *, floor: float, scales: int = 3
) -> Tensor:
    """Difference of local edges, whatever the height: crowns and gaps where the truth has them.

    On logarithms less their mean: 0.3 x |m_P - m_T| + 0.6 x |r_P - r_T| + 0.4 x (1 - cos), each a mean,
    where m is the norm of the Sobel gradient, r its range in 3 x 3 cells, and cos that of the angle between
    the two gradients; averaged over the full resolution, a half and a quarter of it.

    Source: CHMv2 (patch-gradient loss). Cells count where their whole neighbourhood is valid.

    Args:
        predicted: [B, 1, h, w], not negative.
        target: [B, 1, h, w], not negative where valid.
        valid: [B, 1, h, w] bool.
        floor: added before the logarithm, in the target's unit.
        scales: number of resolutions, each half of the one before; those below 5 cells are left out.

    Returns:
        A scalar; 0 if no neighbourhood is valid.
    """
    safe = torch.where(valid, target, 0.0)
    logs = [torch.log(values.clamp(min=0) + floor) for values in (predicted, safe)]
    logs = [values - masked_mean(values, valid) for values in logs]
    terms = []
    for _ in range(scales):
        if min(valid.shape[-2:]) < 5:
            break
        terms.append(_edge_difference(logs[0], logs[1], valid))
        share = F.avg_pool2d(valid.float(), 2)
        logs = [F.avg_pool2d(torch.where(valid, v, 0.0), 2) / share.clamp(min=1e-6) for v in logs]
        valid = share == 1
    return torch.stack(terms).mean() if terms else 0.0 * predicted.sum()


def sobel(values: Tensor) -> tuple[Tensor, Tensor]:
    """Change per cell along columns and rows of [B, 1, h, w], each [B, 1, h - 2, w - 2]."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=values.device) / 8
    return F.conv2d(values, kernel[None, None]), F.conv2d(values, kernel.T[None, None])


def _edge_difference(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    whole = _all_around(valid)
    (px, py), (tx, ty) = sobel(predicted), sobel(target)
    # The offset gives the root a gradient where there is no edge.
    norms = [torch.sqrt(x**2 + y**2 + 1e-8) for x, y in ((px, py), (tx, ty))]
    ranges = [F.max_pool2d(n, 3, stride=1) + F.max_pool2d(-n, 3, stride=1) for n in norms]
    cosine = (px * tx + py * ty + 1e-8) / (norms[0] * norms[1])
    return (
        0.3 * masked_mean((norms[0] - norms[1]).abs(), whole)
        + 0.6 * masked_mean((ranges[0] - ranges[1]).abs(), _all_around(whole))
        + 0.4 * masked_mean(1 - cosine, whole)
    )


def _all_around(valid: Tensor) -> Tensor:
    """Where a cell and its eight neighbours are valid, without the rim."""
    return -F.max_pool2d(-valid.float(), 3, stride=1) == 1


def weighted_cross_entropy(logits: Tensor, classes: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
    """Mean of w_c x cross-entropy over valid cells, divided by the mean w.

    Args:
        logits: [B, K, h, w].
        classes: [B, h, w] positions of classes; anything where not valid.
        valid: [B, h, w] bool.
        weights: [K].

    Returns:
        A scalar; 0 if nothing that counts is valid.
    """
    # -100 is the number that torch leaves out.
    target = torch.where(valid, classes.long(), -100)
    total = F.cross_entropy(logits, target, weight=weights, ignore_index=-100, reduction="sum")
    return total / weights[classes.long()[valid]].sum().clamp(min=1e-12)
