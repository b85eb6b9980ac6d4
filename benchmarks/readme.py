"""Writes the tables of a document from benchmarks/results, so that no number is copied by hand.

Command: python benchmarks/readme.py [--check] [README.md]

A table stands between two marks that say where it comes from and what of it is shown:

    <!-- results 2026-11-24_eurosat methods="kNN k=20; logistic" encoders="untrained; colour statistics" -->
    <!-- /results -->

`methods` and `encoders` may be left out, then all are shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from dinov3geo.errors import ConfigError, UserError
from dinov3geo.evaluation.results import RESULTS, Row, markdown, read_rows
from dinov3geo.paths import written_whole

FOLDER = Path(__file__).parent / "results"
_MARK = re.compile(r"(<!-- results (\S+)(.*?) -->\n).*?(<!-- /results -->)", flags=re.DOTALL)
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


def filled(text: str, folder: Path = FOLDER) -> str:
    """A text with the tables of its marks.

    Args:
        text: with marks.
        folder: of the folders of results.

    Raises:
        ConfigError: no marks, or one that names something that is not there.
    """
    if not _MARK.search(text):
        raise ConfigError("no marks <!-- results FOLDER --> and <!-- /results --> to write between")

    def table(found: re.Match[str]) -> str:
        rows = read_rows(folder / found[2] / RESULTS)
        return f"{found[1]}{markdown(chosen(rows, dict(_OPTION.findall(found[3])), found[2]))}{found[4]}"

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
