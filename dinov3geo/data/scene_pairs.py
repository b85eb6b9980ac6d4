"""Images with labels or further images, aligned by their georeference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torchgeo.datasets import IntersectionDataset

from dinov3geo.data.scenes import Query, Sample, SceneDataset
from dinov3geo.errors import DataError


class ScenePairs(IntersectionDataset):
    """Images and what belongs to them, aligned by their georeference in whatever CRS and pixel size they are.

    The second data set is read on exactly the grid that the first one's read gives. A sample has `image`,
    `valid`, `bounds` and `transform` from the first and, if the second holds labels, `mask` and `mask_valid`
    from it (nearest pixel; [H, W] if it has one band). If both hold images, the second's bands follow the
    first's in `image`, and `valid` asks for both.
    """

    def __init__(
        self,
        images: SceneDataset,
        others: SceneDataset,
        *,
        spatial_only: bool = False,
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        """Intersects the two indexes; neither data set is changed.

        Args:
            images: read in its own grid.
            others: labels or further images.
            spatial_only: pair scenes of different dates.
            transforms: applied to each sample.

        Raises:
            DataError: two label sets, or the two lie apart in space or time.
        """
        if not images.is_image:
            raise DataError("expected images & labels, got two data sets of labels (is_image=False)")
        others = copy.copy(others)
        others.index = others.index.to_crs(images.crs)
        self._spatial_only = spatial_only
        try:
            super().__init__(images, others, spatial_only=spatial_only, transforms=transforms)
        except RuntimeError as error:
            raise DataError(
                f"no scene in {images.paths} overlaps one in {others.paths}: {error}; "
                f"bounds in {images.crs.name} are {_bounds(images)} and {_bounds(others)}"
            ) from error

    def __getitem__(self, index: Query) -> Sample:
        """Reads a query; arguments and errors as `SceneDataset`."""
        images, others = cast(list[SceneDataset], self.datasets)
        numbers, valid, grid = images.read_query(index)
        t = images.complete(index)[2]
        times = (None, None) if self._spatial_only else (t.start, t.stop)
        more, more_valid = others.read_on(grid, *times)
        if others.is_image:
            return self._finished(
                images.sample(index, np.concatenate([numbers, more]), valid & more_valid, grid)
            )
        sample = images.sample(index, numbers, valid, grid)
        sample["mask"] = torch.from_numpy(more).squeeze(0)
        sample["mask_valid"] = torch.from_numpy(more_valid)
        return self._finished(sample)

    def _finished(self, sample: Sample) -> Sample:
        """The sample after the transforms of the first data set and of the pairs."""
        own: Callable[[Sample], Sample] | None = cast(SceneDataset, self.datasets[0]).transforms
        for transform in (own, self.transforms):
            if transform is not None:
                sample = transform(sample)
        return sample


def _bounds(dataset: SceneDataset) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in dataset.index.total_bounds)
