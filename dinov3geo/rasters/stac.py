"""Rasters that a STAC document names: an item, a collection of items (JSON or GeoParquet), or a catalogue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from dinov3geo.errors import DataError, RasterError
from dinov3geo.rasters.lists import gdal_address
from dinov3geo.rasters.parquet import read_table

_TABLE = ".parquet"
STAC_SUFFIXES = (".json", ".geojson", _TABLE)
ASSET_MARK = "#"
"""`items.json#visual` takes the asset `visual` of every item."""

_MEDIA_TYPES = ("image/tiff", "image/jp2", "image/vnd.stac.geotiff", "application/x-geotiff")
_ASIDE = {"thumbnail", "overview", "metadata"}


def split_spec(spec: str | Path) -> tuple[Path, str] | None:
    """Document and asset ("" for whichever it is) where a text names a STAC document, else None."""
    path, _, asset = str(spec).partition(ASSET_MARK)
    found = Path(path).expanduser()
    return (found, asset) if found.suffix.lower() in STAC_SUFFIXES and found.is_file() else None


def stac_rasters(path: Path, asset: str = "") -> list[Path]:
    """The raster of every item that a document holds or links to.

    Args:
        path: JSON file: an Item, an ItemCollection (FeatureCollection), a Catalog or a Collection; or a table
            of items as STAC-GeoParquet has it.
        asset: key of the asset to take; "" where each item has one raster, or one with the role "data".

    Returns:
        Files, or addresses of GDAL, in the order of the document.

    Raises:
        RasterError: the document or a file that it names cannot be read.
        DataError: no STAC, no or several rasters in an item, or an address that GDAL has no name for.
    """
    found = [_raster_of(item, folder, asset, path) for item, folder in _items(path, set())]
    if not found:
        raise DataError(f"{path} names no STAC item; expected an item, an item collection or a catalogue")
    return found


def _items(path: Path, seen: set[Path]) -> Iterator[tuple[Mapping[str, Any], Path]]:
    """Items of a document with the folder that their addresses are relative to."""
    path = path.resolve()
    if path in seen:
        return
    seen.add(path)
    if path.suffix.lower() == _TABLE:
        for item in _rows(path):
            yield item, path.parent
        return
    content = _read(path)
    kind = content.get("type")
    if kind == "Feature":
        yield content, path.parent
    elif kind == "FeatureCollection":
        for item in content.get("features", []):
            yield item, path.parent
    elif kind in ("Catalog", "Collection"):
        for link in content.get("links", []):
            if link.get("rel") in ("item", "child"):
                yield from _items(_linked(str(link.get("href", "")), path.parent, path), seen)
    else:
        raise DataError(
            f"{path} is no STAC document (type {kind!r}); expected Feature, FeatureCollection, Catalog or "
            "Collection"
        )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RasterError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no STAC document; expected a JSON object")
    return content


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Items of a table; an asset that only other items have is None in it."""
    table = read_table(path, "tables of STAC items")
    if "assets" not in table.column_names:
        raise DataError(
            f"{path} has no column assets; expected STAC-GeoParquet, it has {', '.join(table.column_names)}"
        )
    for row in table.select([name for name in ("id", "assets") if name in table.column_names]).to_pylist():
        assets = row.get("assets") or {}
        yield {**row, "assets": {key: _filled(one) for key, one in assets.items() if one is not None}}


def _filled(asset: Mapping[str, Any]) -> Mapping[str, Any]:
    """An asset without the keys that only other assets have."""
    return {key: value for key, value in asset.items() if value is not None}


def _raster_of(item: Mapping[str, Any], folder: Path, asset: str, document: Path) -> Path:
    name = f"item {item.get('id', '?')!r} of {document}"
    assets: Mapping[str, Any] = item.get("assets") or {}
    if asset:
        if asset not in assets:
            raise DataError(f"{name} has no asset {asset!r}; it has: {', '.join(sorted(assets)) or 'none'}")
        return _address(str(assets[asset].get("href", "")), folder, document)
    rasters = {key: one for key, one in assets.items() if _is_raster(one)}
    main = [key for key, one in rasters.items() if "data" in one.get("roles", ())]
    keys = main if len(main) == 1 else list(rasters)
    if len(keys) != 1:
        what = f"several rasters ({', '.join(sorted(keys))})" if keys else "no raster among its assets"
        raise DataError(f"{name} has {what}; name the asset, e.g. {document.name}{ASSET_MARK}visual")
    return _address(str(rasters[keys[0]].get("href", "")), folder, document)


def _is_raster(asset: Mapping[str, Any]) -> bool:
    kind = str(asset.get("type", "")).split(";")[0].strip().lower()
    suffix = Path(urlsplit(str(asset.get("href", ""))).path).suffix.lower()
    looks = kind in _MEDIA_TYPES or (not kind and suffix in (".tif", ".tiff", ".jp2", ".vrt"))
    return looks and not _ASIDE & set(asset.get("roles", ()))


def _address(href: str, folder: Path, document: Path) -> Path:
    """A file of this machine, or what GDAL opens elsewhere."""
    elsewhere = gdal_address(href)
    return _linked(href, folder, document) if elsewhere is None else Path(elsewhere)


def _linked(href: str, folder: Path, document: Path) -> Path:
    """The file of an address."""
    parts = urlsplit(href)
    if len(parts.scheme) > 1 and parts.scheme != "file":
        raise DataError(
            f"{document} names {href}, which is neither on this machine nor a raster that GDAL reads by "
            "address (https, s3, gs, az); fetch the files first"
        )
    if not href:
        raise DataError(f"{document} has an asset or link without an address (href)")
    path = Path(url2pathname(parts.path)) if parts.scheme == "file" else Path(unquote(href))
    path = Path(os.path.normpath(path if path.is_absolute() else folder / path))
    if not path.is_file():
        raise RasterError(f"no such file: {path} (named by {document})")
    return path
