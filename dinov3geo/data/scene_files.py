"""From folders, globs and files to scenes: which files belong together, what they hold, and when it was."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd
from torchgeo.datasets.utils import disambiguate_timestamp

from dinov3geo.errors import DataError
from dinov3geo.rasters.blocks import BLOCKS
from dinov3geo.rasters.cubes import cube_scenes, named_cubes
from dinov3geo.rasters.inventory import inspect_scenes
from dinov3geo.rasters.reader import SceneInfo, SceneReader, find_rasters
from dinov3geo.rasters.sensor import Sensor
from dinov3geo.rasters.stacks import band_files, stack_scenes

Paths = str | Path | Sequence[str | Path]
Interval = tuple[datetime, datetime]
ALWAYS: Interval = (pd.Timestamp.min, pd.Timestamp.max)


@dataclass(frozen=True, slots=True)
class SceneRecord:
    """A scene and when it was seen.

    Attributes:
        info: its header.
        interval: first and last moment; `ALWAYS` if unknown.
    """

    info: SceneInfo
    interval: Interval


def find_scenes(
    paths: Paths,
    sensor: Sensor | None,
    bands: Sequence[str] | None,
    time: tuple[str, str] | None,
    *,
    same_bands: bool = True,
) -> list[SceneRecord]:
    """Lists scenes, at least one.

    Args:
        paths: as `rasters.reader.find_rasters`, also Zarr stores and NetCDF files (`cube.zarr`,
            `cube.nc#reflectance` for one of several variables), of which every time step is a scene.
        sensor: whose files count; None takes all.
        bands: names of the sensor's bands; None for all.
        time: first and last moment of interest, anything pandas understands; None for all times.
        same_bands: whether scenes without a sensor must have one number of bands.

    Raises:
        RasterError, GeoreferenceError: a file cannot be used.
        DataError: nothing found, bands that do not fit, a date that is none.
    """
    cubes, others = _parted(paths)
    infos: list[SceneInfo] = []
    if others or not cubes:
        files = scene_paths(others, sensor)
        stacked = sensor is not None and sensor.files
        infos += _stacks(files, sensor, bands, paths) if sensor and stacked else inspect_scenes(files)
    infos += inspect_scenes(_cube_paths(cubes, sensor, bands))
    if same_bands:
        _check_bands(infos, sensor, bands)
    records = [SceneRecord(info, _interval(info, sensor)) for info in infos]
    if time is None:
        return records
    start, stop = (_moment(text) for text in time)
    kept = [r for r in records if r.interval[0] <= stop and r.interval[1] >= start]
    if not kept:
        raise DataError(f"none of {len(records)} scenes in {paths} lies between {time[0]} and {time[1]}")
    return kept


def scene_paths(paths: Paths, sensor: Sensor | None) -> list[Path]:
    """Sorted paths of all files of a sensor, and of cubes.

    Raises:
        RasterError, DataError: nothing found.
    """
    cubes, paths = _parted(paths)
    if cubes and not paths:
        return sorted({file for file, _ in cubes})
    found = find_rasters(paths)
    glob = "*" if sensor is None else sensor.filename_glob
    files = [path for path in found if fnmatch(path.name, glob)]
    if not files:
        raise DataError(f"none of {len(found)} rasters in {paths} is named {glob!r}")
    return sorted({*files, *(file for file, _ in cubes)})


def band_positions(sensor: Sensor, bands: Sequence[str] | None) -> list[int]:
    """1-based indexes of bands in a scene: of all bands in one file, or of a stack of the wanted ones.

    Raises:
        UnknownNameError: a band that the sensor does not have.
    """
    wanted = sensor.select(bands)
    return list(range(1, len(wanted) + 1)) if sensor.files else list(sensor.band_indexes(bands))


def open_scene(
    infos: dict[Path, SceneInfo], sensor: Sensor | None, bands: Sequence[int] | None, path: Path
) -> SceneReader:
    """Opens a scene of a data set with the cache of this process."""
    info = infos[path]
    quality = None
    if sensor is not None and sensor.quality is not None:
        quality = info.num_bands, sensor.quality
    nodata = None if sensor is None else sensor.nodata
    return SceneReader(info, bands=bands, nodata=nodata, quality=quality, cache=BLOCKS)


def _stacks(files: list[Path], sensor: Sensor, bands: Sequence[str] | None, paths: Paths) -> list[SceneInfo]:
    wanted = [band.name for band in sensor.select(bands)]
    parts = band_files(files, sensor, wanted)
    if not parts:
        raise DataError(
            f"none of {len(files)} rasters in {paths} is named like a band of sensor {sensor.name!r} "
            f"({', '.join(sensor.files)}; pattern {sensor.filename_regex})"
        )
    headers = inspect_scenes([part.path for part in parts])
    return stack_scenes(parts, {info.path: info for info in headers}, sensor, wanted)


def _check_bands(infos: Sequence[SceneInfo], sensor: Sensor | None, bands: Sequence[str] | None) -> None:
    needed = infos[0].num_bands if sensor is None else max(band_positions(sensor, bands))
    for info in infos:
        has = f"scene {info.path} has {info.num_bands} band{'s' * (info.num_bands != 1)}"
        if sensor is None and info.num_bands != needed:
            raise DataError(f"{has}, {infos[0].path} has {needed}; expected the same number in all files")
        if sensor is not None and info.num_bands < needed:
            names = sensor.band_names
            raise DataError(f"{has}; sensor {sensor.name!r} needs {len(names)} ({', '.join(names)})")
    dtypes = {info.dtype for info in infos}
    if sensor is not None and dtypes != {sensor.dtype}:
        warnings.warn(
            f"{infos[0].path} and others hold {', '.join(sorted(dtypes))}; the scale and statistics of "
            f"sensor {sensor.name!r} are for {sensor.dtype}",
            stacklevel=4,
        )


def _parted(paths: Paths) -> tuple[list[tuple[Path, str]], list[str | Path]]:
    """Cubes with the variable that is named, and everything else."""
    cubes, others = [], []
    for spec in [paths] if isinstance(paths, str | Path) else paths:
        named = named_cubes(spec)
        cubes += named
        others += [] if named else [spec]
    return cubes, others


def _cube_paths(
    cubes: Sequence[tuple[Path, str]], sensor: Sensor | None, bands: Sequence[str] | None
) -> list[Path]:
    """Every time step of some cubes, with the bands in the order in which the sensor's scenes have them."""
    wanted: list[tuple[str, ...]] = []
    if sensor is not None and sensor.files:
        tokens = {band.name: token for band, token in zip(sensor.bands, sensor.files, strict=True)}
        wanted = [(band.name, tokens[band.name]) for band in sensor.select(bands)]
        if sensor.quality is not None:
            wanted.append((sensor.quality.file,))
    elif sensor is not None:
        wanted = [(name,) for name in sensor.band_names]
    return [path for file, variable in cubes for path in cube_scenes(file, variable, wanted)]


def _interval(info: SceneInfo, sensor: Sensor | None) -> Interval:
    """When the file, or else its name, says that it was seen."""
    path = info.path
    if info.moment is not None:
        return pd.Timestamp(info.moment), pd.Timestamp(info.moment)
    if sensor is None:
        return ALWAYS
    match = re.match(sensor.filename_regex, path.name, re.VERBOSE)
    groups = {} if match is None else match.groupdict()
    try:
        if groups.get("date"):
            start, stop = disambiguate_timestamp(groups["date"], sensor.date_format)
            return start, stop
        if groups.get("start") and groups.get("stop"):
            start, _ = disambiguate_timestamp(groups["start"], sensor.date_format)
            _, stop = disambiguate_timestamp(groups["stop"], sensor.date_format)
            return start, stop
    except ValueError as error:
        raise DataError(
            f"the name of {path} holds no date of format {sensor.date_format!r}: {error}"
        ) from error
    return ALWAYS


def _moment(text: str) -> pd.Timestamp:
    try:
        return pd.Timestamp(text)
    except ValueError as error:
        raise DataError(f"{text!r} is no date; write e.g. 2020-06-01") from error
