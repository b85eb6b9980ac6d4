"""Parquet tables, with and without geometry: whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dinov3geo.errors import ConfigError, DataError


def import_pyarrow(purpose: str) -> Any:  # noqa: ANN401 (a module that may not be installed)
    """The package pyarrow with its Parquet part.

    Args:
        purpose: what needs it, for the message: "feature tables".

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{purpose} need pyarrow; install it: pip install 'dinov3geo[stores]'") from error
    return pyarrow


def read_table(path: Path, purpose: str) -> Any:  # noqa: ANN401 (of pyarrow)
    """A Parquet file as a table of pyarrow.

    Raises:
        DataError: no such file, or not Parquet.
        ConfigError: pyarrow is not installed.
    """
    arrow = import_pyarrow(purpose)
    if not path.is_file():
        raise DataError(f"no such file: {path}; expected a Parquet table")
    try:
        return arrow.parquet.read_table(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def write_table(table: Any, path: Path, purpose: str) -> None:  # noqa: ANN401 (of pyarrow)
    """Writes a table of pyarrow under a temporary name, then renames it.

    Raises:
        DataError: the disk refuses.
    """
    arrow = import_pyarrow(purpose)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            arrow.parquet.write_table(table, temporary, compression="zstd")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def geo_metadata(projjson: Any, kinds: list[str]) -> dict[str, Any]:  # noqa: ANN401 (JSON)
    """What GeoParquet 1.1 wants to know of the column `geometry`.

    Args:
        projjson: of the reference system; None for longitude and latitude, GeoParquet's default.
        kinds: of geometry, e.g. ["Polygon"].
    """
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": kinds}
    if projjson is not None:
        column["crs"] = projjson
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
