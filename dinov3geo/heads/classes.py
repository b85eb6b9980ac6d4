"""Fitting classes: weighted cross-entropy, judged by the mean intersection over union."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dinov3geo.heads.fit import FitSettings, Scorer
from dinov3geo.heads.objectives import weighted_cross_entropy

ClassWeights = Literal["none", "sqrt", "balanced"]


class ClassFitSettings(FitSettings):
    """How a head for classes is fitted.

    Attributes:
        class_weights: weights of pixels in the loss: `"none"`, `"balanced"` (one over the class's share) or
            `"sqrt"` (the root of that); each with mean 1 over all pixels and times the class's own weight.
    """

    epochs: int = Field(default=40, ge=1)
    batch_pixels: int = Field(default=131_072, ge=1)
    weight_decay: float = Field(default=0.01, ge=0)
    class_weights: ClassWeights = "sqrt"


class ClassObjective:
    """Weighted cross-entropy."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Takes the weight of each class."""
        self.weights = torch.tensor(list(weights), dtype=torch.float32)

    def loss(self, predicted: Tensor, target: Tensor, valid: Tensor, done: float) -> Tensor:
        """See `Objective.loss`."""
        return weighted_cross_entropy(predicted, target, valid, self.weights.to(predicted.device))

    def mass(self, target: Tensor, valid: Tensor) -> float:
        """Sum of the weights of the valid pixels."""
        return float(self.weights.to(target.device)[target.long()[valid]].double().sum())

    def scorer(self) -> Scorer:
        """1 - mean intersection over union."""
        return UnionErrors(len(self.weights))


class UnionErrors:
    """1 - mean intersection over union, over the classes that occur."""

    def __init__(self, count: int) -> None:
        """Starts empty."""
        self._pairs = np.zeros((count, count), dtype=np.int64)

    def update(self, predicted: Tensor, target: Tensor, valid: Tensor) -> None:
        """See `Scorer.update`."""
        count = len(self._pairs)
        chosen = predicted.argmax(0)[valid].numpy().astype(np.int64)
        truth = target[valid].numpy().astype(np.int64)
        self._pairs += np.bincount(truth * count + chosen, minlength=count**2).reshape(count, count)

    def error(self) -> float:
        """See `Scorer.error`; 1 without a valid pixel."""
        hits = self._pairs.diagonal().astype(np.float64)
        union = self._pairs.sum(0) + self._pairs.sum(1) - hits
        occurs = self._pairs.sum(1) > 0
        return 1.0 - float((hits[occurs] / union[occurs]).mean()) if occurs.any() else 1.0


def loss_weights(counts: NDArray[np.int64], own: Sequence[float], kind: ClassWeights) -> NDArray[np.float64]:
    """Weight of each class in the loss.

    Args:
        counts: [K] training pixels of each class.
        own: factors that the class scheme gives.
        kind: see `ClassFitSettings`.

    Returns:
        [K]; 0 for a class without pixels.
    """
    total = counts.sum()
    power = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}[kind]
    share = np.maximum(counts, 1) / max(int(total), 1)
    weights = np.where(counts > 0, np.asarray(own) * share**-power, 0.0)
    mean = float((weights * counts).sum() / max(int(total), 1))
    return np.asarray(weights / mean if mean > 0 else weights, dtype=np.float64)
