"""Rows of scores, and the files that show them: JSON, CSV, Markdown and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinov3geo.errors import ConfigError
from dinov3geo.evaluation.bootstrap import Interval
from dinov3geo.paths import written_whole

RESULTS_FORMAT = "dinov3geo-scores/1"
RESULTS, TABLE, CELLS, PICTURE = "results.json", "table.md", "table.csv", "table.png"


@dataclass(frozen=True, slots=True)
class Row:
    """One number of a table.

    Attributes:
        data: data set.
        encoder: what was measured.
        method: how.
        metric: e.g. "accuracy".
        value: the score.
        low: lower end of its interval.
        high: upper end.
        main: whether it is the metric to compare by.
        details: what was chosen on the way, e.g. C.
    """

    data: str
    encoder: str
    method: str
    metric: str
    value: float
    low: float
    high: float
    main: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def interval(self) -> Interval:
        """Value and interval."""
        return Interval(self.value, self.low, self.high)


def rows_of(
    data: str, encoder: str, method: str, scores: Mapping[str, Interval], details: Mapping[str, Any]
) -> list[Row]:
    """Rows of one method's scores, of which the first is the one to compare by."""
    return [
        Row(data, encoder, method, metric, s.value, s.low, s.high, number == 0, details)
        for number, (metric, s) in enumerate(scores.items())
    ]


def write_results(folder: Path, rows: Sequence[Row], details: Mapping[str, Any]) -> list[Path]:
    """Writes `results.json`, `table.csv`, `table.md` and `table.png`.

    Args:
        folder: made if it is not there.
        rows: at least one.
        details: command, settings, commit, seeds, hardware.

    Returns:
        The files.

    Raises:
        RasterError: one cannot be written.
    """
    from dinov3geo.evaluation.figures import draw_table

    texts = {
        RESULTS: results_text(rows, details),
        CELLS: _csv(rows),
        TABLE: markdown(rows),
    }
    for name, text in texts.items():
        with written_whole(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    draw_table(rows, folder / PICTURE)
    return [folder / name for name in (*texts, PICTURE)]


def results_text(rows: Sequence[Row], details: Mapping[str, Any]) -> str:
    """The results as JSON; numbers that do not exist are null."""
    report = {"format": RESULTS_FORMAT, **details, "rows": [asdict(row) for row in rows]}
    return json.dumps(finite(report), indent=2, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The rows of a `results.json`.

    Raises:
        ConfigError: no such file, or not of this format.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report.get("format") != RESULTS_FORMAT:
            raise ConfigError(f"{path} is no table of scores (format {RESULTS_FORMAT!r} expected)")
        return [_row(cells) for cells in report["rows"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no readable table of scores: {error}") from error


def _row(cells: dict[str, Any]) -> Row:
    known: dict[str, Any] = {name: math.nan if value is None else value for name, value in cells.items()}
    return Row(**known)


def markdown(rows: Sequence[Row]) -> str:
    """One table per data set: encoders down, methods across, the main metric with its interval."""
    parts = []
    for data in dict.fromkeys(row.data for row in rows):
        own = [row for row in rows if row.data == data and row.main]
        methods = list(dict.fromkeys(row.method for row in own))
        metrics = ", ".join(dict.fromkeys(row.metric.replace("_", " ") for row in own))
        cells = {(row.encoder, row.method): str(row.interval) for row in own}
        lines = [f"**{data}**, {metrics} [95 % interval]", "", f"| | {' | '.join(methods)} |"]
        lines.append("|---" * (len(methods) + 1) + "|")
        for encoder in dict.fromkeys(row.encoder for row in own):
            lines.append(f"| {encoder} | {' | '.join(cells.get((encoder, m), '') for m in methods)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["data", "encoder", "method", "metric", "value", "low", "high", "details"])
    for row in rows:
        numbers = [f"{number:.6g}" for number in (row.value, row.low, row.high)]
        writer.writerow(
            [row.data, row.encoder, row.method, row.metric, *numbers, json.dumps(dict(row.details))]
        )
    return text.getvalue()


def finite(value: Any) -> Any:  # noqa: ANN401 (any JSON value)
    """A JSON value with null for numbers that do not exist, which JSON cannot write."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
