"""How few labels an encoder needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov3geo.evaluation.bootstrap import RESAMPLES, Interval
from dinov3geo.evaluation.linear_probe import standardization
from dinov3geo.evaluation.logistic import fit_logistic

SHOTS = (1, 5, 10, 50)
DRAWS = 5


@dataclass(frozen=True, slots=True)
class FewShot:
    """Accuracy with few labelled images of each class.

    Attributes:
        shots: labelled images per class.
        accuracy: mean over the draws; its interval draws both draws and test images again.
        deviation: standard deviation over the draws.
    """

    shots: int
    accuracy: Interval
    deviation: float


def draw_shots(labels: Tensor, shots: int, *, num_classes: int, seed: int) -> NDArray[np.int64]:
    """Numbers of `shots` images of each class, drawn without replacement.

    A larger number of shots holds the images of a smaller one with the same seed.

    Args:
        labels: [N] int64.
        shots: images per class.
        num_classes: K.
        seed: of the draw.

    Raises:
        ValueError: a class has fewer.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels.numpy()[order]
    chosen = [order[shuffled == k][:shots] for k in range(num_classes)]
    if min(len(c) for c in chosen) < shots:
        raise ValueError(f"{shots} images of each class were asked for; a class has fewer")
    return np.concatenate(chosen)


def few_shot(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    shots: int,
    draws: int = DRAWS,
    c: float = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> FewShot:
    """Logistic regression on a few images, with a fixed C: so few labels leave none to choose it with.

    Columns are standardised by all training images, which takes no labels.

    Args:
        train: features [N, D] and labels [N].
        test: likewise.
        num_classes: K.
        shots: labelled images per class.
        draws: of those images.
        c: inverse strength of the penalty.
        resamples: of the interval.
        seed: of draws and resamples.

    Raises:
        ValueError: a class has fewer images.
    """
    mean, scale = standardization(train[0])
    inputs, held = ((features - mean) * scale for features in (train[0], test[0]))
    right = []
    for draw in range(draws):
        chosen = torch.from_numpy(draw_shots(train[1], shots, num_classes=num_classes, seed=seed + draw))
        model = fit_logistic(inputs[chosen], train[1][chosen], num_classes=num_classes, c=c)
        right.append((model.scores(held).argmax(1) == test[1]).numpy())
    hits = np.array(right, dtype=np.float64)
    generator = np.random.default_rng(seed)
    values = [
        hits[generator.integers(0, draws, draws)][
            :, generator.integers(0, hits.shape[1], hits.shape[1])
        ].mean()
        for _ in range(resamples)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    interval = Interval(float(hits.mean()), float(low), float(high))
    return FewShot(shots, interval, float(hits.mean(1).std(ddof=1 if draws > 1 else 0)))
