"""What the numbers of a raster are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov3geo.errors import DataError
from dinov3geo.rasters.overviews import Overviews

Rgb = tuple[int, int, int]

FEW_BANDS = 4
"""Up to so many bands are stored side by side in large blocks."""

# Blocks hold all bands side by side: one of 192 bands of float32 takes 12 MiB.
_BLOCK, _BLOCK_OF_MANY_BANDS = 512, 128


@dataclass(frozen=True, slots=True)
class Layer:
    """What the numbers of a raster are.

    Attributes:
        count: bands.
        dtype: of the stored numbers, a NumPy name.
        nodata: number at pixels without data, or None.
        band_names: one per band, or none.
        units: of all bands, e.g. "m".
        scale: a stored number times this is the value in `units`.
        overviews: how they are computed: "average" for measurements, "mode" or "nearest" for classes.
        colours: red, green and blue of each stored number, for one band of uint8.
        tags: metadata of the file.
    """

    count: int
    dtype: str
    nodata: float | None
    band_names: tuple[str, ...] = ()
    units: str = ""
    scale: float = 1.0
    overviews: Overviews = "average"
    colours: Mapping[int, Rgb] | None = None
    tags: Mapping[str, str] | None = None

    @property
    def block(self) -> int:
        """Side of a block in pixels."""
        return _BLOCK if self.count <= FEW_BANDS else _BLOCK_OF_MANY_BANDS

    def check(self, path: Path) -> None:
        """Raises `DataError` if nodata does not fit the type or there is not one name per band."""
        if self.band_names and len(self.band_names) != self.count:
            raise DataError(
                f"{path}: {len(self.band_names)} band names for {self.count} bands, expected one per band"
            )
        if self.nodata is not None and not _fits(self.nodata, np.dtype(self.dtype)):
            raise DataError(f"{path}: nodata {self.nodata} does not fit numbers of type {self.dtype}")


def _fits(number: float, dtype: np.dtype[Any]) -> bool:
    """Whether a number of this type can equal `number`."""
    if np.issubdtype(dtype, np.floating):
        return True
    limits = np.iinfo(dtype)
    return bool(np.isfinite(number) and number == int(number) and limits.min <= number <= limits.max)
