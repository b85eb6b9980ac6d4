"""Files that name rasters: lists of paths, and splits whose polygons stand for whole scenes."""

from __future__ import annotations

import re
from pathlib import Path

import geopandas

from dinov3geo.errors import DataError, RasterError, UnknownNameError

_SCHEMES = {
    "https://": "/vsicurl/",
    "http://": "/vsicurl/",
    "s3://": "/vsis3/",
    "gs://": "/vsigs/",
    "az://": "/vsiaz/",
}
_VECTOR = ".gpkg"
_TEXT = ".txt"


def listed_rasters(path: Path) -> list[Path] | None:
    """The rasters that a file names; None if it is no such file.

    Args:
        path: `FILE.txt` with a path or address per line (empty lines and comments, #, are skipped),
            or `FILE.gpkg#NAME` of `dinov3geo split --by files`. Relative paths are relative to its folder.

    Raises:
        RasterError: no such file, or a raster in it does not exist.
        DataError: it names nothing, or its polygons are not whole scenes.
        UnknownNameError: no such split.
    """
    if path.suffix.lower() == _TEXT:
        return _from_text(path)
    name, _, split = path.name.rpartition("#")
    if name.lower().endswith(_VECTOR):
        return _from_splits(path.with_name(name), split)
    return None


def _from_text(path: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise RasterError(f"cannot read the list {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; expected one path per line") from error
    return _existing(path, [line for line in lines if line and not line.startswith("#")])


def _from_splits(path: Path, split: str) -> list[Path]:
    if not path.is_file():
        raise RasterError(f"no such file: {path}; expected a GeoPackage of `dinov3geo split --by files`")
    try:
        frame = geopandas.read_file(path, ignore_geometry=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path} cannot be read as a GeoPackage: {error}") from error
    if not {"split", "path"} <= set(frame.columns):
        raise DataError(
            f"{path} says nothing of whole scenes (columns split and path): it was not made with --by files;"
            " for parts of scenes use `split` in data.sources"
        )
    if split not in set(frame["split"]):
        raise UnknownNameError(f"split of {path}", split, set(frame["split"]))
    return _existing(path, frame.loc[frame["split"] == split, "path"].tolist())


def _existing(source: Path, names: list[str]) -> list[Path]:
    if not names:
        raise DataError(f"{source} names no raster")
    found = [Path(gdal_address(name) or source.parent / name) for name in names]
    for path in found:
        if gdal_address(path) is None and not path.exists():
            raise RasterError(f"{source} names {path}, which does not exist")
    return found


def gdal_address(name: str | Path) -> str | None:
    """What GDAL opens for something that is no file of this machine; None for files.

    Args:
        name: `https://...`, `s3://bucket/key`, `gs://...`, `az://...`, or a virtual file of GDAL, `/vsi...`.
            A `Path` has lost one of two slashes, which it gets back.
    """
    text = re.sub(r"^(.*?\b[a-z0-9]+):/+(?=[^/])", r"\1://", str(name), count=1)
    if text.startswith("/vsi"):
        return text
    for scheme, prefix in _SCHEMES.items():
        if text.startswith(scheme):
            return prefix + (text if prefix == "/vsicurl/" else text.removeprefix(scheme))
    return None
