"""Pictures of maps: an image beside a map, with colour bar, scale bar and north arrow."""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import rasterio
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.windows import Window

from dinov3geo.errors import DataError, GeoreferenceError, RasterError
from dinov3geo.rasters.bands import RGB, find_bands
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneInfo, SceneReader, inspect_scene

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

MAX_SIDE = 1200
"""Pixels along the longer side of a panel; larger rasters are read from their overviews."""

HEIGHT_COLOURS = "viridis"
"""Perceptually uniform and told apart by colour-blind readers."""

COLOURS = "colours"
"""In place of a dtype: the values are colours between 0 and 1 already."""

_NO_DATA_COLOUR = "#d4d4d4"
_PANEL_INCHES = 5.2
_MARGIN_INCHES = 0.9


@dataclass(frozen=True, slots=True)
class Overview:
    """A raster read small, north up.

    Attributes:
        values: [C, h, w] float32.
        valid: [h, w].
        grid: of the whole raster at full resolution.
        dtype: numpy name of the stored numbers, or `COLOURS`.
        band_names: of the bands read, "" where there is none.
        model: that made the raster, according to its tags, or "".
    """

    values: Floats
    valid: Mask
    grid: PixelGrid
    dtype: str
    band_names: tuple[str, ...]
    model: str

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """(left, right, bottom, top) in CRS units, the order of matplotlib."""
        xmin, ymin, xmax, ymax = self.grid.bounds
        return xmin, xmax, ymin, ymax


def write_preview(scene: str | Path | None, heights: str | Path, png: str | Path) -> None:
    """Draws a scene beside its heights.

    The colours run from 0 to the 99th percentile of the heights, rounded up; pixels without data are grey.

    Args:
        scene: image that the heights were predicted from, or None for the heights alone.
        heights: raster of metres.
        png: picture to write; it replaces an existing one.

    Raises:
        RasterError: a raster cannot be read or the picture not written.
        GeoreferenceError: scene and heights do not overlap, or lie in different CRS.
        DataError: the heights hold no valid pixel.
    """
    height_map = read_overview(heights, bands=(1,), scaled=True)
    if not height_map.valid.any():
        raise DataError(f"{heights} holds no valid pixel: nothing to show")
    image = None if scene is None else read_overview(scene)
    if image is not None:
        check_overlap(image, height_map, Path(str(scene)), Path(heights))
    figure, panels = new_figure(height_map.grid, panels=1 if image is None else 2)
    if image is not None:
        draw_image(panels[0], image, title=Path(str(scene)).name)
    title = height_map.band_names[0].capitalize() or Path(heights).name
    by = f" ({height_map.model})" if height_map.model else ""
    draw_heights(panels[-1], height_map, title=title + by)
    for panel in panels:
        frame(panel, height_map.grid)
    draw_scale_bar(panels[0], height_map.grid)
    draw_north_arrow(panels[0])
    save_figure(figure, Path(png))


def read_overview(
    path: str | Path, *, bands: tuple[int, ...] | None = None, max_side: int = MAX_SIDE, scaled: bool = False
) -> Overview:
    """Reads a raster at a size for the screen, whatever its own.

    Args:
        path: raster file.
        bands: 1-based indexes; None for those to show as red, green, blue, or the first one as grey.
        max_side: pixels along the longer side.
        scaled: whether stored numbers are turned into values by the scale that the file declares.

    Raises:
        RasterError: the file cannot be read.
        GeoreferenceError: it has no usable position.
    """
    info = inspect_scene(path)
    factor = max(1.0, max(info.grid.shape_hw) / max_side)
    shape_hw = tuple(max(1, round(length / factor)) for length in info.grid.shape_hw)
    try:
        with rasterio.open(path) as dataset:
            chosen = list(bands or colour_bands(info))
            shape = (len(chosen), *shape_hw)
            values = dataset.read(chosen, out_shape=shape, resampling=Resampling.average)
            # White or black in one band is no hole, so a pixel counts if any of its bands does.
            valid = (dataset.read_masks(chosen, out_shape=shape) > 0).any(axis=0)
            scales = [dataset.scales[index - 1] if scaled else 1.0 for index in chosen]
            model = dataset.tags().get("DINOV3GEO_MODEL", "")
    except RasterioError as error:
        raise RasterError(f"cannot read {path}: damaged or truncated ({error})") from error
    values = values.astype(np.float32) * np.array(scales, dtype=np.float32)[:, None, None]
    valid &= np.isfinite(values).all(axis=0)
    if info.grid.transform.e > 0:
        values, valid = values[:, ::-1], valid[::-1]
    names = tuple(info.band_names[index - 1] for index in chosen)
    return Overview(values, valid, info.grid, info.dtype, names, model)


