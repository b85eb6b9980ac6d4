"""Stitched features of a scene as a GeoParquet table: one row per patch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from dinov3geo.errors import RasterError
from dinov3geo.features.store import Floats, Mask, StoredType
from dinov3geo.paths import check_free
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.parquet import geo_metadata, import_pyarrow


class TableWriter:
    """Writes a table from the first row of patches to the last; a context manager. Whole or absent.

    Columns: `row`, `col`, `features` (a list of fixed length) and `geometry`, the centre of the patch.
    Patches without data are left out. The scale of 8-bit features stands in the file's metadata.
    """

    def __init__(
        self,
        path: Path,
        grid: PixelGrid,
        names: Sequence[str],
        stored: StoredType,
        *,
        attributes: dict[str, str],
        overwrite: bool = False,
    ) -> None:
        """Checks the place; arguments as `ZarrWriter`."""
        self._arrow = import_pyarrow("feature tables")
        check_free(path, overwrite=overwrite)
        self.path, self.grid, self.names, self.stored = path, grid, tuple(names), stored
        self._temporary = path.with_name(f".{path.name}.unfinished")
        self._schema = self._make_schema(attributes)
        self._writer: Any = None
        self.next_row = 0

    def __enter__(self) -> TableWriter:
        """Makes the file under a hidden name."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._arrow.parquet.ParquetWriter(
                self._temporary, self._schema, compression="zstd"
            )
        except OSError as error:
            raise RasterError(f"cannot write {self.path}: {error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Gives the file its name, or removes it after an error."""
        self._writer.close()
        if kind is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)

    def write(self, values: Floats, valid: Mask) -> None:
        """Writes the next rows of patches: values [K, n, width] and valid [n, width]."""
        rows, cols = np.nonzero(valid)
        stored = self.stored.encode(values, valid)[:, rows, cols].T
        rows = rows + self.next_row
        transform = self.grid.transform
        centres = shapely.points(
            transform.c + transform.a * (cols + 0.5), transform.f + transform.e * (rows + 0.5)
        )
        arrow = self._arrow
        flat = arrow.array(np.ascontiguousarray(stored).ravel())
        columns = [
            arrow.array(rows, arrow.int32()),
            arrow.array(cols, arrow.int32()),
            arrow.FixedSizeListArray.from_arrays(flat, len(self.names)),
            arrow.array(shapely.to_wkb(centres), arrow.binary()),
        ]
        try:
            self._writer.write_table(arrow.Table.from_arrays(columns, schema=self._schema))
        except OSError as error:
            raise RasterError(f"cannot write {self.path}: {error}") from error
        self.next_row += values.shape[1]

    def _make_schema(self, attributes: dict[str, str]) -> Any:  # noqa: ANN401 (of pyarrow)
        arrow = self._arrow
        number = {"float32": arrow.float32(), "float16": arrow.float16(), "int8": arrow.int8()}[
            self.stored.dtype
        ]
        columns = [
            ("row", arrow.int32()),
            ("col", arrow.int32()),
            ("features", arrow.list_(number, len(self.names))),
            ("geometry", arrow.binary()),
        ]
        geo = geo_metadata(json.loads(self._projjson()), ["Point"])
        facts = {"scale": repr(self.stored.scale), "transform": json.dumps(list(self.grid.transform)[:6])}
        return arrow.schema(columns, metadata={**attributes, **facts, "geo": json.dumps(geo)})

    def _projjson(self) -> str:
        import pyproj

        return pyproj.CRS.from_wkt(self.grid.crs.to_wkt()).to_json()
