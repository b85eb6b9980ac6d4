"""The JSON card that travels with a weights file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dinov3geo.errors import ConfigError, UnknownNameError

CARD_FORMAT = "dinov3geo-backbone/1"
RGB = ("red", "green", "blue")


class BandLike(Protocol):
    """What is read of a band of a sensor table."""

    @property
    def name(self) -> str:
        """Lower case."""

    @property
    def scale(self) -> float:
        """Factor from the stored number to the physical one."""

    @property
    def offset(self) -> float:
        """Addend after the factor."""

    @property
    def mean(self) -> float:
        """Of the physical number."""

    @property
    def std(self) -> float:
        """Of the physical number."""


class SensorLike(Protocol):
    """What is read of a sensor: this room knows no rasters."""

    @property
    def name(self) -> str:
        """Name in the table of sensors."""

    def select(self, names: Sequence[str] | None = None) -> Sequence[BandLike]:
        """The named bands, or all of them."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """From a file's own numbers to what a backbone was trained on.

    `normalized = (number * scale + offset - mean) / std`, band by band: scale and offset turn the
    stored number into a physical one (reflectance, or [0, 1] for 8-bit colours), in whose unit mean
    and std are given.

    Attributes:
        bands: band names in channel order.
        scale: factor per band.
        offset: addend per band, after the factor.
        mean: per band, in physical units.
        std: per band, in physical units.
    """

    bands: tuple[str, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks that every tuple has one entry per band."""
        for name in ("scale", "offset", "mean", "std"):
            got = len(getattr(self, name))
            if got != len(self.bands):
                raise ConfigError(f"normalization {name} has {got} entries for {len(self.bands)} bands")

    @classmethod
    def of_bands(cls, bands: Sequence[BandLike]) -> Normalization:
        """Statistics of a sensor's bands, in their order."""
        return cls(
            bands=tuple(band.name for band in bands),
            scale=tuple(band.scale for band in bands),
            offset=tuple(band.offset for band in bands),
            mean=tuple(band.mean for band in bands),
            std=tuple(band.std for band in bands),
        )

    @classmethod
    def of_rgb8(cls, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Normalization:
        """8-bit red, green and blue, with statistics of numbers in [0, 1]."""
        return cls(RGB, (1 / 255,) * 3, (0.0,) * 3, mean, std)

    def select(self, bands: Sequence[str]) -> Normalization:
        """The statistics of some of the bands, in the order asked for.

        Raises:
            UnknownNameError: a band that has none here.
        """
        for band in bands:
            if band not in self.bands:
                raise UnknownNameError("band (give a sensor that has it)", band, self.bands)
        chosen = [self.bands.index(band) for band in bands]
        numbers = (tuple(t[k] for k in chosen) for t in (self.scale, self.offset, self.mean, self.std))
        return Normalization(tuple(bands), *numbers)

    def __call__(self, numbers: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalises a batch; pixels without data become 0, the mean of the training data.

        Args:
            numbers: [B, C, H, W] in the file's own dtype.
            valid: [B, H, W] bool, or None if all pixels hold data.

        Returns:
            [B, C, H, W] float32 on the same device.
        """
        device = numbers.device
        gain = torch.tensor([s / d for s, d in zip(self.scale, self.std, strict=True)], device=device)
        shift = torch.tensor(
            [(o - m) / d for o, m, d in zip(self.offset, self.mean, self.std, strict=True)], device=device
        )
        normalized = numbers.float() * gain[:, None, None] + shift[:, None, None]
        if valid is not None:
            normalized = torch.where(valid[:, None], normalized, 0.0)
        return normalized


#: What the released weights were trained with. Source: DINOv3 model cards; CHMv2 release.
NORMALIZATIONS: dict[str, Normalization] = {
    "web": Normalization.of_rgb8((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "sat": Normalization.of_rgb8((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    "chmv2": Normalization.of_rgb8((0.420, 0.411, 0.296), (0.213, 0.156, 0.143)),
}


@dataclass(frozen=True, slots=True)
class BackboneCard:
    """What one must know to use a backbone's weights.

    Attributes:
        name: name in the zoo, or of the run that wrote the weights.
        variant: name of the architecture in `zoo.VARIANTS`.
        patch_size: pixels.
        normalization: bands and their statistics.
        gsd_m: range (low, high) of ground sampling distances seen in training, or None if unknown.
        trained_on: data sets and their licences.
        licence: of the weights.
        recipe: how the weights were trained: configuration, steps, commit.
        scores: measured, each with the command that gives it.
        notes: limits that a user should know.
        architecture: settings of the network that differ from the variant and that its tensors do not tell.
    """

    name: str
    variant: str
    patch_size: int
    normalization: Normalization
    gsd_m: tuple[float, float] | None = None
    trained_on: tuple[str, ...] = ()
    licence: str = "unknown"
    recipe: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    notes: str = ""
    architecture: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The card as indented JSON text."""
        return json.dumps({"format": CARD_FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> BackboneCard:
        """Reads a card.

        Args:
            text: JSON.
            source: file name for messages.

        Raises:
            ConfigError: not JSON, another format, or a field is missing or unknown.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{source} is not JSON ({error}); expected a backbone card") from error
        if not isinstance(fields, dict) or fields.pop("format", None) != CARD_FORMAT:
            raise ConfigError(f"{source} is not a backbone card (format {CARD_FORMAT!r} expected)")
        try:
            numbers = {k: tuple(v) for k, v in fields.pop("normalization").items()}
            gsd = fields.pop("gsd_m", None)
            return cls(
                normalization=Normalization(**numbers),
                gsd_m=None if gsd is None else (gsd[0], gsd[1]),
                trained_on=tuple(fields.pop("trained_on", ())),
                **fields,
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(f"{source} is not a complete backbone card: {error}") from error

    @classmethod
    def read(cls, path: Path) -> BackboneCard:
        """Reads a card from a file.

        Raises:
            ConfigError: see `from_json`.
            OSError: the file cannot be read.
        """
        return cls.from_json(path.read_text(encoding="utf-8"), source=str(path))
