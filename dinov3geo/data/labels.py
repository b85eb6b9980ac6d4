"""Masks of land cover: which stored value means which class, and reading them on an image's grid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dinov3geo.data.pairs import PairArrays, RasterPair
from dinov3geo.errors import DataError
from dinov3geo.rasters.reader import SceneReader, read_on_grid

MAX_CLASSES = 255
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_SHOWN = 8


class LandcoverClass(BaseModel):
    """One class of a mask.

    Attributes:
        name: for tables, legends and tags.
        values: stored numbers that mean this class.
        colour: `"#rrggbb"`, or None for one of a palette.
        weight: factor of its pixels in the loss, beside `fit.class_weights`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    values: tuple[int, ...] = Field(min_length=1)
    colour: str | None = None
    weight: float = Field(default=1.0, ge=0)

    @field_validator("values", mode="before")
    @classmethod
    def _one_value(cls, value: Any) -> Any:  # noqa: ANN401 (what a file holds)
        return (value,) if isinstance(value, int) else value

    @field_validator("colour")
    @classmethod
    def _is_colour(cls, value: str | None) -> str | None:
        if value is not None and not _COLOUR.fullmatch(value):
            raise ValueError(f"expected a colour like '#2ca02c' (in quotes), got {value!r}")
        return value


class ClassScheme(BaseModel):
    """The classes of a set of masks; a file of `configs/classes`.

    Attributes:
        classes: in the order of the model's outputs and of the map's numbers.
        ignore: stored numbers that say nothing; the masks' nodata is always ignored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    classes: tuple[LandcoverClass, ...] = Field(min_length=2, max_length=MAX_CLASSES)
    ignore: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _no_value_twice(self) -> ClassScheme:
        names = [c.name for c in self.classes]
        values = [v for c in self.classes for v in c.values] + list(self.ignore)
        twice = {x for x in (*names, *values) if (*names, *values).count(x) > 1}
        if twice:
            raise ValueError(f"given more than once: {', '.join(sorted(map(str, twice)))}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(c.name for c in self.classes)

    @property
    def colours(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Red, green and blue of each class, None where the file names none."""
        return tuple(_rgb(c.colour) for c in self.classes)

    def describe(self) -> str:
        """The classes and their values in one line, for messages."""
        parts = [f"{c.name} ({', '.join(map(str, c.values))})" for c in self.classes]
        return ", ".join(parts) + (f"; ignored: {', '.join(map(str, self.ignore))}" if self.ignore else "")

    def encode(self, numbers: NDArray[Any], known: NDArray[np.bool_], source: object) -> ClassMap:
        """Stored numbers to positions of classes.

        Args:
            numbers: [h, w] whole numbers of any type.
            known: [h, w] False at nodata.
            source: named in messages.

        Raises:
            DataError: a number that stands for no class and is not ignored, or a fraction.
        """
        if numbers.dtype.kind == "f" and not np.array_equal(numbers[known], np.rint(numbers[known])):
            raise DataError(f"{source} holds fractions; expected a mask of whole numbers, one per class")
        classes = np.zeros(numbers.shape, dtype=np.uint8)
        unnamed = known.copy()
        for position, own in enumerate(self.classes):
            inside = np.isin(numbers, own.values) & known
            classes[inside] = position
            unnamed &= ~inside
        ignored = np.isin(numbers, self.ignore)
        strange = unnamed & ~ignored
        if strange.any():
            values, counts = np.unique(numbers[strange], return_counts=True)
            found = ", ".join(
                f"{v:g} ({n} pixels)" for v, n in zip(values[:_SHOWN].tolist(), counts, strict=False)
            )
            more = f" and {len(values) - _SHOWN} more values" if len(values) > _SHOWN else ""
            raise DataError(
                f"{source} holds {found}{more}, which no class names; named are {self.describe()}; "
                "add them to a class or to `ignore`"
            )
        return ClassMap(classes, known & ~unnamed)


@dataclass(frozen=True, slots=True)
class ClassMap:
    """A mask in positions of classes.

    Attributes:
        classes: [h, w] uint8, 0 where not valid.
        valid: [h, w] bool.
    """

    classes: NDArray[np.uint8]
    valid: NDArray[np.bool_]


def load_label_pair(
    pair: RasterPair, scheme: ClassScheme, *, bands: Sequence[int] | None = None
) -> PairArrays:
    """Reads a pair whose target is a mask of classes.

    A mask on another grid or in another CRS gives the nearest of its pixels; classes are never mixed.

    Args:
        pair: from `match_pairs`.
        scheme: what the mask's numbers mean.
        bands: 1-based image bands; None for all but alpha.

    Raises:
        RasterError: a file is gone or damaged.
        DataError: more than one band of classes, or numbers that the scheme does not name.
    """
    with SceneReader(pair.image, bands=bands) as reader:
        image, valid = reader.read(pair.window)
    with SceneReader(pair.target) as reader:
        if len(reader.bands) != 1:
            raise DataError(f"{pair.target} has {len(reader.bands)} bands, expected one band of classes")
        numbers, known = read_on_grid(reader, pair.grid, resampling="nearest")
    labels = scheme.encode(numbers[0], known, pair.target)
    return PairArrays(image, valid, labels.classes, labels.valid)


def _rgb(colour: str | None) -> tuple[int, int, int] | None:
    if colour is None:
        return None
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
