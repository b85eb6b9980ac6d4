"""Statistics of a set of scenes, as a record of their sensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.data.scene_files import SceneRecord, band_positions, find_scenes
from dinov3geo.errors import DataError
from dinov3geo.rasters.reader import SceneReader
from dinov3geo.rasters.sensors import Band, Sensor, get_sensor
from dinov3geo.rasters.statistics import BandStatistics, band_statistics, windows_of

_SIDE = 1024


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found.

    Attributes:
        sensor: with mean and std in its physical units and their source.
        bands: statistics of the stored numbers, in the order of the sensor's bands.
    """

    sensor: Sensor
    bands: tuple[BandStatistics, ...]


def measure_sensor(
    paths: Sequence[str],
    *,
    sensor: str | None,
    name: str,
    nodata: float | None,
    percents: Sequence[float],
) -> Survey:
    """Reads every pixel once (twice, if numbers have more than 16 bits).

    Args:
        paths: folders, globs or files.
        sensor: name or file whose bands, scales and quality bits hold; None takes the files as they are.
        name: of the new record.
        nodata: number that means no data where files declare none; None takes the sensor's.
        percents: of stored numbers, in [0, 100].

    Raises:
        RasterError, GeoreferenceError, DataError: files that cannot be used, or no valid pixel.
        UnknownNameError: no such sensor.
    """
    known = None if sensor is None else get_sensor(sensor)
    records = find_scenes(list(paths), known, None, None)
    missing = nodata if nodata is not None or known is None else known.nodata

    def pieces() -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        for record in records:
            with _open(record, known, missing) as reader:
                for row, col, size in windows_of(*record.info.grid.shape_hw, _SIDE):
                    numbers, valid = reader.read_at(row, col, size)
                    yield numbers, np.ones(size, dtype=np.bool_) if valid is None else valid

    found = tuple(band_statistics(pieces, percents))
    base = known or _plain_sensor(records, len(found))
    bands = tuple(
        replace(band, mean=row.mean * band.scale + band.offset, std=row.std * abs(band.scale))
        for band, row in zip(base.bands, found, strict=True)
    )
    source = f"statistics of {found[0].count} valid pixels of {len(records)} scenes in {', '.join(paths)}"
    return Survey(replace(base, name=name, bands=bands, nodata=missing, source=source), found)


def parse_percents(text: str) -> tuple[float, ...]:
    """Percentiles from `1,50,99`.

    Raises:
        DataError: something else.
    """
    try:
        percents = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(f"percentiles must be numbers with commas between them, got {text!r}") from error
    if not all(0 <= percent <= 100 for percent in percents):
        raise DataError(f"percentiles must lie in 0..100, got {text!r}")
    return percents


def _open(record: SceneRecord, sensor: Sensor | None, nodata: float | None) -> SceneReader:
    bands = None if sensor is None else band_positions(sensor, None)
    quality = None
    if sensor is not None and sensor.quality is not None:
        quality = record.info.num_bands, sensor.quality
    return SceneReader(record.info, bands=bands, nodata=nodata, quality=quality)


def _plain_sensor(records: Sequence[SceneRecord], count: int) -> Sensor:
    """A record of what the first file says of itself; 8-bit numbers are scaled to [0, 1]."""
    info = records[0].info
    texts = [text.strip().lower() for text in info.band_names[:count]]
    colours = list(info.colours[:count])
    named = all(texts) and len(set(texts)) == count
    coloured = set(colours) == {"red", "green", "blue"} and count == 3
    names = texts if named else colours if coloured else [f"b{number}" for number in range(1, count + 1)]
    scale = 1 / 255 if info.dtype == "uint8" else 1.0
    gsd_m = round(info.grid.gsd_m, 6)
    bands = tuple(Band(name, None, gsd_m, scale, 0.0, 0.0, 1.0) for name in names)
    rgb = tuple(names[:3]) if count >= 3 else tuple(names[:1]) * 3
    return Sensor("", bands, gsd_m, info.dtype, None, "*", ".*", rgb, True, "")
