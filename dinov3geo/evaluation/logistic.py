"""Logistic regression by L-BFGS: scikit-learn's objective and optimum, on any device, over a path of C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_CS = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))


@dataclass(frozen=True, slots=True)
class LogisticModel:
    """A fitted linear classifier.

    Attributes:
        weight: [K, D] float64.
        bias: [K] float64.
        multi_label: each class is a yes or no of its own.
        c: inverse strength of the penalty.
        loss: objective at the end, see `objective`.
        iterations: of L-BFGS.
    """

    weight: Tensor
    bias: Tensor
    multi_label: bool
    c: float
    loss: float
    iterations: int

    def scores(self, features: Tensor) -> Tensor:
        """[N, K] logits of [N, D]."""
        return features.to(self.weight) @ self.weight.T + self.bias

    def probabilities(self, features: Tensor) -> Tensor:
        """[N, K]; rows sum to 1 unless an image may have several classes."""
        scores = self.scores(features)
        return scores.sigmoid() if self.multi_label else scores.softmax(1)


def objective(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, c: float) -> Tensor:
    """`C * sum of cross-entropies + |W|^2 / 2`, what scikit-learn minimises; the bias is free.

    Args:
        weight: [K, D].
        bias: [K].
        features: [N, D].
        labels: [N] int64 for one class each, or [N, K] bool for several.
        c: inverse strength of the penalty.
    """
    return c * _cross_entropy(features @ weight.T + bias, labels) + weight.square().sum() / 2


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    c: float = 1.0,
    start: LogisticModel | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-9,
) -> LogisticModel:
    """Minimises `objective` in float64.

    Directions are scaled by the curvature that Böhning's bound gives them (a change of variables, so the
    optimum stays where it is); without it features of unequal spread need hundreds of iterations.

    Args:
        features: [N, D].
        labels: [N] int64, or [N, K] bool.
        num_classes: K.
        c: inverse strength of the penalty, positive.
        start: a model to start from, e.g. of a neighbouring C.
        max_iterations: of L-BFGS.
        tolerance: stops when the loss per image and unit of C changes by less.

    Raises:
        ValueError: no image, shapes that do not fit, or C not positive.
    """
    if not len(features) or len(features) != len(labels) or c <= 0:
        raise ValueError(f"expected N images and labels and C > 0, got {len(features)}, {len(labels)}, {c}")
    problem = _Problem(features.double(), labels, num_classes)
    return problem.fit(c, start, max_iterations, tolerance)


def sweep_logistic(
    features: Tensor,
    labels: Tensor,
    validation: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    score: Callable[[Tensor, Tensor], float],
    cs: Sequence[float] = PAPER_CS,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, list[float]]:
    """The C whose model scores best on validation images; the smaller one of equals.

    Args:
        features: [N, D] of the training part.
        labels: [N] or [N, K].
        validation: features and labels of the validation part.
        num_classes: K.
        score: of (scores [M, K], labels), the higher the better.
        cs: to try; each fit starts from the one before.
        progress: called with how many of them are done.

    Returns:
        C, and the score of each of `cs` in increasing order of C.
    """
    problem = _Problem(features.double(), labels, num_classes)
    held, held_labels = validation
    model, found = None, []
    ordered = sorted(cs)
    for done, c in enumerate(ordered, start=1):
        # A sweep only ranks them, so it stops sooner than the fit that is kept.
        model = problem.fit(c, model, max_iterations=60, tolerance=1e-6)
        found.append(score(model.scores(held), held_labels))
        if progress is not None:
            progress(done, len(ordered))
    return ordered[int(np.argmax(found))], found


class _Problem:
    """Features rotated to their principal axes, once for all C."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        self.labels = labels.double() if labels.ndim == 2 else labels.long()
        self.num_classes = num_classes
        self.mean = features.mean(0)
        centred = features - self.mean
        values, self.axes = torch.linalg.eigh(centred.T @ centred)
        self.spread = values.clamp_min(0)
        self.rotated = centred @ self.axes

    def fit(
        self, c: float, start: LogisticModel | None, max_iterations: int, tolerance: float
    ) -> LogisticModel:
        multi_label = self.labels.ndim == 2
        # Böhning 1992: the Hessian of the softmax is below half the Gram matrix, that of the logistic
        # function below a quarter of it.
        bound = 0.25 if multi_label else 0.5
        scale = (c * bound * self.spread + 1).rsqrt()
        bias_scale = (c * bound * len(self.rotated)) ** -0.5
        moved = self._variables(start, scale, bias_scale)
        moved.requires_grad_(True)
        inputs = self.rotated * scale
        optimizer = torch.optim.LBFGS(
            [moved],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            tolerance_grad=1e-12,
            tolerance_change=tolerance,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        # In units of one image's loss, so that tolerances mean the same for every N and C.
        unit = 1 / (c * len(inputs))
        evaluations = 0

        def closure() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            scores = inputs @ moved[:-1] + moved[-1] * bias_scale
            penalty = (moved[:-1] * scale[:, None]).square().sum() / 2
            unit_loss: Tensor = (c * _cross_entropy(scores, self.labels) + penalty) * unit
            unit_loss.backward()
            return unit_loss

        optimizer.step(closure)
        with torch.no_grad():
            weight = (self.axes @ (moved[:-1] * scale[:, None])).T.contiguous()
            bias = moved[-1] * bias_scale - weight @ self.mean
            scores = self.rotated @ (moved[:-1] * scale[:, None]) + moved[-1] * bias_scale
            loss = float(c * _cross_entropy(scores, self.labels) + weight.square().sum() / 2)
        return LogisticModel(weight, bias, multi_label, c, loss, evaluations)

    def _variables(self, start: LogisticModel | None, scale: Tensor, bias_scale: float) -> Tensor:
        """[D + 1, K]: scaled weights and, in the last row, the scaled bias at the mean."""
        if start is None:
            return torch.zeros(len(self.axes) + 1, self.num_classes).to(self.rotated)
        weights: Tensor = (self.axes.T @ start.weight.T) / scale[:, None]
        bias = (start.bias + start.weight @ self.mean) / bias_scale
        return torch.cat([weights, bias[None]])


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Summed over images, and over classes where each is a yes or no."""
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(scores, labels.to(scores), reduction="sum")
    return F.cross_entropy(scores, labels, reduction="sum")
