"""Which band of a file is which, by what the file itself says."""

from __future__ import annotations

from collections.abc import Sequence

from dinov3geo.rasters.reader import SceneInfo
from dinov3geo.rasters.sensors import SENSORS

RGB = ("red", "green", "blue")

_KNOWN_NAMES = frozenset(name for sensor in SENSORS.values() for name in sensor.band_names)


def described_bands(info: SceneInfo, wanted: Sequence[str]) -> tuple[str, ...]:
    """Per band its description in lower case where that names a band, else "".

    Args:
        info: of the file.
        wanted: names that count beside those of the known sensors.
    """
    known = _KNOWN_NAMES.union(name.lower() for name in wanted)
    texts = (text.strip().lower() for text in info.band_names)
    return tuple(text if text in known else "" for text in texts)


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
