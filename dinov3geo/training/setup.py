"""From settings to the parts of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed as dist

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.convnext import ConvNextConfig
from dinov3geo.backbones.filter_bank import FilterBank
from dinov3geo.backbones.variants import VARIANTS, build_backbone
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.backbones.zoo import check_complete, load_backbone
from dinov3geo.data.crops import CropMaker
from dinov3geo.data.mixture import network_bands
from dinov3geo.errors import ConfigError
from dinov3geo.rasters.sensors import get_sensor
from dinov3geo.training.checkpoint import is_checkpoint, read_networks, read_state
from dinov3geo.training.continuing import settings_of
from dinov3geo.training.settings import FilterSettings, RunSettings, TrainSettings
from dinov3geo.training.ssl import SelfSupervisedRecipe


def run_normalization(settings: RunSettings | FilterSettings) -> Normalization:
    """Bands and statistics of the network's input, from the sensor table."""
    bands = get_sensor(settings.data.sensor).select(settings.data.bands)
    return Normalization(
        bands=network_bands(settings.data),
        scale=tuple(band.scale for band in bands),
        offset=tuple(band.offset for band in bands),
        mean=tuple(band.mean for band in bands),
        std=tuple(band.std for band in bands),
    )


def build_crop_makers(settings: RunSettings, *, patch_size: int) -> list[tuple[CropMaker, float]]:
    """What turns the run's chips into crops: one for each choice of sizes, with its share of the steps.

    Args:
        settings: of the run.
        patch_size: of the teacher, pixels.

    Raises:
        ConfigError: a crop size does not fit the patch size.
    """
    try:
        return [
            (
                CropMaker(
                    crops,
                    settings.masks,
                    run_normalization(settings),
                    patch_size=patch_size,
                    nadir=get_sensor(settings.data.sensor).nadir,
                ),
                share,
            )
            for crops, share in settings.crop_choices()
        ]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_student(settings: TrainSettings) -> Backbone:
    """The network that is trained, with its initial weights.

    Raises:
        ConfigError: a ConvNeXt, with settings that only a vision transformer can follow.
        UnknownNameError: no such variant.
    """
    model = settings.model
    config = VARIANTS.get(model.variant)
    if isinstance(config, ConvNextConfig):
        if model.patch_size != config.stride:
            raise ConfigError(
                f"{model.variant} has a stride of {config.stride}, not {model.patch_size}; set "
                f"model.patch_size to {config.stride}"
            )
        if settings.masks.probability > 0:
            raise ConfigError(
                f"{model.variant} cannot see masked patches; set masks.probability to 0, which leaves DINO "
                "and KoLeo, or distil it from a vision transformer (configs/distill)"
            )
    return build_backbone(
        model.variant,
        in_channels=len(network_bands(settings.data)),
        patch_size=model.patch_size,
        drop_path=model.drop_path,
        layer_scale=model.layer_scale,
        num_registers=model.num_registers,
        filters=load_filters(model.filters, settings),
    )


def load_filters(path: Path | None, settings: RunSettings) -> FilterBank | None:
    """The bank that becomes a patch embedding, if any.

    Raises:
        UserError: it cannot be loaded, is none, or was fitted to other bands or statistics than the run's.
    """
    if path is None:
        return None
    check_filter_precision(settings)
    with torch.device("cpu"):  # also where the network is only counted, on the meta device
        bank = load_backbone(path)
    if not isinstance(bank, FilterBank) or bank.card is None:
        raise ConfigError(f"{path} is no filter bank; name the output folder of `dinov3geo filters`")
    own, run = bank.card.normalization, run_normalization(settings)
    if own != run:
        raise ConfigError(
            f"the filters {path} were fitted to other bands or statistics ({', '.join(own.bands)}) than "
            f"data.sensor {settings.data.sensor!r} gives ({', '.join(run.bands)}); use one sensor for both"
        )
    return bank


