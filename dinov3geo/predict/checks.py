"""Does the scene suit the model? Answered before any work, in one line each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rasterio.windows import Window

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.errors import DataError, GeoreferenceError, RasterError
from dinov3geo.paths import check_target
from dinov3geo.rasters.bands import choose_bands
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import RASTER_SUFFIXES, SceneReader

GSD_FACTOR = 2.0
"""A GSD this many times outside the range of the training is worth a warning."""

_SAMPLE_SIDE = 128
_BYTE_SCALE = 1 / 255


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What a model was trained on, as far as a scene must resemble it.

    Attributes:
        name: of the model, for messages and tags.
        normalization: bands and the scale of their numbers.
        gsd_m: range (low, high) of ground sampling distances, or None if unknown.
    """

    name: str
    normalization: Normalization
    gsd_m: tuple[float, float] | None

    @classmethod
    def of_backbone(cls, backbone: Backbone) -> ModelInput:
        """From the card of a backbone.

        Raises:
            DataError: it has none.
        """
        if backbone.card is None:
            raise DataError("the backbone has no card, so its bands are unknown; load it with load_backbone")
        return cls(backbone.card.name, backbone.card.normalization, backbone.card.gsd_m)


def check_numbers(reader: SceneReader, wanted: ModelInput) -> None:
    """Looks at some windows whether the stored numbers have the scale that the model was trained on.

    Args:
        reader: of the model's bands.
        wanted: what the model takes.

    Raises:
        DataError: 8-bit numbers expected and something else found, or the reverse; NaN in the sample.
        RasterError: the scene is damaged.
    """
    dtype = np.dtype(reader.info.dtype)
    expects_bytes = all(np.isclose(scale, _BYTE_SCALE) for scale in wanted.normalization.scale)
    advice = "rescale the scene first, e.g. gdal_translate -ot Byte -scale LOW HIGH 0 255 IN OUT"
    if dtype == np.uint8:
        if all(scale < _BYTE_SCALE / 4 for scale in wanted.normalization.scale):
            raise DataError(
                f"scene {reader.path} holds 8-bit numbers, but model {wanted.name!r} expects reflectance "
                f"stored with the factor {wanted.normalization.scale[0]:g}; use the unscaled product"
            )
        return
    numbers = _sample_numbers(reader)
    if not expects_bytes or not numbers.size:
        return
    low, high = float(numbers.min()), float(numbers.max())
    if low < 0 or high > 255 or (dtype.kind == "f" and high <= 1.5):
        raise DataError(
            f"scene {reader.path} holds {dtype} numbers from {low:g} to {high:g}, but model {wanted.name!r} "
            f"expects 0 to 255; {advice}"
        )


def check_chips(files: Iterable[Path], wanted: ModelInput, size: int | None) -> list[str]:
    """Looks at whole images that get one answer each, before any of them does.

    Args:
        files: images; pictures and rasters without a georeference are not looked at.
        wanted: what the model takes.
        size: side that every image is resized to, or None.

    Returns:
        At most one warning, of the first image that is seen at another pixel size than those of the training.

    Raises:
        DataError: numbers of another scale, NaN, bands that are missing, or no pixel with data.
        RasterError: a file is damaged.
    """
    warnings: list[str] = []
    for file in files:
        if file.suffix.lower() not in RASTER_SUFFIXES:
            continue
        try:
            bands, _ = choose_bands(file, wanted.normalization.bands, model=wanted.name)
        except GeoreferenceError:
            continue
        with SceneReader(file, bands=bands) as reader:
            check_numbers(reader, wanted)
            grid = reader.info.grid
            _, valid = reader.read(Window(0, 0, grid.width, grid.height))
        if not valid.any():
            raise DataError(f"{file} holds no pixel with data, so it has no class; leave it out")
        warnings += _chip_warnings(file, grid, wanted, size)
    more = f" (and {len(warnings) - 1} more images)" if len(warnings) > 1 else ""
    return [text + more for text in warnings[:1]]


def _chip_warnings(file: Path, grid: PixelGrid, wanted: ModelInput, size: int | None) -> list[str]:
    shrunk = 1.0 if size is None else math.sqrt(grid.width * grid.height) / size
    seen_m = grid.gsd_m * shrunk
    if wanted.gsd_m is None or _is_near(seen_m, wanted.gsd_m):
        return []
    how = "" if size is None else f", resized to {size} x {size}"
    own = f"{grid.width} x {grid.height} of {grid.gsd_m:.3g} m{how}"
    return [
        f"{file} is seen at {seen_m:.3g} m per pixel ({own}), but model {wanted.name!r} was fitted at "
        f"{_range(wanted.gsd_m)}; cut scenes into pictures of that scale"
    ]


def _is_near(gsd_m: float, trained_m: tuple[float, float]) -> bool:
    return trained_m[0] / GSD_FACTOR <= gsd_m <= trained_m[1] * GSD_FACTOR


def _range(gsd_m: tuple[float, float]) -> str:
    low, high = gsd_m
    return f"{low:g} m" if low == high else f"{low:g} to {high:g} m"


def gsd_warnings(scene: Path, own_m: float, seen_m: float, wanted: ModelInput) -> list[str]:
    """Warnings about pixels that the model sees.

    Args:
        scene: raster file.
        own_m: its GSD.
        seen_m: that at which the model sees it.
        wanted: what the model takes.

    Returns:
        A line if pixels are much smaller or larger on the ground than in the training, and one if the scene
        is far too coarse for the pixels that were asked for.
    """
    found = []
    if own_m > GSD_FACTOR * seen_m:
        found.append(
            f"scene {scene} has pixels of {own_m:.3g} m and is seen at {seen_m:.3g} m: it becomes smoother, "
            "not more detailed; expect worse results than on a scene that was taken at that size"
        )
    if wanted.gsd_m is None:
        return found
    if _is_near(seen_m, wanted.gsd_m):
        return found
    trained = _range(wanted.gsd_m)
    has = "has" if own_m == seen_m else "is seen at"
    return [
        *found,
        f"scene {scene} {has} pixels of {seen_m:.3g} m, but model {wanted.name!r} was trained at {trained}; "
        "expect worse results, or resample it (--gsd model where the command has it, else gdalwarp)",
    ]


def check_picture(png: Path, *, sources: Iterable[Path], overwrite: bool) -> None:
    """Checks that a picture can be written.

    Args:
        png: picture to write.
        sources: files that it is drawn from.
        overwrite: whether an existing picture may be replaced.

    Raises:
        RasterError: the name does not end in .png, or see `check_target`.
    """
    if png.suffix.lower() != ".png":
        raise RasterError(f"cannot write {png}: pictures are PNG files, expected a name that ends in .png")
    check_target(png, sources=sources, overwrite=overwrite)


def _sample_numbers(reader: SceneReader) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    """Valid numbers of up to 3 x 3 small windows spread over the scene, [N]."""
    height, width = reader.info.grid.shape_hw
    rows, cols = (sorted({int(length * share) for share in (0.0, 0.4, 0.8)}) for length in (height, width))
    found = []
    for row in rows:
        for col in cols:
            window = Window(col, row, min(_SAMPLE_SIDE, width - col), min(_SAMPLE_SIDE, height - row))
            numbers, valid = reader.read(window)
            found.append(numbers[:, valid].ravel())
    return np.concatenate(found)