def read_window(path: Path, window: Window) -> Floats:
    """A window of a raster in colours, [h, w, 4] between 0 and 1, transparent where it holds no data.

    Numbers that are not of 8 bits are stretched within the window.

    Raises:
        RasterError: the file cannot be read.
        GeoreferenceError: it has no usable position.
    """
    info = inspect_scene(path)
    with SceneReader(path, bands=colour_bands(info)) as reader:
        numbers, valid = reader.read(window)
    if info.grid.transform.e > 0:
        numbers, valid = numbers[:, ::-1], valid[::-1]
    names = ("",) * len(numbers)
    return to_rgba(Overview(numbers.astype(np.float32), valid, info.grid, info.dtype, names, ""))


def new_figure(grid: PixelGrid, *, panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels side by side, each in the shape of the grid on the ground."""
    # One global setting of matplotlib is read, none is changed, so threads may draw at once.
    aspect = _ground_aspect(grid) * _span(grid)[1] / _span(grid)[0]
    height = _PANEL_INCHES * min(max(aspect, 0.25), 2.0)
    size = (_PANEL_INCHES * panels + _MARGIN_INCHES, height + _MARGIN_INCHES)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def draw_image(axes: Axes, image: Overview, *, title: str) -> None:
    """Draws a colour or grey image; 8-bit numbers as they are, others from the 2nd to the 98th percentile."""
    axes.imshow(to_rgba(image), extent=image.extent, interpolation="nearest")
    axes.set_title(title, fontsize=10)


def to_rgba(image: Overview) -> Floats:
    """[h, w, 4] between 0 and 1, transparent where invalid."""
    values = image.values[:, image.valid]
    if image.dtype == "uint8":
        low, high = 0.0, 255.0
    elif image.dtype == COLOURS:
        low, high = 0.0, 1.0
    elif values.size:
        # One range for all bands keeps the hue.
        low, high = (float(p) for p in np.percentile(values, (2, 98)))
    else:
        low, high = 0.0, 1.0
    scaled = np.clip((image.values - low) / max(high - low, 1e-9), 0, 1)
    colours = np.broadcast_to(scaled, (3, *scaled.shape[1:])) if len(scaled) == 1 else scaled
    alpha = image.valid[None].astype(np.float32)
    return np.moveaxis(np.concatenate([np.nan_to_num(colours), alpha]), 0, -1)


def draw_heights(axes: Axes, heights: Overview, *, title: str) -> None:
    """Draws heights with their colour bar and, where there is any, a note on pixels without data."""
    values = heights.values[0]
    top = round_up(float(np.percentile(values[heights.valid], 99)))
    colours = matplotlib.colormaps[HEIGHT_COLOURS].with_extremes(bad=(0, 0, 0, 0))
    masked = np.ma.masked_array(values, ~heights.valid)
    drawn = axes.imshow(
        masked, extent=heights.extent, cmap=colours, vmin=0, vmax=top, interpolation="nearest"
    )
    extend = "max" if float(masked.max()) > top else "neither"
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.025, 0, 0.04, 1)), extend=extend)
    bar.set_label("height [m]", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.5)
    axes.set_title(title, fontsize=10)
    if not heights.valid.all():
        note = Patch(facecolor=_NO_DATA_COLOUR, edgecolor="0.4", linewidth=0.5, label="no data")
        axes.legend(handles=[note], loc="lower right", fontsize=8, framealpha=0.9, handlelength=1.2)


def frame(axes: Axes, grid: PixelGrid) -> None:
    """Shows exactly the ground of a grid, true to scale, without coordinates."""
    xmin, ymin, xmax, ymax = grid.bounds
    axes.set_xlim(xmin, xmax)
    axes.set_ylim(ymin, ymax)
    axes.set_aspect(_ground_aspect(grid))
    axes.set_facecolor(_NO_DATA_COLOUR)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)


def draw_scale_bar(axes: Axes, grid: PixelGrid) -> None:
    """Draws a bar of a round length, about a quarter of the panel, into the lower left corner."""
    width = _span(grid)[0]
    metres_per_unit = _metres_per_x_unit(grid)
    length_m = round_down(width * metres_per_unit / 4)
    share = length_m / metres_per_unit / width
    label = f"{length_m / 1000:g} km" if length_m >= 1000 else f"{length_m:g} m"
    left, bottom, thickness = 0.04, 0.045, 0.012
    axes.add_patch(
        Rectangle(
            (left, bottom), share, thickness, transform=axes.transAxes, facecolor="white",
            edgecolor="black", linewidth=0.8, zorder=5,
        )
    )  # fmt: skip
    axes.text(
        left + share / 2, bottom + thickness + 0.012, label, transform=axes.transAxes, ha="center",
        va="bottom", fontsize=9, color="white", path_effects=[withStroke(linewidth=2, foreground="black")],
    )  # fmt: skip


def draw_north_arrow(axes: Axes) -> None:
    """Draws an arrow to the north into the upper right corner; pictures are always north up."""
    outline = [withStroke(linewidth=2.5, foreground="black")]
    axes.annotate(
        "N", xy=(0.95, 0.965), xytext=(0.95, 0.86), xycoords="axes fraction", ha="center", va="center",
        fontsize=10, color="white", fontweight="bold", path_effects=outline,
        arrowprops={"arrowstyle": "-|>", "color": "white", "linewidth": 1.5, "path_effects": outline},
    )  # fmt: skip


def save_figure(figure: Figure, png: Path) -> None:
    """Writes a figure under a temporary name and renames it.

    Raises:
        RasterError: the picture cannot be written.
    """
    temporary = png.with_name(f".{png.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", facecolor="white", bbox_inches="tight", pad_inches=0.1)
        os.replace(temporary, png)
    except OSError as error:
        raise RasterError(f"cannot write {png}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def round_up(value: float) -> float:
    """The next number of the form 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten; at least 1."""
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    if value <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return float(next(step * power for step in steps if step * power >= value * (1 - 1e-9)))


def round_down(value: float) -> float:
    """The next smaller number of the form 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return float(max(step * power for step in (1, 2, 5) if step * power <= value * (1 + 1e-9)))


def colour_bands(info: SceneInfo) -> tuple[int, ...]:
    """Red, green and blue as the file names them, else the first three, else the first."""
    found = find_bands(info, RGB)
    if found is not None:
        return found
    data = [index for index, meaning in enumerate(info.colours, start=1) if meaning != "alpha"]
    return tuple(data[:3]) if len(data) >= 3 else (1,)


def _span(grid: PixelGrid) -> tuple[float, float]:
    """Width and height in CRS units."""
    xmin, ymin, xmax, ymax = grid.bounds
    return xmax - xmin, ymax - ymin


def _ground_aspect(grid: PixelGrid) -> float:
    """Length on the ground of a y unit over that of an x unit: 1 but for degrees."""
    if not grid.crs.is_geographic:
        return 1.0
    latitude = math.radians((grid.bounds[1] + grid.bounds[3]) / 2)
    return 1 / max(math.cos(latitude), 0.01)


def _metres_per_x_unit(grid: PixelGrid) -> float:
    """From the grid's GSD, the geometric mean of both directions."""
    x_size, y_size = grid.resolution_xy
    return grid.gsd_m / math.sqrt(x_size * y_size * _ground_aspect(grid))


def check_overlap(image: Overview, heights: Overview, scene: Path, heights_path: Path) -> None:
    """Raises `GeoreferenceError` unless an image and a map of it lie on each other."""
    if image.grid.crs != heights.grid.crs:
        raise GeoreferenceError(
            f"scene {scene} is in {image.grid.crs}, heights {heights_path} in {heights.grid.crs}; "
            "expected one CRS, warp one of them (gdalwarp -t_srs)"
        )
    a, b = image.grid.bounds, heights.grid.bounds
    if min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]):
        raise GeoreferenceError(
            f"scene {scene} and heights {heights_path} do not overlap; give the scene of these heights"
        )
