"""What the commands show: progress, tables and notes. Results go to stdout, all else to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from dinov3geo.errors import ConfigError, one_line
from dinov3geo.paths import folder_obstacle

SECONDS_BETWEEN_LINES = 30.0
"""Where stderr is no terminal, progress is a line from time to time."""

_MAX_NUMBERS_SHOWN = 4


class Tell(Protocol):
    """What `progress_bar` hands out."""

    def __call__(
        self, done: int, total: int, numbers: Mapping[str, float] | None = None, *, label: str | None = None
    ) -> None:
        """Shows a step.

        Args:
            done: steps done.
            total: steps in all.
            numbers: to show beside, e.g. the loss.
            label: of the stage, where work has several.
        """


@contextmanager
def progress_bar(label: str) -> Iterator[Tell]:
    """Shows progress and the time left while the block runs.

    Args:
        label: what is done, e.g. the name of a scene.

    Yields:
        The function to call after each step.
    """
    if not sys.stderr.isatty():
        yield _LineTeller(label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[notes]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=None, notes="")

        def tell(
            done: int, total: int, numbers: Mapping[str, float] | None = None, *, label: str | None = None
        ) -> None:
            notes = _format_numbers(numbers)
            progress.update(task, description=label, completed=done, total=total, notes=notes)

        yield tell


def run_all[T](
    work: Callable[[int, Callable[[int, int], None]], T],
    sizes: Sequence[int],
    labels: Sequence[str],
    *,
    at_once: int = 1,
) -> list[T]:
    """Does several pieces of work under one progress bar.

    Args:
        work: does the piece of a number, from 0 on, and tells steps done and in all of it.
        sizes: steps of each piece, or what they are like beside each other.
        labels: of each piece.
        at_once: pieces in the making; after an error no further one begins.

    Returns:
        What each piece returned, in their order.
    """
    finished = [0] * len(sizes)
    with progress_bar(labels[0]) as tell:

        def do(number: int) -> T:
            label = f"{labels[number]} ({number + 1}/{len(sizes)})" if len(sizes) > 1 else labels[number]

            def told(done: int, whole: int) -> None:
                # The share counts: a piece may count its steps in another way than `sizes`.
                finished[number] = round(done / max(whole, 1) * sizes[number])
                tell(sum(finished), sum(sizes), label=label)

            return work(number, told)

        if at_once == 1 or len(sizes) == 1:
            return [do(number) for number in range(len(sizes))]
        with ThreadPoolExecutor(max_workers=at_once) as pool:
            waiting = [pool.submit(do, number) for number in range(len(sizes))]
            try:
                return [one.result() for one in waiting]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


class _LineTeller:
    """Progress as lines, for log files."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._began = self._last = time.monotonic()
        self._first: int | None = None
        self._done = 0

    def __call__(
        self, done: int, total: int, numbers: Mapping[str, float] | None = None, *, label: str | None = None
    ) -> None:
        now = time.monotonic()
        if self._first is None or done < self._done:
            # A resumed run does not start at zero, a new stage starts again: speed is that since then.
            self._began, self._first = now if self._first is not None else self._began, max(done - 1, 0)
        self._done = done
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = (now - self._began) / max(done - self._first, 1) * (total - done)
        words = (
            f"{label or self._label}: {done}/{total}, {format_seconds(left)} left {_format_numbers(numbers)}"
        )
        note(words)


def _format_numbers(numbers: Mapping[str, float] | None) -> str:
    if numbers is None:
        return ""
    return "  ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:_MAX_NUMBERS_SHOWN])


def format_seconds(seconds: float) -> str:
    """`8.2 s`, `3:05` or `2:03:05`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def note(text: str) -> None:
    """One line on stderr."""
    print(one_line(text), file=sys.stderr, flush=True)


def note_resumed(epochs: int) -> None:
    """A line that says after how many epochs a fit was taken up again; none for 0."""
    if epochs:
        note(f"went on after epoch {epochs} of a fit that was cut off")


def warn(warnings: Sequence[str]) -> None:
    """One line on stderr for each warning."""
    for text in warnings:
        note(f"warning: {text}")


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values in two columns on stdout."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"{name:<{width}}  {value}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table on stdout: the first column to the left, the others to the right.

    Plain text keeps its columns whatever the terminal's width, also in a file.
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = [
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def check_folder(folder: Path) -> None:
    """Makes sure, before any work, that files can be written into a folder that may not exist yet.

    Raises:
        ConfigError: they cannot.
    """
    obstacle = folder_obstacle(folder)
    if obstacle is not None:
        raise ConfigError(f"cannot write into {folder}: {obstacle}")
