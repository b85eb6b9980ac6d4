"""What `dinov3geo canopy` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dinov3geo.commands.console import format_seconds, print_pairs, print_table

if TYPE_CHECKING:
    from dinov3geo.evaluation.canopy import CanopyEvaluation
    from dinov3geo.predict.products import PredictionReport


def print_evaluation(evaluation: CanopyEvaluation) -> None:
    """Errors by method and site, by true height, and what was chosen by, on stdout."""
    from dinov3geo.evaluation.canopy import CHOICE_TITLE

    by_site = [
        [row.method, row.site, str(row.scores.count)]
        + [f"{n:.2f}" for n in (row.scores.mae, row.scores.rmse, row.scores.bias)]
        + [f"{n:.3f}" for n in (row.scores.r2, row.block_r2, row.edge_error)]
        for row in evaluation.rows
    ]
    print_table(
        ["method", "site", "cells", "MAE [m]", "RMSE [m]", "bias [m]", "R2", "block R2", "edge error"],
        by_site,
    )
    filled = {bin.low: bin for bins in evaluation.bins.values() for bin in bins if bin.count}
    header = ["MAE [m] by true height"]
    header += [
        f"{low:g}-{bin.high:g} m" if bin.high < float("inf") else f">{low:g} m" for low, bin in filled.items()
    ]
    rows = [
        [method, *(f"{bin.mae:.2f}" for bin in bins if bin.count)] for method, bins in evaluation.bins.items()
    ]
    print()
    print_table(header, rows)
    if choices := evaluation.choice_rows():
        print(f"\n{CHOICE_TITLE}:\n")
        print_table(choices[0], choices[1:])


def print_reports(reports: Sequence[PredictionReport]) -> None:
    """A summary of predictions on stdout: pairs for one, a table for several."""
    if len(reports) == 1:
        report = reports[0]
        pairs = [
            ("heights", str(report.output)),
            ("picture", str(report.preview or "none")),
            ("min, mean, max", f"{report.minimum_m:.1f}, {report.mean_m:.1f}, {report.maximum_m:.1f} m"),
            ("valid", f"{report.valid_share:.1%} of the pixels, {report.area_km2 * 100:.4g} ha"),
            ("tiles", str(report.tiles)),
            ("time", format_seconds(report.seconds)),
        ]
        print_pairs(pairs)
        return
    rows = [
        [
            str(report.output),
            f"{report.minimum_m:.1f}",
            f"{report.mean_m:.1f}",
            f"{report.maximum_m:.1f}",
            f"{report.valid_share:.1%}",
            format_seconds(report.seconds),
        ]
        for report in reports
    ]
    print_table(["heights", "min [m]", "mean [m]", "max [m]", "valid", "time"], rows)
