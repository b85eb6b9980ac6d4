"""What the study of Gram anchoring measures of a backbone: dense, global, and how noisy patches are.

All three look at images that no training run of the study has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.config import load_model
from dinov3geo.data.labels import ClassScheme, load_label_pair
from dinov3geo.data.pairs import match_pairs
from dinov3geo.errors import DataError
from dinov3geo.evaluation.folds import balanced_folds
from dinov3geo.evaluation.image_sets import ImageSet
from dinov3geo.evaluation.knn import weighted_votes
from dinov3geo.evaluation.linear_probe import standardization
from dinov3geo.evaluation.probes import class_tokens
from dinov3geo.evaluation.segmentation_metrics import ConfusionMatrix

_K = 20
_BATCH = 64
_RIDGE = 1e-3
# Patches that vote: as many as a second of one core allows.
_MAX_REFERENCES = 4000
# Patches of a chip whose pairs are ranked.
_RANKED = 64

Classify = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class LabelledChips:
    """Squares of labelled scenes, with the class of each patch.

    Attributes:
        images: [N, 3, S, S] uint8, red, green, blue.
        labels: [N, P] int64 class of most of a patch's pixels, -1 where none is known.
        folds: [N] int64; chips of one place have one fold.
        classes: names.
    """

    images: Tensor
    labels: Tensor
    folds: Tensor
    classes: tuple[str, ...]

    def take(self, chosen: Tensor) -> LabelledChips:
        """Those of a mask [N] bool."""
        return LabelledChips(self.images[chosen], self.labels[chosen], self.folds[chosen], self.classes)


Part = tuple[Tensor, LabelledChips, Tensor, LabelledChips]


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """Whole images in memory.

    Attributes:
        images: [N, 3, S, S] uint8.
        labels: [N] int64.
        num_classes: K.
    """

    images: Tensor
    labels: Tensor
    num_classes: int


def read_images(images: ImageSet, size: int) -> LabelledSet:
    """Reads all images of a set at one size.

    Args:
        images: of one class each, 8-bit red, green, blue.
        size: side in pixels; resized with antialiasing.
    """
    numbers = [
        F.interpolate(images.read(i)[None].float(), (size, size), mode="bilinear", antialias=True)
        for i in range(len(images))
    ]
    return LabelledSet(torch.cat(numbers).round().to(torch.uint8), images.labels, len(images.classes))


def read_chips(
    tiles: Path,
    classes: Path,
    *,
    bands: Sequence[int],
    size: int,
    patch: int,
    per_tile: int,
    per_place: int,
    folds: int,
    like: tuple[NDArray[Any], NDArray[Any]],
) -> LabelledChips:
    """Cuts chips out of tiles with masks of land cover.

    Args:
        tiles: folder with `image` and `mask`.
        classes: YAML file of the classes.
        bands: 1-based, red, green, blue.
        size: side of a chip in pixels.
        patch: side of a patch in pixels.
        per_tile: chips of a tile, at places drawn once and for all.
        per_place: chips of a place at most; tiles that overlap are one place.
        folds: parts of the places, each held out once.
        like: mean and deviation [3] that the bands of every tile are brought to. The tiles are 8-bit
            pictures, each stretched in its own way.

    Raises:
        DataError: fewer places than folds.
    """
    scheme = load_model(ClassScheme, classes)
    match = match_pairs(tiles / "image", tiles / "mask")
    random = np.random.default_rng(0)
    images, labels, groups = [], [], []
    for pair in match.pairs:
        arrays = load_label_pair(pair, scheme, bands=bands)
        picture = _restretch(arrays.image.astype(np.float64), *like)
        height, width = arrays.target.shape
        room = per_place - groups.count(pair.group)
        for _ in range(min(per_tile, room)):
            top, left = random.integers(height - size + 1), random.integers(width - size + 1)
            rows, cols = slice(top, top + size), slice(left, left + size)
            images.append(torch.from_numpy(picture[:, rows, cols].copy()))
            target = np.where(arrays.target_valid, arrays.target.astype(np.int64), -1)[rows, cols]
            labels.append(_majority(target, patch, len(scheme.names)))
            groups.append(pair.group)
    fold_of = balanced_folds(groups, [1.0] * len(groups), folds, seed=0)
    return LabelledChips(torch.stack(images), torch.stack(labels), torch.tensor(fold_of), scheme.names)


def make_mosaics(images: LabelledSet, classes: Sequence[str], *, count: int, patch: int) -> LabelledChips:
    """Squares of two by two images, a patch's class being that of the image it lies in.

    Args:
        images: of one side S, a multiple of `patch`.
        classes: names.
        count: mosaics at most; an image is in one of them only.
        patch: side of a patch in pixels.
    """
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
    four = order[: min(count, len(order) // 4) * 4].unflatten(0, (-1, 2, 2))
    pixels = images.images[four].permute(0, 3, 1, 4, 2, 5)  # [N, C, row, h, column, w]
    side = images.images.shape[-1] // patch
    labels = images.labels[four].repeat_interleave(side, 1).repeat_interleave(side, 2)
    return LabelledChips(
        pixels.flatten(4).flatten(2, 3), labels.flatten(1), torch.zeros(len(four)).long(), tuple(classes)
    )


@dataclass(frozen=True, slots=True)
class Probe:
    """The data that every backbone is measured on.

    Attributes:
        gallery: images whose classes vote.
        queries: images that are asked for.
        mosaics: of the gallery and of the queries.
        tiles: chips of land cover.
    """

    gallery: LabelledSet
    queries: LabelledSet
    mosaics: tuple[LabelledChips, LabelledChips]
    tiles: LabelledChips

    def measure(self, backbone: Backbone, normalization: Normalization) -> dict[str, float]:
        """All numbers of one backbone.

        Args:
            backbone: frozen, in evaluation mode.
            normalization: that it was trained with.

        Returns:
            `mosaic_linear`, `mosaic_knn`: mIoU of linear segmentation and of the vote of nearest patches on
            mosaics of queries, fitted on mosaics of the gallery. `landcover`: mIoU of linear segmentation on
            places held out. `global_knn`: share of queries that their nearest images name. `pair_error`,
            `noise`: see the functions of these names; on mosaics of queries, and on the tiles.
        """
        fitted, asked = self.mosaics
        train, _ = patch_features(backbone, fitted.images, normalization)
        test, _ = patch_features(backbone, asked.images, normalization)
        tiles, grid_hw = patch_features(backbone, self.tiles.images, normalization)
        votes = weighted_votes(
            class_tokens(backbone, self.gallery.images, normalization),
            self.gallery.labels,
            class_tokens(backbone, self.queries.images, normalization),
            num_classes=self.gallery.num_classes,
            ks=(_K,),
        )[_K]
        parts = {"mosaic_linear": linear_classes, "mosaic_knn": neighbour_classes}
        return {
            **{name: score_of([(train, fitted, test, asked)], c) for name, c in parts.items()},
            "landcover": score_of(_folds(tiles, self.tiles), linear_classes),
            "global_knn": float((votes.argmax(1) == self.queries.labels).float().mean()),
            "pair_error": pair_error(test, asked.labels),
            "noise": similarity_noise(tiles, grid_hw),
        }


@torch.no_grad()
def patch_features(
    backbone: Backbone, images: Tensor, normalization: Normalization
) -> tuple[Tensor, tuple[int, int]]:
    """Normalised patch features [N, P, D] of 8-bit images [N, 3, S, S], and their grid."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (normalization.mean, normalization.std))
    seen = [backbone((part.float() / 255 - mean) / std) for part in images.split(_BATCH)]
    return F.normalize(torch.cat([s.patches for s in seen]).float(), dim=-1), seen[0].grid_hw


