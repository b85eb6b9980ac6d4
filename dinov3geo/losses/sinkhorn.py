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
    all samples' sums. The maximum of the batch is subtracted first; the result does not depend on it.

    Args:
        logits: [N, K], any float dtype.
        temperature: of the teacher.
        iterations: of the two normalisations.
        group: processes whose samples form one problem; None for this process alone.

    Returns:
        [N, K] float32, rows sum to 1.

    Source: Caron et al. 2020 (SwAV), listing 1; Siméoni et al. 2025 (DINOv3) uses 3 iterations.
    """
    scaled = logits.float() / temperature
    if scaled.shape[0] == 0 and group is None:
        return scaled
    peak = scaled.max() if scaled.numel() else scaled.new_full((), -torch.inf)
    if group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    assignment = (scaled - peak).exp_()  # [N, K]
    for _ in range(iterations):
        prototype_sums = assignment.sum(0)
        if group is not None:
            dist.all_reduce(prototype_sums, group=group)
        # A prototype that no sample reaches keeps its zeros instead of becoming 0 / 0.
        assignment /= prototype_sums.clamp_min(torch.finfo(torch.float32).tiny)
        assignment /= assignment.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return assignment
