"""Writes the tables of a document from benchmarks/results, so that no number is copied by hand.

Command: python benchmarks/readme.py [--check] [README.md]

A table stands between two marks that say where it comes from and what of it is shown:

    <!-- results 2026-11-24_eurosat methods="kNN k=20; logistic" encoders="untrained; colour statistics" -->
    <!-- /results -->

`methods` and `encoders` may be left out, then all are shown. Tables of canopy heights, from what
`canopy evaluate` wrote, name their rows one by one:

    <!-- canopy
    2026-11-29_filters/canopy_choice.json | gradient boosting | what the table calls it
    -->
    <!-- /canopy -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from dinov3geo.errors import ConfigError, UserError
from dinov3geo.evaluation.results import RESULTS, Row, markdown, read_rows
from dinov3geo.paths import written_whole

FOLDER = Path(__file__).parent / "results"
_MARK = re.compile(r"(<!-- results (\S+)(.*?) -->\n).*?(<!-- /results -->)", flags=re.DOTALL)
_CANOPY_MARK = re.compile(r"(<!-- canopy\n(.*?)-->\n).*?(<!-- /canopy -->)", flags=re.DOTALL)
_CANOPY_COLUMNS = {
    "MAE [m]": ("mae", 2),
    "RMSE [m]": ("rmse", 2),
    "bias [m]": ("bias", 2),
    "R2": ("r2", 3),
    "block R2 (10 m)": ("block_r2", 3),
}
_OPTION = re.compile(r'(\w+)="([^"]*)"')


def chosen(rows: list[Row], options: dict[str, str], where: str) -> list[Row]:
    """The rows that a mark asks for, in its order.

    Raises:
        ConfigError: an option that does not exist, or a name that no row has.
    """
    for name, listed in options.items():
        key = {"methods": "method", "encoders": "encoder"}.get(name)
        if key is None:
            raise ConfigError(f"{where}: unknown option {name!r}; valid names: methods, encoders")
        wanted = [text.strip() for text in listed.split(";")]
        there = {getattr(row, key) for row in rows}
        for text in wanted:
            if text not in there:
                raise ConfigError(f"{where}: no {key} {text!r}; there are {', '.join(sorted(there))}")
        rows = [row for text in wanted for row in rows if getattr(row, key) == text]
    return rows


def canopy_table(lines: str, folder: Path) -> str:
    """A table of canopy heights over all sites.

    Args:
        lines: one per row: file below `folder` | its method | name in the table.
        folder: of the folders of results.

    Raises:
        ConfigError: a line of another form, or a file or method that is not there.
    """
    table = [["method", *_CANOPY_COLUMNS], ["---"] * (1 + len(_CANOPY_COLUMNS))]
    for line in lines.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 3:
            raise ConfigError(f"canopy: expected FILE | METHOD | NAME, got {line!r}")
        try:
            report = json.loads((folder / parts[0]).read_text(encoding="utf-8"))
            rows = {row["method"]: row for row in report["rows"] if row["site"] == "all"}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"canopy: no readable report {parts[0]} ({error!r})") from error
        if parts[1] not in rows:
            raise ConfigError(f"canopy: no method {parts[1]!r} in {parts[0]}; there are {', '.join(rows)}")
        row = rows[parts[1]]
        table.append([parts[2], *(f"{row[key]:.{digits}f}" for key, digits in _CANOPY_COLUMNS.values())])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def filled(text: str, folder: Path = FOLDER) -> str:
    """A text with the tables of its marks.

    Args:
        text: with marks.
        folder: of the folders of results.

    Raises:
        ConfigError: no marks, or one that names something that is not there.
    """
    if not (_MARK.search(text) or _CANOPY_MARK.search(text)):
        raise ConfigError("no marks <!-- results FOLDER --> and <!-- /results --> to write between")

    def table(found: re.Match[str]) -> str:
        rows = read_rows(folder / found[2] / RESULTS)
        return f"{found[1]}{markdown(chosen(rows, dict(_OPTION.findall(found[3])), found[2]))}{found[4]}"

    text = _CANOPY_MARK.sub(lambda found: f"{found[1]}{canopy_table(found[2], folder)}{found[3]}", text)
    return _MARK.sub(table, text)


def main(words: list[str] | None = None) -> int:
    """Writes the document, or tells whether it is in step (0) or not (1)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("document", nargs="?", type=Path, default=FOLDER.parent.parent / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a table is out of step")
    given = parser.parse_args(words)
    try:
        text = given.document.read_text(encoding="utf-8")
        new = filled(text)
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.check:
        return int(new != text)
    with written_whole(given.document) as temporary:
        temporary.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
