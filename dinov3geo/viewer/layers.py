"""Rasters as layers of a web map: what they show, their tiles, their legend, and the numbers in them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyproj
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio import warp
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from dinov3geo.errors import ConfigError, GeoreferenceError, RasterError
from dinov3geo.predict.class_picture import read_classes
from dinov3geo.predict.preview import HEIGHT_COLOURS, colour_bands, read_overview, round_up
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.layer import Rgb
from dinov3geo.rasters.reader import SceneInfo, inspect_scene

Array = NDArray[np.generic]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]

TILE_SIDE = 256
MAX_ZOOM = 24
"""The deepest zoom of MapLibre: 1 cm per pixel at the equator."""

WEB_MERCATOR_LATITUDE = 85.051128
"""Web maps end here; the square of Web Mercator."""

_WGS84 = CRS.from_epsg(4326)
_EQUATOR_M = 40_075_016.686
_LEGEND_STEPS = 9
_OVERVIEW_SIDE = 512
_SHARPER = 2


@dataclass(frozen=True, slots=True)
class MapLayer:
    """One layer of the web map.

    Attributes:
        key: names the layer in addresses.
        name: for people.
        kind: "image" (colours as they are), "values" (a number per pixel) or "classes".
        path: raster file.
        bands: 1-based: three or one of an image, one else.
        grid: of the raster.
        low: number that gets the first colour; of an image, black.
        high: number that gets the last colour; of an image, white.
        unit: of the values, "" if the file tells none.
        scale: a stored number times this plus `offset` is the value.
        offset: see `scale`.
        classes: name and colour by number.
        shown: whether the page begins with it shown; of a file, its first band is.
    """

    key: str
    name: str
    kind: str
    path: Path
    bands: tuple[int, ...]
    grid: PixelGrid
    low: float = 0.0
    high: float = 1.0
    unit: str = ""
    scale: float = 1.0
    offset: float = 0.0
    classes: Mapping[int, tuple[str, Rgb]] = field(default_factory=dict)
    shown: bool = True

    def describe(self) -> dict[str, Any]:
        """What the page has to know, as JSON."""
        return {
            "key": self.key,
            "name": self.name,
            "kind": self.kind,
            "shown": self.shown,
            "bounds": lonlat_bounds(self.grid, str(self.path)),
            "maxzoom": deepest_zoom(self.grid),
            "legend": self.legend(),
        }

    def legend(self) -> dict[str, Any]:
        """Colours with their meaning; an image has none."""
        if self.kind == "classes":
            entries = [{"label": name, "colour": to_hex(rgb)} for name, rgb in self.classes.values()]
            return {"classes": entries}
        return {} if self.kind == "image" else ramp_legend(HEIGHT_COLOURS, self.low, self.high, self.unit)

    def tile(self, z: int, x: int, y: int) -> bytes:
        """A tile of Web Mercator as PNG, transparent where there is no data or no raster.

        Raises:
            RasterError: the file cannot be read.
        """
        from rio_tiler.errors import RioTilerError, TileOutsideBounds
        from rio_tiler.io import Reader

        smooth = "bilinear" if self.kind == "image" else "nearest"
        try:
            with Reader(str(self.path)) as reader:
                image = reader.tile(
                    x, y, z, tilesize=TILE_SIDE, indexes=self.bands,
                    resampling_method=smooth, reproject_method=smooth,
                )  # fmt: skip
        except TileOutsideBounds:
            return empty_tile()
        except (RasterioError, RioTilerError) as error:
            raise RasterError(f"cannot read {self.path}: {error}") from error
        return to_png(self.colours(image.array.data, ~np.ma.getmaskarray(image.array).all(axis=0)))

    def colours(self, stored: Array, valid: Mask) -> Pixels:
        """Stored numbers [C, h, w] and where they hold data [h, w] to [h, w, 4], transparent elsewhere."""
        known = valid & np.isfinite(stored).all(axis=0)
        if self.kind == "classes":
            return _class_colours(stored[0], known, self.classes)
        values = stored.astype(np.float32) * np.float32(self.scale) + np.float32(self.offset)
        if self.kind == "values":
            return ramp_colours(values[0], known, HEIGHT_COLOURS, self.low, self.high)
        grey = np.clip((values - self.low) / max(self.high - self.low, 1e-9), 0, 1)
        pixels = np.zeros((*known.shape, 4), dtype=np.uint8)
        colours = np.broadcast_to(np.nan_to_num(grey), (3, *known.shape))
        pixels[..., :3] = np.rint(255 * np.moveaxis(colours, 0, -1))
        pixels[..., 3] = 255 * known
        return pixels

    def value_at(self, lon: float, lat: float) -> dict[str, Any]:
        """What the pixel under a point holds.

        Args:
            lon: degrees east, WGS 84.
            lat: degrees north.

        Returns:
            `key`, `name` and `text` for people; inside of the raster also `x` and `y` in its reference
            system, `row`, `col` and `values` (one a band, None where there is no data).

        Raises:
            RasterError: the file cannot be read.
        """
        x, y = to_crs(self.grid.crs, lon, lat)
        found: dict[str, Any] = {"key": self.key, "name": self.name, "text": "outside"}
        cell = cell_at(self.grid, x, y)
        if cell is None:
            return found
        row, col = cell
        window = Window(col, row, 1, 1)
        try:
            with rasterio.open(self.path) as dataset:
                stored = dataset.read(list(self.bands), window=window)[:, 0, 0]
                known = dataset.read_masks(list(self.bands), window=window)[:, 0, 0] > 0
        except RasterioError as error:
            raise RasterError(f"cannot read {self.path}: {error}") from error
        known &= np.isfinite(stored)
        values = [self._value(number) if yes else None for number, yes in zip(stored, known, strict=True)]
        words = [self._words(number) if yes else "no data" for number, yes in zip(stored, known, strict=True)]
        text = " ".join(words) if any(known) else "no data"
        return found | {"x": x, "y": y, "row": row, "col": col, "values": values, "text": text}

    def _value(self, number: np.generic) -> float:
        value = number.item()
        return float(value) if self.scale == 1 and self.offset == 0 else value * self.scale + self.offset

    def _words(self, number: np.generic) -> str:
        if self.kind == "classes":
            return self.classes.get(int(number), (f"class {number}", (0, 0, 0)))[0]
        plain = self.scale == 1 and self.offset == 0
        # As many digits as tell this number from its neighbours of the same type, like gdallocationinfo.
        text = str(number) if plain else f"{self._value(number):.10g}"
        return f"{text} {self.unit}".strip()


def open_layers(paths: list[Path]) -> list[MapLayer]:
    """The layers of some files, the lowest first: images below, maps above.

    Args:
        paths: rasters; a file with several bands that carry units, or one or two bands, gives a layer a band.

    Raises:
        ConfigError: rio-tiler is not installed.
        RasterError: a file cannot be read.
        GeoreferenceError: a file has no position, or one that no web map can show.
    """
    import_rio_tiler()
    layers: list[MapLayer] = []
    for path in paths:
        info = inspect_scene(path)
        lonlat_bounds(info.grid, str(path))
        try:
            with rasterio.open(path) as dataset:
                layers += _layers_of(path, dataset, info, first_key=len(layers))
        except RasterioError as error:
            raise RasterError(f"cannot read {path}: {error}") from error
    # What was named first, and of a file its first band, lies on top.
    return sorted(reversed(layers), key=lambda layer: layer.kind != "image")


def import_rio_tiler() -> Any:  # noqa: ANN401 (a module that may not be installed)
    """The package rio-tiler.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import rio_tiler.io
    except ImportError as error:
        raise ConfigError(
            "the viewer needs rio-tiler; install it: pip install 'dinov3geo[viewer]'"
        ) from error
    return rio_tiler


