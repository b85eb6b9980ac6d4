"""Every chip of a set of scenes, on a regular grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov3geo.data.indexed import IndexedChips
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import DataError
from dinov3geo.rasters.grid import PixelGrid


@dataclass(frozen=True, slots=True)
class ChipPlace:
    """A square of a scene.

    Attributes:
        path: of the scene.
        row: first row in the scene's own pixels; negative where the scene is smaller than the chip.
        col: first column.
        size: side in pixels.
    """

    path: Path
    row: int
    col: int
    size: int


class GridChips(IndexedChips):
    """Chips side by side, or `stride` pixels apart; the last of a row or column is moved inside the scene.

    Nothing is listed: a number says which chip it is, so memory grows with the scenes and not with the chips.
    """

    def __init__(self, dataset: SceneDataset, *, chip_size: int, stride: int | None = None) -> None:
        """Counts the chips.

        Args:
            dataset: the scenes.
            chip_size: side in pixels.
            stride: pixels from one chip to the next; the chip's side if None.

        Raises:
            DataError: a number below 1.
        """
        step = chip_size if stride is None else stride
        if chip_size < 1 or step < 1:
            raise DataError(f"chip size and stride must be at least 1 pixel, got {chip_size} and {step}")
        self.dataset = dataset
        self.chip_size = chip_size
        self._stride = step
        self._paths = list(dataset.infos)
        shapes = np.array([info.grid.shape_hw for info in dataset.infos.values()])
        self._shapes: NDArray[np.int64] = shapes
        # Chips along a side: one, and as many more as it takes to reach the end.
        self._counts = 1 + np.maximum(-(-(shapes - chip_size) // step), 0)
        self._ends = np.cumsum(np.prod(self._counts, axis=1))

    def __len__(self) -> int:
        """Number of chips."""
        return int(self._ends[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the scenes."""
        return self.dataset.dtype

    @property
    def gsd_range_m(self) -> tuple[float, float]:
        """Of the scenes."""
        return self.dataset.gsd_range_m

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Reads a chip; errors as `SceneDataset`."""
        numbers, valid = self.read(index)
        return {"image": torch.from_numpy(numbers), "valid": torch.from_numpy(valid)}

    def read(self, index: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Numbers [C, S, S] and their mask [S, S]."""
        place = self.locate(index)
        return self.dataset.read_window(place.path, place.row, place.col, (place.size, place.size))

    def locate(self, index: int) -> ChipPlace:
        """Where a chip lies."""
        scene = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[scene - 1]) if scene else 0)
        numbers = divmod(within, int(self._counts[scene, 1]))
        row, col = (
            _start(number, self._stride, self.chip_size, int(length))
            for number, length in zip(numbers, self._shapes[scene], strict=True)
        )
        return ChipPlace(self._paths[scene], row, col, self.chip_size)

    def grid(self, index: int) -> PixelGrid:
        """Georeference of a chip."""
        return chip_grid(self.dataset, self.locate(index))

    def place(self, index: int) -> str:
        """Where a chip comes from."""
        place = self.locate(index)
        return f"{place.path} at row {place.row}, column {place.col}"


def chip_grid(dataset: SceneDataset, place: ChipPlace) -> PixelGrid:
    """Georeference of a chip of a scene."""
    return dataset.window_grid(place.path, place.row, place.col, (place.size, place.size))


def _start(number: int, stride: int, size: int, length: int) -> int:
    """First pixel of the n-th chip along a side; a shorter side is centred in its chip."""
    return min(number * stride, length - size) if length >= size else -((size - length) // 2)