def check_filter_precision(settings: RunSettings) -> None:
    """Filters stay in float32, which sharded weights in bfloat16 do not.

    Raises:
        ConfigError: such a run.
    """
    if settings.precision == "bfloat16" and settings.parallel.layout == "shard":
        raise ConfigError(
            "filters need float32, which parallel.layout: shard with precision: bfloat16 does not keep; use "
            "precision: float32 or another layout"
        )


def build_recipe(settings: TrainSettings, *, group: dist.ProcessGroup | None = None) -> SelfSupervisedRecipe:
    """Student, teacher and anchor with the run's initial weights, the same in every process.

    Args:
        settings: of the run.
        group: processes that share Sinkhorn-Knopp and KoLeo.

    Raises:
        ConfigError: the anchor does not fit the run.
        UnknownNameError: no such variant or weights.
    """
    torch.manual_seed(settings.seed)
    backbone = build_student(settings)
    anchor = load_anchor(settings, backbone)
    return SelfSupervisedRecipe(backbone, settings.losses, settings.gram, anchor=anchor, group=group)


def load_anchor(settings: TrainSettings, backbone: Backbone) -> VisionTransformer | None:
    """The frozen backbone of Gram anchoring, or None if the run has none of its own.

    Raises:
        UserError: it cannot be loaded, or does not fit the run.
    """
    gram = settings.gram
    if gram.from_teacher and (gram.anchor is not None or gram.refresh_every is not None):
        raise ConfigError(
            "gram.from_teacher takes the EMA teacher of the moment; leave out gram.anchor and "
            "gram.refresh_every"
        )
    if gram.anchor is None:
        _refuse_gram_without_anchor(settings)
        return None
    anchor = (
        load_teacher_backbone(gram.anchor)[0] if is_checkpoint(gram.anchor) else load_backbone(gram.anchor)
    )
    if not isinstance(anchor, VisionTransformer):
        raise ConfigError(
            f"gram.anchor {gram.anchor} is no vision transformer; its patches have another grid"
        )
    variant, normalization = _identity(gram.anchor, anchor)
    if normalization != run_normalization(settings):
        raise ConfigError(
            f"gram.anchor {gram.anchor} was trained on other bands or statistics "
            f"({', '.join(normalization.bands)}) than data.sensor {settings.data.sensor!r} gives"
        )
    if gram.refresh_every is not None and variant != settings.model.variant:
        raise ConfigError(
            f"gram.refresh_every puts the teacher ({settings.model.variant}) in the place of gram.anchor "
            f"({variant}); both must be of one variant and width"
        )
    if anchor.in_channels != backbone.in_channels or anchor.patch_size != backbone.patch_size:
        raise ConfigError(
            f"gram.anchor {gram.anchor} has {anchor.in_channels} bands and patch "
            f"{anchor.patch_size}; the run has {backbone.in_channels} bands and patch {backbone.patch_size}"
        )
    return anchor


def _refuse_gram_without_anchor(settings: TrainSettings) -> None:
    if settings.gram.from_teacher:
        return
    if settings.crops.gram_size is not None or any(c.gram_size is not None for c in settings.resolutions):
        raise ConfigError(
            "crops.gram_size is set but gram.anchor is not; name the anchor's weights, run folder or "
            "checkpoint, or set gram.from_teacher"
        )


def load_teacher_backbone(path: Path) -> tuple[Backbone, Normalization]:
    """The EMA teacher's backbone of a pretraining run's checkpoint, and what it was trained with.

    Raises:
        DataError: the checkpoint is of another kind of run, or not whole.
    """
    settings = settings_of(read_state(path), path)
    backbone = build_student(settings)
    tensors = read_networks(path, "teacher.backbone.")
    check_complete(backbone.state_dict(), tensors, source=path)
    backbone.load_state_dict(tensors)
    return backbone.eval().requires_grad_(False), run_normalization(settings)


def _identity(path: Path, backbone: Backbone) -> tuple[str, Normalization]:
    """Variant and input statistics, from the card or from the settings of the checkpoint's run."""
    if backbone.card is not None:
        return backbone.card.variant, backbone.card.normalization
    settings = settings_of(read_state(path), path)
    return settings.model.variant, run_normalization(settings)
