"""Quick looks at frozen features while a training goes on: nearest neighbours and a linear dense probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.data.image_folder import ImageFolder
from dinov3geo.data.pairs import find_pairs, load_pair
from dinov3geo.errors import DataError
from dinov3geo.evaluation.knn import PAPER_TEMPERATURE, weighted_votes

_BATCH = 64
_EVERY_TEST = 4
_RIDGE = 1e-3
_MAX_PAIRS = 48

Encoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images in memory, split the same way every time.

    Attributes:
        images: [N, 3, S, S] uint8.
        labels: [N] int64.
        is_test: [N] bool, every fourth image of each class.
    """

    images: Tensor
    labels: Tensor
    is_test: Tensor


def load_labelled(folder: Path, *, size: int, per_class: int, hold_out: float = 0.0) -> LabelledImages:
    """Reads a folder with one sub-folder of images per class.

    Args:
        folder: of the classes.
        size: side of the images in pixels.
        per_class: images read of each class, spread evenly over its sorted files.
        hold_out: share of the images that is not looked at, by a hash of their names.

    Raises:
        DataError: fewer than two classes.
    """
    dataset = ImageFolder(folder, chip_size=size, labels=True, hold_out=hold_out)
    if len(dataset.classes) < 2:
        raise DataError(
            f"{folder} has {len(dataset.classes)} class; expected one sub-folder of images per class"
        )
    names = np.array([path.parent.name for path in dataset.files])
    chosen: list[int] = []
    is_test: list[bool] = []
    for name in dataset.classes:
        members = np.flatnonzero(names == name)
        picks = members[np.linspace(0, len(members) - 1, min(per_class, len(members))).round().astype(int)]
        chosen += picks.tolist()
        is_test += [number % _EVERY_TEST == 0 for number in range(len(picks))]
    samples = [dataset[index] for index in chosen]
    return LabelledImages(
        torch.stack([sample["image"] for sample in samples]),
        torch.stack([sample["label"] for sample in samples]),
        torch.tensor(is_test),
    )


@torch.no_grad()
def class_tokens(backbone: Backbone, images: Tensor, normalization: Normalization) -> Tensor:
    """Class tokens of 8-bit images, [N, D] on the CPU.

    Args:
        backbone: in evaluation mode, of three bands.
        images: [N, 3, S, S] uint8.
        normalization: that the backbone was trained with.
    """
    device = next(backbone.parameters()).device
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (normalization.mean, normalization.std)
    )
    tokens = []
    for part in images.split(_BATCH):
        tokens.append(backbone((part.to(device).float() / 255 - mean) / std).cls.float().cpu())
    return torch.cat(tokens)


def knn_accuracy(
    features: Tensor, data: LabelledImages, *, k: int = 20, temperature: float = PAPER_TEMPERATURE
) -> float:
    """Share of test images whose class the weighted vote of their nearest training images names.

    Args:
        features: [N, D], any scale.
        data: labels and split.
        k: neighbours.
        temperature: of the votes' softmax.

    Source: Wu et al. 2018 (weighted kNN), as in DINO.
    """
    train = ~data.is_test
    votes = weighted_votes(
        features[train],
        data.labels[train],
        features[data.is_test],
        num_classes=int(data.labels.max()) + 1,
        ks=(k,),
        temperature=temperature,
    )[k]
    return float((votes.argmax(1) == data.labels[data.is_test]).float().mean())


@torch.no_grad()
def height_probe(backbone: Backbone, images: Path, heights: Path, normalization: Normalization) -> float:
    """R2 of a ridge regression from patch features to the mean height of the patch, on other places.

    Args:
        backbone: in evaluation mode.
        images: folder of rasters with the backbone's bands.
        heights: folder of canopy heights in metres.
        normalization: that the backbone was trained with.

    Returns:
        1 - residual / variance over the patches of every fourth group of overlapping images.
    """
    pairs = find_pairs(images, heights)[:_MAX_PAIRS]
    groups = sorted({pair.group for pair in pairs})
    tests = set(groups[::_EVERY_TEST])
    rows: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for pair in pairs:
        arrays = load_pair(pair)
        if arrays.image.shape[0] < backbone.in_channels:
            raise DataError(
                f"{pair.image} has {arrays.image.shape[0]} bands, the probe needs {backbone.in_channels}"
            )
        rows[pair.group in tests].append(_patch_rows(backbone, arrays.image, arrays.target, normalization))
    if not rows[True] or not rows[False]:
        raise DataError(
            f"{images} holds one place only; a probe is fitted on some places and tested on others"
        )
    (x, y), (x_test, y_test) = (
        tuple(torch.cat(parts) for parts in zip(*rows[kind], strict=True)) for kind in (False, True)
    )
    x_mean, y_mean = x.mean(0), y.mean()
    centred = x - x_mean
    gram = centred.T @ centred
    gram.diagonal().add_(_RIDGE * gram.trace() / len(gram))
    solution = torch.linalg.solve(gram, centred.T @ (y - y_mean))
    predicted = (x_test - x_mean) @ solution + y_mean
    return float(1 - (predicted - y_test).square().sum() / (y_test - y_test.mean()).square().sum())


def _patch_rows(
    backbone: Backbone, image: np.ndarray, heights: np.ndarray, normalization: Normalization
) -> tuple[Tensor, Tensor]:
    """Features and mean heights of the patches of an image, float64."""
    device = next(backbone.parameters()).device
    scale, offset, mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (normalization.scale, normalization.offset, normalization.mean, normalization.std)
    )
    numbers = torch.from_numpy(image[: backbone.in_channels].astype(np.float32))
    features = backbone((((numbers * scale + offset) - mean) / std)[None].to(device))
    size = features.grid_hw
    wanted = F.interpolate(torch.from_numpy(heights)[None, None], size, mode="area")
    return features.patches[0].double().cpu(), wanted.flatten().double()
