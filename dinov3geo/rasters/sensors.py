"""The records of known sensors, and the look-up by name or file.

To add a sensor, add one record to `_RECORDS`, or write a YAML file (`dinov3geo stats --output` writes one).
A new set of statistics states what it was computed from.
"""

from __future__ import annotations

from dinov3geo.errors import UnknownNameError
from dinov3geo.rasters.satellites import SATELLITES
from dinov3geo.rasters.sensor import Band, Quality, Sensor
from dinov3geo.rasters.sensor_files import SUFFIXES, load_sensor

__all__ = ["SENSORS", "Band", "Quality", "Sensor", "get_sensor"]

# Stored 8-bit numbers to [0, 1], the unit in which mean and std of 8-bit sensors are given.
_BYTE = 1.0 / 255.0


def get_sensor(name: str) -> Sensor:
    """Looks a sensor up.

    Args:
        name: a key of `SENSORS`, or the path of a YAML file.

    Raises:
        UnknownNameError: no such sensor; the message lists those there are.
        ConfigError: the file cannot be read or does not describe a sensor.
    """
    if name.lower().endswith(SUFFIXES):
        return load_sensor(name)
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
        name="eurosat_rgb",
        bands=_byte_bands(
            10.0,
            ("red", 664.6, 0.3442, 0.2011),
            ("green", 559.8, 0.3814, 0.1356),
            ("blue", 492.4, 0.4086, 0.1157),
        ),
        gsd_m=10.0,
        dtype="uint8",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source="EuroSAT RGB (Sentinel-2, Helber et al. 2019); statistics of the 12,896 of 16,000 "
        "images that are not in the test part by file name",
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
SENSORS: dict[str, Sensor] = {sensor.name: sensor for sensor in (*_RECORDS, *SATELLITES)}
