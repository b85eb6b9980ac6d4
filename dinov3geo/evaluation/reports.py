"""Reports on disk: whole or absent, and JSON without NaN."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from dinov3geo.errors import RasterError


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name only when whole.

    Raises:
        RasterError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RasterError(f"{path} cannot be written ({error.strerror})") from error


def finite(value: Any) -> Any:  # noqa: ANN401
    """The same structure with NaN and infinity as None, as JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
