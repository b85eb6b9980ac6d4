"""The patches of some scenes that look most like one patch, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rasterio.windows import Window

from dinov3geo.backbones.base import Backbone
from dinov3geo.errors import ConfigError
from dinov3geo.predict.checks import check_picture
from dinov3geo.predict.pictures import (
    choose_scale,
    collect_rows,
    feature_at,
    open_scene,
    prepare_features,
    similarity_runner,
)
from dinov3geo.predict.preview import read_window, save_figure
from dinov3geo.predict.stream import Floats, Mask

_APART = 2
"""Patches between two neighbours in one scene: those beside a patch are like it, and tell nothing new."""

_CHIP_PATCHES = 9
_COLUMNS = 4
_CHIP_INCHES = 2.2


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A patch that looks like the one that was asked for.

    Attributes:
        scene: raster file.
        xy: centre of the patch in the scene's reference system.
        similarity: cosine, at most 1.
        row: first row of the patch in pixels of the scene.
        col: first column likewise.
    """

    scene: Path
    xy: tuple[float, float]
    similarity: float
    row: int
    col: int


def find_neighbours(
    scenes: Sequence[Path],
    *,
    backbone: Backbone,
    xy: tuple[float, float],
    count: int = 8,
    image_scale: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Neighbour, list[Neighbour], int]:
    """Finds the patches of scenes that are most similar to the patch at a point of the first one.

    Args:
        scenes: raster files; the point lies in the first one.
        backbone: with a card, on the device to compute on.
        xy: point in the first scene's reference system.
        count: neighbours wanted.
        image_scale: all scenes are made this many times larger before the backbone sees them; None chooses 1,
            2 or 4 by the size of the first one.
        progress: told about scenes done.

    Returns:
        The patch that was asked for, its neighbours, the most similar first, and the side of a patch in
        pixels.

    Raises:
        RasterError, GeoreferenceError: a scene cannot be read or has no usable position.
        DataError: bands or numbers that do not suit the backbone; a point outside or without data.
        ConfigError: no neighbour wanted.
    """
    if count < 1:
        raise ConfigError(f"at least one neighbour has to be wanted, got {count}")
    query: Floats | None = None
    asked: Neighbour | None = None
    found: list[Neighbour] = []
    side = 0
    for number, scene in enumerate(scenes, start=1):
        with open_scene(scene, backbone) as reader:
            grid = reader.info.grid
            image_scale = choose_scale(grid, backbone) if image_scale is None else image_scale
            side, plan, features = prepare_features(grid, backbone, image_scale)
            taken: tuple[int, int] | None = None
            if query is None:
                query = feature_at(reader, plan, features, xy, stride=side)
                col, row = (int(np.floor(position)) // side for position in ~grid.transform @ xy)
                taken = (row, col)
                asked = Neighbour(scene, xy, 1.0, row * side, col * side)
            run = similarity_runner(features, [query])
            values, valid = collect_rows(reader, plan, run, outputs=1, stride=side)
        for row, col, similarity in best_cells(values[0], valid, count, taken=taken):
            x, y = grid.transform @ ((col + 0.5) * side, (row + 0.5) * side)
            found.append(Neighbour(scene, (float(x), float(y)), similarity, row * side, col * side))
        if progress is not None:
            progress(number, len(scenes))
    assert asked is not None
    # Equal ones in the order of the scenes, then from the top.
    found.sort(key=lambda neighbour: -neighbour.similarity)
    return asked, found[:count], side


def best_cells(
    values: Floats, valid: Mask, count: int, *, taken: tuple[int, int] | None = None
) -> list[tuple[int, int, float]]:
    """The cells with the greatest values that do not touch each other.

    Args:
        values: [h, w].
        valid: [h, w], cells that count.
        count: cells wanted; there may be fewer.
        taken: row and column of a cell around which none is wanted.

    Returns:
        Row, column and value of each, the greatest first.
    """
    left = np.where(valid, values, -np.inf)

    def take(row: int, col: int) -> None:
        left[max(row - _APART, 0) : row + _APART + 1, max(col - _APART, 0) : col + _APART + 1] = -np.inf

    if taken is not None:
        take(*taken)
    found: list[tuple[int, int, float]] = []
    while len(found) < count:
        row, col = (int(k) for k in np.unravel_index(left.argmax(), left.shape))
        if left[row, col] == -np.inf:
            break
        found.append((row, col, float(left[row, col])))
        take(row, col)
    return found


def draw_neighbours(asked: Neighbour, found: Sequence[Neighbour], png: Path, *, side: int) -> None:
    """Draws the patch that was asked for and its neighbours, each in the middle of what lies around it.

    Args:
        asked: see `find_neighbours`.
        found: likewise.
        png: picture to write; it replaces an existing one.
        side: of a patch in pixels.

    Raises:
        RasterError: a scene cannot be read or the picture not written.
    """
    check_picture(png, sources=[asked.scene, *(neighbour.scene for neighbour in found)], overwrite=True)
    rows = -(-(len(found) + 1) // _COLUMNS)
    size = (_CHIP_INCHES * _COLUMNS, (_CHIP_INCHES + 0.4) * rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    margin = _CHIP_PATCHES // 2 * side
    for panel in panels:
        panel.set_axis_off()
    for panel, one in zip(panels, [asked, *found], strict=False):
        window = Window(one.col - margin, one.row - margin, side + 2 * margin, side + 2 * margin)
        panel.imshow(read_window(one.scene, window), interpolation="nearest")
        for colour, width in (("black", 3.0), ("cyan", 1.5)):
            box = Rectangle((margin - 0.5, margin - 0.5), side, side, fill=False, ec=colour, lw=width)
            panel.add_patch(box)
        title = "asked for" if one is asked else f"{one.similarity:.3f}"
        panel.set_title(f"{title}\n{one.scene.name}", fontsize=8)
    save_figure(figure, png)
