"""Encoders by the names that a command line or a configuration gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import RGB, Normalization
from dinov3geo.backbones.variants import build_backbone
from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone
from dinov3geo.errors import ConfigError
from dinov3geo.evaluation.encoders import (
    DEFAULT_SIZE,
    BackboneEncoder,
    ColourStatistics,
    Encoder,
    Pixels,
    RandomConvolutions,
)
from dinov3geo.evaluation.peer_encoders import TIMM, TRANSFORMERS, timm_encoder, transformers_encoder
from dinov3geo.rasters.sensors import Band, Sensor, get_sensor

RCF, COLOURS, PIXELS, UNTRAINED = "rcf", "colours", "pixels", "untrained"
BASELINES = (UNTRAINED, RCF, COLOURS)


@dataclass(frozen=True, slots=True)
class Input:
    """What the images are, and how an encoder sees them.

    Attributes:
        size: side that networks see; the other baselines see images as they are.
        crop_from: see `resize_image`.
        bands: of the images in their order, or None for red, green, blue.
        sensor: that tells their statistics, a name or YAML file, or None for those of the weights.
        stem: how to make kernels for bands that the weights do not know, see `load_backbone`.
        normalization: statistics of the images themselves, which win over the sensor's.
        device: to compute on.
        seed: of what is random.
    """

    size: int | None = DEFAULT_SIZE
    crop_from: int | None = None
    bands: tuple[str, ...] | None = None
    sensor: str | None = None
    stem: str | None = None
    normalization: Normalization | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    def statistics(self) -> Sensor | None:
        """The sensor whose statistics are to be used, or None for those of the weights.

        Raises:
            UserError: no such sensor or file.
        """
        if self.normalization is not None:
            return measured_sensor(self.normalization)
        return None if self.sensor is None else get_sensor(self.sensor)

    def check(self) -> None:
        """Checks sizes.

        Raises:
            ConfigError: a size without pixels, or a crop larger than what it is cut from.
        """
        if self.size is not None and self.size < 1:
            raise ConfigError(f"size must be at least 1 pixel, got {self.size}")
        if self.crop_from is not None and (self.size is None or self.crop_from < self.size):
            raise ConfigError(f"cannot cut a square of {self.size} pixels out of {self.crop_from}")


def make_encoders(names: Sequence[str], seen: Input) -> list[Encoder]:
    """Encoders in the order of their names, each name once.

    Args:
        names: `rcf`, `colours`, `pixels`, `untrained`, `untrained:VARIANT`, `timm:NAME@FILE`,
            `transformers:FOLDER`, or what `load_backbone` takes.
        seen: the images.

    Raises:
        UserError: a name, file or band that cannot be used.
    """
    seen.check()
    encoders = [make_encoder(name, seen) for name in dict.fromkeys(names)]
    tell_apart(encoders, list(dict.fromkeys(names)))
    return encoders


class Named(Protocol):
    """Anything with a name for tables."""

    name: str


def tell_apart(encoders: Sequence[Named], names: Sequence[str]) -> None:
    """Adds the given name where two encoders show the same one: two runs may have given theirs one name."""
    shown = [encoder.name for encoder in encoders]
    for encoder, name in zip(encoders, names, strict=True):
        if shown.count(encoder.name) > 1:
            encoder.name = f"{encoder.name} ({name})"


def make_encoder(name: str, seen: Input) -> Encoder:
    """One encoder; arguments and errors as in `make_encoders`."""
    if name == COLOURS:
        return ColourStatistics()
    if name == PIXELS:
        return Pixels()
    if name == RCF:
        return RandomConvolutions(seed=seen.seed + 1)
    if name.startswith(TIMM):
        return timm_encoder(name, size=seen.size, crop_from=seen.crop_from, device=seen.device)
    if name.startswith(TRANSFORMERS):
        return transformers_encoder(name, size=seen.size, crop_from=seen.crop_from, device=seen.device)
    backbone, shown = make_backbone(name, seen)
    return BackboneEncoder(backbone, name=shown, size=seen.size, crop_from=seen.crop_from)


def make_backbone(name: str, seen: Input) -> tuple[Backbone, str]:
    """A frozen network on its device, and its name for tables.

    Args:
        name: `untrained`, `untrained:VARIANT`, or what `load_backbone` takes.
        seen: the images.

    Raises:
        UserError: a name, file or band that cannot be used.
    """
    if name.partition(":")[0] == UNTRAINED:
        backbone, shown = untrained(name.partition(":")[2], seen), name.replace(":", " ")
    else:
        sensor = seen.statistics()
        # Colours without statistics of their own are seen with those of the weights.
        bands = seen.bands if sensor is not None or seen.bands != RGB else None
        backbone = load_backbone(name, bands=bands, sensor=sensor, stem=seen.stem)
        shown = "" if backbone.card is None else backbone.card.name
    return backbone.to(seen.device), shown or name


def untrained(variant: str, seen: Input) -> Backbone:
    """A network with its first random weights and the card of the default weights.

    Residual branches get the full weight 1 instead of the 1e-5 that training starts with, so that the
    baseline is a random network and not the identity.

    Args:
        variant: name of the shape, or "" for that of the default weights.
        seen: bands and seed.
    """
    card = load_backbone(DEFAULT_BACKBONE).card
    assert card is not None
    variant = variant or card.variant
    bands = len(seen.bands) if seen.bands is not None else len(card.normalization.bands)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seen.seed)
        backbone = build_backbone(variant, in_channels=bands, layer_scale=1.0)
    statistics, sensor = card.normalization, seen.statistics()
    if sensor is not None:
        statistics = Normalization.of_bands(sensor.select(seen.bands))
    elif bands != len(statistics.bands):
        raise ConfigError(f"{bands} bands need a sensor, or statistics of the images, to be normalised")
    backbone.card = dataclasses.replace(
        card, name=UNTRAINED, variant=variant, patch_size=backbone.patch_size, normalization=statistics
    )
    return backbone.eval().requires_grad_(False)


def measured_sensor(normalization: Normalization) -> Sensor:
    """Statistics of images as a sensor, which is what `load_backbone` takes."""
    numbers = zip(
        normalization.bands,
        normalization.scale,
        normalization.offset,
        normalization.mean,
        normalization.std,
        strict=True,
    )
    return Sensor(
        name="measured",
        bands=tuple(Band(name, None, None, *rest) for name, *rest in numbers),
        gsd_m=1.0,
        dtype="float32",
        nodata=None,
        filename_glob="*",
        filename_regex=".*",
        rgb_bands=(),
        nadir=True,
        source="statistics of the training images",
    )
