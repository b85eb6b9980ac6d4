"""An evaluation of canopy height as a Markdown table and pictures."""

from __future__ import annotations

import io
import math
from pathlib import Path

from matplotlib.figure import Figure

from dinov3geo.evaluation.canopy import CHOICE_TITLE, MEAN, SITE_MEAN, CanopyEvaluation
from dinov3geo.evaluation.reports import write_bytes

RESULTS_JSON, RESULTS_TABLE = "results.json", "results.md"
CALIBRATION_PICTURE, BIAS_PICTURE = "calibration.png", "bias.png"
_CONSTANT = (MEAN, SITE_MEAN)


def markdown(evaluation: CanopyEvaluation) -> str:
    """Scores by method and site, bias by true height, and shifts where they were looked for."""
    side = evaluation.details.get("block_cells", "")
    header = ["method", "site", "MAE [m]", "RMSE [m]", "bias [m]", "R2", f"block R2 ({side} cells)"]
    rows = [
        [r.method, r.site, *(f"{n:.2f}" for n in (r.scores.mae, r.scores.rmse, r.scores.bias))]
        + [f"{n:.3f}" for n in (r.scores.r2, r.block_r2, r.edge_error)]
        for r in evaluation.rows
    ]
    parts = [_table([*header, "edge error"], rows), "Bias [m] by true height (cells):\n"]
    first = next(iter(evaluation.bins.values()))
    shown = [k for k, b in enumerate(first) if b.count]
    names = [f"{_interval(first[k].low, first[k].high)} ({first[k].count})" for k in shown]
    biases = [[m, *(f"{bins[k].bias:+.2f}" for k in shown)] for m, bins in evaluation.bins.items()]
    parts.append(_table(["method", *names], biases))
    if choices := evaluation.choice_rows():
        parts += [f"{CHOICE_TITLE}:\n", _table(choices[0], choices[1:])]
    registration = evaluation.details.get("registration")
    if registration:
        parts.append(_registration(registration))
    return "\n".join(parts)


def write_report(evaluation: CanopyEvaluation, folder: Path) -> list[Path]:
    """Writes table, report and pictures into a folder.

    Returns:
        What was written.

    Raises:
        RasterError: it cannot be written.
    """
    contents = {
        RESULTS_JSON: evaluation.to_json().encode(),
        RESULTS_TABLE: markdown(evaluation).encode(),
        CALIBRATION_PICTURE: _png(draw_calibration(evaluation)),
        BIAS_PICTURE: _png(draw_bias(evaluation)),
    }
    for name, content in contents.items():
        write_bytes(folder / name, content)
    return [folder / name for name in contents]


def draw_calibration(evaluation: CanopyEvaluation) -> Figure:
    """Mean truth of the cells of each predicted height, for every method that is not constant."""
    figure = Figure(figsize=(5.2, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    top = 0.0
    for method, points in evaluation.calibration.items():
        filled = [p for p in points if p.count]
        if method in _CONSTANT or not filled:
            continue
        axes.plot([p.predicted for p in filled], [p.true for p in filled], "o-", ms=3, lw=1, label=method)
        top = max(top, *(max(p.predicted, p.true) for p in filled))
    axes.plot([0, top], [0, top], color="0.6", lw=1, ls=":")
    axes.set_xlabel("predicted height [m], mean of a bin")
    axes.set_ylabel("mean true height [m]")
    axes.legend(frameon=False, fontsize=6)
    return figure


def draw_bias(evaluation: CanopyEvaluation) -> Figure:
    """Bias by true height."""
    figure = Figure(figsize=(6.0, 4.0), dpi=120, layout="constrained")
    axes = figure.subplots()
    labels: list[str] = []
    for method, bins in evaluation.bins.items():
        filled = [b for b in bins if b.count]
        labels = [_interval(b.low, b.high) for b in filled]
        if method not in _CONSTANT:
            axes.plot(range(len(filled)), [b.bias for b in filled], "o-", ms=3, lw=1, label=method)
    axes.axhline(0, color="0.6", lw=1, ls=":")
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlabel("true height [m]")
    axes.set_ylabel("predicted less true [m]")
    axes.legend(frameon=False, fontsize=6)
    return figure


def _registration(found: dict[str, object]) -> str:
    lines = ["Where heights lie beside their images (cells to the south and east, all plots of a site):\n"]
    sites = found["sites"]
    assert isinstance(sites, dict)
    rows = [
        [site, *(f"{numbers[key]:+.2f}" for key in ("south", "east", "correlation", "unmoved"))]
        for site, numbers in sites.items()
    ]
    lines.append(_table(["site", "south", "east", "correlation", "as it is"], rows))
    displaced, plots = found["displaced_sites"], found["displaced_plots"]
    assert isinstance(displaced, list) and isinstance(plots, list)
    names = list(sites)
    by_move = {tuple(p["moved"]): p for p in plots}
    rows = []
    for move, numbers in by_move.items():
        own = {d["site"]: d["found"] for d in displaced if tuple(d["moved"]) == move}
        rows.append(
            [f"{move[0]:+d}, {move[1]:+d}"]
            + [f"{own[n][0]:+.2f}, {own[n][1]:+.2f}" for n in names]
            + [f"{numbers['median_error_cells']:.2f}", f"{numbers['within_1_cell']:.0%}"]
        )
    lines.append("Heights moved on purpose, and what was found beyond the shift that was there before:\n")
    header = ["moved", *names, "single plots: median error", "within 1 cell"]
    return "\n".join([*lines, _table(header, rows)])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped) + "\n"


def _interval(low: float, high: float) -> str:
    return f">{low:g}" if math.isinf(high) else f"{low:g}-{high:g}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
