"""Errors that a user can mend.

The command line prints a `UserError` as one line and exits with status 2. Every class also inherits
the built-in type that a caller in Python would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(text: str) -> str:
    """The text without line breaks, for a message."""
    return " ".join(text.split())


class UserError(Exception):
    """Something in the input, not in the program: what was expected, what arrived, what to do."""


class RasterError(UserError, OSError):
    """A file cannot be opened, read or written as a raster."""


class GeoreferenceError(UserError, ValueError):
    """A raster's position on the ground is missing, rotated or does not match another's."""


class DataError(UserError, ValueError):
    """Values, bands or files that the task cannot use."""


class EmptySceneError(DataError):
    """A scene without a single valid pixel; among many scenes it may be left out."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run."""


class UnknownNameError(UserError, ValueError):
    """A name that stands in no table; the message lists the valid ones."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        """Builds the message.

        Args:
            kind: what the name should have named, e.g. `"backbone"`.
            name: what arrived.
            valid: every name that would have been accepted.
        """
        names = sorted(valid)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        super().__init__(f"unknown {kind} {name!r}{hint}; valid names: {', '.join(names)}")
