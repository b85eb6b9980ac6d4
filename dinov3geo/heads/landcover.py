"""Land cover: a frozen backbone and a fitted head for classes, with the card that travels with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import BackboneCard
from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone
from dinov3geo.data.labels import ClassScheme, load_label_pair
from dinov3geo.data.pairs import PairArrays, PairMatch, RasterPair, Spec, match_pairs
from dinov3geo.errors import ConfigError, DataError, one_line
from dinov3geo.features.extract import FeatureCache, default_blocks
from dinov3geo.heads.base import Head, OutputSpec
from dinov3geo.heads.canopy_report import gsd_range
from dinov3geo.heads.classes import ClassFitSettings, ClassObjective, loss_weights
from dinov3geo.heads.curves import CURVE_FILE, draw_curves
from dinov3geo.heads.dpt import DPTHead
from dinov3geo.heads.fit import FitResult, FitSample, fit_head, predict_cells
from dinov3geo.heads.folders import (
    check_free,
    find_model,
    load_head_weights,
    model_card,
    open_model,
    save_model,
)
from dinov3geo.heads.frozen import FrozenModel, head_map
from dinov3geo.heads.samples import StageProgress, build_samples
from dinov3geo.heads.segmentation import BatchNormHead, LinearHead, UPerNetHead
from dinov3geo.rasters.bands import choose_bands

PRODUCT = "land_cover"
DEFAULT_MODEL = "landcover-tiny-satellite"
BUNDLED_MODELS = (DEFAULT_MODEL,)
HEAD_KINDS = ("linear", "batchnorm", "upernet", "dpt")
ClassHead = LinearHead | BatchNormHead | UPerNetHead | DPTHead


class ClassHeadSettings(BaseModel):
    """Kind and shape of a head for classes.

    Attributes:
        kind: `"linear"`, `"batchnorm"` (batch norm and 1 x 1 convolution), `"upernet"` or `"dpt"`.
        channels: width of the pyramid of UPerNet and DPT.
        finest: its finest level in units of the patch grid.
        dropout: share of channels silenced in training (not in a linear head).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear", "batchnorm", "upernet", "dpt"] = "linear"
    channels: int = Field(default=32, ge=8, multiple_of=8)
    finest: Literal[1, 2, 4] = 2
    dropout: float = Field(default=0.1, ge=0, lt=1)

    def build(self, dims: Sequence[int], *, output: OutputSpec) -> ClassHead:
        """A new head on feature maps of the given widths, with torch's global generator."""
        if self.kind == "linear":
            return LinearHead(dims, output=output)
        if self.kind == "batchnorm":
            return BatchNormHead(dims, output=output, dropout=self.dropout)
        if self.kind == "upernet":
            return UPerNetHead(
                dims, output=output, channels=self.channels, finest=self.finest, dropout=self.dropout
            )
        return DPTHead(dims, output=output, channels=self.channels, finest=self.finest, dropout=self.dropout)


