"""Objects of whole scenes: windows that overlap, one list of boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import batched_nms

from dinov3geo.data.boxes import read_box_image
from dinov3geo.data.image_folder import IMAGE_SUFFIXES
from dinov3geo.errors import ConfigError
from dinov3geo.heads.detection import Boxes, DetectionModel
from dinov3geo.rasters.bands import choose_bands
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneReader, inspect_scene

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SceneBoxes:
    """Objects of one scene; `grid` is None for a picture without a place."""

    path: Path
    boxes: Boxes
    grid: PixelGrid | None


def find_objects(
    scene: Path,
    model: DetectionModel,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    min_score: float = 0.3,
    progress: Progress | None = None,
) -> SceneBoxes:
    """Boxes of a scene of any size; one window is in memory at a time.

    A box that an inner edge of its window cuts is left to the window beside, which shows it whole as long as
    it is smaller than the overlap; of boxes that overlap further (`overlap_limit`) the better one stays.

    Args:
        scene: picture or raster.
        model: on the device to compute on.
        tile: side of a window, pixels; None for that of the fit.
        overlap: pixels that neighbouring windows share; None for a quarter of the side.
        min_score: boxes below are left out.
        progress: called with how many windows are done.

    Raises:
        RasterError, GeoreferenceError, DataError: a scene that cannot be read or has other bands.
        ConfigError: an overlap that is not smaller than the window.
    """
    tile = tile or model.settings.max_window
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise ConfigError(f"the overlap must be 0 to {tile - 1} pixels for windows of {tile}, got {overlap}")
    picture = scene.suffix.lower() in IMAGE_SUFFIXES
    grid = None if picture else inspect_scene(scene).grid
    found: list[Boxes] = []
    if picture:
        numbers, valid = read_box_image(scene, model.bands, model="the model")
        height, width = numbers.shape[-2:]
    else:
        assert grid is not None
        chosen, _ = choose_bands(scene, model.bands, model="the model")
        reader = SceneReader(scene, bands=chosen)
        height, width = grid.shape_hw
    plan = [(row, col) for row in _starts(height, tile, overlap) for col in _starts(width, tile, overlap)]
    try:
        for done, (row, col) in enumerate(plan):
            size_hw = min(tile, height - row), min(tile, width - col)
            if picture:
                part = numbers[:, row : row + size_hw[0], col : col + size_hw[1]]
                known = valid[row : row + size_hw[0], col : col + size_hw[1]]
            else:
                part, mask = reader.read_at(row, col, size_hw)
                known = np.ones(size_hw, dtype=bool) if mask is None else mask
            if known.any():
                one = model.predict(
                    torch.from_numpy(np.ascontiguousarray(part)), torch.from_numpy(known.copy())
                )
                found.append(_placed(one, row, col, size_hw, (height, width), overlap > 0))
            if progress is not None:
                progress(done + 1, len(plan))
    finally:
        if not picture:
            reader.close()
    return SceneBoxes(scene, _merged(found, min_score, model.settings.overlap_limit), grid)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of windows; the last one ends at the edge."""
    if length <= tile:
        return [0]
    step = tile - overlap
    return [*range(0, length - tile, step), length - tile]


def _placed(
    one: Boxes, row: int, col: int, size_hw: tuple[int, int], whole_hw: tuple[int, int], drops_cut: bool
) -> Boxes:
    """Boxes in pixels of the scene, without those that an inner edge cuts."""
    x0, y0, x1, y1 = one.boxes.unbind(1)
    cut = torch.zeros(len(one.boxes), dtype=torch.bool)
    if drops_cut:
        cut |= (x0 < 1) & (col > 0)
        cut |= (y0 < 1) & (row > 0)
        cut |= (x1 > size_hw[1] - 1) & (col + size_hw[1] < whole_hw[1])
        cut |= (y1 > size_hw[0] - 1) & (row + size_hw[0] < whole_hw[0])
    moved = one.boxes + torch.tensor([col, row, col, row], dtype=torch.float32)
    return Boxes(moved[~cut], one.scores[~cut], one.labels[~cut])


def _merged(found: Sequence[Boxes], min_score: float, limit: float) -> Boxes:
    if not found:
        return Boxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    boxes, scores, labels = (
        torch.cat([getattr(one, name) for one in found]) for name in ("boxes", "scores", "labels")
    )
    good = scores >= min_score
    boxes, scores, labels = boxes[good], scores[good], labels[good]
    kept = batched_nms(boxes, scores, labels, limit)
    return Boxes(boxes[kept], scores[kept], labels[kept])
