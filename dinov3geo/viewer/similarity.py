"""Similarity of all patches of a feature store to a clicked one, as a layer of the web map."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio import warp
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.transform import from_bounds

from dinov3geo.errors import DataError
from dinov3geo.features.store import FeatureStore
from dinov3geo.features.visualize import cosine_similarity_map
from dinov3geo.viewer.layers import (
    TILE_SIDE,
    cell_at,
    deepest_zoom,
    empty_tile,
    lonlat_bounds,
    ramp_colours,
    ramp_legend,
    to_crs,
    to_png,
)

Floats = NDArray[np.float32]

SIMILARITY_COLOURS = "magma"
MAPS_KEPT = 4
"""Maps of the last clicks: going back is instant, and memory bounded."""

_ROWS_AT_ONCE = 64
_LOW_PERCENTILE = 1
_EDGE_M = 20_037_508.342789244
_MERCATOR = CRS.from_epsg(3857)


@dataclass(frozen=True, slots=True)
class SimilarityMap:
    """Cosine similarity of every cell to one.

    Attributes:
        row: of the cell that was asked for.
        col: likewise.
        values: [h, w], NaN where there is no data.
        low: similarity that gets the first colour; 1 gets the last.
    """

    row: int
    col: int
    values: Floats
    low: float


class SimilarityLayer:
    """Draws similarity maps of one feature store; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Opens a store.

        Args:
            path: X.zarr, written by `dinov3geo features`.

        Raises:
            ConfigError: zarr is not installed.
            RasterError: no such store.
            GeoreferenceError: it lies where no web map can show it.
        """
        self.store = FeatureStore(path)
        self.path = path
        self.bounds = lonlat_bounds(self.store.grid, str(path))
        self._kept: OrderedDict[tuple[int, int], SimilarityMap] = OrderedDict()
        self._lock = threading.Lock()

    def describe(self, lon: float, lat: float) -> dict[str, Any]:
        """What the page has to know of the similarity to the cell under a point, as JSON.

        Raises:
            DataError: the point is outside of the store or on a cell without data.
        """
        grid = self.store.grid
        cell = cell_at(grid, *to_crs(grid.crs, lon, lat))
        if cell is None:
            raise DataError(f"the point lies outside of the features {self.path.name}")
        found = self.map_of(*cell)
        return {
            "key": f"{found.row}_{found.col}",
            "name": f"similarity ({self.path.name})",
            "bounds": self.bounds,
            "maxzoom": deepest_zoom(grid),
            "legend": ramp_legend(SIMILARITY_COLOURS, found.low, 1.0, ""),
            "text": f"patch in row {found.row}, column {found.col}",
        }

    def map_of(self, row: int, col: int) -> SimilarityMap:
        """The similarity to one cell, computed once while it is kept.

        Raises:
            DataError: no such cell, or one without data.
        """
        with self._lock:  # the tiles of a new map are asked for at once; one of them computes
            found = self._kept.pop((row, col), None) or self._compute(row, col)
            self._kept[row, col] = found
            while len(self._kept) > MAPS_KEPT:
                self._kept.popitem(last=False)
            return found

    def tile(self, row: int, col: int, z: int, x: int, y: int) -> bytes:
        """A tile of Web Mercator as PNG, transparent where there is no data.

        Raises:
            DataError: as `map_of`.
        """
        found = self.map_of(row, col)
        side = 2 * _EDGE_M / 2**z
        west, north = x * side - _EDGE_M, _EDGE_M - y * side
        drawn = np.full((TILE_SIDE, TILE_SIDE), np.nan, dtype=np.float32)
        try:
            warp.reproject(
                found.values,
                drawn,
                src_transform=self.store.grid.transform,
                src_crs=self.store.grid.crs,
                src_nodata=np.nan,
                dst_transform=from_bounds(west, north - side, west + side, north, TILE_SIDE, TILE_SIDE),
                dst_crs=_MERCATOR,
                dst_nodata=np.nan,
                resampling=Resampling.nearest,
            )
        except RasterioError:
            # The tile and the store have no point in common that the projection knows.
            return empty_tile()
        return to_png(ramp_colours(drawn, np.isfinite(drawn), SIMILARITY_COLOURS, found.low, 1.0))

    def _compute(self, row: int, col: int) -> SimilarityMap:
        height, width = self.store.grid.shape_hw
        if not (0 <= row < height and 0 <= col < width):
            raise DataError(f"the features {self.path.name} have no cell in row {row}, column {col}")
        query = self.store.read(slice(row, row + 1), slice(col, col + 1))[:, 0, 0]
        if not np.isfinite(query).all():
            raise DataError(f"the features {self.path.name} hold no data at this point")
        values = np.empty((height, width), dtype=np.float32)
        for start in range(0, height, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, height))
            values[rows] = cosine_similarity_map(np.moveaxis(self.store.read(rows), 0, -1), query)
        low = float(np.nanpercentile(values, _LOW_PERCENTILE))
        return SimilarityMap(row, col, values, min(low, 0.99))