class LandcoverSettings(BaseModel):
    """How a land-cover model is made.

    Attributes:
        image_scale: images are made this many times larger for the backbone, so that a patch covers less.
        num_maps: number of blocks whose features are taken, evenly spread over the depth.
        views: flips and turns of each image that the head is fitted on.
        max_window: images larger than this are cut, in training and (by default) in prediction, pixels.
        head: shape of the head.
        fit: how it is fitted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_scale: float = Field(default=1.0, gt=0)
    num_maps: int = Field(default=4, ge=1)
    views: Literal[1, 2, 4, 8] = 1
    max_window: int = Field(default=512, ge=1)
    head: ClassHeadSettings = ClassHeadSettings()
    fit: ClassFitSettings = ClassFitSettings()


@dataclass
class LandcoverModel(FrozenModel[ClassHead]):
    """Everything that turns an image into class probabilities (a `predict.runners.ClassModel`).

    Attributes:
        blocks: numbers of the backbone's blocks that the head reads.
        image_scale: images are made this many times larger for the backbone.
        card: what is known of the model.
    """

    blocks: tuple[int, ...]
    image_scale: float
    card: dict[str, Any]

    def predict(self, numbers: Tensor, valid: Tensor | None = None) -> Tensor:
        """Class probabilities of each pixel.

        Args:
            numbers: [B, C, H, W] as the file holds them, on the model's device.
            valid: [B, H, W] bool, or None if all pixels hold data.

        Returns:
            [B, K, H, W] that sum to 1; where `valid` is false they mean nothing.

        Raises:
            DataError: another number of bands than the backbone takes.
        """
        scores = head_map(self, numbers, valid, blocks=self.blocks, image_scale=self.image_scale)
        return scores.float().softmax(dim=1)


@dataclass(frozen=True, slots=True)
class LandcoverFitReport:
    """What `fit_landcover` did.

    Attributes:
        folder: of the model.
        pairs: number of image windows with labels.
        counts: labelled pixels of each class.
        unmatched_images: images without a mask.
        unmatched_masks: masks without an image.
        result: of the fit.
    """

    folder: Path
    pairs: int
    counts: dict[str, int]
    unmatched_images: int
    unmatched_masks: int
    result: FitResult


def land_cover(scheme: ClassScheme) -> OutputSpec:
    """The output of a head for a scheme."""
    return OutputSpec(PRODUCT, class_names=scheme.names, colours=scheme.colours, dtype="uint8", nodata=255.0)


def fit_landcover(
    images: Spec,
    masks: Spec,
    scheme: ClassScheme,
    *,
    out: Path,
    backbone: str | Path | None = None,
    settings: LandcoverSettings | None = None,
    overwrite: bool = False,
    cache: FeatureCache | None = None,
    command: str = "",
    progress: StageProgress | None = None,
) -> LandcoverFitReport:
    """Fits a head on pairs of images and masks of classes and saves the model.

    A fit that was cut off goes on where it was when it is asked for again.

    Args:
        images: folder, glob, file or list of them.
        masks: likewise; matched to the images by georeference.
        scheme: what the masks' numbers mean.
        out: folder of the model.
        backbone: name or path, or None for the bundled one.
        settings: how; None for the defaults.
        overwrite: replace an existing folder.
        cache: of features, or None to keep none.
        command: that was typed, for the card.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        UserError: a file, name or number that cannot be used; nothing is written then.
    """
    settings = settings or LandcoverSettings()
    check_settings(settings)
    check_free(out, what="land-cover", overwrite=overwrite)
    source = DEFAULT_BACKBONE if backbone is None else backbone
    frozen = load_backbone(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = match_masks(images, masks, settings)
    blocks = default_blocks(frozen.num_blocks, settings.num_maps)
    check_labels(match, scheme, frozen)
    samples = label_samples(match, scheme, frozen.to(device), settings, cache=cache, progress=progress)
    counts = count_classes(samples, scheme)
    head, result = fit_class_head(
        samples,
        scheme,
        settings,
        device=device,
        progress=progress,
        state_file=out.with_name(f".{out.name}.fit"),
    )
    card = model_card(frozen, source, land_cover(scheme)) | {
        "name": out.name,
        "blocks": list(blocks),
        "gsd_m": list(gsd_range(match.pairs)),
        "classes": scheme.model_dump(),
        "trained_on": {
            "pairs": len(match.pairs),
            "images": len({p.image for p in match.pairs}),
            "pixels": counts,
        },
        "settings": settings.model_dump(),
        "fit": {
            "epochs": len(result.losses),
            "best_epoch": result.best_epoch + 1,
            "validation_errors": [round(e, 5) for e in result.validation_errors],
            "losses": [round(x, 6) for x in result.losses],
        },
        "command": command,
    }
    pictures = {CURVE_FILE: draw_curves(result, error="1 - mIoU")}
    save_model(out, frozen, head, card, what="land-cover", overwrite=overwrite, pictures=pictures)
    return LandcoverFitReport(
        out, len(match.pairs), counts, len(match.unmatched_images), len(match.unmatched_targets), result
    )


def check_settings(settings: LandcoverSettings) -> None:
    """Refuses what cannot be fitted.

    Raises:
        ConfigError: L-BFGS for a head that is not linear.
    """
    if settings.fit.optimizer == "lbfgs" and settings.head.kind not in ("linear", "batchnorm"):
        raise ConfigError(
            f"fit.optimizer=lbfgs needs a linear problem, but head.kind is {settings.head.kind}; "
            "use head.kind=linear or batchnorm, or fit.optimizer=adamw"
        )


def match_masks(images: Spec, masks: Spec, settings: LandcoverSettings) -> PairMatch:
    """Images with masks of the same place; errors as in `match_pairs`."""
    return match_pairs(images, masks, max_size=settings.max_window, what="mask")


def load_class_pair(
    pair: RasterPair, scheme: ClassScheme, card: BackboneCard
) -> tuple[PairArrays, tuple[int, ...]]:
    """Reads a pair with the bands that a backbone takes; errors as in `load_label_pair`."""
    bands, _ = choose_bands(pair.image, card.normalization.bands, model=card.name)
    return load_label_pair(pair, scheme, bands=bands), bands


def check_labels(match: PairMatch, scheme: ClassScheme, backbone: Backbone) -> None:
    """Reads every mask before the backbone runs, which takes far longer.

    Raises:
        DataError: a number that no class names, no labelled pixel, or a class without any.
    """
    assert backbone.card is not None
    total = np.zeros(len(scheme.classes), dtype=np.int64)
    for pair in match.pairs:
        arrays, _ = load_class_pair(pair, scheme, backbone.card)
        total += np.bincount(arrays.target[arrays.target_valid], minlength=len(total))
    if not total.any():
        raise DataError(
            f"none of the {len(match.pairs)} masks holds a labelled pixel: all is ignored or nodata; "
            f"named are {scheme.describe()}"
        )
    empty = [c.name for c, n in zip(scheme.classes, total, strict=True) if n == 0]
    if empty:
        raise DataError(
            f"no mask holds a pixel of {', '.join(empty)}; take the class out of the scheme, "
            "or add masks that show it"
        )


def label_samples(
    match: PairMatch,
    scheme: ClassScheme,
    backbone: Backbone,
    settings: LandcoverSettings,
    *,
    cache: FeatureCache | None = None,
    progress: StageProgress | None = None,
) -> list[FitSample]:
    """Features and classes of each pair; see `build_samples`."""
    assert backbone.card is not None
    return build_samples(
        match.pairs,
        backbone,
        blocks=default_blocks(backbone.num_blocks, settings.num_maps),
        image_scale=settings.image_scale,
        views=settings.views,
        cache=cache or FeatureCache(None),
        load=partial(load_class_pair, scheme=scheme, card=backbone.card),
        progress=progress,
    )


def fit_class_head(
    samples: list[FitSample],
    scheme: ClassScheme,
    settings: LandcoverSettings,
    *,
    device: torch.device,
    progress: StageProgress | None = None,
    state_file: Path | None = None,
) -> tuple[ClassHead, FitResult]:
    """A new head, fitted on samples; errors as in `fit_head`."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.fit.seed)
        dims = [m.shape[0] for m in samples[0].views[0].maps]
        head = settings.head.build(dims, output=land_cover(scheme)).to(device)
    head.fit_statistics([s.views[0].maps for s in samples])
    counts = np.array(list(count_classes(samples, scheme).values()), dtype=np.int64)
    weights = loss_weights(counts, [c.weight for c in scheme.classes], settings.fit.class_weights)

    def report(done: int, total: int, loss: float) -> None:
        if progress is not None:
            progress(f"head (loss {loss:.3f})", done, total)

    result = fit_head(
        head,
        samples,
        ClassObjective(weights.tolist()),
        settings=settings.fit,
        progress=report,
        state_file=state_file,
    )
    return head, result


