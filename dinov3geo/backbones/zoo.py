"""Names of architectures and of weights; reading and writing of weights with their card."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import NORMALIZATIONS, RGB, BackboneCard, Normalization, SensorLike
from dinov3geo.backbones.convert import Checkpoint, to_ours
from dinov3geo.backbones.convnext import ConvNext, ConvNextConfig
from dinov3geo.backbones.filter_bank import STRIDE, FilterBankConfig
from dinov3geo.backbones.hub import PREFIX, is_hub_name, locate_repository
from dinov3geo.backbones.stems import adapt_stem, needs_choice
from dinov3geo.backbones.store import (
    HF_CONFIG,
    HF_INDEX,
    HF_PROCESSOR,
    HF_WEIGHTS,
    PICKLES,
    read_json,
    read_weights,
    write_text,
)
from dinov3geo.backbones.store import read_tensors as read_tensors
from dinov3geo.backbones.store import write_tensors as write_tensors
from dinov3geo.backbones.variants import FITTED, Config, build_network, variant_of
from dinov3geo.backbones.variants import VARIANTS as VARIANTS
from dinov3geo.backbones.variants import build_backbone as build_backbone
from dinov3geo.backbones.variants import build_vit as build_vit
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.errors import ConfigError, DataError, UnknownNameError

_WEIGHTS_FOLDER = Path(__file__).parent / "weights"
BUNDLED: dict[str, Path] = {
    "vit-tiny-aerial": _WEIGHTS_FOLDER / "vit_tiny_aerial.safetensors",
    "vit-mini-satellite": _WEIGHTS_FOLDER / "vit_mini_satellite.safetensors",
    "filters-aerial": _WEIGHTS_FOLDER / "filters_aerial.safetensors",
    "filters-satellite": _WEIGHTS_FOLDER / "filters_satellite.safetensors",
}
DEFAULT_BACKBONE = "vit-tiny-aerial"
RUN_EXPORT = "backbone.safetensors"

# Tensors [D, C, k, k] that see the bands.
_FIRST_KERNELS = re.compile(r"patch_embed\.weight|stem\.conv\.weight|(patch_embed\.)?filters\.\d+\.weight")
# What a card must say, because the tensors do not.
_UNSEEN = ("norm_eps", "rope_base", "rope_rescale", "rope_rounded_periods", "rope_shift", "rope_jitter")


def load_backbone(
    name_or_path: str | Path = DEFAULT_BACKBONE,
    *,
    bands: Sequence[str] | None = None,
    sensor: SensorLike | None = None,
    normalization: Normalization | str | None = None,
    stem: str | None = None,
    download: bool = False,
) -> Backbone:
    """A frozen backbone with its card, in evaluation mode on the CPU.

    Args:
        name_or_path: a bundled name, the folder of a pretraining run, a .safetensors file, an official .pth
            (backbone, or training checkpoint with a teacher), a Hugging Face folder, or
            `hub:owner/repository[@revision]`. Dialect and variant are recognised from the tensors.
        bands: in the order of the images to come; None for those of the weights, or of the sensor.
        sensor: gives the statistics of the bands; needed for bands that the weights do not know.
        normalization: statistics, or a name in `card.NORMALIZATIONS`; None for what the checkpoint tells.
        stem: how to adapt the first convolution to other bands, see `stems.adapt_stem`.
        download: let a `hub:` name be fetched; without it only the local cache is looked at.

    Returns:
        The network; its call takes normalised images (`backbone.card.normalization`).

    Raises:
        UnknownNameError: neither a bundled name nor an existing path; no such normalization or band.
        ConfigError: the card is missing or incomplete; other bands, but not how to adapt the stem.
        DataError: the weights do not fill the network exactly, or the file is damaged.
    """
    opened = open_checkpoint(
        name_or_path, bands=bands, sensor=sensor, normalization=normalization, stem=stem, download=download
    )
    backbone = build_network(opened.config)
    check_complete(backbone.state_dict(), opened.tensors, source=opened.path)
    backbone.load_state_dict({name: tensor.to(torch.float32) for name, tensor in opened.tensors.items()})
    backbone.card = opened.card
    return backbone.eval().requires_grad_(False)


@dataclass(frozen=True)
class OpenedCheckpoint:
    """Weights that were read and understood, but not yet put into a network.

    Attributes:
        path: where they lie.
        dialect: of the file.
        config: the shape, with the bands wanted.
        tensors: in this library's names and the file's dtype.
        card: that came with them, or was made for them.
        dropped: names that this library has no use for.
    """

    path: Path
    dialect: str
    config: Config
    tensors: dict[str, Tensor]
    card: BackboneCard
    dropped: tuple[str, ...]


def open_checkpoint(
    name_or_path: str | Path,
    *,
    bands: Sequence[str] | None = None,
    sensor: SensorLike | None = None,
    normalization: Normalization | str | None = None,
    stem: str | None = None,
    download: bool = False,
) -> OpenedCheckpoint:
    """Reads weights of any dialect; arguments and errors as in `load_backbone`."""
    path = locate_weights(name_or_path, download=download)
    checkpoint = to_ours(read_weights(path))
    if checkpoint.dialect == "ours":
        card = _read_card(path)
        config = _carded_config(card, checkpoint.config)
    else:
        config = with_hf_settings(path, checkpoint.config)
        card = _foreign_card(path, checkpoint, config)
        if is_hub_name(name_or_path):
            # A snapshot is named by its commit.
            source = str(name_or_path)
            card = dataclasses.replace(card, name=source, recipe={**card.recipe, "commit": path.name})
    if normalization is not None:
        statistics = find_normalization(normalization)
        card = _with_statistics(card, statistics, f"{_name_of(statistics)}, named by the user")
    tensors = dict(checkpoint.tensors)
    card = adapt_bands(tensors, card, bands=bands, sensor=sensor, stem=stem)
    config = dataclasses.replace(config, in_channels=len(card.normalization.bands))
    return OpenedCheckpoint(path, checkpoint.dialect, config, tensors, card, checkpoint.dropped)


def inspect_weights(name_or_path: str | Path) -> OpenedCheckpoint:
    """Reads weights of any dialect and makes sure that they fill their network exactly, without building it.

    Arguments and errors as in `load_backbone`.
    """
    opened = open_checkpoint(name_or_path)
    with torch.device("meta"):
        expected = build_network(opened.config).state_dict()
    check_complete(expected, opened.tensors, source=opened.path)
    return opened


def find_normalization(name: Normalization | str) -> Normalization:
    """Statistics by name.

    Raises:
        UnknownNameError: no such name.
    """
    if isinstance(name, Normalization):
        return name
    if name not in NORMALIZATIONS:
        raise UnknownNameError("normalization", name, NORMALIZATIONS)
    return NORMALIZATIONS[name]


def adapt_bands(
    tensors: dict[str, Tensor],
    card: BackboneCard,
    *,
    bands: Sequence[str] | None,
    sensor: SensorLike | None,
    stem: str | None,
) -> BackboneCard:
    """Changes the first convolution, in `tensors`, to the bands wanted; arguments as in `load_backbone`.

    Returns:
        The card with the new bands, their statistics and, where kernels were made up, the choice.

    Raises:
        ConfigError: see `load_backbone`.
        UnknownNameError: a band that neither the sensor nor the weights know.
    """
    known = card.normalization
    first = [name for name in tensors if _FIRST_KERNELS.fullmatch(name)]
    count = tensors[first[0]].shape[1]
    if count != len(known.bands):
        named = None if sensor is None else Normalization.of_bands(_bands(sensor, bands))
        if named is None or len(named.bands) != count:
            other = len(known.bands if named is None else named.bands)
            raise ConfigError(
                f"the weights take {count} bands, but the statistics are of {other}; "
                f"name a sensor with these {count} bands (dinov3geo convert IN OUT --to ours --sensor ...)"
            )
        return _with_statistics(card, named, f"{_of_sensor(sensor)}, as are the bands")
    if bands is None and sensor is None:
        return card
    names = tuple(bands) if bands is not None else tuple(band.name for band in _bands(sensor, None))
    if needs_choice(known.bands, names) and "filters" in first[0]:
        raise ConfigError(
            f"the filters of {card.name} were fitted to the bands {', '.join(known.bands)}, and "
            f"{', '.join(names)} are wanted; fit others to these (dinov3geo filters)"
        )
    for name in first:
        tensors[name] = adapt_stem(tensors[name], known.bands, names, how=stem)
    if needs_choice(known.bands, names):
        choice = {"how": stem, "from": list(known.bands), "to": list(names)}
        card = dataclasses.replace(card, recipe={**card.recipe, "stem": choice})
    if sensor is None:
        return dataclasses.replace(card, normalization=known.select(names))
    return _with_statistics(card, Normalization.of_bands(_bands(sensor, names)), _of_sensor(sensor))


def _with_statistics(card: BackboneCard, statistics: Normalization, why: str) -> BackboneCard:
    """The card with other statistics, and where they come from."""
    return dataclasses.replace(card, normalization=statistics, recipe={**card.recipe, "normalization": why})


def _name_of(statistics: Normalization) -> str:
    return next((name for name, known in NORMALIZATIONS.items() if known == statistics), "its own")


def _of_sensor(sensor: SensorLike | None) -> str:
    assert sensor is not None
    return f"that of the sensor {sensor.name}, named by the user"


def _bands(sensor: SensorLike | None, names: Sequence[str] | None) -> Sequence[Any]:
    assert sensor is not None
    return sensor.select(names)


def _foreign_card(path: Path, checkpoint: Checkpoint, config: Config) -> BackboneCard:
    """A card for weights that came without one; the normalisation is what the checkpoint tells.

    Raises:
        DataError: no variant has this shape, or statistics beside the weights cannot be read.
    """
    variant = variant_of(config)
    normalization, why = _recognise_normalization(path, variant, checkpoint)
    return BackboneCard(
        name=path.stem,
        variant=variant,
        patch_size=config.stride if isinstance(config, ConvNextConfig) else config.patch_size,
        normalization=normalization,
        recipe={"dialect": checkpoint.dialect, "normalization": f"{_name_of(normalization)}, {why}"},
        architecture=_architecture(config, variant),
    )


def _recognise_normalization(path: Path, variant: str, checkpoint: Checkpoint) -> tuple[Normalization, str]:
    if variant == "vit_large" and "local_norm.weight" in checkpoint.tensors:
        why = "recognised by the norm of local crops, which only the satellite ViT-L has"
        return NORMALIZATIONS["sat"], why
    for file in (HF_PROCESSOR, HF_CONFIG):
        if (path / file).is_file():
            found = _read_statistics(path / file)
            if found is not None:
                return found, f"read from {file}"
    return NORMALIZATIONS["web"], "assumed; name another one if the weights are of satellite images"


def _read_statistics(path: Path) -> Normalization | None:
    """Statistics in the preprocessor_config.json of transformers or the config.json of timm, if any.

    Raises:
        DataError: they are no numbers.
    """
    fields = read_json(path)
    timm = fields.get("pretrained_cfg")
    fields = timm if isinstance(timm, dict) else fields
    mean = fields.get("image_mean", fields.get("mean"))
    std = fields.get("image_std", fields.get("std"))
    bands = fields.get("bands", RGB)
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == len(bands)):
        return None  # none there, or of bands that cannot be named
    try:
        factor = float(fields.get("rescale_factor", 1 / 255))
        return Normalization(
            tuple(str(band) for band in bands),
            (factor,) * len(bands),
            (0.0,) * len(bands),
            tuple(float(number) for number in mean),
            tuple(float(number) for number in std),
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} has statistics that cannot be used: {error}") from error


def with_hf_settings(path: Path, config: Config, *, section: str | None = None) -> Config:
    """A shape with what the config.json of a Hugging Face folder says and the tensors do not.

    Args:
        path: the folder; the shape stays as it is where there is no such file.
        config: what the tensors say.
        section: object of the file that describes the backbone, if it is not the whole.

    Raises:
        DataError: the file contradicts the tensors, or holds what cannot be read.
    """
    file = path / HF_CONFIG
    if not file.is_file() or isinstance(config, FilterBankConfig):
        return config
    fields = read_json(file)
    if section is not None:
        fields = fields.get(section) or {}
    if not isinstance(fields, dict):
        raise DataError(f"{file} has no settings under {section!r}, but {type(fields).__name__}")
    usual = "silu" if isinstance(config, VitConfig) and config.ffn == "swiglu" else "gelu"
    if fields.get("hidden_act", usual) != usual:
        raise DataError(f"{file} says hidden_act {fields['hidden_act']!r}, this network has {usual!r}")
    try:
        eps = float(fields.get("layer_norm_eps", config.norm_eps))
        if isinstance(config, ConvNextConfig):
            return dataclasses.replace(config, norm_eps=eps)
        heads = int(fields.get("num_attention_heads", config.num_heads))
        base = float(fields.get("rope_theta", config.rope_base))
    except (TypeError, ValueError) as error:
        raise DataError(f"{file} has a value that is no number ({error})") from error
    if heads != config.num_heads:
        raise DataError(
            f"{file} says {heads} heads for width {config.embed_dim}, expected {config.num_heads}"
        )
    return dataclasses.replace(config, norm_eps=eps, rope_base=base)


def _read_card(path: Path) -> BackboneCard:
    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        raise ConfigError(
            f"{path} has no card beside it; expected {card_path.name}, written with the weights"
        )
    return BackboneCard.read(card_path)


def _carded_config(card: BackboneCard, found: Config) -> Config:
    """The shape that the card names, with the optional parts that the tensors show."""
    kernels = found.kernels if isinstance(found, FilterBankConfig) else getattr(found, "stem_kernels", ())
    sides = [side for side, _ in kernels]
    if sides and (card.patch_size % STRIDE or not all(side % 2 for side in sides)):
        raise DataError(
            f"{card.name} has filters of {sides} pixels and a patch of {card.patch_size}; filters have odd "
            "sides, patches an even one"
        )
    known: dict[str, Config] = {**VARIANTS, **FITTED}
    if card.variant not in known:
        raise UnknownNameError("backbone variant in the card", card.variant, known)
    named = known[card.variant]
    if isinstance(found, FilterBankConfig) and isinstance(named, FilterBankConfig):
        return dataclasses.replace(found, patch_size=card.patch_size)
    unknown = card.architecture.keys() - set(_UNSEEN)
    if unknown:
        raise ConfigError(
            f"the card's architecture has unknown settings {sorted(unknown)}; known: {', '.join(_UNSEEN)}"
        )
    changes = dict(card.architecture)
    if isinstance(named, VitConfig):
        changes["patch_size"] = card.patch_size
        if isinstance(found, VitConfig):
            changes |= {
                "num_registers": found.num_registers,
                "qkv_bias": found.qkv_bias,
                "local_cls_norm": found.local_cls_norm,
                "stem_kernels": found.stem_kernels,
            }
    return dataclasses.replace(named, **changes)


def _architecture(config: Config, variant: str) -> dict[str, Any]:
    usual = VARIANTS.get(variant)
    found = {name: getattr(config, name) for name in _UNSEEN if hasattr(config, name)}
    return {name: value for name, value in found.items() if value != getattr(usual, name, value)}


def locate_weights(name_or_path: str | Path, *, download: bool = False) -> Path:
    """The weights behind a name, a run's folder, a path or a repository of the hub.

    Args:
        name_or_path: as in `load_backbone`.
        download: see `load_backbone`.

    Returns:
        A file, or a folder in the layout of Hugging Face.

    Raises:
        UnknownNameError: nothing of the kind.
        DataError: a folder without weights, or a file of another type.
    """
    bundled = BUNDLED.get(str(name_or_path))
    if bundled is not None:
        return bundled
    if is_hub_name(name_or_path):
        path = locate_repository(str(name_or_path), download=download)
    else:
        path = Path(name_or_path)
    if path.is_dir():
        if (path / RUN_EXPORT).is_file():
            return path / RUN_EXPORT
        if (path / HF_WEIGHTS).is_file() or (path / HF_INDEX).is_file():
            return path
        raise DataError(
            f"{path} holds neither {RUN_EXPORT} nor {HF_WEIGHTS}; give the output folder of a "
            "`dinov3geo pretrain` run or a Hugging Face folder"
        )
    if not path.is_file():
        name = str(name_or_path)
        looks_remote = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
        hint = f" (a path, or on the hub: {PREFIX}{name})" if looks_remote else ""
        raise UnknownNameError(f"backbone{hint}", name, BUNDLED)
    if path.suffix not in (".safetensors", *PICKLES):
        raise DataError(f"{path} is no file of weights; expected .safetensors, {', '.join(PICKLES)}")
    return path


def save_backbone(
    path: Path, backbone: Backbone, card: BackboneCard, *, dtype: torch.dtype = torch.float32
) -> None:
    """Writes weights and card; both appear under their names only when whole.

    Args:
        path: of the .safetensors file; the card gets the suffix .json.
        backbone: in any dtype, on any device.
        card: what a user must know; settings of the network that its tensors do not tell are added.
        dtype: in which the weights are written; they are read back as float32.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in backbone.state_dict().items()
    }
    if isinstance(backbone, VisionTransformer | ConvNext):
        card = dataclasses.replace(card, architecture=_architecture(backbone.config, card.variant))
    write_tensors(path, tensors)
    write_text(path.with_suffix(".json"), card.to_json())


def check_complete(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Every tensor has its place, and every place its tensor.

    Args:
        expected: state dict of the network.
        tensors: in this library's names.
        source: for messages.

    Raises:
        DataError: what is left on both sides, and shapes that differ.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = [n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape]
    if missing or extra or shapes:
        raise DataError(
            f"{source} does not fit its variant: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} not expected {extra[:3]}, {len(shapes)} of another shape {sorted(shapes)[:3]}"
        )
