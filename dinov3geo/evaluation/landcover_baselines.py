"""What must be beaten on land cover: a forest on pixels, and a network trained from scratch as long."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn

from dinov3geo.backbones.card import Normalization
from dinov3geo.data.pairs import PairArrays
from dinov3geo.errors import ConfigError
from dinov3geo.evaluation.baselines import color_statistics
from dinov3geo.features.extract import apply_view
from dinov3geo.heads.objectives import weighted_cross_entropy

TREES = 50
MAX_FOREST_PIXELS = 100_000
# Beside the pixel itself: means and deviations of squares of so many pixels.
FOREST_SQUARES = (3, 7, 15)
_UNET_BATCH = 8
_UNET_RATE = 1e-3
_UNET_MULTIPLE = 32


def pixel_values(arrays: PairArrays, factor: int, *, surroundings: bool) -> NDArray[np.float32]:
    """What a forest knows of each cell, [h, w, F]: its colours, or also those around it.

    Args:
        arrays: of one pair.
        factor: image pixels per cell.
        surroundings: whether statistics of squares around the cell are added.
    """
    squares = (1, *FOREST_SQUARES) if surroundings else (1,)
    return np.nan_to_num(color_statistics(arrays.image, arrays.valid, factor, squares))


class PixelForest:
    """A random forest on the colours of pixels; classes weigh alike."""

    def __init__(self, *, surroundings: bool, seed: int) -> None:
        """Takes what it may look at, and the seed of draw and trees."""
        self._surroundings, self._seed = surroundings, seed
        self._forest = RandomForestClassifier(
            TREES,
            min_samples_leaf=5,
            class_weight="balanced_subsample",
            random_state=seed,
            n_jobs=torch.get_num_threads(),
        )

    def fit(self, plots: Sequence[PairArrays], factors: Sequence[int]) -> None:
        """Fits on cells drawn evenly from all plots."""
        generator = np.random.default_rng(self._seed)
        share = max(MAX_FOREST_PIXELS // len(plots), 1)
        rows, classes = [], []
        for arrays, factor in zip(plots, factors, strict=True):
            known = np.flatnonzero(arrays.target_valid)
            chosen = generator.permutation(known)[:share]
            values = pixel_values(arrays, factor, surroundings=self._surroundings)
            rows.append(values.reshape(-1, values.shape[-1])[chosen])
            classes.append(arrays.target.ravel()[chosen])
        self._forest.fit(np.concatenate(rows), np.concatenate(classes))

    def predict(self, arrays: PairArrays, factor: int) -> NDArray[np.uint8]:
        """Classes of all cells, [h, w]."""
        values = pixel_values(arrays, factor, surroundings=self._surroundings)
        chosen: NDArray[np.uint8] = self._forest.predict(values.reshape(-1, values.shape[-1]))
        return chosen.reshape(values.shape[:2]).astype(np.uint8)


@dataclass
class ScratchUNet:
    """A U-Net (segmentation-models-pytorch, ResNet-18 encoder without weights) trained for so many seconds.

    Attributes:
        normalization: of the images.
        weights: of the classes in the loss.
        seconds: to train.
        seed: of weights, order and views.
        steps: done.
    """

    normalization: Normalization
    weights: Sequence[float]
    seconds: float
    seed: int
    steps: int = 0

    def fit(self, plots: Sequence[PairArrays], factors: Sequence[int]) -> None:
        """Trains on random plots in random flips and turns, AdamW with a cosine over the given time.

        Raises:
            ConfigError: segmentation-models-pytorch is not installed, or labels are coarser than the image.
        """
        if any(factor != 1 for factor in factors):
            raise ConfigError("the U-Net baseline needs labels at the resolution of the images")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self._net = _new_unet(len(self.normalization.bands), len(self.weights))
            self._train(plots)
        self._net.eval()

    def _train(self, plots: Sequence[PairArrays]) -> None:
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=_UNET_RATE, weight_decay=1e-2)
        weights = torch.tensor(list(self.weights), dtype=torch.float32)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, plot in enumerate(plots):
            by_shape.setdefault(plot.target.shape, []).append(index)
        pools = list(by_shape.values())
        chances = torch.tensor([float(len(pool)) for pool in pools])
        began = time.monotonic()
        while (spent := time.monotonic() - began) < self.seconds or self.steps == 0:
            for group in optimizer.param_groups:
                group["lr"] = _UNET_RATE * 0.5 * (1 + np.cos(np.pi * min(spent / self.seconds, 1.0)))
            pool = pools[int(torch.multinomial(chances, 1))]
            drawn = [pool[i] for i in torch.randint(len(pool), (min(_UNET_BATCH, len(pool)),)).tolist()]
            view = int(torch.randint(8 if len({*plots[drawn[0]].target.shape}) == 1 else 4, (1,)))
            images = torch.cat([self._image(plots[i]) for i in drawn])
            classes = torch.stack([torch.from_numpy(plots[i].target) for i in drawn])
            valid = torch.stack([torch.from_numpy(plots[i].target_valid) for i in drawn])
            self.steps += 1
            if not valid.any():
                continue
            scores = self._run(apply_view(images, view))
            loss = weighted_cross_entropy(scores, apply_view(classes, view), apply_view(valid, view), weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def predict(self, arrays: PairArrays, factor: int) -> NDArray[np.uint8]:
        """Classes of all cells, [h, w]."""
        with torch.no_grad():
            return self._run(self._image(arrays))[0].argmax(0).numpy().astype(np.uint8)

    def _image(self, arrays: PairArrays) -> Tensor:
        return self.normalization(torch.from_numpy(arrays.image)[None], torch.from_numpy(arrays.valid)[None])

    def _run(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padding = (0, -width % _UNET_MULTIPLE, 0, -height % _UNET_MULTIPLE)
        scores: Tensor = self._net(nn.functional.pad(images, padding))
        return scores[..., :height, :width]


def _new_unet(bands: int, classes: int) -> nn.Module:
    try:
        package: Any = importlib.import_module("segmentation_models_pytorch")
    except ImportError as error:
        raise ConfigError(
            "the U-Net baseline needs segmentation-models-pytorch; install it, or leave it out of --methods"
        ) from error
    net: nn.Module = package.Unet("resnet18", encoder_weights=None, in_channels=bands, classes=classes)
    return net
