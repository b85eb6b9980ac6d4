"""Entropy regulariser that spreads the class tokens over the sphere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist


def koleo_loss(vectors: Tensor, *, group: dist.ProcessGroup | None = None, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko term: minus the mean log distance to the nearest neighbour.

    Args:
        vectors: [B, D], any scale; one crop per image, B of at least 2 over the group.
        group: processes whose vectors are neighbours too; None for this process alone.
        eps: keeps distance and logarithm finite where two vectors coincide.

    Returns:
        Scalar float32, the mean over this process's own vectors.

    Raises:
        ValueError: a single vector has no neighbour.

    Source: Sablayrolles et al. 2019; eps as in DINOv2.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        own = F.normalize(vectors.float(), dim=-1, eps=eps)
        pool, offset = own, 0
        if group is not None:
            pool = _Gather.apply(own, group)
            offset = dist.get_rank(group) * len(own)
        if len(pool) < 2:
            raise ValueError(
                "KoLeo needs at least 2 images in the batch; raise the batch size or set its weight to 0"
            )
        with torch.no_grad():
            similarity = own @ pool.T  # [B, pool]
            own_index = torch.arange(len(own), device=own.device)
            # Below any cosine: at -1 a vector could be taken for its own neighbour.
            similarity[own_index, own_index + offset] = -2
            nearest = similarity.argmax(1)
        distances = F.pairwise_distance(own, pool[nearest], eps=eps)
        return -torch.log(distances + eps).mean()


class _Gather(torch.autograd.Function):
    """The vectors of all processes, [B, D] each -> [W * B, D]; gradients find their way back."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN401
        ctx.group, ctx.count = group, len(own)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        summed = outer.contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.count
        return summed[start : start + ctx.count], None