def _folds(patches: Tensor, chips: LabelledChips) -> list[Part]:
    """Every fold held out once."""
    parts = []
    for fold in chips.folds.unique().tolist():
        held = chips.folds == fold
        parts.append((patches[~held], chips.take(~held), patches[held], chips.take(held)))
    return parts


def score_of(parts: Sequence[Part], classify: Classify) -> float:
    """The mIoU over all patches that are asked for.

    Args:
        parts: features [N, P, D] and classes to fit, features and classes to ask for.
        classify: gives classes [M] from training features [T, D], their classes [T], features [M, D] and K.
    """
    matrix = ConfusionMatrix(parts[0][1].classes)
    for train, fitted, test, asked in parts:
        known, wanted = fitted.labels >= 0, asked.labels >= 0
        found = classify(train[known], fitted.labels[known], test[wanted], len(fitted.classes))
        matrix.update(found.numpy(), asked.labels[wanted].numpy())
    return matrix.scores().miou


def linear_classes(features: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    """Least squares on one-hot classes, every class with the same weight in all.

    Args:
        features: [T, D].
        labels: [T] int64.
        queries: [M, D].
        num_classes: K.
    """
    weights = 1 / torch.bincount(labels, minlength=num_classes).clamp_min(1).double()[labels]
    mean, scale = standardization(features.double())
    inputs, asked = ((x.double() - mean) * scale for x in (features, queries))
    inputs, asked = (torch.cat([x, x.new_ones(len(x), 1)], 1) for x in (inputs, asked))
    scaled = inputs * weights[:, None]
    gram = scaled.T @ inputs
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, scaled.T @ F.one_hot(labels, num_classes).double())
    return (asked @ solution).argmax(1)


