"""Cross-entropy with soft targets over many prototypes, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers handled at once: 2 MiB of float32 stay in a CPU's cache, a GPU wants long kernels.
_CHUNK = {"cpu": 2**19}
_CHUNK_ELSEWHERE = 2**27


def soft_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """Weighted sum of `-sum_k target[k] * log softmax(logits / temperature)[k]`.

    The gradient is formed together with the value, chunk of rows by chunk of rows, so that of the many
    arrays of the logits' size that the plain formula makes (scaled logits, log-probabilities, products,
    probabilities, and their gradients) only the gradient is ever held.

    Args:
        logits: [G, R, K], any float dtype.
        targets: [R, K] float32, the same for every g; rows may sum to any number.
        weights: [R] float32.
        temperature: of the softmax.

    Returns:
        Scalar float32: the sum over g and r of weight times cross-entropy.
    """
    total: Tensor = _SoftCrossEntropy.apply(logits, targets, weights, 1 / temperature)
    return total


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, scale: float) -> Tensor:  # noqa: ANN401
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        rows = max(1, _CHUNK.get(logits.device.type, _CHUNK_ELSEWHERE) // max(logits.shape[-1], 1))
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        # Written over again for every chunk: fresh memory costs more than the arithmetic.
        scratch = torch.empty(rows, logits.shape[-1], dtype=torch.float32, device=logits.device)
        # Autocast would round the products to bfloat16.
        with torch.autocast(logits.device.type, enabled=False):
            for start in range(0, targets.shape[0], rows):
                chunk = slice(start, start + rows)
                target, weight = targets[chunk], weights[chunk]
                mass = target.sum(1)
                for group, group_logits in enumerate(logits):
                    scaled = scratch[: len(target)].copy_(group_logits[chunk]).mul_(scale)
                    # Not bmm: a batch of row-times-column products takes 27 times as long on a CPU.
                    agreement = torch.linalg.vecdot(scaled, target)
                    peak = scaled.amax(1)
                    exponentials = scaled.sub_(peak[:, None]).exp_()
                    sums = exponentials.sum(1)
                    total += (weight * (mass * (sums.log() + peak) - agreement)).sum()
                    if gradient is not None:
                        exponentials.mul_((mass / sums)[:, None]).sub_(target)
                        gradient[group, chunk].copy_(exponentials.mul_((weight * scale)[:, None]))
        ctx.gradient = gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None, None]:  # noqa: ANN401
        gradient = ctx.gradient
        ctx.gradient = None
        return (None if gradient is None else gradient.mul_(outer)), None, None, None