def lonlat_bounds(grid: PixelGrid, name: str) -> tuple[float, float, float, float]:
    """West, south, east and north in degrees; east is above 180 where the antimeridian is crossed.

    Raises:
        GeoreferenceError: the raster lies outside of what Web Mercator shows.
    """
    west, south, east, north = warp.transform_bounds(grid.crs, _WGS84, *grid.bounds, densify_pts=21)
    limit = WEB_MERCATOR_LATITUDE
    if not all(map(math.isfinite, (west, south, east, north))) or south >= limit or north <= -limit:
        raise GeoreferenceError(
            f"{name} lies outside of what a web map shows, expected latitudes from -85 to 85 degrees; "
            "open it in a GIS"
        )
    return west, max(south, -limit), east + 360 if east < west else east, min(north, limit)


def deepest_zoom(grid: PixelGrid) -> int:
    """Zoom down to which tiles are drawn: pixels of the raster then have sharp edges."""
    _, south, _, north = lonlat_bounds(grid, "the raster")
    metres = _EQUATOR_M * math.cos(math.radians((south + north) / 2)) / TILE_SIDE
    return min(max(math.ceil(math.log2(metres / grid.gsd_m)) + _SHARPER, 0), MAX_ZOOM)


def to_crs(crs: CRS, lon: float, lat: float) -> tuple[float, float]:
    """A point in degrees of WGS 84 in another reference system; infinite where that has no such point."""
    # Not by GDAL, which takes a point far from the system's home as an error.
    x, y = pyproj.Transformer.from_crs("OGC:CRS84", crs.to_wkt(), always_xy=True).transform(lon, lat)
    return float(x), float(y)


