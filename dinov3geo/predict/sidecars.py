"""Files beside a map: a STAC item, a QGIS style, a legend, and names of classes."""

from __future__ import annotations

import datetime
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import rasterio
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rasterio import warp
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError

from dinov3geo.errors import RasterError
from dinov3geo.predict.encodings import class_colours
from dinov3geo.predict.preview import HEIGHT_COLOURS, round_up, save_figure
from dinov3geo.rasters.grid import PixelGrid

_STYLE_STEPS = 9
_WGS84 = CRS.from_epsg(4326)
_EXTENSIONS = (
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
)


def write_sidecars(raster: str | Path, *, scene: str | Path | None = None) -> list[Path]:
    """Writes what belongs beside a map: STAC item, QGIS style, legend and, for classes, their names.

    Args:
        raster: map written by this package.
        scene: what it was predicted from; its date, if it tells one, is that of the map.

    Returns:
        The files: `NAME.stac.json`, `NAME.qml`, `NAME_legend.png` and for classes `NAME.tif.aux.xml`.

    Raises:
        RasterError: the map cannot be read, or a file not written.
    """
    raster = Path(raster)
    stac, qml, legend = sidecar_paths(raster)
    names = class_names(raster)
    _write_text(stac, json.dumps(stac_item(raster, scene), indent=2) + "\n")
    _write_text(qml, qgis_style(raster))
    save_figure(_legend(raster, names), legend)
    written = [stac, qml, legend]
    if names:
        aux = raster.with_name(raster.name + ".aux.xml")
        _write_text(aux, _class_table(raster, names))
        written.append(aux)
    return written


def sidecar_paths(raster: Path) -> tuple[Path, Path, Path]:
    """Where the STAC item, the style and the legend of a map go."""
    stac, qml, legend = (raster.with_name(raster.stem + end) for end in (".stac.json", ".qml", "_legend.png"))
    return stac, qml, legend


def class_names(raster: Path) -> tuple[str, ...]:
    """Names of the classes of a map, in the order of their numbers; empty if it holds none.

    Raises:
        RasterError: it cannot be read.
    """
    with _open(raster) as dataset:
        tags = dataset.tags()
    numbered = {int(key[6:]): name for key, name in tags.items() if key.startswith("CLASS_")}
    return tuple(numbered[number] for number in sorted(numbered))


def stac_item(raster: str | Path, scene: str | Path | None = None) -> dict[str, Any]:
    """A STAC item (version 1.1) of a raster, with its projection and bands.

    Args:
        raster: file that the item is of.
        scene: what it was made from, for the date of acquisition; without one the time of writing counts.

    Raises:
        RasterError: a file cannot be read.
    """
    raster = Path(raster)
    with _open(raster) as dataset:
        grid = PixelGrid.from_dataset(dataset)
        tags = dataset.tags()
        bands = [_stac_band(dataset, index) for index in dataset.indexes]
    west, south, east, north = warp.transform_bounds(grid.crs, _WGS84, *grid.bounds, densify_pts=21)
    xmin, ymin, xmax, ymax = grid.bounds
    corners = [(xmin, ymin), (xmax, ymin), (xmax, ymax), (xmin, ymax), (xmin, ymin)]
    lons, lats = warp.transform(grid.crs, _WGS84, *zip(*corners, strict=True))
    code = grid.crs.to_epsg()
    projection: dict[str, Any] = {"proj:code": f"EPSG:{code}"} if code else {"proj:wkt2": grid.crs.to_wkt()}
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": list(_EXTENSIONS),
        "id": raster.stem,
        "bbox": [west, south, east, north],
        "geometry": {"type": "Polygon", "coordinates": [[list(c) for c in zip(lons, lats, strict=True)]]},
        "properties": {
            "datetime": _acquired(scene) or _iso(raster.stat().st_mtime),
            "created": _iso(raster.stat().st_mtime),
            "gsd": grid.gsd_m,
            **projection,
            "proj:shape": list(grid.shape_hw),
            "proj:transform": list(grid.transform)[:6],
            **{key.lower().replace("_", ":", 1): text for key, text in tags.items() if "DINOV3GEO" in key},
        },
        "links": [],
        "assets": {
            "data": {
                "href": f"./{raster.name}",
                "type": "image/tiff; application=geotiff; profile=cloud-optimized",
                "roles": ["data"],
                "raster:bands": bands,
            }
        },
    }


def qgis_style(raster: str | Path) -> str:
    """A QGIS layer style (.qml): colours of classes with their names, or a colour ramp over the values.

    Raises:
        RasterError: the raster cannot be read.
    """
    raster = Path(raster)
    names = class_names(raster)
    root = ElementTree.Element(
        "qgis", version="3.34", styleCategories="Symbology", hasScaleBasedVisibilityFlag="0"
    )
    pipe = ElementTree.SubElement(root, "pipe")
    if names:
        renderer = ElementTree.SubElement(
            pipe, "rasterrenderer", type="paletted", band="1", opacity="1", alphaBand="-1"
        )
        palette = ElementTree.SubElement(renderer, "colorPalette")
        for number, rgb in _colours(raster, len(names)).items():
            ElementTree.SubElement(
                palette, "paletteEntry", value=str(number), label=names[number], color=_hex(rgb), alpha="255"
            )
    else:
        _ramp(pipe, raster)
    for kind in ("brightnesscontrast", "huesaturation"):
        ElementTree.SubElement(pipe, kind)
    ElementTree.SubElement(pipe, "rasterresampler", maxOversampling="2")
    ElementTree.SubElement(root, "blendMode").text = "0"
    ElementTree.indent(root)
    header = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
    return header + ElementTree.tostring(root, encoding="unicode") + "\n"


