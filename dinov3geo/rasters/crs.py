"""Reference systems in the forms of rasterio and pyproj, and transformations between them that are kept."""

from __future__ import annotations

import functools
from typing import Any

import pyproj
from rasterio.crs import CRS


@functools.lru_cache(maxsize=256)
def transformer(source: CRS, target: CRS) -> pyproj.Transformer:
    """From (x, y) in one CRS to (x, y) in another."""
    return pyproj.Transformer.from_crs(to_pyproj(source), to_pyproj(target), always_xy=True)


@functools.lru_cache(maxsize=256)
def to_pyproj(crs: CRS) -> pyproj.CRS:
    """A rasterio CRS as torchgeo keeps it."""
    return pyproj.CRS.from_wkt(crs.to_wkt(version="WKT2_2019"))


def to_rasterio(crs: Any) -> CRS:  # noqa: ANN401
    """Any description of a CRS as rasterio keeps it."""
    return CRS.from_wkt(crs.to_wkt()) if isinstance(crs, pyproj.CRS) else CRS.from_user_input(crs)
