"""A class map beside its scene, with the names and colours of its classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from matplotlib.patches import Patch
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader

from dinov3geo.errors import DataError, RasterError
from dinov3geo.predict.preview import (
    COLOURS,
    MAX_SIDE,
    Overview,
    check_overlap,
    draw_image,
    draw_north_arrow,
    draw_scale_bar,
    frame,
    new_figure,
    read_overview,
    save_figure,
)
from dinov3geo.rasters.layer import Rgb
from dinov3geo.rasters.reader import inspect_scene

_MAX_CLASSES = 64
_SAMPLE_SIDE = 512


def write_class_preview(scene: str | Path | None, classes: str | Path, png: str | Path) -> None:
    """Draws a scene beside its classes; those that occur stand in the legend.

    Args:
        scene: image that the classes were predicted from, or None for the classes alone.
        classes: raster of class numbers with a colour table.
        png: picture to write; it replaces an existing one.

    Raises:
        RasterError: a raster cannot be read or the picture not written.
        GeoreferenceError: scene and classes do not overlap, or lie in different CRS.
        DataError: the raster holds no classes, or no valid pixel.
    """
    classes = Path(classes)
    drawn, seen = _class_overview(classes)
    image = None if scene is None else read_overview(scene)
    if image is not None:
        check_overlap(image, drawn, Path(str(scene)), classes)
    figure, panels = new_figure(drawn.grid, panels=1 if image is None else 2)
    if image is not None:
        draw_image(panels[0], image, title=Path(str(scene)).name)
    by = f" ({drawn.model})" if drawn.model else ""
    draw_image(panels[-1], drawn, title=f"{drawn.band_names[0].capitalize() or classes.name}{by}")
    for panel in panels:
        frame(panel, drawn.grid)
    handles = [
        Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor="0.4", linewidth=0.5, label=name)
        for name, (red, green, blue) in seen
    ]
    panels[-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8, frameon=False)
    draw_scale_bar(panels[0], drawn.grid)
    draw_north_arrow(panels[0])
    save_figure(figure, Path(png))


def read_classes(dataset: DatasetReader) -> dict[int, tuple[str, Rgb]]:
    """Name and colour by number of a raster with a colour table: those that it names, else those in it.

    Args:
        dataset: open for reading; without a colour table there is no class.
    """
    if dataset.count > 1 or dataset.colorinterp[0] != ColorInterp.palette:
        return {}
    table = dataset.colormap(1)
    named = {int(key[6:]): text for key, text in dataset.tags().items() if key.startswith("CLASS_")}
    if not named:
        shape = _small_shape(dataset.shape, _SAMPLE_SIDE)
        seen = dataset.read(1, out_shape=shape, masked=True, resampling=Resampling.nearest).compressed()
        named = {int(number): f"class {number}" for number in np.unique(seen)[:_MAX_CLASSES]}
    return {number: (name, table[number][:3]) for number, name in sorted(named.items()) if number in table}


def _class_overview(path: Path) -> tuple[Overview, list[tuple[str, Rgb]]]:
    """The map in its colours, north up, and the classes that occur."""
    info = inspect_scene(path)
    try:
        with rasterio.open(path) as dataset:
            classes = read_classes(dataset)
            if not classes:
                raise DataError(
                    f"{path} holds no classes; expected one band with a colour table, as `landcover predict` "
                    "writes it"
                )
            shape = _small_shape(dataset.shape, MAX_SIDE)
            numbers = dataset.read(1, out_shape=shape, resampling=Resampling.nearest)
            valid = dataset.read_masks(1, out_shape=shape, resampling=Resampling.nearest) > 0
            model = dataset.tags().get("DINOV3GEO_MODEL", "")
    except RasterioError as error:
        raise RasterError(f"cannot read {path}: damaged or truncated ({error})") from error
    valid &= np.isin(numbers, list(classes))
    if not valid.any():
        raise DataError(f"{path} holds no valid pixel: nothing to show")
    table = np.zeros((256, 3), dtype=np.float32)
    for number, (_, rgb) in classes.items():
        table[number] = np.array(rgb) / 255
    colours = np.moveaxis(table[numbers.astype(np.uint8)], -1, 0)
    if info.grid.transform.e > 0:
        colours, valid, numbers = colours[:, ::-1], valid[::-1], numbers[::-1]
    seen = [classes[int(number)] for number in np.unique(numbers[valid])]
    return Overview(colours, valid, info.grid, COLOURS, (info.band_names[0],), model), seen


def _small_shape(shape_hw: tuple[int, int], side: int) -> tuple[int, int]:
    """Rows and columns whose longer side is at most so long."""
    factor = max(1.0, max(shape_hw) / side)
    height, width = (max(1, round(length / factor)) for length in shape_hw)
    return height, width
