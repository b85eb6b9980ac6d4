"""Pictures of what a backbone sees in a scene: feature colours and similarities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from dinov3geo.backbones.base import Backbone
from dinov3geo.errors import DataError
from dinov3geo.features.extract import pixels_per_patch
from dinov3geo.features.visualize import cosine_similarity_map, fit_pca
from dinov3geo.predict.checks import ModelInput, check_numbers, check_picture
from dinov3geo.predict.preview import (
    COLOURS,
    Overview,
    draw_image,
    draw_north_arrow,
    draw_scale_bar,
    frame,
    new_figure,
    read_overview,
    save_figure,
)
from dinov3geo.predict.runners import feature_runner, pca_runner, sample_features
from dinov3geo.predict.stream import Array, Floats, Mask, RunTiles, output_shape, read_tile, stream_rows
from dinov3geo.rasters.bands import choose_bands
from dinov3geo.rasters.grid import PixelGrid, TilePlan
from dinov3geo.rasters.reader import SceneReader

SIMILARITY_COLOURS = "magma"

_TILE = 512
_OVERLAP = 128
_BATCH = 4
_MIN_PATCHES = 96
_SCALES = (1, 2, 4)


def show_pca(
    scene: str | Path, png: str | Path, *, backbone: Backbone, image_scale: float | None = None
) -> None:
    """Draws a scene beside the first three principal components of its patch features.

    Args:
        scene: raster file.
        png: picture to write; it replaces an existing one.
        backbone: with a card, on the device to compute on.
        image_scale: the scene is made this many times larger before the backbone sees it; None chooses
            1, 2 or 4, so that small scenes do not become a handful of patches.

    Raises:
        RasterError: the scene cannot be read or the picture not written.
        GeoreferenceError: the scene has no usable position.
        DataError: too few bands, numbers of another scale, NaN, no valid pixel, too small for a PCA.
    """
    scene, png = Path(scene), Path(png)
    check_picture(png, sources=(scene,), overwrite=True)
    with open_scene(scene, backbone) as reader:
        grid = reader.info.grid
        stride, plan, features = prepare_features(grid, backbone, image_scale)
        basis = fit_pca(sample_features(reader, plan, features, stride=stride))
        components, valid = collect_rows(reader, plan, pca_runner(features, basis), outputs=3, stride=stride)
    colours = np.moveaxis(basis.scale(np.moveaxis(components, 0, -1)), -1, 0)
    figure, panels = new_figure(grid, panels=2)
    draw_image(panels[0], read_overview(scene), title=scene.name)
    share = float(basis.explained.sum())
    title = f"Feature PCA, {share:.0%} of the variance ({ModelInput.of_backbone(backbone).name})"
    draw_image(panels[1], _as_overview(colours, valid, grid.coarsen(stride)), title=title)
    _finish(panels, grid)
    save_figure(figure, png)


def show_similarity(
    scene: str | Path,
    png: str | Path,
    *,
    backbone: Backbone,
    points: Sequence[tuple[float, float]],
    image_scale: float | None = None,
) -> None:
    """Draws a scene beside the cosine similarity of its patches to the patch at a point.

    Of several points the most similar one counts: the picture shows what looks like any of them.

    Args:
        scene: raster file.
        png: picture to write; it replaces an existing one.
        backbone: with a card, on the device to compute on.
        points: (x, y) in the scene's CRS, at least one.
        image_scale: as in `show_pca`.

    Raises:
        RasterError, GeoreferenceError: as `show_pca`.
        DataError: also no point, one outside the scene or on pixels without data.
    """
    scene, png = Path(scene), Path(png)
    if not points:
        raise DataError("no point to compare with; give at least one")
    check_picture(png, sources=(scene,), overwrite=True)
    with open_scene(scene, backbone) as reader:
        grid = reader.info.grid
        stride, plan, features = prepare_features(grid, backbone, image_scale)
        queries = [feature_at(reader, plan, features, xy, stride=stride) for xy in points]
        similarity = similarity_runner(features, queries)
        values, valid = collect_rows(reader, plan, similarity, outputs=1, stride=stride)
    figure, panels = new_figure(grid, panels=2)
    draw_image(panels[0], read_overview(scene), title=scene.name)
    _draw_similarity(panels[1], _as_overview(values, valid, grid.coarsen(stride)))
    name = ModelInput.of_backbone(backbone).name
    marked = "marked patch" if len(points) == 1 else "nearest of the marked patches"
    panels[1].set_title(f"Cosine similarity to the {marked} ({name})", fontsize=10)
    for panel in panels:
        for colour, width in (("black", 3.0), ("cyan", 1.5)):
            panel.plot(*np.transpose(points), "o", ms=9, mfc="none", mec=colour, mew=width)
    _finish(panels, grid)
    save_figure(figure, png)


def similarity_runner(features: RunTiles, queries: Sequence[Floats]) -> RunTiles:
    """The greatest cosine similarity to some features [D], as [B, 1, h, w]."""

    def run(images: Array, valid: Mask) -> Floats:
        patches = np.moveaxis(features(images, valid), 1, -1)
        found = [cosine_similarity_map(patches, query) for query in queries]
        return np.max(found, axis=0)[:, None]

    return run


@contextmanager
def open_scene(scene: Path, backbone: Backbone) -> Iterator[SceneReader]:
    """A reader of the backbone's bands, once the numbers are known to suit it."""
    wanted = ModelInput.of_backbone(backbone)
    bands, _ = choose_bands(scene, wanted.normalization.bands, model=wanted.name)
    with SceneReader(scene, bands=bands) as reader:
        check_numbers(reader, wanted)
        yield reader