def count_classes(samples: Sequence[FitSample], scheme: ClassScheme) -> dict[str, int]:
    """Labelled pixels of each class."""
    total: NDArray[np.int64] = np.zeros(len(scheme.classes), dtype=np.int64)
    for sample in samples:
        view = sample.views[0]
        total += np.bincount(view.target[view.valid].numpy(), minlength=len(total))
    return dict(zip(scheme.names, total.tolist(), strict=True))


def predict_classes(head: Head, sample: FitSample) -> NDArray[np.uint8]:
    """The most probable class of each cell of a sample, [h, w]."""
    with torch.no_grad():
        chosen = predict_cells(head, [sample.views[0]], sample.factor)[0].argmax(0)
    return chosen.cpu().numpy().astype(np.uint8)


def load_landcover_model(name_or_folder: str | Path = DEFAULT_MODEL) -> LandcoverModel:
    """A bundled model, or one that `fit_landcover` wrote, ready to predict, on the CPU.

    Raises:
        UnknownNameError: neither a bundled name nor a folder.
        ConfigError: the card is missing, incomplete, or belongs to other backbone weights.
        DataError: the weights are damaged or do not fit.
    """
    folder = find_model(name_or_folder, BUNDLED_MODELS, what="land-cover", command="landcover fit")
    stored = open_model(folder, LandcoverSettings, product=PRODUCT)
    dims = [stored.backbone.embed_dim] * len(stored.blocks)
    head = stored.settings.head.build(dims, output=stored.output)
    load_head_weights(stored.folder, head)
    return LandcoverModel(stored.backbone, head, stored.blocks, stored.settings.image_scale, stored.card)


def scheme_of(model: LandcoverModel) -> ClassScheme:
    """The class scheme that a model was fitted with.

    Raises:
        ConfigError: the card holds none.
    """
    try:
        return ClassScheme.model_validate(model.card["classes"])
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"the model's card names no classes: {one_line(str(error))}") from error
