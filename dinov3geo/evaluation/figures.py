"""Pictures of scores: tables as dots with intervals, confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dinov3geo.evaluation.results import Row
from dinov3geo.paths import written_whole

_ROW_INCHES, _WIDTH_INCHES = 0.24, 7.0
_MAX_NUMBERED = 25


def save_figure(figure: Figure, png: Path) -> None:
    """Writes a PNG under a temporary name and renames it.

    Raises:
        RasterError: it cannot be written.
    """
    with written_whole(png) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white", bbox_inches="tight")


def draw_table(rows: Sequence[Row], png: Path) -> None:
    """Draws the main metric of all rows: a panel per data set, a line per method, a colour per encoder.

    Args:
        rows: of any number of data sets.
        png: to write.
    """
    shown = [row for row in rows if row.main]
    names = list(dict.fromkeys(row.data for row in shown))
    encoders = list(dict.fromkeys(row.encoder for row in shown))
    methods = {data: list(dict.fromkeys(r.method for r in shown if r.data == data)) for data in names}
    heights = [len(methods[data]) * max(2, len(encoders)) * _ROW_INCHES / 2 + 0.8 for data in names]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axes, data in zip(panels, names, strict=True):
        for number, encoder in enumerate(encoders):
            own = [row for row in shown if (row.data, row.encoder) == (data, encoder)]
            if not own:
                continue
            shift = (number + 0.5) / len(encoders) * 0.8 - 0.4
            places = [methods[data].index(row.method) + shift for row in own]
            values = np.array([row.value for row in own])
            ends = np.array([[max(r.value - r.low, 0), max(r.high - r.value, 0)] for r in own]).T
            colour = colours[number % len(colours)]
            axes.errorbar(values, places, xerr=ends, fmt="o", ms=4, lw=1.2, color=colour, label=encoder)
        axes.set_yticks(range(len(methods[data])), methods[data])
        axes.invert_yaxis()
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        metrics = dict.fromkeys(row.metric.replace("_", " ") for row in shown if row.data == data)
        axes.set_xlabel(", ".join(metrics))
        axes.set_title(data, loc="left", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, png)


def draw_confusion(confusion: NDArray[Any], classes: Sequence[str], png: Path, *, title: str) -> None:
    """Draws a confusion matrix as shares of the true class, with counts where there is room.

    Args:
        confusion: [K, K] counts, true classes down.
        classes: K names.
        png: to write.
        title: above the matrix.
    """
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 1.6 + 0.42 * min(len(classes), 60)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10)
    if len(classes) <= _MAX_NUMBERED:
        for row, col in np.argwhere(confusion > 0):
            colour = "white" if shares[row, col] > 0.5 else "black"
            text = str(confusion[row, col])
            axes.text(col, row, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the true class")
    save_figure(figure, png)
