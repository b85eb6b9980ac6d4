"""Which band of a file is which, by what the file itself says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinov3geo.errors import DataError, UnknownNameError
from dinov3geo.rasters.reader import SceneInfo, SceneReader
from dinov3geo.rasters.sensors import SENSORS

RGB = ("red", "green", "blue")

_KNOWN_NAMES = frozenset(name for sensor in SENSORS.values() for name in sensor.band_names)
# Names that mean one colour wherever two digits are written: Sentinel-2 and the harmonised HLS products agree
# on these, whereas "B2" is blue on Landsat 8 and green on Landsat 4 to 7. Source: ESA, Sentinel-2 MSI; NASA,
# HLS v2.
_COLOURS_OF_NUMBERS = {"b02": "blue", "b03": "green", "b04": "red"}


def described_bands(info: SceneInfo, wanted: Sequence[str]) -> tuple[str, ...]:
    """Per band its description in lower case where that names a band, else ""; B02 to B04 become colours.

    Args:
        info: of the file.
        wanted: names that count beside those of the known sensors.
    """
    return name_bands(info.band_names, wanted)


def name_bands(descriptions: Sequence[str | None], wanted: Sequence[str]) -> tuple[str, ...]:
    """The same of a file's descriptions alone, see `described_bands`."""
    names = {name.lower() for name in wanted}
    known = _KNOWN_NAMES | names
    texts = (_colour_unless_wanted((text or "").strip().lower(), names) for text in descriptions)
    return tuple(text if text in known else "" for text in texts)


def _colour_unless_wanted(text: str, wanted: set[str]) -> str:
    """The colour of a numbered band of Sentinel-2, unless the number itself is looked for."""
    return text if text in wanted else _COLOURS_OF_NUMBERS.get(text, text)


def find_bands(info: SceneInfo, wanted: Sequence[str]) -> tuple[int, ...] | None:
    """Finds bands by their descriptions, and where these say nothing by their colour interpretation.

    Args:
        info: of the file.
        wanted: names of bands, in any case.

    Returns:
        1-based indexes in the order of `wanted`, or None if any is not found.
    """
    described = described_bands(info, wanted)
    labels = [text or colour for text, colour in zip(described, info.colours, strict=True)]
    if any(name.lower() not in labels for name in wanted):
        return None
    return tuple(labels.index(name.lower()) + 1 for name in wanted)


def order_contradicts_colours(info: SceneInfo, wanted: Sequence[str], chosen: Sequence[int]) -> bool:
    """Whether the file's colour interpretation calls one of the chosen bands another colour than wanted."""
    colours = [info.colours[index - 1] for index in chosen]
    return any(colour in RGB and colour != name.lower() for colour, name in zip(colours, wanted, strict=True))


def ordered_bands(info: SceneInfo, wanted: Sequence[str], order: Sequence[str]) -> tuple[int, ...] | None:
    """Finds bands of a file that describes none by the order in which its sensor has them, alpha included.

    Args:
        info: of the file.
        wanted: names of bands.
        order: name of each band of the file.

    Returns:
        1-based indexes in the order of `wanted`, or None if the file says itself which band is which.

    Raises:
        DataError: another number of bands.
        UnknownNameError: a wanted band that the sensor does not have.
    """
    if any(described_bands(info, wanted)):
        return None
    return find_in_order(info.path, info.num_bands, wanted, order)


def find_in_order(path: Path, num_bands: int, wanted: Sequence[str], order: Sequence[str]) -> tuple[int, ...]:
    """The same of a file of which only the number of bands is known; errors as in `ordered_bands`."""
    if num_bands != len(order):
        raise DataError(f"{path} has {num_bands} bands, expected {len(order)}: {', '.join(order)}")
    for name in wanted:
        if name not in order:
            raise UnknownNameError("band", name, order)
    return tuple(list(order).index(name) + 1 for name in wanted)


def choose_bands(
    scene: Path, wanted: Sequence[str], *, model: str, order: Sequence[str] | None = None
) -> tuple[tuple[int, ...], list[str]]:
    """Finds the bands of a scene that a model needs.

    Bands are taken by their names (descriptions), else by the order that is known, else by their colour
    interpretation, else in the file's order; alpha is counted only in an order that is known.

    Args:
        scene: raster file.
        wanted: names of the bands that the model takes.
        model: its name, for messages.
        order: see `ordered_bands`, or None.

    Returns:
        1-based indexes in the model's order, and warnings.

    Raises:
        RasterError, GeoreferenceError: the scene cannot be opened or used.
        DataError: too few bands, or named ones among which one is missing.
    """
    with SceneReader(scene) as reader:
        available, info = reader.bands, reader.info
    found = None if order is None else ordered_bands(info, wanted, order)
    found = found or find_bands(info, wanted)
    if found is not None:
        return found, []
    needs = f"model {model!r} needs {len(wanted)}: {', '.join(wanted)}"
    described = described_bands(info, wanted)
    if any(described):
        listed = ", ".join(name or "unnamed" for name in described)
        raise DataError(f"scene {scene} names its bands {listed}; {needs}; name or reorder the bands")
    if len(available) < len(wanted):
        raise DataError(f"scene {scene} has {len(available)} band{'s' * (len(available) != 1)}; {needs}")
    chosen = available[: len(wanted)]
    if len(available) == len(wanted) and not order_contradicts_colours(info, wanted, chosen):
        return chosen, []
    listed = ", ".join(str(index) for index in chosen)
    return chosen, [
        f"scene {scene} has {len(available)} bands without the names {', '.join(wanted)}; "
        f"bands {listed} were taken as these"
    ]
