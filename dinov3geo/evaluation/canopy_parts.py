"""Parts of a cross-validation: fitted, predicted, and kept on disk for one that was cut off to go on."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinov3geo.evaluation.reports import write_bytes
from dinov3geo.heads.canopy import CanopySettings, fit_canopy_head, predict_plot
from dinov3geo.heads.fit import FitSample
from dinov3geo.heads.samples import StageProgress

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
        heights = _read(path)
        if heights is not None:
            return heights
        heights = compute()
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"plot{i}": h for i, h in heights.items()}
        np.savez_compressed(buffer, **arrays)
        write_bytes(path, buffer.getvalue())
        return heights


def _read(path: Path) -> dict[int, Heights] | None:
    """What a file keeps; None if there is none or it is damaged, for then it is made anew."""
    try:
        # Opened here, for NumPy leaves a damaged file open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
            return {int(name.removeprefix("plot")): kept[name] for name in kept.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None


def fit_and_predict(
    samples: list[FitSample],
    train: list[int],
    held: list[int],
    settings: CanopySettings,
    device: torch.device,
    progress: StageProgress | None,
) -> dict[int, Heights]:
    """Heights [h, w] of the held-out plots by their number, metres.

    Args:
        samples: of all plots.
        train: numbers of those to fit on.
        held: numbers of those to predict.
        settings: of the head.
        device: to fit on.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        DataError: the training plots hold no valid height.
    """
    head, _ = fit_canopy_head([samples[i] for i in train], settings, device=device, progress=progress)
    return {i: predict_plot(head, samples[i], settings.predict_views) for i in held}


def prefixed(progress: StageProgress | None, prefix: str) -> StageProgress | None:
    """Progress whose stages begin with `prefix`."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(prefix + stage, done, total)
