"""Stitched features of a scene in a Zarr store, read without the network.

Layout (Zarr version 3): `features [feature, y, x]`, `x [x]` and `y [y]` (centres of the cells), and
`spatial_ref` with the reference system as CF and rioxarray want it. xarray opens it; numbers of 8 bits carry
CF's `scale_factor`, so that xarray gives floats and NaN where there is no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.errors import ConfigError, DataError, RasterError
from dinov3geo.rasters.grid import PixelGrid

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

STORED = ("float32", "float16", "int8")
"""Types of stored features."""

INT8_NODATA = -128


@dataclass(frozen=True, slots=True)
class StoredType:
    """How features become stored numbers.

    Attributes:
        dtype: a name in `STORED`.
        scale: a stored number times this is the feature; 1 for floats.
    """

    dtype: str
    scale: float = 1.0

    @classmethod
    def fitted(cls, dtype: str, sample: Floats) -> StoredType:
        """For 8 bits, a scale that 99.9 % of the sample fit into.

        Args:
            dtype: a name in `STORED`.
            sample: [N, D] features.

        Raises:
            ConfigError: no such type.
        """
        if dtype not in STORED:
            raise ConfigError(f"unknown type of features {dtype!r}; valid names: {', '.join(STORED)}")
        if dtype != "int8":
            return cls(dtype)
        return cls(dtype, max(float(np.percentile(np.abs(sample), 99.9)) / 127, 1e-12))

    def encode(self, values: Floats, valid: Mask) -> NDArray[Any]:
        """Features [K, n, w] and where they hold data [n, w] to stored numbers."""
        if self.dtype == "int8":
            whole = np.clip(np.rint(np.where(valid, values, 0) / self.scale), -127, 127).astype(np.int8)
            whole[:, ~valid] = INT8_NODATA
            return whole
        stored = values.astype(self.dtype)
        stored[:, ~valid] = np.nan
        return stored

    def decode(self, stored: NDArray[Any]) -> Floats:
        """Stored numbers to features, NaN where there is no data."""
        values = stored.astype(np.float32)
        if self.dtype == "int8":
            values = np.where(stored == INT8_NODATA, np.float32(np.nan), values * np.float32(self.scale))
        return np.asarray(values, dtype=np.float32)


def import_zarr() -> Any:  # noqa: ANN401 (a module that may not be installed)
    """The package zarr.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import zarr
    except ImportError as error:
        raise ConfigError("feature stores need zarr; install it: pip install 'dinov3geo[stores]'") from error
    return zarr


class FeatureStore:
    """Features of a scene, read from a store; no backbone is needed."""

    def __init__(self, path: str | Path) -> None:
        """Opens a store.

        Args:
            path: folder that `dinov3geo features -o X.zarr` wrote.

        Raises:
            ConfigError: zarr is not installed.
            RasterError: no such store.
        """
        from affine import Affine
        from rasterio.crs import CRS

        zarr = import_zarr()
        try:
            root = zarr.open_group(Path(path), mode="r")
            self._features = root["features"]
            wkt = root["spatial_ref"].attrs["crs_wkt"]
            transform = Affine(*root.attrs["transform"])
        except (OSError, KeyError, ValueError) as error:
            raise RasterError(
                f"{path} is no feature store ({error}); expected an X.zarr of this package"
            ) from error
        self.path = Path(path)
        self.names = tuple(root.attrs["feature_names"])
        self.attributes = dict(root.attrs)
        self.grid = PixelGrid(CRS.from_wkt(wkt), transform, *self._features.shape[1:])
        self._type = StoredType(
            str(self._features.dtype), float(self._features.attrs.get("scale_factor", 1.0))
        )

    def read(self, rows: slice = slice(None), cols: slice = slice(None)) -> Floats:
        """Features [D, h, w] of a window of cells, NaN where there is no data."""
        return self._type.decode(np.asarray(self._features[:, rows, cols]))

    def sample(self, xy: NDArray[np.float64]) -> Floats:
        """Features at points.

        Args:
            xy: [N, 2] in the store's reference system.

        Returns:
            [N, D], NaN where there is no data.

        Raises:
            DataError: a point outside.
        """
        inverse = ~self.grid.transform
        cols, rows = (
            np.floor(part).astype(int)
            for part in (inverse.a * xy[:, 0] + inverse.c, inverse.e * xy[:, 1] + inverse.f)
        )
        outside = (rows < 0) | (rows >= self.grid.height) | (cols < 0) | (cols >= self.grid.width)
        if outside.any():
            x, y = xy[np.flatnonzero(outside)[0]]
            raise DataError(f"point {x:g} {y:g} lies outside of the feature store {self.path}")
        found = np.empty((len(xy), len(self.names)), dtype=np.float32)
        # One read for all points of a row of cells: chunks are decoded once.
        for row in np.unique(rows):
            chosen = rows == row
            found[chosen] = self.read(slice(row, row + 1))[:, 0, cols[chosen]].T
        return found
