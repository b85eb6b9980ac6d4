"""A fit that is under way, on disk: taken up again by the same fit, never by another."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from dinov3geo.errors import RasterError


class ProgressFile:
    """One file that holds the newest state of a fit.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        """Names the file; nothing is written yet."""
        self.path = path

    def read(self, fingerprint: str) -> dict[str, Any] | None:
        """The state that a fit of this fingerprint left, or None: no file, another fit's, or damaged."""
        if not self.path.is_file():
            return None
        try:
            # Tensors, numbers and lists only: nothing in the file is run.
            kept = torch.load(self.path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            # A damaged state costs no more than fitting from the beginning.
            return None
        if not isinstance(kept, dict) or kept.get("fit") != _digest(fingerprint):
            return None
        state: dict[str, Any] = kept["state"]
        return state

    def write(self, fingerprint: str, state: dict[str, Any]) -> None:
        """Replaces the state; the file is whole at any time.

        Raises:
            RasterError: it cannot be written.
        """
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"fit": _digest(fingerprint), "state": state}, temporary)
            os.replace(temporary, self.path)
        except OSError as error:
            raise RasterError(f"{self.path} cannot be written ({error.strerror})") from error
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forgets the state."""
        self.path.unlink(missing_ok=True)


def _digest(fingerprint: str) -> str:
    return hashlib.sha256(fingerprint.encode()).hexdigest()