def prepare_features(
    grid: PixelGrid, backbone: Backbone, image_scale: float | None
) -> tuple[int, TilePlan, RunTiles]:
    """Scene pixels per patch, tiles that the backbone sees at `_TILE` pixels, and the features of a tile."""
    scale = choose_scale(grid, backbone) if image_scale is None else image_scale
    stride = pixels_per_patch(backbone.patch_size, scale)
    tile, overlap = (int(side / scale) // stride * stride for side in (_TILE, _OVERLAP))
    return stride, grid.tiles(tile, overlap, stride), feature_runner(backbone, image_scale=scale)


def choose_scale(grid: PixelGrid, backbone: Backbone) -> float:
    """How many times a scene is made larger, so that small ones do not become a handful of patches."""
    patches = [max(grid.shape_hw) * scale / backbone.patch_size for scale in _SCALES]
    enough = (scale for scale, count in zip(_SCALES, patches, strict=True) if count >= _MIN_PATCHES)
    return float(next(enough, _SCALES[-1]))


def collect_rows(
    reader: SceneReader, plan: TilePlan, run: RunTiles, *, outputs: int, stride: int
) -> tuple[Floats, Mask]:
    """The whole blended output in memory: [K, h, w] and [h, w] at patch resolution."""
    shape = output_shape(plan, stride)
    values, valid = np.empty((outputs, *shape), dtype=np.float32), np.empty(shape, dtype=np.bool_)
    strips = stream_rows(reader, plan, run, batch_size=_BATCH, num_outputs=outputs, stride=stride)
    with closing(strips):
        for window, strip, mask in strips:
            rows = slice(window.row_off, window.row_off + window.height)
            values[:, rows], valid[rows] = strip, mask
    return values, valid


def feature_at(
    reader: SceneReader, plan: TilePlan, features: RunTiles, xy: tuple[float, float], *, stride: int
) -> Floats:
    """Feature [D] of the patch that holds a point, with as much context around it as a tile has."""
    grid = reader.info.grid
    col, row = (int(np.floor(position)) for position in ~grid.transform @ xy)
    if not (0 <= row < grid.height and 0 <= col < grid.width):
        xmin, ymin, xmax, ymax = grid.bounds
        raise DataError(
            f"point {xy[0]:g} {xy[1]:g} lies outside of scene {reader.path}; expected x {xmin:.10g} to "
            f"{xmax:.10g} and y {ymin:.10g} to {ymax:.10g} in the scene's CRS"
        )
    start_row, start_col = (
        min(max(position - size // 2, 0), length - size)
        for position, size, length in zip((row, col), plan.size_hw, grid.shape_hw, strict=True)
    )
    tile = read_tile(reader, plan, (start_row, start_col), stride=stride)
    if not tile.valid[row - tile.row * stride, col - tile.col * stride]:
        raise DataError(f"scene {reader.path} holds no data at point {xy[0]:g} {xy[1]:g}; choose another one")
    outputs = features(tile.image[None], tile.valid[None])
    return outputs[0, :, row // stride - tile.row, col // stride - tile.col]


def _as_overview(values: Floats, valid: Mask, grid: PixelGrid) -> Overview:
    """An array on a grid as something to draw, north up."""
    if grid.transform.e > 0:
        values, valid = values[:, ::-1], valid[::-1]
    return Overview(values, valid, grid, COLOURS, ("",) * len(values), "")


def _draw_similarity(axes: Axes, similarity: Overview) -> None:
    values = similarity.values[0]
    low = min(float(np.percentile(values[similarity.valid], 1)), 0.99)
    masked = np.ma.masked_array(values, ~similarity.valid)
    colours = matplotlib.colormaps[SIMILARITY_COLOURS].with_extremes(bad=(0, 0, 0, 0))
    drawn = axes.imshow(
        masked, extent=similarity.extent, cmap=colours, vmin=low, vmax=1, interpolation="nearest"
    )
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.025, 0, 0.04, 1)), extend="min")
    bar.ax.tick_params(labelsize=8)


def _finish(panels: list[Axes], grid: PixelGrid) -> None:
    """Frames the panels and says where north is and how long a metre."""
    for panel in panels:
        frame(panel, grid)
    draw_scale_bar(panels[0], grid)
    draw_north_arrow(panels[0])
