"""What all stores of features are written by: bands of rows, finished one by one, taken up after a kill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dinov3geo.errors import RasterError, UserError
from dinov3geo.features.store import Floats, Mask, StoredType
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.unfinished import FinishedStrip, Statistics, WorkFolder

BAND_ROWS = 64
"""Rows of cells that are stored together."""


class BandedWriter(ABC):
    """Writes a store from its first row to its last; a context manager. Whole or absent.

    Rows are gathered to bands, so that what is stored does not depend on how they arrive. Work with a name
    for its job can be taken up again: the next writer of the same job begins at `next_row`.

    Attributes:
        path: of the store.
        grid: of the cells.
        names: of the features.
        stored: how they are stored.
        next_row: the row that `write` takes next.
        cells: cells with data so far, those of an earlier run included.
    """

    def __init__(
        self,
        path: Path,
        grid: PixelGrid,
        names: Sequence[str],
        stored: StoredType,
        *,
        attributes: dict[str, str],
        job: str = "",
        overwrite: bool = False,
    ) -> None:
        """Checks the place.

        Args:
            path: of the store.
            grid: of the cells.
            names: of the features.
            stored: how they are stored.
            attributes: of the store, e.g. the model.
            job: name of everything that the numbers depend on; "" for work that cannot be taken up again.
            overwrite: whether an existing store, or unfinished work of another job, may be replaced.

        Raises:
            ConfigError: the package that writes such stores is not installed.
            RasterError: the path is taken.
        """
        self.path, self.grid, self.names, self.stored = path, grid, tuple(names), stored
        self._attributes, self._overwrite = attributes, overwrite
        self._folder = WorkFolder(path, job)
        self._rows: list[tuple[NDArray[Any], Mask]] = []
        self._waiting = 0
        self._bands: list[FinishedStrip] = []
        self.next_row = 0
        self.cells = 0

    def __enter__(self) -> Self:
        """Makes the work folder, or takes up the one of an unfinished run.

        Raises:
            RasterError: it cannot be made, or belongs to another job or a process that still runs.
        """
        try:
            self._bands = self._folder.open(overwrite=self._overwrite)
            self.next_row = min(len(self._bands) * BAND_ROWS, self.grid.height)
            self.cells = sum(band.statistics.count[0] for band in self._bands)
            self._begin()
        except OSError as error:
            self._folder.leave(keep=True)
            if isinstance(error, RasterError):
                raise
            raise RasterError(f"cannot write {self.path}: {error}") from error
        except BaseException:
            self._folder.leave(keep=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the store. After an error, keeps the bands of work to take up again, nothing else.

        Raises:
            RasterError: the disk refuses.
            ValueError: rows are missing.
        """
        if kind is not None:
            self._folder.leave(keep=not isinstance(error, UserError) or isinstance(error.__cause__, OSError))
            return
        try:
            if self.next_row != self.grid.height:
                raise ValueError(f"{self.path}: {self.next_row} of {self.grid.height} rows were written")
            self._finish([band.path for band in self._bands])
        except OSError as failure:
            self._folder.leave(keep=True)
            raise RasterError(f"cannot write {self.path}: {failure}; {self._folder.advice}") from failure
        except BaseException:
            self._folder.leave(keep=True)
            raise
        self._folder.remove()

    def write(self, values: Floats, valid: Mask) -> None:
        """Writes the next rows.

        Args:
            values: [K, n, width].
            valid: [n, width].

        Raises:
            RasterError: the disk refuses.
        """
        self._rows.append((self.stored.encode(values, valid), valid))
        self._waiting += len(valid)
        self.next_row += len(valid)
        while self._waiting >= BAND_ROWS or (self._waiting and self.next_row == self.grid.height):
            self._store_band()

    def _store_band(self) -> None:
        """Stores the first rows that wait, as many as a band has or all that are left."""
        stored = np.concatenate([rows for rows, _ in self._rows], axis=1)
        valid = np.concatenate([known for _, known in self._rows])
        count = min(BAND_ROWS, len(valid))
        self._rows = [(stored[:, count:], valid[count:])]
        self._waiting -= count
        number = len(self._bands)
        facts = Statistics(1, pixels=int(valid[:count].size))
        facts.count[0] = int(valid[:count].sum())
        try:
            content = self._encode(number * BAND_ROWS, stored[:, :count], valid[:count])
            path = self._folder.add_strip(number, content, facts)
        except OSError as error:
            raise RasterError(f"cannot write {self.path}: {error}; {self._folder.advice}") from error
        self._bands.append(FinishedStrip(path, facts))
        self.cells += facts.count[0]

    @abstractmethod
    def _begin(self) -> None:
        """Makes ready to store bands from `next_row` on."""

    @abstractmethod
    def _encode(self, row: int, stored: NDArray[Any], valid: Mask) -> bytes:
        """Stores a band [K, n, width] that begins at a row; returns what the band's own file has to hold."""

    @abstractmethod
    def _finish(self, bands: Sequence[Path]) -> None:
        """Makes the store out of all bands and gives it its name."""
