"""Chips that have numbers: what image folders, chosen chips and packed chips have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinov3geo.data.sampling import IndexSampler
from dinov3geo.rasters.grid import PixelGrid


class Order(Protocol):
    """An endless order of the keys of a data set."""

    def stream(self, start: int) -> Iterator[Any]:
        """Keys from a position on."""


class IndexedChips(Dataset[dict[str, Tensor]]):
    """A data set whose samples `image` [C, S, S] and `valid` [S, S] are asked for by number.

    Attributes:
        noun: what its samples are called.
    """

    noun = "chips"

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers in a sample."""
        return torch.uint8

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Where a sample comes from, for messages."""

    def grid(self, index: int) -> PixelGrid | None:
        """Where a sample lies on the ground; None for images."""
        return None

    @property
    def band_count(self) -> int | None:
        """Bands of a sample where the files alone decide; None where they are chosen by name."""
        return None

    @property
    def gsd_range_m(self) -> tuple[float, float] | None:
        """Smallest and largest ground sampling distance, metres; None for images without one."""
        return None

    def order(self, *, seed: int, rank: int, world_size: int) -> Order:
        """The order in which a run sees them: every one once per epoch."""
        return IndexSampler(self, seed=seed, rank=rank, world_size=world_size)
