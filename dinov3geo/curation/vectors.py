"""Embeddings in a plain file: appended in order, read in blocks, never whole in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.errors import DataError

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]

#: Vectors per block that passes through memory.
BLOCK = 16_384
_STORED = np.dtype("<f2")


class VectorFile:
    """[N, D] vectors of unit length as float16 without a header; a row of zeros says: no vector.

    Rows are fetched by plain reads, not by a memory map, whose pages would count as memory of the process.
    """

    def __init__(self, path: Path, width: int) -> None:
        """Names the file, which need not exist yet.

        Args:
            path: of the file.
            width: numbers D of a vector.
        """
        self.path = path
        self.width = width
        self._row_bytes = width * _STORED.itemsize

    def __len__(self) -> int:
        """Whole vectors in the file."""
        return self.path.stat().st_size // self._row_bytes if self.path.exists() else 0

    def append(self, vectors: NDArray[Any]) -> None:
        """Adds vectors [n, D] after the last whole one, scaled to unit length; zeros stay zeros.

        Raises:
            DataError: the disk refuses.
        """
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = (vectors / np.where(lengths > 0, lengths, 1)).astype(_STORED)
        try:
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                # What a killed process wrote of a row is written over.
                file.seek(len(self) * self._row_bytes)
                file.write(unit.tobytes())
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, Floats]]:
        """First row and vectors [n, D] float32 of each block."""
        for start in range(0, len(self), size):
            yield start, self.read(start, min(start + size, len(self)))

    def read(self, start: int, stop: int) -> Floats:
        """Rows `start` to `stop`, [stop - start, D] float32."""
        with self.path.open("rb") as file:
            return self._read(file.fileno(), start, stop)

    def gather(self, rows: NDArray[Any]) -> Floats:
        """The named rows, [len(rows), D] float32, in the order given."""
        found = np.empty((len(rows), self.width), dtype=np.float32)
        order = np.argsort(rows, kind="stable")
        ascending = np.asarray(rows)[order]
        # One read for each run of neighbours.
        starts = np.flatnonzero(np.diff(ascending, prepend=-2) != 1)
        stops = np.append(starts[1:], len(ascending))
        with self.path.open("rb") as file:
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                first = int(ascending[start])
                found[order[start:stop]] = self._read(file.fileno(), first, first + stop - start)
        return found

    def _read(self, descriptor: int, start: int, stop: int) -> Floats:
        content = os.pread(descriptor, (stop - start) * self._row_bytes, start * self._row_bytes)
        return np.frombuffer(content, dtype=_STORED).reshape(-1, self.width).astype(np.float32)
