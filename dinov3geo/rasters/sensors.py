"""What the bands of a raster mean: names, wavelengths, scale and statistics.

To add a sensor, add one record to `_RECORDS`. A new set of statistics states what it was computed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dinov3geo.errors import UnknownNameError

# Stored 8-bit numbers to [0, 1], the unit in which mean and std of 8-bit sensors are given.
_BYTE = 1.0 / 255.0


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


def get_sensor(name: str) -> Sensor:
    """Looks a sensor up.

    Raises:
        UnknownNameError: no such sensor; the message lists those there are.
    """
    if name not in SENSORS:
        raise UnknownNameError("sensor", name, SENSORS)
    return SENSORS[name]


def _byte_bands(gsd_m: float | None, *rows: tuple[str, float | None, float, float]) -> tuple[Band, ...]:
    """8-bit bands from (name, wavelength_nm, mean, std) in [0, 1]."""
    return tuple(Band(name, nm, gsd_m, _BYTE, 0.0, mean, std) for name, nm, mean, std in rows)


_FLAIR_RGBN = (
    ("red", None, 0.4727, 0.2005),
    ("green", None, 0.4909, 0.1799),
    ("blue", None, 0.4560, 0.1796),
    ("nir", None, 0.4123, 0.1757),
)

_RECORDS = (
    Sensor(
        name="aerial_rgb",
        bands=_byte_bands(
            0.1,
            ("red", None, 0.5245, 0.1820),
            ("green", None, 0.5857, 0.1603),
            ("blue", None, 0.5067, 0.1228),
        ),
        gsd_m=0.1,
        dtype="uint8",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source="NEON airborne camera; statistics of all valid pixels of 115 plots at HARV, OSBS and SJER "
        "(weecology/DeepForest, 18.0 million pixels)",
    ),
    Sensor(
        name="aerial_rgbn",
        bands=_byte_bands(0.2, *_FLAIR_RGBN),
        gsd_m=0.2,
        dtype="uint8",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source="any aerial image of red, green, blue, near infrared; statistics as sensor 'flair'",
    ),
    Sensor(
        name="flair",
        bands=_byte_bands(0.2, *_FLAIR_RGBN, ("height", None, 0.0644, 0.1331)),
        gsd_m=0.2,
        dtype="uint8",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source="IGN FLAIR #2 (BD ORTHO, 8-bit height whose unit is not stated); statistics of 6 tiles of "
        "512 x 512 pixels",
    ),
    Sensor(
        name="naip",
        bands=_byte_bands(
            None,
            ("red", None, 0.4037, 0.1494),
            ("green", None, 0.4464, 0.1119),
            ("blue", None, 0.3624, 0.1022),
            ("nir", None, 0.5807, 0.2568),
        ),
        gsd_m=0.6,
        dtype="uint8",
        nodata=0.0,
        filename_glob="*",
        filename_regex=r"m_\d+_[a-z]{2}_\d+_[^_]+_(?P<date>\d{8})",
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source="USDA NAIP; statistics of all valid pixels of one place in North Dakota on 5 dates 2009-2020, "
        "resampled to 5 m (3.4 million pixels)",
    ),
    Sensor(
        name="treesat_aerial",
        bands=_byte_bands(
            0.2,
            ("nir", None, 0.5608, 0.2015),
            ("green", None, 0.3474, 0.1323),
            ("blue", None, 0.3200, 0.1106),
            ("red", None, 0.3092, 0.1390),
        ),
        gsd_m=0.2,
        dtype="uint8",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source="TreeSatAI aerial patches; band order as torchgeo.datasets.TreeSatAI; statistics of 25 "
        "patches of 304 x 304 pixels",
    ),
    Sensor(
        name="sentinel2_rgb8",
        bands=_byte_bands(
            10.0,
            ("blue", 492.4, 0.3874, 0.2946),
            ("green", 559.8, 0.3900, 0.2688),
            ("red", 664.6, 0.2697, 0.2505),
        ),
        gsd_m=10.0,
        dtype="uint8",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source="Sentinel-2 B02, B03, B04 stretched to 8 bits (minuex/Satellite-Land-Cover-Segmentation); "
        "statistics of 33 tiles of 512 x 512 pixels; wavelengths of Sentinel-2A, ESA",
    ),
    Sensor(
        name="sat_rgb",
        bands=_byte_bands(
            0.6,
            ("red", None, 0.430, 0.213),
            ("green", None, 0.411, 0.156),
            ("blue", None, 0.296, 0.143),
        ),
        gsd_m=0.6,
        dtype="uint8",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source="SAT-493M (Maxar RGB, 0.6 m); statistics from the DINOv3 model cards for satellite backbones",
    ),
    Sensor(
        name="photo_rgb",
        bands=_byte_bands(
            None,
            ("red", None, 0.485, 0.229),
            ("green", None, 0.456, 0.224),
            ("blue", None, 0.406, 0.225),
        ),
        gsd_m=1.0,
        dtype="uint8",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=("red", "green", "blue"),
        nadir=False,
        source="natural images without a ground sampling distance (gsd_m is nominal); ImageNet-1k statistics",
    ),
)

#: All sensors by name.
SENSORS: dict[str, Sensor] = {sensor.name: sensor for sensor in _RECORDS}
