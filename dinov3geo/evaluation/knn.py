"""Nearest neighbours: the weighted vote of DINO and the plain vote of torchgeo-bench."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_KS = (10, 20, 100, 200)
PAPER_TEMPERATURE = 0.07
# Similarities held at a time: 64 MiB of float32.
_CHUNK = 1 << 24


def weighted_votes(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int] = PAPER_KS,
    temperature: float = PAPER_TEMPERATURE,
) -> dict[int, Tensor]:
    """Class scores by cosine similarity, each neighbour weighted by a softmax.

    The softmax runs once over the largest k, and a smaller k sums the first of its weights, as DINOv3 does.

    Args:
        train: [N, D], any scale.
        labels: [N] int64, or [N, K] bool where an image has several classes.
        queries: [M, D].
        num_classes: K.
        ks: numbers of neighbours; those above N count as N.
        temperature: of the softmax.

    Returns:
        Per k the scores [M, K].

    Raises:
        ValueError: no training image, or a k below 1.

    Source: Wu et al. 2018 (weighted kNN); DINOv3 evaluation protocol.
    """
    _check(train, ks)
    similarity, nearest = _nearest(
        F.normalize(train.float(), dim=-1), F.normalize(queries.float(), dim=-1), ks
    )
    weights = (similarity / temperature).softmax(1)
    targets = one_hot(labels, num_classes)
    return {k: _sum_votes(weights[:, :k], targets, nearest[:, :k]) for k in ks}


def majority_votes(train: Tensor, labels: Tensor, queries: Tensor, *, num_classes: int, k: int = 5) -> Tensor:
    """Shares of the k nearest by Euclidean distance on raw features, as torchgeo-bench counts them.

    Args:
        train: [N, D].
        labels: [N] int64, or [N, K] bool.
        queries: [M, D].
        num_classes: K.
        k: neighbours; all of them where there are fewer.

    Returns:
        [M, K] shares; `argmax` takes the first of equal classes.

    Raises:
        ValueError: see `weighted_votes`.
    """
    _check(train, [k])
    train, queries = train.float(), queries.float()
    # |q - t|^2 without |q|^2, which is the same for all neighbours, as one product; centred, so that float32
    # does not lose a small distance in large numbers.
    centre = train.mean(0)
    train, queries = train - centre, queries - centre
    longer = torch.cat([2 * train, -train.square().sum(1, keepdim=True)], dim=1)
    _, nearest = _nearest(longer, torch.cat([queries, queries.new_ones(len(queries), 1)], dim=1), [k])
    weights = torch.full(nearest.shape, 1 / nearest.shape[1], device=train.device)
    return _sum_votes(weights, one_hot(labels, num_classes), nearest)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """[N, K] float32 of class numbers [N], or of memberships [N, K]."""
    if labels.ndim == 2:
        return labels.float()
    return F.one_hot(labels.long(), num_classes).float()


def _check(train: Tensor, ks: Sequence[int]) -> None:
    if not len(train) or not ks or min(ks) < 1:
        raise ValueError(f"kNN needs training images and k >= 1, got {len(train)} images and k {list(ks)}")


def _nearest(train: Tensor, queries: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Largest products and where they are, [M, max k] each."""
    k = min(max(ks), len(train))
    rows = max(1, _CHUNK // len(train))
    found = [(part @ train.T).topk(k, dim=1) for part in queries.split(rows)]
    if not found:
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=queries.device)
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])


def _sum_votes(weights: Tensor, targets: Tensor, nearest: Tensor) -> Tensor:
    votes = weights.new_zeros(len(weights), targets.shape[1])
    for column in range(weights.shape[1]):
        votes += weights[:, column, None] * targets[nearest[:, column]]
    return votes
