"""Scenes whose bands lie in files of their own, at resolutions of their own, read as one raster.

GDAL's virtual format says how the files make up the scene; it is handed over as text, so nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.sax.saxutils import escape

from dinov3geo.errors import DataError
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneInfo
from dinov3geo.rasters.sensor import Sensor

_GDAL_TYPES = {
    "uint8": "Byte",
    "int8": "Int8",
    "uint16": "UInt16",
    "int16": "Int16",
    "uint32": "UInt32",
    "int32": "Int32",
    "float32": "Float32",
    "float64": "Float64",
}


@dataclass(frozen=True, slots=True)
class BandFile:
    """A file that holds one band.

    Attributes:
        path: of the file.
        scene: what the files of one scene have in common.
        token: what its name says of the band, e.g. "B02".
    """

    path: Path
    scene: str
    token: str


def band_files(paths: Sequence[Path], sensor: Sensor, wanted: Sequence[str]) -> list[BandFile]:
    """The files of the wanted bands (and of the quality band), by what their names say."""
    position = {band.name: token for band, token in zip(sensor.bands, sensor.files, strict=True)}
    tokens = {position[name] for name in wanted}
    if sensor.quality is not None:
        tokens.add(sensor.quality.file)
    pattern = re.compile(sensor.filename_regex, re.VERBOSE)
    found = []
    for path in paths:
        match = pattern.match(path.name)
        if match is None or match["band"] not in tokens:
            continue
        start, end = match.span("band")
        # Level 2A products write the pixel size behind the band.
        rest = re.sub(r"_\d{2}m(?=\.)", "", path.name[end:])
        found.append(BandFile(path, str(path.parent / f"{path.name[:start]}*{rest}"), match["band"]))
    return found


def stack_scenes(
    files: Sequence[BandFile], infos: dict[Path, SceneInfo], sensor: Sensor, wanted: Sequence[str]
) -> list[SceneInfo]:
    """One scene from the band files of each place and date.

    Where a product holds a band at several resolutions, the finest is taken. The scene's grid is that of its
    finest band; coarser bands are interpolated, quality bits taken from the nearest pixel.

    Args:
        files: from `band_files`.
        infos: their headers.
        sensor: says which band is which.
        wanted: names of bands in the order of the result.

    Raises:
        DataError: a scene lacks a band, or its files do not belong together.
    """
    scenes: dict[str, dict[str, SceneInfo]] = {}
    for file in files:
        info, bands = infos[file.path], scenes.setdefault(file.scene, {})
        if file.token not in bands or info.grid.gsd_m < bands[file.token].grid.gsd_m:
            bands[file.token] = info
    position = {band.name: token for band, token in zip(sensor.bands, sensor.files, strict=True)}
    tokens = [position[name] for name in wanted]
    if sensor.quality is not None:
        tokens.append(sensor.quality.file)
    stacked = []
    for name, bands in scenes.items():
        missing = [token for token in tokens if token not in bands]
        if missing:
            raise DataError(
                f"scene {name} lacks {', '.join(missing)} of sensor {sensor.name!r}; it has "
                f"{', '.join(sorted(bands))}; add the files, or ask for other bands"
            )
        quality = sensor.quality is not None
        stacked.append(_stack([bands[token] for token in tokens], tuple(wanted), quality))
    return stacked


def _stack(parts: Sequence[SceneInfo], names: tuple[str, ...], has_quality: bool) -> SceneInfo:
    for part in parts:
        if part.num_bands != 1:
            raise DataError(f"{part.path} has {part.num_bands} bands, expected one band per file")
        if part.grid.crs != parts[0].grid.crs:
            raise DataError(f"{part.path} and {parts[0].path} lie in different reference systems")
    images = parts[: len(names)]
    finest = min(images, key=lambda part: part.grid.gsd_m)
    grid = finest.grid.southward()
    text = _virtual_raster(parts, grid, len(names) if has_quality else len(parts))
    dtypes = {part.dtype for part in images}
    if len(dtypes) > 1:
        raise DataError(f"the bands of {finest.path} are of types {', '.join(sorted(dtypes))}, expected one")
    return replace(
        finest,
        grid=grid,
        num_bands=len(parts),
        nodata=tuple(part.nodata[0] for part in parts),
        band_names=(*names, *("quality",) * has_quality),
        colours=("undefined",) * len(parts),
        source=text,
    )


def _virtual_raster(parts: Sequence[SceneInfo], grid: PixelGrid, num_images: int) -> str:
    """GDAL's XML of the scene."""
    t = grid.transform
    lines = [
        f'<VRTDataset rasterXSize="{grid.width}" rasterYSize="{grid.height}">',
        f"<SRS>{escape(grid.crs.to_wkt())}</SRS>",
        f"<GeoTransform>{t.c!r}, {t.a!r}, 0, {t.f!r}, 0, {t.e!r}</GeoTransform>",
    ]
    for number, part in enumerate(parts, start=1):
        xmin, _, _, ymax = part.grid.bounds
        width, height = (
            size / own for size, own in zip(part.grid.resolution_xy, grid.resolution_xy, strict=True)
        )
        x, y = (xmin - t.c) / t.a, (ymax - t.f) / t.e
        coarser = number <= num_images and width > 1.01
        how = ' resampling="bilinear"' if coarser else ""
        nodata, name = part.nodata[0], escape(str(part.path.absolute()))
        if part.grid.transform.e > 0:
            raise DataError(
                f"{part.path} runs from south to north, expected north to south in files of single bands"
            )
        lines += [
            f'<VRTRasterBand dataType="{_GDAL_TYPES[part.dtype]}" band="{number}">',
            *([] if nodata is None else [f"<NoDataValue>{nodata!r}</NoDataValue>"]),
            f'<SimpleSource{how}><SourceFilename relativeToVRT="0">{name}</SourceFilename>',
            "<SourceBand>1</SourceBand>",
            f'<SrcRect xOff="0" yOff="0" xSize="{part.grid.width}" ySize="{part.grid.height}"/>',
            f'<DstRect xOff="{x!r}" yOff="{y!r}" xSize="{part.grid.width * width!r}" '
            f'ySize="{part.grid.height * height!r}"/>',
            "</SimpleSource></VRTRasterBand>",
        ]
    return "\n".join([*lines, "</VRTDataset>"])
