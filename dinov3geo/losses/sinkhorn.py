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
    all samples' sums. It runs on logarithms: a sample far below the largest logit keeps its target.

    Args:
        logits: [N, K], any float dtype.
        temperature: of the teacher.
        iterations: of the two normalisations.
        group: processes whose samples form one problem; None for this process alone.

    Returns:
        [N, K] float32, rows sum to 1.

    Source: Caron et al. 2020 (SwAV), listing 1; Siméoni et al. 2025 (DINOv3) uses 3 iterations.
    """
    log_assignment = logits.float() / temperature  # [N, K]
    for _ in range(iterations):
        log_assignment = log_assignment - _log_prototype_sums(log_assignment, group)
        log_assignment = log_assignment - log_assignment.logsumexp(1, keepdim=True)
    return log_assignment.exp()


def _log_prototype_sums(log_assignment: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Logarithm of each prototype's sum over the samples of all processes, [K]."""
    if group is None:
        # Without samples there is nothing to subtract from.
        return log_assignment.logsumexp(0) if len(log_assignment) else log_assignment.new_zeros(())
    lowest = torch.finfo(torch.float32).min
    peak = log_assignment.amax(0) if len(log_assignment) else log_assignment.new_full((), lowest)
    peak = peak.expand(log_assignment.shape[1]).clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    sums = (log_assignment - peak).exp().sum(0)
    dist.all_reduce(sums, group=group)
    return peak + sums.log()
