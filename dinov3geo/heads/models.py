"""Canopy-height models of every kind: bundled, fitted here, or the released CHMv2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinov3geo.backbones.hub import is_hub_name, locate_repository
from dinov3geo.backbones.store import HF_CONFIG, HF_INDEX, HF_WEIGHTS, PICKLES, read_weights
from dinov3geo.errors import ConfigError, UnknownNameError
from dinov3geo.heads.base import HeightModel
from dinov3geo.heads.canopy import BUNDLED_MODELS, DEFAULT_MODEL, load_canopy_model
from dinov3geo.heads.chmv2 import describe_chmv2, load_chmv2
from dinov3geo.heads.folders import CARD_FILE


def load_height_model(
    name_or_path: str | Path = DEFAULT_MODEL, *, backbone: str | Path | None = None
) -> HeightModel:
    """A model ready to predict, on the CPU.

    Args:
        name_or_path: a bundled name, a folder that `canopy fit` wrote, or CHMv2: a Hugging Face folder,
            `hub:owner/repository`, or a file of the official release.
        backbone: weights of the satellite ViT-L, for an official CHMv2 file of the decoder alone; or those
            of a head on stored features, if they are no longer where they were.

    Raises:
        UnknownNameError: nothing of the kind.
        ConfigError: a backbone is named for a model that has its own, or none for one that lacks it; else as
            `load_canopy_model` and `load_chmv2`.
        DataError: the weights are damaged or do not fit.
    """
    path = _chmv2_path(name_or_path)
    if path is not None:
        return load_chmv2(path, backbone=backbone)
    return load_canopy_model(name_or_path, backbone=backbone)


def describe_height_model(path: Path) -> dict[str, Any] | None:
    """The card of a canopy-height model, once its tensors fit, or None if the path holds something else.

    Raises:
        UserError: as `load_height_model`.
    """
    if (path / CARD_FILE).is_file():
        return load_canopy_model(path).card
    if _holds_weights(path) and any("reassemble" in name for name in read_weights(path)):
        return describe_chmv2(path)
    return None


def _holds_weights(path: Path) -> bool:
    if path.is_dir():
        return (path / HF_WEIGHTS).is_file() or (path / HF_INDEX).is_file()
    return path.is_file() and path.suffix in (".safetensors", *PICKLES)


def _chmv2_path(name_or_path: str | Path) -> Path | None:
    """Where the weights of CHMv2 lie, or None for a model of the other kinds."""
    if str(name_or_path) in BUNDLED_MODELS:
        return None
    if is_hub_name(name_or_path):
        return locate_repository(str(name_or_path))
    path = Path(name_or_path)
    if path.is_dir():
        foreign = (path / HF_CONFIG).is_file() or (path / HF_WEIGHTS).is_file()
        return path if foreign and not (path / CARD_FILE).is_file() else None
    if not path.is_file():
        raise UnknownNameError("canopy model", str(name_or_path), BUNDLED_MODELS)
    if path.suffix not in (".safetensors", *PICKLES):
        raise ConfigError(
            f"{path} is no canopy model; expected a folder of `canopy fit`, or CHMv2 as a Hugging Face "
            f"folder or a file (.safetensors, {', '.join(PICKLES)})"
        )
    return path
