"""Writes the features of a scene into a Zarr store, one row of chunks after another; see `features.store`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.errors import RasterError
from dinov3geo.features.banded import BAND_ROWS, BandedWriter
from dinov3geo.features.store import INT8_NODATA, Mask, StoredType, import_zarr
from dinov3geo.rasters.grid import PixelGrid

_MAX_CHUNK_FEATURES = 256
_STORE, _META = "store.zarr", "zarr.json"


class ZarrWriter(BandedWriter):
    """Writes a store from its first row to its last; chunks go where they belong, the journal says which."""

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
        self._zarr = import_zarr()
        if path.exists() and (not overwrite or not (path / _META).exists()):
            raise RasterError(f"cannot write {path}: it exists already; choose another name or overwrite it")
        super().__init__(path, grid, names, stored, attributes=attributes, job=job, overwrite=overwrite)
        self._features: Any = None

    @property
    def _store(self) -> Path:
        return self._folder.path / _STORE

    def _begin(self) -> None:
        # Without a finished band there may be half a store.
        if self.next_row:
            self._features = self._zarr.open_group(self._store, mode="r+")["features"]
        else:
            self._features = self._make()

    def _encode(self, row: int, stored: NDArray[Any], valid: Mask) -> bytes:
        self._features[:, row : row + len(valid)] = stored
        return b""

    def _finish(self, bands: Sequence[Path]) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
        self._store.rename(self.path)

    def _make(self) -> Any:  # noqa: ANN401 (of zarr)
        """A store without features; returns their array."""
        grid, count = self.grid, len(self.names)
        root = self._zarr.create_group(self._store, zarr_format=3, overwrite=True)
        root.attrs.update(
            {"Conventions": "CF-1.8", "transform": list(grid.transform)[:6], **self._attributes}
        )
        nodata: Any = INT8_NODATA if self.stored.dtype == "int8" else float("nan")
        chunks = (min(count, _MAX_CHUNK_FEATURES), min(BAND_ROWS, grid.height), min(BAND_ROWS, grid.width))
        features = root.create_array(
            "features",
            shape=(count, *grid.shape_hw),
            chunks=chunks,
            dtype=self.stored.dtype,
            fill_value=nodata,
            dimension_names=("feature", "y", "x"),
        )
        described: dict[str, Any] = {"grid_mapping": "spatial_ref", "coordinates": "spatial_ref"}
        if self.stored.dtype == "int8":
            described |= {"scale_factor": self.stored.scale, "add_offset": 0.0, "_FillValue": INT8_NODATA}
        features.attrs.update(described)
        transform = grid.transform
        for name, start, step, length in (
            ("x", transform.c, transform.a, grid.width),
            ("y", transform.f, transform.e, grid.height),
        ):
            centres = start + step * (np.arange(length) + 0.5)
            axis = root.create_array(name, data=centres, dimension_names=(name,))
            axis.attrs.update({"axis": name.upper(), "standard_name": f"projection_{name}_coordinate"})
        place = root.create_array("spatial_ref", data=np.array(0), dimension_names=())
        t = transform
        place.attrs.update(
            {
                "crs_wkt": grid.crs.to_wkt(),
                "spatial_ref": grid.crs.to_wkt(),
                "GeoTransform": f"{t.c} {t.a} {t.b} {t.f} {t.d} {t.e}",
            }
        )
        root.attrs["feature_names"] = list(self.names)
        return features
