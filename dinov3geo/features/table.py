"""Stitched features of a scene as a GeoParquet table: one row per patch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from dinov3geo.features.banded import BandedWriter
from dinov3geo.features.store import Mask, StoredType
from dinov3geo.paths import check_free
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.parquet import geo_metadata, import_pyarrow


class TableWriter(BandedWriter):
    """Writes a table from the first row of patches to the last.

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
        job: str = "",
        overwrite: bool = False,
    ) -> None:
        """Checks the place; see `BandedWriter`."""
        self._arrow = import_pyarrow("feature tables")
        check_free(path, overwrite=overwrite)
        super().__init__(path, grid, names, stored, attributes=attributes, job=job, overwrite=overwrite)
        self._schema: Any = None

    def _begin(self) -> None:
        self._schema = self._make_schema(self._attributes)

    def _encode(self, row: int, stored: NDArray[Any], valid: Mask) -> bytes:
        rows, cols = np.nonzero(valid)
        transform = self.grid.transform
        centres = shapely.points(
            transform.c + transform.a * (cols + 0.5), transform.f + transform.e * (rows + row + 0.5)
        )
        arrow = self._arrow
        flat = arrow.array(np.ascontiguousarray(stored[:, rows, cols].T).ravel())
        columns = [
            arrow.array(rows + row, arrow.int32()),
            arrow.array(cols, arrow.int32()),
            arrow.FixedSizeListArray.from_arrays(flat, len(self.names)),
            arrow.array(shapely.to_wkb(centres), arrow.binary()),
        ]
        sink = arrow.BufferOutputStream()
        table = arrow.Table.from_arrays(columns, schema=self._schema)
        arrow.parquet.write_table(table, sink, compression="zstd")
        content: bytes = sink.getvalue().to_pybytes()
        return content

    def _finish(self, bands: Sequence[Path]) -> None:
        # A band becomes a row group, so that one at a time is in memory.
        whole = self._folder.path / "output.parquet"
        parquet = self._arrow.parquet
        with parquet.ParquetWriter(whole, self._schema, compression="zstd") as writer:
            for band in bands:
                # Not `read_table`, which would take part of a path for a column.
                table = parquet.ParquetFile(band).read()
                if table.num_rows:
                    writer.write_table(table)
        check_free(self.path, overwrite=self._overwrite)
        whole.replace(self.path)

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