def cell_at(grid: PixelGrid, x: float, y: float) -> tuple[int, int] | None:
    """Row and column of the cell under a point in the grid's reference system; None outside."""
    if not (math.isfinite(x) and math.isfinite(y)):
        return None
    col, row = (math.floor(position) for position in ~grid.transform @ (x, y))
    return (row, col) if 0 <= row < grid.height and 0 <= col < grid.width else None


def ramp_colours(values: Floats, valid: Mask, colours: str, low: float, high: float) -> Pixels:
    """Values [h, w] as colours of a map of matplotlib, [h, w, 4], transparent where invalid."""
    share = np.clip((np.where(valid, values, low) - low) / max(high - low, 1e-9), 0, 1)
    pixels = np.asarray(matplotlib.colormaps[colours](share, bytes=True), dtype=np.uint8)
    pixels[..., 3] = 255 * valid
    return pixels


def ramp_legend(colours: str, low: float, high: float, unit: str) -> dict[str, Any]:
    """The legend of `ramp_colours`."""
    shares = matplotlib.colormaps[colours](np.linspace(0, 1, _LEGEND_STEPS), bytes=True)
    steps = [to_hex((int(red), int(green), int(blue))) for red, green, blue, _ in shares]
    return {"low": f"{low:.4g}", "high": f"{high:.4g}", "unit": unit, "colours": steps}


def to_hex(rgb: Rgb) -> str:
    """Red, green and blue as `#rrggbb`."""
    return "#" + "".join(f"{part:02x}" for part in rgb)


def to_png(pixels: Pixels) -> bytes:
    """[h, w, 4] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG", compress_level=1)
    return file.getvalue()


def empty_tile() -> bytes:
    """A transparent tile."""
    return to_png(np.zeros((TILE_SIDE, TILE_SIDE, 4), dtype=np.uint8))


def _layers_of(path: Path, dataset: DatasetReader, info: SceneInfo, *, first_key: int) -> list[MapLayer]:
    bands = [k for k, meaning in enumerate(dataset.colorinterp, start=1) if meaning != ColorInterp.alpha]
    classes = read_classes(dataset)
    if classes:
        return [MapLayer(str(first_key), path.name, "classes", path, (1,), info.grid, classes=classes)]
    if len(bands) > 2 and not all(dataset.units[k - 1] for k in bands):
        low, high = _image_range(path, info)
        return [MapLayer(str(first_key), path.name, "image", path, colour_bands(info), info.grid, low, high)]
    layers = []
    for number, band in enumerate(bands):
        low, high = _value_range(path, band, float(dataset.offsets[band - 1]))
        name = f"{path.name}: {info.band_names[band - 1]}" if info.band_names[band - 1] else path.name
        layers.append(
            MapLayer(
                str(first_key + number), name, "values", path, (band,), info.grid, low, high,
                unit=dataset.units[band - 1] or "",
                scale=float(dataset.scales[band - 1]),
                offset=float(dataset.offsets[band - 1]),
                shown=number == 0,
            )
        )  # fmt: skip
    return layers


def _class_colours(stored: Array, valid: Mask, classes: Mapping[int, tuple[str, Rgb]]) -> Pixels:
    table = np.zeros((256, 4), dtype=np.uint8)
    for number, (_, rgb) in classes.items():
        table[number] = (*rgb, 255)
    pixels = table[stored.astype(np.uint8)]
    pixels[~valid] = 0
    return pixels


def _image_range(path: Path, info: SceneInfo) -> tuple[float, float]:
    """Numbers to show as black and white: 8 bits as they are, others from the 2nd to the 98th percentile."""
    if info.dtype == "uint8":
        return 0.0, 255.0
    overview = read_overview(path, max_side=_OVERVIEW_SIDE)
    values = overview.values[:, overview.valid]
    return (float(np.percentile(values, 2)), float(np.percentile(values, 98))) if values.size else (0.0, 1.0)


def _value_range(path: Path, band: int, offset: float) -> tuple[float, float]:
    """Values to colour from and to: 0, or the first percentile below it, and the 99th rounded up."""
    overview = read_overview(path, bands=(band,), max_side=_OVERVIEW_SIDE, scaled=True)
    values = overview.values[0, overview.valid] + np.float32(offset)
    if not values.size:
        return 0.0, 1.0
    low, high = (float(number) for number in np.percentile(values, (1, 99)))
    return min(low, 0.0), round_up(high) if high > 1 or low >= 0 else high
