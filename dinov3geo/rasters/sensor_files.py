"""Sensors in YAML files: read, checked and written."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dinov3geo.errors import ConfigError, one_line
from dinov3geo.rasters.sensor import Band, Quality, Sensor

SUFFIXES = (".yaml", ".yml")


class _BandFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    wavelength_nm: float | None = None
    gsd_m: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    mean: float
    std: float = Field(gt=0)
    file: str | None = None


class _QualityFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    fields: list[tuple[int, int, int]] = Field(min_length=1)


class _SensorFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    gsd_m: float = Field(gt=0)
    dtype: str
    nodata: float | None = None
    filename_glob: str = "*"
    filename_regex: str = ".*"
    date_format: str = "%Y%m%d"
    rgb_bands: tuple[str, ...] = ()
    nadir: bool = True
    source: str
    quality: _QualityFile | None = None
    bands: list[_BandFile] = Field(min_length=1)


def load_sensor(path: str | Path) -> Sensor:
    """Reads a sensor file.

    Raises:
        ConfigError: it cannot be read, is no YAML, or a key is missing, unknown or of the wrong kind.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the sensor file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(str(error))}") from error
    try:
        content = _SensorFile.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        valid = ", ".join(_SensorFile.model_fields)
        raise ConfigError(
            f"{path}: {key}: {first['msg']}; a sensor file has the keys {valid}, and each band "
            f"{', '.join(_BandFile.model_fields)}"
        ) from error
    return _record(content, path)


def _record(content: _SensorFile, path: str | Path) -> Sensor:
    names = [band.name for band in content.bands]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: bands: every band needs a name of its own, got {', '.join(names)}")
    unknown = [name for name in content.rgb_bands if name not in names]
    if unknown:
        raise ConfigError(f"{path}: rgb_bands: no band {unknown[0]!r}; bands are {', '.join(names)}")
    files = tuple(band.file for band in content.bands if band.file is not None)
    if files and len(files) < len(names):
        raise ConfigError(f"{path}: bands: 'file' must be given for every band or for none")
    if files and "(?P<band>" not in content.filename_regex:
        raise ConfigError(
            f"{path}: filename_regex: needs a group (?P<band>...) for bands in files of their own"
        )
    bands = tuple(
        Band(b.name, b.wavelength_nm, b.gsd_m, b.scale, b.offset, b.mean, b.std) for b in content.bands
    )
    bits = content.quality
    quality = None if bits is None else Quality(bits.file, tuple(bits.fields))
    return Sensor(
        name=content.name,
        bands=bands,
        gsd_m=content.gsd_m,
        dtype=content.dtype,
        nodata=content.nodata,
        filename_glob=content.filename_glob,
        filename_regex=content.filename_regex,
        rgb_bands=content.rgb_bands or tuple(names[:3]),
        nadir=content.nadir,
        source=content.source,
        date_format=content.date_format,
        files=files,
        quality=quality,
    )


def dump_sensor(sensor: Sensor) -> str:
    """The sensor as YAML that `load_sensor` reads back."""
    files = sensor.files or (None,) * len(sensor.bands)
    content = _SensorFile(
        name=sensor.name,
        gsd_m=sensor.gsd_m,
        dtype=sensor.dtype,
        nodata=sensor.nodata,
        filename_glob=sensor.filename_glob,
        filename_regex=sensor.filename_regex,
        date_format=sensor.date_format,
        rgb_bands=sensor.rgb_bands,
        nadir=sensor.nadir,
        source=sensor.source,
        quality=sensor.quality and _QualityFile(file=sensor.quality.file, fields=list(sensor.quality.fields)),
        bands=[
            _BandFile(
                name=b.name,
                wavelength_nm=b.wavelength_nm,
                gsd_m=b.gsd_m,
                scale=b.scale,
                offset=b.offset,
                mean=b.mean,
                std=b.std,
                file=file,
            )
            for b, file in zip(sensor.bands, files, strict=True)
        ],
    )
    text: str = yaml.safe_dump(content.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def save_sensor(sensor: Sensor, path: Path) -> None:
    """Writes a sensor file, whole or not at all.

    Raises:
        ConfigError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(dump_sensor(sensor), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
