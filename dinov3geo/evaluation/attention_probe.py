"""Attention pooling: one learned query looks at all patches of an image, a linear layer names its class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.errors import DataError

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
EPOCHS = 20
_BATCH, _WEIGHT_DECAY, _WARMUP_SHARE = 64, 0.01, 0.1
_STATISTICS_IMAGES = 500


class AttentionPooling(nn.Module):
    """[B, P, D] patches -> [B, K] scores.

    The weights of the patches are the softmax of query x key / sqrt(width of a head); the pooled values of
    all heads go through one linear layer. The query begins at 0, where all patches weigh the same.

    Source: the attentive probe of frozen features as in AIM (El-Nouby et al. 2024), with one query.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, num_classes: int, *, num_heads: int = 1) -> None:
        """Builds the layers with torch's global generator.

        Args:
            dim: width D of the patches.
            num_classes: K.
            num_heads: parts of the width that attend on their own.

        Raises:
            ValueError: heads that do not divide the width.
        """
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the width {dim}")
        self.num_heads = num_heads
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.query = nn.Parameter(torch.zeros(dim))
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.score = nn.Linear(dim, num_classes)

    def weights(self, patches: Tensor) -> Tensor:
        """What each patch counts, [B, heads, P]; rows sum to 1."""
        keys = self.key((patches - self.mean) * self.scale).unflatten(-1, (self.num_heads, -1))
        query = self.query.unflatten(0, (self.num_heads, -1))
        scores = torch.einsum("bphd,hd->bhp", keys, query) / math.sqrt(query.shape[-1])
        return scores.softmax(-1)

    def forward(self, patches: Tensor) -> Tensor:
        """See the class."""
        values = self.value((patches - self.mean) * self.scale).unflatten(-1, (self.num_heads, -1))
        pooled = torch.einsum("bhp,bphd->bhd", self.weights(patches), values).flatten(1)
        scores: Tensor = self.score(pooled)
        return scores


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The probe that scored best on validation images, its learning rate and its score there."""

    probe: AttentionPooling
    rate: float
    score: float


def num_heads(dim: int) -> int:
    """Heads of about 64 columns each; 1 where these do not divide the width."""
    wanted = max(1, round(dim / 64))
    return wanted if dim % wanted == 0 else 1


def fit_attention(
    patches: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    rate: float,
    epochs: int = EPOCHS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> AttentionPooling:
    """Trains a probe with AdamW, a linear rise and a cosine to 0.

    Args:
        patches: [N, P, D], float16 or float32.
        labels: [N] int64, or [N, K] bool.
        num_classes: K.
        rate: learning rate at its peak.
        epochs: passes over the images.
        seed: of the first weights and the order.
        progress: called with how many epochs are done.

    Raises:
        DataError: the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = AttentionPooling(patches.shape[2], num_classes, num_heads=num_heads(patches.shape[2]))
    some = patches[:: max(1, len(patches) // _STATISTICS_IMAGES)].float().flatten(0, 1)
    deviation = some.std(0, correction=0)
    probe.mean.copy_(some.mean(0))
    # A constant column says nothing.
    probe.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0.0))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=_WEIGHT_DECAY)
    total, step = epochs * -(-len(patches) // _BATCH), 0
    for epoch in range(epochs):
        for chosen in torch.randperm(len(patches), generator=generator).split(_BATCH):
            done = step / total
            rise = min(1.0, (step + 1) / max(_WARMUP_SHARE * total, 1.0))
            for group in optimizer.param_groups:
                group["lr"] = rate * rise * 0.5 * (1 + math.cos(math.pi * done))
            scores = probe(patches[chosen].float())
            truth = labels[chosen]
            loss = (
                F.binary_cross_entropy_with_logits(scores, truth.float())
                if truth.ndim == 2
                else F.cross_entropy(scores, truth)
            )
            if not torch.isfinite(loss):
                raise DataError(f"attention pooling diverges at a learning rate of {rate:g}; lower it")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        if progress is not None:
            progress(epoch + 1, epochs)
    return probe.eval().requires_grad_(False)


def choose_attention(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    score: Callable[[Tensor, Tensor], float],
    rates: Sequence[float] = RATES,
    epochs: int = EPOCHS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> AttentionChoice:
    """Trains one probe per learning rate and keeps the best on validation images, the first of equals.

    Args:
        train: patches [N, P, D] and labels.
        validation: likewise.
        num_classes: K.
        score: of scores and labels, the larger the better.
        rates: learning rates.
        epochs: see `fit_attention`.
        seed: likewise.
        progress: called with how many rates are done.
    """
    found: list[AttentionChoice] = []
    for done, rate in enumerate(rates):
        if progress is not None:
            progress(done, len(rates))
        probe = fit_attention(*train, num_classes=num_classes, rate=rate, epochs=epochs, seed=seed)
        found.append(
            AttentionChoice(probe, rate, score(attention_scores(probe, validation[0]), validation[1]))
        )
    return max(found, key=lambda choice: choice.score)


@torch.no_grad()
def attention_scores(probe: AttentionPooling, patches: Tensor) -> Tensor:
    """[N, K] scores of [N, P, D] patches, some images at a time."""
    return torch.cat([probe(part.float()) for part in patches.split(_BATCH)])
