"""Features of a scene read from what `dinov3geo features` wrote, of whichever kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.windows import Window

from dinov3geo.errors import ConfigError, RasterError
from dinov3geo.features.facts import FeatureFacts
from dinov3geo.features.store import FeatureStore, Floats, StoredType
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.parquet import import_pyarrow

KINDS = (".zarr", ".parquet", ".tif", ".tiff")
"""Suffixes of files and folders of features."""


class StoredFeatures(Protocol):
    """Features of a scene, one cell per patch."""

    @property
    def path(self) -> Path:
        """File or folder."""

    @property
    def grid(self) -> PixelGrid:
        """Of the patches."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Tags by name."""

    def read(self, rows: slice = slice(None), cols: slice = slice(None)) -> Floats:
        """Features [D, h, w] of a window of cells, NaN where there is no data."""


def open_features(path: str | Path) -> StoredFeatures:
    """Opens a Zarr store, a Parquet table or a GeoTIFF of features.

    Args:
        path: ends in one of `KINDS`.

    Raises:
        ConfigError: another suffix, or a package that reads it is not installed.
        RasterError: it cannot be read as features.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise ConfigError(f"{path} is no file of features; expected {', '.join(KINDS)}")
    if not path.exists():
        raise RasterError(f"no such file of features: {path}; write it with `dinov3geo features`")
    if suffix == ".zarr":
        return FeatureStore(path)
    return FeatureTable(path) if suffix == ".parquet" else FeatureRaster(path)


class FeatureRaster:
    """Features of a scene in a GeoTIFF, one band each."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            RasterError: the file cannot be read.
        """
        self.path = path
        try:
            with rasterio.open(path) as dataset:
                self.grid = PixelGrid(dataset.crs, dataset.transform, dataset.height, dataset.width)
                self.attributes: Mapping[str, Any] = dataset.tags()
                self._type = StoredType(dataset.dtypes[0], float(dataset.scales[0]))
        except RasterioError as error:
            raise RasterError(f"{path} cannot be read as features ({error})") from error

    def read(self, rows: slice = slice(None), cols: slice = slice(None)) -> Floats:
        """Features [D, h, w] of a window of cells, NaN where there is no data.

        Raises:
            RasterError: the file is damaged.
        """
        (top, bottom, _), (left, right, _) = rows.indices(self.grid.height), cols.indices(self.grid.width)
        window = Window(left, top, right - left, bottom - top)
        try:
            with rasterio.open(self.path) as dataset:
                return self._type.decode(dataset.read(window=window))
        except RasterioError as error:
            raise RasterError(f"{self.path} cannot be read ({error})") from error


class FeatureTable:
    """Features of a scene in a Parquet table, one row per patch with data."""

    def __init__(self, path: Path) -> None:
        """Reads the schema.

        Raises:
            ConfigError: pyarrow is not installed, or the table does not say what its features are of.
            RasterError: the file is no such table.
        """
        import pyproj

        self.path = path
        self._arrow = import_pyarrow("feature tables")
        try:
            self._file = self._arrow.parquet.ParquetFile(path)
            schema = self._file.schema_arrow
            tags = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
            number = schema.field("features").type
            self._type = StoredType(_numpy_name(number.value_type), float(tags["scale"]))
            self._count = int(number.list_size)
            transform = Affine(*json.loads(tags["transform"]))
            crs = pyproj.CRS.from_json_dict(json.loads(tags["geo"])["columns"]["geometry"]["crs"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RasterError(
                f"{path} is no table of features ({error}); expected an X.parquet of this package"
            ) from error
        self.attributes: Mapping[str, Any] = tags
        # Patches without data have no row, so the table itself does not tell how far the scene reaches.
        facts = FeatureFacts.from_tags(tags, source=path)
        height, width = (-(-length // facts.stride) for length in facts.scene_hw)
        self.grid = PixelGrid(CRS.from_wkt(crs.to_wkt()), transform, height, width)

    def read(self, rows: slice = slice(None), cols: slice = slice(None)) -> Floats:
        """Features [D, h, w] of a window of cells, NaN where there is no data.

        Raises:
            RasterError: the file is damaged.
        """
        (top, bottom, _), (left, right, _) = rows.indices(self.grid.height), cols.indices(self.grid.width)
        found = np.full((self._count, bottom - top, right - left), np.nan, dtype=np.float32)
        try:
            for group in range(self._file.num_row_groups):
                statistics = self._file.metadata.row_group(group).column(0).statistics
                if statistics is not None and (statistics.max < top or statistics.min >= bottom):
                    continue
                table = self._file.read_row_group(group, columns=["row", "col", "features"]).combine_chunks()
                row, col = (table[name].to_numpy() for name in ("row", "col"))
                inside = (row >= top) & (row < bottom) & (col >= left) & (col < right)
                stored = table["features"].chunk(0).flatten().to_numpy(zero_copy_only=False)
                values = self._type.decode(stored.reshape(-1, self._count)[inside])
                found[:, row[inside] - top, col[inside] - left] = values.T
        except (OSError, ValueError) as error:
            raise RasterError(f"{self.path} cannot be read ({error})") from error
        return found


def _numpy_name(number: Any) -> str:  # noqa: ANN401 (of pyarrow)
    name: str = np.dtype(number.to_pandas_dtype()).name
    return name
