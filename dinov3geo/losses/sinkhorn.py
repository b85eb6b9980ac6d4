"""Balanced soft assignment of teacher outputs to prototypes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def sinkhorn_knopp(
    logits: Tensor,
    temperature: float,
    *,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Teacher targets in which every prototype is used equally over the batch.

    Starting from Q = exp(logits / temperature), each iteration makes all prototypes' sums equal, then
    all samples' sums. Q is held as fixed numbers times a factor per prototype and one per sample, so that
    an iteration reads them twice and writes nothing; the fixed numbers are scaled such that the largest
    of every row and of every column is 1, and no sample and no prototype can underflow.

    Args:
        logits: [N, K], any float dtype.
        temperature: of the teacher.
        iterations: of the two normalisations, at least 1.
        group: processes whose samples form one problem; None for this process alone.

    Returns:
        [N, K] float32, rows sum to 1.

    Source: Caron et al. 2020 (SwAV), listing 1; Siméoni et al. 2025 (DINOv3) uses 3 iterations.
    """
    # Autocast would round the sums to bfloat16.
    with torch.autocast(logits.device.type, enabled=False):
        scaled = logits.float() * (1 / temperature)  # [N, K], a copy
        scaled -= _prototype_peaks(scaled, group)
        peaks = scaled.amax(1) if len(scaled) else scaled.new_zeros(0)  # not above 0
        fixed = scaled.sub_(peaks[:, None]).exp_()
        of_sample = peaks.exp()
        of_prototype = fixed.new_ones(fixed.shape[1])
        for _ in range(iterations):
            sums = of_sample @ fixed
            if group is not None:
                dist.all_reduce(sums, group=group)
            of_prototype = sums.amin() / sums  # any common factor cancels; without it they drift
            of_sample = 1 / (fixed @ of_prototype)
        return fixed.mul_(of_prototype).mul_(of_sample[:, None])


def _prototype_peaks(scaled: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Each prototype's largest number over the samples of all processes, [K]."""
    if len(scaled):
        peaks = scaled.amax(0)
    else:
        peaks = scaled.new_full((scaled.shape[1],), torch.finfo(torch.float32).min)
    if group is not None:
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=group)
    return peaks