def neighbour_classes(features: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    """The vote of the 20 nearest patches among evenly spread ones.

    Args:
        features: [T, D].
        labels: [T] int64.
        queries: [M, D].
        num_classes: K.
    """
    chosen = torch.linspace(0, len(features) - 1, min(_MAX_REFERENCES, len(features))).long()
    votes = weighted_votes(features[chosen], labels[chosen], queries, num_classes=num_classes, ks=(_K,))[_K]
    return votes.argmax(1)


def similarity_noise(patches: Tensor, grid_hw: tuple[int, int]) -> float:
    """Share of a similarity map that is speckle, mean over chips.

    The map of a patch holds its cosine to every patch of the chip. Speckle is what the mean of a patch's
    eight neighbours does not say of it, as a variance, over the variance of the map.

    Args:
        patches: [N, P, D], normalised.
        grid_hw: rows and columns.
    """
    maps = (patches @ patches.mT)[:, :, None].unflatten(-1, grid_hw)  # [N, P, 1, h, w]
    kernel = torch.full((1, 1, 3, 3), 1 / 8)
    kernel[..., 1, 1] = 0
    flat = maps.flatten(0, 1)
    rest = flat[..., 1:-1, 1:-1] - F.conv2d(flat, kernel)
    spread = flat.flatten(1).var(1).unflatten(0, maps.shape[:2]).mean(1)
    speckle = rest.flatten(1).var(1).unflatten(0, maps.shape[:2]).mean(1)
    return float((speckle / spread.clamp_min(1e-12)).mean())


def pair_error(patches: Tensor, labels: Tensor) -> float:
    """How often two patches of different classes are more alike than two of one class.

    Args:
        patches: [N, P, D], normalised.
        labels: [N, P] int64, -1 where unknown.

    Returns:
        1 - area under the ROC curve of the cosine, over pairs within a chip, mean over the chips that hold
        both kinds of pairs; 0.5 is chance.

    Raises:
        DataError: no chip holds two classes.
    """
    chosen = torch.linspace(0, patches.shape[1] - 1, min(_RANKED, patches.shape[1])).long()
    upper = torch.ones(len(chosen), len(chosen), dtype=torch.bool).triu(1)
    errors = []
    for own, classes in zip(patches[:, chosen], labels[:, chosen], strict=True):
        pairs = upper & (classes[:, None] >= 0) & (classes[None] >= 0)
        same = (classes[:, None] == classes[None])[pairs]
        count, others = int(same.sum()), int((~same).sum())
        if not count or not others:
            continue
        ranks = (own @ own.T)[pairs].argsort().argsort().double() + 1
        area = (ranks[same].sum() - count * (count + 1) / 2) / (count * others)
        errors.append(1 - float(area))
    if not errors:
        raise DataError("no chip holds patches of two classes; similarity within chips cannot be scored")
    return float(np.mean(errors))


def _restretch(image: NDArray[Any], mean: NDArray[Any], deviation: NDArray[Any]) -> NDArray[np.uint8]:
    own_mean, own = image.mean((1, 2), keepdims=True), image.std((1, 2), keepdims=True)
    moved = (image - own_mean) / np.maximum(own, 1) * deviation[:, None, None] + mean[:, None, None]
    return np.clip(np.rint(moved), 0, 255).astype(np.uint8)


def _majority(classes: NDArray[np.int64], patch: int, num_classes: int) -> Tensor:
    """[P] class of most known pixels of each patch; -1 where fewer than half are known."""
    height, width = (side // patch for side in classes.shape)
    cells = torch.from_numpy(classes[: height * patch, : width * patch])
    cells = cells.unflatten(0, (height, patch)).unflatten(2, (width, patch)).permute(0, 2, 1, 3)
    counts = torch.stack([(cells == k).sum((2, 3)) for k in range(num_classes)])
    best: Tensor = counts.argmax(0)
    return torch.where(counts.sum(0) * 2 >= patch**2, best, -1).flatten()
