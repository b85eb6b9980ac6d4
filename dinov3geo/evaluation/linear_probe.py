"""A linear layer by stochastic gradient descent, at many learning rates at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
PAPER_STEPS = 12_500
_MOMENTUM, _INITIAL_STD, _REFERENCE_BATCH = 0.9, 0.01, 256


@dataclass(frozen=True, slots=True)
class LinearModels:
    """One linear classifier per learning rate.

    Attributes:
        weights: [L, K, D].
        biases: [L, K].
        mean: [D] subtracted from the features.
        scale: [D] multiplied after that.
        rates: L learning rates.
    """

    weights: Tensor
    biases: Tensor
    mean: Tensor
    scale: Tensor
    rates: tuple[float, ...]

    def scores(self, features: Tensor, index: int) -> Tensor:
        """[N, K] logits of the model with this number."""
        return (features - self.mean) * self.scale @ self.weights[index].T + self.biases[index]

    def best(self, features: Tensor, labels: Tensor, score: Callable[[Tensor, Tensor], float]) -> int:
        """Number of the model that scores best, the first of equals."""
        found = [score(self.scores(features, k), labels) for k in range(len(self.rates))]
        return found.index(max(found))


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of each column, [D] each; a constant column is left out (0)."""
    deviation = features.std(0, correction=0)
    return features.mean(0), torch.where(deviation > 1e-12, 1 / deviation.clamp_min(1e-12), 0.0)


def fit_linear_probes(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    rates: Sequence[float] = PAPER_RATES,
    steps: int = PAPER_STEPS,
    batch_size: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LinearModels:
    """Trains them on the same batches: momentum 0.9, no weight decay, a cosine to zero.

    Features are standardised first, so that one grid of rates serves encoders of any scale.

    Args:
        features: [N, D].
        labels: [N] int64, or [N, K] bool.
        num_classes: K.
        rates: per 256 images of a batch.
        steps: of gradient descent.
        batch_size: images a step, all of them where there are fewer.
        seed: of the first weights and the order of the images.
        progress: called now and then with how many steps are done.

    Source: DINOv3 evaluation protocol (10 x 1250 steps, 13 rates), here without random crops.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, scale = standardization(features)
    inputs = (features - mean) * scale
    batch_size = min(batch_size, len(inputs))
    shape = len(rates), num_classes, inputs.shape[1]
    first = torch.randn(shape[1:], generator=generator) * _INITIAL_STD
    weights, biases = first.expand(shape).clone(), torch.zeros(shape[:2])
    moving = [torch.zeros_like(weights), torch.zeros_like(biases)]
    base = torch.tensor(list(rates)) * batch_size / _REFERENCE_BATCH
    order, place = torch.randperm(len(inputs), generator=generator), 0
    for step in range(steps):
        if place + batch_size > len(inputs):
            order, place = torch.randperm(len(inputs), generator=generator), 0
        chosen = order[place : place + batch_size]
        place += batch_size
        batch = inputs[chosen]
        error = _score_gradient(torch.einsum("bd,lkd->lbk", batch, weights) + biases[:, None], labels[chosen])
        gradients = torch.einsum("lbk,bd->lkd", error, batch), error.sum(1)
        rate = base * (1 + math.cos(math.pi * step / steps)) / 2
        for tensor, speed, gradient in zip((weights, biases), moving, gradients, strict=True):
            speed.mul_(_MOMENTUM).add_(gradient)
            tensor -= rate.view(-1, *[1] * (tensor.ndim - 1)) * speed
        if progress is not None and step % 500 == 0:
            progress(step, steps)
    return LinearModels(weights, biases, mean, scale, tuple(rates))


def _score_gradient(scores: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy for the scores [L, B, K]."""
    if labels.ndim == 2:
        return (scores.sigmoid() - labels.float()) / (scores.shape[1] * scores.shape[2])
    return (scores.softmax(-1) - F.one_hot(labels, scores.shape[-1])) / scores.shape[1]
