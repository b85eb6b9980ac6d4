"""From blended model outputs to stored numbers: one encoding per product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dinov3geo.errors import ConfigError
from dinov3geo.features.store import INT8_NODATA, StoredType
from dinov3geo.heads.base import OutputSpec
from dinov3geo.predict.stream import Array, Floats, Mask
from dinov3geo.rasters.geotiff import Layer

INTEGERS: Mapping[str, tuple[str, float, float]] = {"dm": ("uint16", 0.1, 65535), "m": ("uint8", 1.0, 255)}
"""Whole numbers for heights: type, metres per step, nodata."""

FINEST_M = 2.0**-14
"""Heights are stored in steps of 0.06 mm: finer digits are noise, and more than a quarter of a file."""

PALETTE = (
    (31, 119, 180), (255, 187, 120), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
    (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207), (174, 199, 232), (152, 223, 138),
    (255, 152, 150), (197, 176, 213), (196, 156, 148), (247, 182, 210), (199, 199, 199), (219, 219, 141),
)  # fmt: skip
"""Colours of classes in their order; they begin again after the last."""

NO_CLASS = 255
"""Nodata of a class map."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How blended outputs of a model are stored.

    Attributes:
        layer: what the stored numbers are.
        inputs: values per cell that the model gives.
        encode: values [K, n, w] and valid [n, w] to stored numbers [C, n, w].
    """

    layer: Layer
    inputs: int
    encode: Callable[[Floats, Mask], Array]


def height_encoding(
    output: OutputSpec, *, integer: str | None = None, uncertainty: bool = False, tags: Mapping[str, str]
) -> Encoding:
    """Heights in metres, or as whole decimetres or metres; a second band tells how sure they are.

    Metres are rounded to steps of `FINEST_M`.

    Args:
        output: of the head.
        integer: a name in `INTEGERS`, or None for the head's own type.
        uncertainty: whether the model gives a spread in metres beside the height.
        tags: of the file.

    Raises:
        ConfigError: no such name.
    """
    if integer is not None and integer not in INTEGERS:
        raise ConfigError(f"unknown integer {integer!r}; valid names: {', '.join(INTEGERS)}")
    dtype, step, nodata = INTEGERS[integer] if integer else (output.dtype, 1.0, output.nodata)
    names = (output.name.replace("_", " "), "spread over flips and turns")[: 1 + uncertainty]
    top = np.iinfo(dtype).max - 1 if integer else None
    finest = FINEST_M if output.unit == "m" and dtype == "float32" else None

    def encode(values: Floats, valid: Mask) -> Array:
        stored: Array = values
        if top is not None:
            # A map of whole numbers cannot hold what lies beyond its range; nodata stays apart.
            stored = np.clip(np.rint(np.where(valid, values, 0) / step), 0, top).astype(dtype)
        elif finest:
            # A power of two: both products are exact.
            np.rint(values * np.float32(1 / finest), out=values)
            values *= np.float32(finest)
        stored[:, ~valid] = nodata
        return stored

    layer = Layer(
        count=len(names),
        dtype=dtype,
        nodata=nodata,
        band_names=names,
        units=output.unit,
        scale=step,
        overviews="average",
        tags=tags,
    )
    return Encoding(layer, len(names), encode)


def feature_encoding(names: tuple[str, ...], stored: StoredType, *, tags: Mapping[str, str]) -> Encoding:
    """Features as they are, NaN where there is no data, or as 8-bit numbers with a scale."""
    nodata = float(INT8_NODATA) if stored.dtype == "int8" else float("nan")
    layer = Layer(len(names), stored.dtype, nodata, band_names=names, scale=stored.scale, tags=tags)
    return Encoding(layer, len(names), stored.encode)


def class_encoding(output: OutputSpec, *, tags: Mapping[str, str]) -> Encoding:
    """The most probable class per cell as uint8 with colours; probabilities are blended before.

    Raises:
        ConfigError: not 1 to 255 classes.
    """
    class_names = output.class_names
    if not 1 <= len(class_names) <= NO_CLASS:
        raise ConfigError(f"a class map holds 1 to {NO_CLASS} classes, got {len(class_names)}")

    def encode(values: Floats, valid: Mask) -> Array:
        best = np.where(valid, values, 0).argmax(axis=0).astype(np.uint8)
        return np.where(valid, best, np.uint8(NO_CLASS))[None]

    named = {f"CLASS_{number}": name for number, name in enumerate(class_names)}
    layer = Layer(
        count=1,
        dtype="uint8",
        nodata=NO_CLASS,
        band_names=("land cover",),
        overviews="mode",
        colours=class_colours(len(class_names), output.colours),
        tags={**tags, **named},
    )
    return Encoding(layer, len(class_names), encode)


def entropy_encoding(num_classes: int, *, tags: Mapping[str, str]) -> Encoding:
    """How unsure the class is: entropy of the blended probabilities, 0 (sure) to 100 (all alike) percent."""

    def encode(values: Floats, valid: Mask) -> Array:
        shares = np.where(valid, values, 1.0 / num_classes).clip(1e-7, 1.0)
        shares /= shares.sum(axis=0)
        entropy = -(shares * np.log(shares)).sum(axis=0) / max(np.log(num_classes), 1e-9)
        return np.where(valid, np.rint(100 * entropy), NO_CLASS).astype(np.uint8)[None]

    layer = Layer(1, "uint8", NO_CLASS, band_names=("uncertainty",), units="%", tags=tags)
    return Encoding(layer, num_classes, encode)


def probability_encoding(class_names: tuple[str, ...], *, tags: Mapping[str, str]) -> Encoding:
    """Blended probabilities in percent, one band per class."""

    def encode(values: Floats, valid: Mask) -> Array:
        percent = np.rint(100 * np.where(valid, values, 0).clip(0, 1))
        return np.where(valid, percent, NO_CLASS).astype(np.uint8)

    layer = Layer(len(class_names), "uint8", NO_CLASS, band_names=class_names, units="%", tags=tags)
    return Encoding(layer, len(class_names), encode)


def class_colours(
    count: int, chosen: Sequence[tuple[int, int, int] | None] = ()
) -> dict[int, tuple[int, int, int]]:
    """Red, green and blue of each class: the chosen ones, else those of the palette."""
    own = {number: rgb for number, rgb in enumerate(chosen[:count]) if rgb is not None}
    return {number: PALETTE[number % len(PALETTE)] for number in range(count)} | own