def _ramp(pipe: ElementTree.Element, raster: Path) -> None:
    """Interpolated colours from 0 (or the least value) to the greatest, in the stored numbers."""
    low, high, scale = value_range(raster)
    renderer = ElementTree.SubElement(
        pipe, "rasterrenderer", type="singlebandpseudocolor", band="1", opacity="1", alphaBand="-1",
        classificationMin=f"{low:g}", classificationMax=f"{high:g}",
    )  # fmt: skip
    shader = ElementTree.SubElement(renderer, "rastershader")
    ramp = ElementTree.SubElement(
        shader, "colorrampshader", colorRampType="INTERPOLATED", classificationMode="1", clip="0",
        minimumValue=f"{low:g}", maximumValue=f"{high:g}",
    )  # fmt: skip
    colours = matplotlib.colormaps[HEIGHT_COLOURS]
    for value in np.linspace(low, high, _STYLE_STEPS):
        rgb = tuple(round(255 * part) for part in colours((value - low) / max(high - low, 1e-9))[:3])
        label = f"{value * scale:.3g}"
        ElementTree.SubElement(ramp, "item", value=f"{value:g}", label=label, color=_hex(rgb), alpha="255")


def value_range(raster: Path) -> tuple[float, float, float]:
    """Stored numbers to colour from and to, and the value of one step; from the statistics in the file.

    Raises:
        RasterError: the raster cannot be read.
    """
    with _open(raster) as dataset:
        tags, scale = dataset.tags(1), float(dataset.scales[0])
    least, greatest = (float(tags.get(f"STATISTICS_{end}", 0)) for end in ("MINIMUM", "MAXIMUM"))
    low = min(least, 0.0) if least * scale > -1e6 else 0.0
    return low, max(round_up(greatest * scale) / scale, low + scale), scale


def _legend(raster: Path, names: Sequence[str]) -> Figure:
    if names:
        handles = [
            Patch(facecolor=_hex(rgb), edgecolor="0.3", linewidth=0.5, label=names[number])
            for number, rgb in _colours(raster, len(names)).items()
        ]
        figure = Figure(figsize=(2.6, 0.3 * len(names) + 0.3), dpi=150)
        figure.legend(handles=handles, loc="center", frameon=False, fontsize=9)
        return figure
    with _open(raster) as dataset:
        title = dataset.descriptions[0] or raster.stem
        unit = f" [{dataset.units[0]}]" if dataset.units[0] else ""
    low, high, scale = value_range(raster)
    figure = Figure(figsize=(4.0, 0.9), dpi=150, layout="constrained")
    axes = figure.subplots()
    norm = matplotlib.colors.Normalize(low * scale, high * scale)
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(norm, matplotlib.colormaps[HEIGHT_COLOURS]),
        cax=axes,
        orientation="horizontal",
    )
    bar.set_label(title + unit, fontsize=9)
    return figure


def _colours(raster: Path, count: int) -> dict[int, tuple[int, int, int]]:
    """Colours of the classes as the file's own table has them."""
    with _open(raster) as dataset:
        if dataset.colorinterp[0] != ColorInterp.palette:
            return class_colours(count)
        table = dataset.colormap(1)
    return {number: tuple(table[number][:3]) for number in range(count)}


def _class_table(raster: Path, names: Sequence[str]) -> str:
    """GDAL's side file with category names and a raster attribute table, which QGIS and GDAL read."""
    root = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    listed = ElementTree.SubElement(band, "CategoryNames")
    for name in names:
        ElementTree.SubElement(listed, "Category").text = name
    table = ElementTree.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    fields = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8))
    for index, (name, kind, usage) in enumerate(fields):
        field = ElementTree.SubElement(table, "FieldDefn", index=str(index))
        for tag, text in (("Name", name), ("Type", str(kind)), ("Usage", str(usage))):
            ElementTree.SubElement(field, tag).text = text
    for number, rgb in _colours(raster, len(names)).items():
        row = ElementTree.SubElement(table, "Row", index=str(number))
        for value in (number, names[number], *rgb):
            ElementTree.SubElement(row, "F").text = str(value)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _stac_band(dataset: rasterio.io.DatasetReader, index: int) -> dict[str, Any]:
    nodata, tags = dataset.nodatavals[index - 1], dataset.tags(index)
    band: dict[str, Any] = {
        "data_type": dataset.dtypes[index - 1],
        "spatial_resolution": dataset.res[0],
        "scale": dataset.scales[index - 1],
        "offset": dataset.offsets[index - 1],
    }
    if nodata is not None:
        band["nodata"] = "nan" if np.isnan(nodata) else nodata
    if dataset.units[index - 1]:
        band["unit"] = dataset.units[index - 1]
    names = {"MINIMUM": "minimum", "MAXIMUM": "maximum", "MEAN": "mean", "STDDEV": "stddev"}
    statistics = {
        ours: float(tags[f"STATISTICS_{theirs}"])
        for theirs, ours in names.items()
        if tags.get(f"STATISTICS_{theirs}")
    }
    return band | ({"statistics": statistics} if statistics else {})


def _acquired(scene: str | Path | None) -> str | None:
    """When a scene was taken, from TIFF's tag of date and time; None where it tells nothing."""
    if scene is None:
        return None
    with _open(Path(scene)) as dataset:
        text = dataset.tags().get("TIFFTAG_DATETIME", "")
    try:
        moment = datetime.datetime.strptime(text, "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None
    return moment.isoformat() + "Z"


def _iso(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _hex(rgb: Sequence[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in rgb)


def _open(path: Path) -> rasterio.io.DatasetReader:
    try:
        return rasterio.open(path)
    except RasterioError as error:
        raise RasterError(f"cannot read {path}: {error}") from error


def _write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise RasterError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
