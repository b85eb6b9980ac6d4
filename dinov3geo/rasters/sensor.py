"""What one must know of a family of rasters: bands, scale, statistics, names of files, quality bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class Band:
    """One band of a sensor.

    Attributes:
        name: lower case, unique within its sensor.
        wavelength_nm: centre wavelength [nm], or None if it has none (heights) or it is not published.
        gsd_m: the band's own ground sampling distance [m], or None where it varies.
        scale: factor from the stored number to the physical one.
        offset: addend after the factor.
        mean: of the physical number over the source's valid pixels.
        std: standard deviation of the same.
    """

    name: str
    wavelength_nm: float | None
    gsd_m: float | None
    scale: float
    offset: float
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Quality:
    """Bits of a quality band that make a pixel invalid.

    Attributes:
        file: what stands for the band in names of files, as in `Sensor.files`.
        fields: (lowest bit, number of bits, smallest value that is invalid) each, e.g. (14, 2, 2) for clouds
            of at least medium confidence in bits 14 and 15.
    """

    file: str
    fields: tuple[tuple[int, int, int], ...]

    def valid(self, bits: NDArray[Any]) -> NDArray[np.bool_]:
        """Where no field reaches its limit, of numbers of any shape."""
        good = np.ones(bits.shape, dtype=np.bool_)
        for lowest, count, limit in self.fields:
            good &= (bits >> lowest) & ((1 << count) - 1) < limit
        return good


@dataclass(frozen=True, slots=True)
class Sensor:
    """What one must know to read a family of rasters.

    Attributes:
        name: key in `SENSORS`.
        bands: in the order of the file.
        gsd_m: nominal ground sampling distance [m].
        dtype: numpy name of the stored numbers.
        nodata: stored number that means "no data" in files that declare none, or None.
        filename_glob: which files of a folder belong to the sensor.
        filename_regex: verbose regular expression on the file name; a group `date` dates the file.
        rgb_bands: the three bands to show as red, green, blue.
        nadir: seen from above, so flips and right-angle turns keep an image equally likely.
        source: where bands and statistics come from.
        date_format: `strptime` format of the group `date`.
        files: what stands for each band in the names of files that hold one band each (the group `band` of
            `filename_regex`), in the order of `bands`; empty where a file holds all bands.
        quality: how a band of quality bits makes pixels invalid, or None.
    """

    name: str
    bands: tuple[Band, ...]
    gsd_m: float
    dtype: str
    nodata: float | None
    filename_glob: str
    filename_regex: str
    rgb_bands: tuple[str, ...]
    nadir: bool
    source: str
    date_format: str = field(default="%Y%m%d", kw_only=True)
    files: tuple[str, ...] = field(default=(), kw_only=True)
    quality: Quality | None = field(default=None, kw_only=True)

    @property
    def band_names(self) -> tuple[str, ...]:
        """Names in the order of the file."""
        return tuple(band.name for band in self.bands)

    def select(self, names: Sequence[str] | None = None) -> tuple[Band, ...]:
        """The named bands in the order asked for; all of them for None.

        Raises:
            UnknownNameError: a name that the sensor does not have.
        """
        if names is None:
            return self.bands
        table = {band.name: band for band in self.bands}
        for name in names:
            if name not in table:
                raise UnknownNameError(f"band of sensor {self.name!r}", name, table)
        return tuple(table[name] for name in names)

    def band_indexes(self, names: Sequence[str] | None = None) -> tuple[int, ...]:
        """1-based positions in the file of the named bands.

        Raises:
            UnknownNameError: a name that the sensor does not have.
        """
        position = {band.name: index for index, band in enumerate(self.bands, start=1)}
        return tuple(position[band.name] for band in self.select(names))
