"""An evaluation of land cover as JSON, as a Markdown table, and as pictures."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dinov3geo.data.labels import ClassScheme
from dinov3geo.errors import RasterError
from dinov3geo.evaluation.landcover import TITLES, LandcoverEvaluation, MethodResult
from dinov3geo.evaluation.reports import finite, write_bytes

RESULTS_JSON, RESULTS_TABLE = "results.json", "results.md"
IOU_PICTURE, CONFUSION_PICTURE, MAP_PICTURE = "iou.png", "confusion.png", "maps.png"
# Beside the classes: no label.
_NO_LABEL = (255, 255, 255)
_PALETTE = ("#1f77b4", "#ffbb78", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def to_json(evaluation: LandcoverEvaluation) -> str:
    """The report as indented JSON; numbers that do not exist are null."""
    rows = [
        {
            "method": row.method,
            **asdict(row.scores),
            "fold_miou": list(row.fold_miou),
            "seconds": round(row.seconds, 1),
            "confusion": row.matrix.counts.tolist(),
        }
        for row in evaluation.results
    ]
    report = {**evaluation.details, "rows": rows, "warnings": list(evaluation.warnings)}
    return json.dumps(finite(report), indent=2, allow_nan=False) + "\n"


def table(evaluation: LandcoverEvaluation) -> tuple[list[str], list[list[str]]]:
    """Header and one row of texts per method."""
    names = [c.name for c in evaluation.results[0].scores.classes]
    header = ["method", "mIoU", *names, "accuracy", "time to fit [s]"]
    rows = [
        [TITLES.get(row.method, row.method), _number(row.scores.miou)]
        + [_number(c.iou) for c in row.scores.classes]
        + [_number(row.scores.accuracy), f"{row.seconds:.0f}"]
        for row in evaluation.results
    ]
    return header, rows


def markdown(evaluation: LandcoverEvaluation) -> str:
    """The table in Markdown."""
    header, rows = table(evaluation)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_report(evaluation: LandcoverEvaluation, folder: Path) -> list[Path]:
    """Writes table, report and pictures into a folder.

    Returns:
        What was written.

    Raises:
        RasterError: it cannot be written.
    """
    scheme = ClassScheme.model_validate(evaluation.details["classes"])
    contents = {
        RESULTS_JSON: to_json(evaluation).encode(),
        RESULTS_TABLE: markdown(evaluation).encode(),
        IOU_PICTURE: _png(draw_iou(evaluation.results, scheme)),
        CONFUSION_PICTURE: _png(draw_confusion(evaluation.results)),
    }
    if evaluation.example is not None:
        contents[MAP_PICTURE] = _png(draw_maps(evaluation, scheme))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RasterError(f"{folder} cannot be made ({error.strerror})") from error
    for name, content in contents.items():
        write_bytes(folder / name, content)
    return [folder / name for name in contents]


def draw_iou(results: Sequence[MethodResult], scheme: ClassScheme) -> Figure:
    """IoU of each class and their mean, methods side by side."""
    figure = Figure(figsize=(8, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    groups = ["mean", *scheme.names]
    width = 0.8 / len(results)
    for number, row in enumerate(results):
        heights = [row.scores.miou, *(c.iou for c in row.scores.classes)]
        places = np.arange(len(groups)) + (number - (len(results) - 1) / 2) * width
        axes.bar(places, np.nan_to_num(heights), width, label=TITLES.get(row.method, row.method))
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("intersection over union")
    axes.legend(frameon=False, fontsize=7)
    return figure


def draw_confusion(results: Sequence[MethodResult]) -> Figure:
    """Confusion matrices, each row in shares of the true class."""
    columns = min(len(results), 4)
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * rows), dpi=110, layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    for axes, row in zip(panels, results, strict=False):
        names = row.matrix.names
        shares = row.matrix.counts / np.maximum(row.matrix.counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for i, j in np.ndindex(*shares.shape):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(TITLES.get(row.method, row.method), fontsize=8)
        axes.set_ylabel("truth (rows in %)", fontsize=7)
    return figure


def draw_maps(evaluation: LandcoverEvaluation, scheme: ClassScheme) -> Figure:
    """One held-out scene: image, labels and the map of each method."""
    example = evaluation.example
    assert example is not None
    colours = scheme_colours(scheme)
    table_of_colours = np.array([*colours, _NO_LABEL], dtype=np.float64) / 255
    panels: Mapping[str, NDArray[Any]] = {
        f"{example.name}": example.image,
        "labels": np.where(example.valid, example.truth, len(colours)),
        **{TITLES.get(m, m): classes for m, classes in example.predicted.items()},
    }
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.75 * rows + 0.4), dpi=120, layout="constrained")
    spots = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    colour_map = ListedColormap(table_of_colours.tolist())
    for axes in spots:
        axes.set_axis_off()
    for axes, (title, content) in zip(spots, panels.items(), strict=False):
        if content.ndim == 3:
            axes.imshow(content)
        else:
            axes.imshow(content, cmap=colour_map, vmin=-0.5, vmax=len(colours) + 0.5, interpolation="nearest")
        axes.set_title(title, fontsize=7)
    handles = [
        Patch(facecolor=table_of_colours[k].tolist(), edgecolor="0.3", label=n)
        for k, n in enumerate(scheme.names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def scheme_colours(scheme: ClassScheme) -> list[tuple[int, int, int]]:
    """Red, green and blue of each class."""
    spare = [(int(c[1:3], 16), int(c[3:5], 16), int(c[5:7], 16)) for c in _PALETTE]
    return [own or spare[k % len(spare)] for k, own in enumerate(scheme.colours)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
