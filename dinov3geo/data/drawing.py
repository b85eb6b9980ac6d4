"""How often the ground of a source is drawn: by area, by file, by class or by value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dinov3geo.data.places import Places
from dinov3geo.data.sampling import ChipSampler, Weights
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import DataError
from dinov3geo.rasters.crs import to_rasterio
from dinov3geo.rasters.grid import PixelGrid

# Points looked at along each axis of a chip, and cells along each axis of a scene.
_POINTS, _MOST_CELLS = 16, 64

Floats = NDArray[np.float64]


class DrawSettings(BaseModel):
    """How often the places of a source are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["area", "file", "class", "value"] = Field(
        "area",
        description="all ground alike, all files alike, all classes alike, or in proportion to a number",
    )
    rasters: str | None = Field(
        None, description="for class and value: rasters of one band on the same ground, relative to data.root"
    )
    shares: dict[int, float] | None = Field(
        None, description="for class: share of each number of the rasters; those left out are not sought"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        needed = self.by in ("class", "value")
        if needed != (self.rasters is not None):
            raise ValueError(
                f"draw by {self.by} needs `rasters`, a raster of one band on the same ground"
                if needed
                else f"`rasters` is for draw by class or value, not by {self.by}"
            )
        if self.shares is not None:
            if self.by != "class":
                raise ValueError(f"`shares` is for draw by class, not by {self.by}")
            numbers = list(self.shares.values())
            if not (np.isfinite(numbers).all() and min(numbers, default=0) >= 0 and sum(numbers) > 0):
                raise ValueError("`shares` must be finite, at least 0 and not all 0")
        return self


def find_weights(
    dataset: SceneDataset, settings: DrawSettings, root: Path, chip_size: int, group_side: int
) -> Weights:
    """What a sampler of a data set takes as its weights.

    By class and by value every scene is cut into cells of about a chip; at 16 x 16 points of the chip in the
    middle of each cell the rasters are looked up. All ground that one process or another trains on is looked
    at once, when the run starts.

    Args:
        dataset: of the scenes.
        settings: as given in a configuration.
        root: that `settings.rasters` is relative to.
        chip_size: side of a chip in pixels.
        group_side: of the squares that are visited together, pixels.

    Raises:
        RasterError, DataError: rasters that cannot be read, have several bands, lie elsewhere, hold no whole
            numbers (by class), lack a class that is asked for, or no number above 0 (by value).
    """
    if settings.rasters is None:
        return "file" if settings.by == "file" else "area"
    looked_up = SceneDataset(
        root / settings.rasters, is_image=False, sensor=None, allow_mixed_resolution=True
    )
    path = root / settings.rasters
    if any(info.num_bands != 1 for info in looked_up.infos.values()):
        raise DataError(
            f"draw by {settings.by} needs rasters of one band; {root / settings.rasters} has more"
        )
    sampler = ChipSampler(dataset, chip_size=chip_size, chips_per_epoch=1, seed=0)
    places = sampler.cells(chip_size, group_side, _MOST_CELLS)
    numbers = [_numbers(looked_up, dataset, query) for query in sampler.middles(places)]
    if not any(len(each) for each in numbers):
        raise DataError(f"{path} lies nowhere on the scenes that it is to weigh")
    weigh = _by_class if settings.by == "class" else _by_value
    return replace(places, weights=weigh(places, numbers, settings))


def _numbers(looked_up: SceneDataset, dataset: SceneDataset, query: Any) -> NDArray[Any]:  # noqa: ANN401
    """Valid numbers under a chip."""
    x, y = query[:2]
    width, height = (x.stop - x.start) / _POINTS, (y.stop - y.start) / _POINTS
    transform = Affine(width, 0.0, x.start, 0.0, -height, y.stop)
    numbers, valid = looked_up.read_on(PixelGrid(to_rasterio(dataset.crs), transform, _POINTS, _POINTS))
    found: NDArray[Any] = numbers[0][valid]
    return found


def _by_class(places: Places, numbers: list[NDArray[Any]], settings: DrawSettings) -> Floats:
    """A class is drawn as often as its share says, a place in proportion to how much of it is there."""
    everything = np.concatenate(numbers)
    if np.issubdtype(everything.dtype, np.floating) and np.any(everything != np.rint(everything)):
        raise DataError(
            f"draw by class needs whole numbers; {settings.rasters} holds {everything.dtype} others"
        )
    found = np.unique(everything).astype(np.int64)
    shares = dict.fromkeys(found.tolist(), 1.0) if settings.shares is None else settings.shares
    absent = sorted(set(shares) - set(found.tolist()))
    if absent:
        raise DataError(
            f"draw by class: {settings.rasters} holds no {', '.join(map(str, absent))} on these scenes, "
            f"only {', '.join(map(str, found.tolist()))}"
        )
    total = sum(shares.values())
    weights = np.zeros(len(numbers))
    for number, share in shares.items():
        amount = places.weights * [np.mean(each == number) if len(each) else 0.0 for each in numbers]
        weights += share / total * amount / amount.sum()
    return weights


def _by_value(places: Places, numbers: list[NDArray[Any]], settings: DrawSettings) -> Floats:
    """In proportion to the mean of the numbers, of which those below 0 count as 0."""
    means = [float(np.maximum(each, 0).mean(dtype=np.float64)) if len(each) else 0.0 for each in numbers]
    weights: Floats = places.weights * np.array(means)
    if not weights.sum() > 0:
        raise DataError(f"draw by value: {settings.rasters} holds no number above 0 on these scenes")
    return weights
