"""Several encoders on one set of images: one table."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinov3geo import __version__
from dinov3geo.evaluation.class_metrics import confusion_matrix
from dinov3geo.evaluation.classification import ClassificationSettings, Progress, evaluate_encoder
from dinov3geo.evaluation.figures import draw_confusion
from dinov3geo.evaluation.image_sets import ImageSet, split_images
from dinov3geo.evaluation.named_encoders import Input, make_encoders
from dinov3geo.evaluation.results import Row, rows_of, write_results


@dataclass(frozen=True, slots=True)
class Task:
    """What is compared.

    Attributes:
        images: with their labels.
        encoders: names, see `make_encoders`.
        seen: how they see the images.
        settings: methods and their numbers.
    """

    images: ImageSet
    encoders: Sequence[str]
    seen: Input
    settings: ClassificationSettings


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came out.

    Attributes:
        rows: in the order of encoders and methods.
        confusions: by (encoder, method), [K, K] counts.
        classes: K names.
        notes: on what could not be done.
        details: data, split and settings.
    """

    rows: tuple[Row, ...]
    confusions: Mapping[tuple[str, str], NDArray[np.int64]]
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    details: Mapping[str, Any]


def compare(task: Task, *, cache: Path | None = None, progress: Progress | None = None) -> Comparison:
    """Runs all methods on all encoders.

    Args:
        task: images, encoders and settings.
        cache: folder of vectors kept from earlier calls, or None.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        UserError: a name, file or number that cannot be used.
    """
    images, settings = task.images, task.settings
    split = split_images(images, test_share=settings.test_share, validation_share=settings.validation_share)
    encoders = make_encoders(task.encoders, task.seen)
    truth = images.labels[split.test].numpy()
    rows: list[Row] = []
    confusions: dict[tuple[str, str], NDArray[np.int64]] = {}
    notes: list[str] = []
    for encoder in encoders:
        results, left_out = evaluate_encoder(encoder, images, split, settings, cache=cache, progress=progress)
        notes += [text for text in left_out if text not in notes]
        for result in results:
            rows += rows_of(images.name, encoder.name, result.method, result.scores, result.details)
            if result.predicted is not None:
                key = encoder.name, result.method
                confusions[key] = confusion_matrix(truth, result.predicted, len(images.classes))
    details = {
        "data": images.name,
        "images": {
            "train": len(split.train),
            "validation": len(split.validation),
            "test": len(split.test),
        },
        "classes": list(images.classes),
        "size": task.seen.size,
        "settings": settings.model_dump(mode="json"),
    }
    return Comparison(tuple(rows), confusions, images.classes, tuple(notes), details)


def write_comparison(comparison: Comparison, folder: Path, *, command: str = "") -> list[Path]:
    """Writes table, picture, report and a confusion matrix per encoder.

    The matrix is that of the logistic regression, else of the first method that has one.

    Args:
        comparison: to write.
        folder: made if it is not there.
        command: that was typed.

    Returns:
        The files.

    Raises:
        RasterError: one cannot be written.
    """
    files = write_results(folder, comparison.rows, {"command": command, **hardware(), **comparison.details})
    for encoder in dict.fromkeys(row.encoder for row in comparison.rows):
        methods = [method for name, method in comparison.confusions if name == encoder]
        if not methods:
            continue
        method = "logistic" if "logistic" in methods else methods[0]
        png = folder / f"confusion_{re.sub(r'[^A-Za-z0-9]+', '_', encoder).strip('_')}.png"
        title = f"{comparison.details['data']}: {encoder}, {method}"
        draw_confusion(comparison.confusions[encoder, method], comparison.classes, png, title=title)
        files.append(png)
    return files


def commit_of(folder: Path) -> str:
    """The commit of the working copy in a folder, "" where there is none."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def hardware() -> dict[str, str]:
    """On what the numbers were made, in general words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "dinov3geo": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": f"{device}, {torch.get_num_threads()} threads",
    }
