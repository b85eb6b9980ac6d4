"""Finished parts of an evaluation on disk, so that one that was cut off goes on."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.evaluation.reports import write_bytes

Classes = NDArray[np.uint8]


@dataclass
class Part:
    """One method on one fold.

    Attributes:
        counts: confusion matrix of the fold.
        seconds: to fit.
        example: classes of the held-out windows that are shown in pictures, by their number.
        note: for the report.
    """

    counts: NDArray[np.int64]
    seconds: float
    example: dict[int, Classes]
    note: str = ""


class PartStore:
    """Parts in a folder; a change of data, settings or weights gives them other names."""

    def __init__(self, folder: Path | None, facts: Sequence[Any]) -> None:
        """Names the folder, or None to keep nothing, and what the numbers depend on."""
        self.folder = folder
        self._digest = hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()[:16]

    def read(self, method: str, fold: int) -> Part | None:
        """A part that an earlier run finished, or None."""
        if self.folder is None or not self._path(method, fold).is_file():
            return None
        with np.load(self._path(method, fold), allow_pickle=False) as kept:
            shown = {int(n.removeprefix("w")): kept[n] for n in kept.files if n.startswith("w")}
            return Part(kept["counts"], float(kept["seconds"]), shown, str(kept["note"]))

    def write(self, method: str, fold: int, part: Part) -> None:
        """Keeps a part; its file is whole or absent.

        Raises:
            RasterError: it cannot be written.
        """
        if self.folder is None:
            return
        arrays: dict[str, Any] = {f"w{i}": classes for i, classes in part.example.items()}
        arrays |= {"counts": part.counts, "seconds": part.seconds, "note": np.array(part.note)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_bytes(self._path(method, fold), buffer.getvalue())

    def _path(self, method: str, fold: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{method}_fold{fold + 1}_{self._digest}.npz"
