"""Two dates of one place as the two views of a sample."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinov3geo.data.scenes import Query, SceneDataset

# A second date that covers less of what the first one covers says too little.
_MIN_SHARED = 0.5


class Twice(Dataset[dict[str, Tensor]]):
    """A data set whose samples show one and the same image as both views."""

    def __init__(self, dataset: Any) -> None:  # noqa: ANN401
        """Keeps the data set; its items hold `image` and `valid`."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Samples of the data set."""
        return len(cast(Sized, self.dataset))

    def __getitem__(self, key: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """`image` [2, C, H, W] and `valid` [2, H, W]."""
        sample = self.dataset[key]
        return {name: torch.stack([sample[name]] * 2) for name in ("image", "valid")}


class TwoDates(Dataset[dict[str, Tensor]]):
    """Scenes of several dates: the first view is what a query asks for, the second another date of it.

    The second date is drawn among those that cover the place, always the same one for the same query, and is
    read on the pixels of the first. Where no other date covers enough of it, both views show the first.

    No part of the DINOv3 paper; seasonal contrast goes back to Manas et al. 2021 (arXiv 2103.16607).
    """

    def __init__(self, dataset: SceneDataset) -> None:
        """Keeps the data set."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Scenes of the data set."""
        return len(self.dataset)

    def __getitem__(self, index: Query) -> dict[str, Tensor]:
        """`image` [2, C, H, W] and `valid` [2, H, W]; errors as `SceneDataset`."""
        numbers, valid, grid = self.dataset.read_query(index)
        x, y, t = self.dataset.complete(index)
        others = self.dataset.intervals((x.start, y.start, x.stop, y.stop), besides=(t.start, t.stop))
        # From the place alone, so that reading processes and resumed runs agree.
        place = np.array([x.start, y.start]).view(np.uint64).tolist()
        for number in np.random.default_rng(place).permutation(len(others)).tolist():
            more, more_valid = self.dataset.read_on(grid, *others[number])
            if more_valid[valid].mean() >= _MIN_SHARED if valid.any() else False:
                return _stack(numbers, more, valid, more_valid)
        return _stack(numbers, numbers, valid, valid)


def _stack(one: Any, other: Any, valid: Any, other_valid: Any) -> dict[str, Tensor]:  # noqa: ANN401
    return {
        "image": torch.from_numpy(np.stack([one, other])),
        "valid": torch.from_numpy(np.stack([valid, other_valid])),
    }
