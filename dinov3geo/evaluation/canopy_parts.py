"""Predictions of finished parts of a cross-validation on disk, so that one that was cut off goes on."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.evaluation.reports import write_bytes

Heights = NDArray[np.float32]


class PredictionStore:
    """Heights of the held-out plots of a fold by name; other facts give other file names."""

    def __init__(self, folder: Path | None, facts: Sequence[Any]) -> None:
        """Names the folder, or None to keep nothing, and what every prediction depends on."""
        self.folder = folder
        self._facts = json.dumps(list(facts))

    def get_or_compute(
        self, fold: int, own: Mapping[str, Any], compute: Callable[[], dict[int, Heights]]
    ) -> dict[int, Heights]:
        """Heights by the number of their plot, computed and kept if they are not there yet.

        Args:
            fold: number of the part.
            own: settings of what predicts.
            compute: makes them.

        Raises:
            RasterError: they cannot be written.
        """
        if self.folder is None:
            return compute()
        digest = hashlib.sha256(f"{self._facts} {fold} {json.dumps(own)}".encode()).hexdigest()[:20]
        path = self.folder / f"fold{fold + 1}_{digest}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as kept:
                return {int(name.removeprefix("plot")): kept[name] for name in kept.files}
        heights = compute()
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"plot{i}": h for i, h in heights.items()}
        np.savez_compressed(buffer, **arrays)
        write_bytes(path, buffer.getvalue())
        return heights
