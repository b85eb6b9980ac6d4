"""At which pixel size a model sees a scene: the scene's own, one that is asked for, or the model's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from dinov3geo.errors import ConfigError
from dinov3geo.predict.checks import ModelInput
from dinov3geo.rasters.grid import PixelGrid, aligned_window

PixelSize = float | Literal["model"] | None
"""Metres, "model" for the nearest size that the model was trained at, or None for the scene's own."""

MODEL: Literal["model"] = "model"
MAX_CHANGE = 100.0
"""A pixel that becomes so many times larger or smaller is a slip of the pen."""


def parse_pixel_size(text: str | None) -> PixelSize:
    """The value of an option: metres or "model".

    Raises:
        ConfigError: neither.
    """
    if text is None or text == MODEL:
        return text
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    return _checked(size, text)


def seen_grid(scene: Path, own: PixelGrid, size: PixelSize, wanted: ModelInput) -> PixelGrid:
    """The grid on which a model sees a scene, `own` if nothing has to change.

    Args:
        scene: raster file, for messages.
        own: its grid.
        size: of a pixel.
        wanted: what the model takes.

    Raises:
        ConfigError: a size that is no positive number or changes pixels more than 100 times, or "model" for
            one that does not tell its GSD.
    """
    if size is None:
        return own
    gsd_m = own.gsd_m
    if size == MODEL:
        if wanted.gsd_m is None:
            raise ConfigError(
                f"the card of model {wanted.name!r} does not say at which pixel size it was trained; "
                "give metres instead, e.g. --gsd 0.6"
            )
        low, high = wanted.gsd_m
        # Rounding errors of a header are no reason to touch every number.
        if low * (1 - 1e-3) <= gsd_m <= high * (1 + 1e-3):
            return own
        metres = min(max(gsd_m, low), high)
    else:
        metres = _checked(float(size), str(size))
    change = max(metres / gsd_m, gsd_m / metres)
    if change > MAX_CHANGE:
        raise ConfigError(
            f"scene {scene} has pixels of {gsd_m:.3g} m, and {metres:g} m change them {change:.0f} times; "
            f"expected at most {MAX_CHANGE:.0f} times, so choose a size nearer to its own, or another scene"
        )
    grid = own.at_gsd(metres)
    return own if grid.shape_hw == own.shape_hw and aligned_window(own, grid) is not None else grid


def _checked(size: float, text: str) -> float:
    if not (math.isfinite(size) and size > 0):
        raise ConfigError(f"--gsd takes metres above 0, or {MODEL}, got {text!r}; e.g. --gsd 0.6")
    return size
