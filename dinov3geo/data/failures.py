"""What goes wrong while chips are read: counted, and told in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from dinov3geo.errors import DataError, one_line


@contextlib.contextmanager
def readers_watched() -> Iterator[None]:
    """Around whatever goes on while processes read: torch tells of a killed one wherever the program is.

    Raises:
        DataError: in place of torch's long message, a reading process was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a reading process was killed ({one_line(str(error))}); if memory ran out, use fewer "
            "data.workers or smaller chips, then go on with --resume"
        ) from error


class Failures:
    """Counts reads that failed, and tells of each kind once."""

    def __init__(self, warn: Callable[[str], None] | None) -> None:
        """Keeps who is told."""
        self._warn = warn
        self._number = 0
        self._told: set[str] = set()

    def count(self, problems: Sequence[str]) -> None:
        """Counts reads that failed."""
        for problem in problems:
            self._number += 1
            # The place in the file differs, what is wrong with it does not.
            kind = problem.split(" at rows ")[0]
            if kind not in self._told and self._warn is not None:
                self._told.add(kind)
                self._warn(f"left out ({self._number} failed reads so far): {problem}")
