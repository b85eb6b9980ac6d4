"""The canopy-height decoder of CHMv2, for its released weights.

Source: CHMv2 (mixed log-linear bins, readout of the CLS token); Ranftl et al. 2021 (DPT). The arithmetic
follows the port in transformers, which the tests compare it with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import NORMALIZATIONS, BackboneCard
from dinov3geo.backbones.convert import to_ours
from dinov3geo.backbones.features import Features
from dinov3geo.backbones.keymaps import Pair, Renaming
from dinov3geo.backbones.store import HF_CONFIG, read_json, read_weights
from dinov3geo.backbones.variants import build_network, variant_of
from dinov3geo.backbones.zoo import check_complete, load_backbone, with_hf_settings
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.heads.base import Head, OutputSpec
from dinov3geo.heads.dpt import ResidualUnit
from dinov3geo.heads.frozen import FrozenModel

CANOPY_HEIGHT = OutputSpec("canopy_height", unit="m", minimum=0.0, maximum=96.0)
BLOCKS = (5, 11, 17, 23)
# Of the images it was trained on: Maxar Vivid2 and NAIP.
GSD_M = (0.597, 0.6)
_MINIMUM, _MAXIMUM = 1e-3, 96.0
# The released bins are those of an eighth of the range, and what they expect is multiplied by 8.
_RANGE_FACTOR = 8.0
_FACTORS = (4.0, 2.0, 1.0, 0.5)

_BACKBONE_CONFIG = "backbone_config"

_UNITS = ("first", "second")
_HF_PAIRS: tuple[Pair, ...] = (
    ("levels.{i}.readout.{x}", "reassemble_stage.readout_projects.{i}.0.{x}"),
    ("levels.{i}.project.{x}", "reassemble_stage.layers.{i}.projection.{x}"),
    ("levels.{i}.resample.{x}", "reassemble_stage.layers.{i}.resize.{x}"),
    ("levels.{i}.mix.weight", "convs.{i}.weight"),
    ("fusions.{i}.project.{x}", "fusion_layers.{i}.projection.{x}"),
    *(
        (f"fusions.{{i}}.{ours}.{unit}.{{x}}", f"fusion_layers.{{i}}.{theirs}.convolution{k}.{{x}}")
        for ours, theirs in (("lateral", "residual_layer1"), ("refine", "residual_layer2"))
        for k, unit in enumerate(_UNITS, start=1)
    ),
    ("decode.{i}.{x}", "conv_depth.head.{i}.{x}"),
)
_OFFICIAL_PAIRS: tuple[Pair, ...] = (
    ("levels.{i}.readout.{x}", "reassemble_blocks.readout_projects.{i}.0.{x}"),
    ("levels.{i}.project.{x}", "reassemble_blocks.projects.{i}.conv.{x}"),
    ("levels.{i}.resample.{x}", "reassemble_blocks.resize_layers.{i}.{x}"),
    ("levels.{i}.mix.weight", "convs.{i}.conv.weight"),
    ("fusions.{i}.project.{x}", "fusion_blocks.{i}.project.conv.{x}"),
    *(
        (f"fusions.{{i}}.{ours}.{unit}.{{x}}", f"fusion_blocks.{{i}}.{theirs}.conv{k}.conv.{{x}}")
        for ours, theirs in (("lateral", "res_conv_unit1"), ("refine", "res_conv_unit2"))
        for k, unit in enumerate(_UNITS, start=1)
    ),
    ("decode.{i}.{x}", "conv_depth.head.{i}.{x}"),
)


@dataclass(frozen=True, slots=True)
class Chmv2Shape:
    """Widths of the decoder.

    Attributes:
        dim: width D of the backbone.
        levels: width of each level of the pyramid, fine to coarse.
        channels: width of the fusion.
        hidden: width before the scores.
        bins: number of height bins.
        has_projection: whether a 1 x 1 convolution follows each fusion.
    """

    dim: int = 1024
    levels: tuple[int, ...] = (128, 256, 512, 1024)
    channels: int = 256
    hidden: int = 128
    bins: int = 256
    has_projection: bool = True


class _Level(nn.Module):
    """Patch features with CLS, [B, 2D, h, w], as one level of the pyramid, [B, C, s * h, s * w]."""

    def __init__(self, shape: Chmv2Shape, width: int, factor: float) -> None:
        super().__init__()
        self.readout = nn.Linear(2 * shape.dim, shape.dim)
        self.project = nn.Conv2d(shape.dim, width, 1)
        if factor > 1:
            self.resample: nn.Module = nn.ConvTranspose2d(width, width, int(factor), int(factor))
        elif factor == 1:
            self.resample = nn.Identity()
        else:
            self.resample = nn.Conv2d(width, width, 3, stride=int(1 / factor), padding=1)
        self.mix = nn.Conv2d(width, shape.channels, 3, padding=1, bias=False)

    def forward(self, feature_map: Tensor) -> Tensor:
        read = F.gelu(self.readout(feature_map.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        output: Tensor = self.mix(self.resample(self.project(read)))
        return output


class _Fusion(nn.Module):
    """Adds a level to the coarser result, refines the sum and doubles its resolution."""

    def __init__(self, shape: Chmv2Shape, *, has_coarser: bool) -> None:
        super().__init__()
        self.lateral = ResidualUnit(shape.channels) if has_coarser else None
        self.refine = ResidualUnit(shape.channels)
        width = shape.channels
        self.project = nn.Conv2d(width, width, 1) if shape.has_projection else nn.Identity()

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        fused = level
        if self.lateral is not None and coarser is not None:
            if level.shape != coarser.shape:
                level = F.interpolate(level, coarser.shape[-2:], mode="bilinear", align_corners=False)
            fused = coarser + self.lateral(level)
        doubled = F.interpolate(self.refine(fused), scale_factor=2, mode="bilinear", align_corners=True)
        output: Tensor = self.project(doubled)
        return output


def mixed_bins(count: int) -> Tensor:
    """Centres of the bins, [count], in eighths of a metre: logarithmic at the low end, linear at the high."""
    share = torch.linspace(1, 0, count)
    top = _MAXIMUM / _RANGE_FACTOR
    logarithmic = torch.exp(torch.linspace(math.log(_MINIMUM), math.log(top), count))
    return share * logarithmic + (1 - share) * torch.linspace(_MINIMUM, top, count)


class Chmv2Head(Head):
    """Decoder of CHMv2. Its maps hold the CLS vector of their block beside each patch (`maps_with_cls`)."""

    bins: Tensor

    def __init__(self, shape: Chmv2Shape | None = None) -> None:
        """Builds the decoder.

        Args:
            shape: widths; None for those of the released weights.
        """
        super().__init__()
        self.shape = shape = shape or Chmv2Shape()
        self.output = CANOPY_HEIGHT
        self.levels = nn.ModuleList(
            _Level(shape, width, factor) for width, factor in zip(shape.levels, _FACTORS, strict=True)
        )
        count = len(shape.levels)
        self.fusions = nn.ModuleList(_Fusion(shape, has_coarser=k > 0) for k in range(count))
        self.decode = nn.Sequential(
            nn.Conv2d(shape.channels, shape.channels // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(shape.channels // 2, shape.hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(shape.hidden, shape.bins, 1),
        )
        self.register_buffer("bins", mixed_bins(shape.bins), persistent=False)

    def forward(self, feature_maps: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        """Predicts heights.

        Args:
            feature_maps: [B, 2D, h, w] of four blocks, early blocks first.
            size_hw: rows and columns that the maps cover, in pixels.

        Returns:
            [B, 1, H, W] metres.
        """
        fused: Tensor | None = None
        # Fusions are numbered from coarse to fine, levels from fine to coarse.
        maps = [level(m) for level, m in zip(self.levels, feature_maps, strict=True)]
        for fusion, level in zip(self.fusions, reversed(maps), strict=True):
            fused = fusion(level, fused)
        assert fused is not None
        scores = F.relu(self.decode(fused)) + 1e-8
        expected = torch.einsum("bkhw,k->bhw", scores, self.bins) / scores.sum(1)
        heights = expected[:, None] * _RANGE_FACTOR
        if heights.shape[-2:] != torch.Size(size_hw):
            # An odd number of patches leaves a map that is a little too large.
            heights = F.interpolate(heights, size_hw, mode="bilinear", align_corners=True)
        return heights


def maps_with_cls(features: Sequence[Features]) -> list[Tensor]:
    """Patch maps with the CLS vector of their image behind each patch's own, [B, 2D, h, w] each."""
    maps = []
    for block in features:
        patches = block.map()
        cls = block.cls[:, :, None, None].expand_as(patches)
        maps.append(torch.cat([patches, cls], dim=1))
    return maps


@dataclass
class Chmv2Model(FrozenModel[Chmv2Head]):
    """Backbone with CHMv2's normalisation and decoder; predicts like `heads.canopy.CanopyModel`.

    Attributes:
        blocks: numbers of the backbone's blocks that the head reads.
        card: what is known of the model.
    """

    blocks: tuple[int, ...] = BLOCKS
    card: dict[str, Any] = field(default_factory=dict)

    def predict(self, numbers: Tensor, valid: Tensor | None = None) -> Tensor:
        """Heights of each pixel.

        Args:
            numbers: [B, C, H, W] as the file holds them, on the model's device.
            valid: [B, H, W] bool, or None if all pixels hold data.

        Returns:
            [B, 1, H, W] float32 metres.

        Raises:
            DataError: another number of bands than the backbone takes.
        """
        if numbers.shape[1] != self.backbone.in_channels or self.backbone.card is None:
            raise DataError(
                f"the model takes {self.backbone.in_channels} bands, but the image has {numbers.shape[1]}"
            )
        height, width = numbers.shape[-2:]
        down, right = (-height) % self.backbone.patch_size, (-width) % self.backbone.patch_size
        top, left = down // 2, right // 2
        with torch.no_grad():
            images = self.backbone.card.normalization(numbers, valid)
            # The released model was used with zeros around the image, and the image in the middle.
            images = F.pad(images, (left, right - left, top, down - top))
            maps = maps_with_cls(self.backbone.intermediate(images, self.blocks))
            heights: Tensor = self.head(maps, (images.shape[-2], images.shape[-1]))
        heights = heights[..., top : top + height, left : left + width]
        return heights.clamp(self.output.minimum, self.output.maximum)


def load_chmv2(path: Path, *, backbone: str | Path | None = None) -> Chmv2Model:
    """The released canopy-height model.

    Args:
        path: a Hugging Face folder (or its .safetensors file), or an official file: of the decoder alone,
            or of decoder and backbone.
        backbone: weights of the satellite ViT-L, where the file holds none.

    Raises:
        ConfigError: the file holds no backbone and none is named, or both; a setting that this decoder lacks.
        DataError: tensors are missing, left over or of another shape; all are listed.
        UnknownNameError: the backbone is not there.
    """
    head, inner = _read_parts(path)
    if inner and backbone is not None:
        raise ConfigError(f"{path} holds its own backbone; leave {backbone} out")
    if inner:
        network = _inner_backbone(inner, path)
    elif backbone is None:
        raise ConfigError(
            f"{path} holds the decoder only; name the weights of the satellite ViT-L too (--backbone)"
        )
    else:
        network = load_backbone(backbone, normalization="chmv2")
    if network.embed_dim != head.shape.dim:
        raise DataError(f"the decoder reads width {head.shape.dim}, the backbone has {network.embed_dim}")
    blocks = _blocks(path, network.num_blocks)
    assert network.card is not None
    card = _card(path, head) | {
        "backbone": {"name": network.card.name, "variant": network.card.variant},
        "blocks": list(blocks),
    }
    return Chmv2Model(network, head, blocks, card)


def describe_chmv2(path: Path) -> dict[str, Any]:
    """The card of the released model, once every tensor has found its place; errors as in `load_chmv2`."""
    head, inner = _read_parts(path)
    return load_chmv2(path).card if inner else _card(path, head) | {"backbone": "to be named beside it"}


def _read_parts(path: Path) -> tuple[Chmv2Head, dict[str, Tensor]]:
    """The decoder, and the tensors of the backbone beside it, if any."""
    tensors = read_weights(path)
    inner = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    outer = {n.removeprefix("head."): t for n, t in tensors.items() if not n.startswith("backbone.")}
    return build_chmv2_head(outer, source=path), inner


def _card(path: Path, head: Chmv2Head) -> dict[str, Any]:
    return {
        "name": "CHMv2",
        "source": path.name,
        "decoder": dataclasses.asdict(head.shape),
        "output": dataclasses.asdict(head.output),
        "gsd_m": list(GSD_M),
    }


def build_chmv2_head(tensors: Mapping[str, Tensor], *, source: Path) -> Chmv2Head:
    """The decoder from its tensors in either naming, without the prefix `head.`.

    Raises:
        DataError: tensors are missing, left over or of another shape.
    """
    official = any(name.startswith("reassemble_blocks.") for name in tensors)
    rename = Renaming(_OFFICIAL_PAIRS if official else _HF_PAIRS, to_ours=True)
    renamed = {name: rename(name) for name in tensors}
    unknown = sorted(name for name, found in renamed.items() if found is None)
    if unknown:
        raise DataError(
            f"{source} holds {len(unknown)} tensors that are not CHMv2's: {', '.join(unknown[:4])}"
        )
    ours = {found: tensors[name].float() for name, found in renamed.items() if found is not None}
    head = Chmv2Head(_describe(ours, source))
    check_complete(head.state_dict(), ours, source=source)
    head.load_state_dict(ours)
    return head.eval().requires_grad_(False)


def _describe(ours: Mapping[str, Tensor], source: Path) -> Chmv2Shape:
    try:
        return Chmv2Shape(
            dim=ours["levels.0.project.weight"].shape[1],
            levels=tuple(ours[f"levels.{k}.project.weight"].shape[0] for k in range(len(_FACTORS))),
            channels=ours["decode.0.weight"].shape[1],
            hidden=ours["decode.4.weight"].shape[1],
            bins=ours["decode.4.weight"].shape[0],
            has_projection="fusions.0.project.weight" in ours,
        )
    except (KeyError, IndexError) as error:
        raise DataError(f"{source} is not a whole CHMv2 decoder: no usable tensor {error}") from error


def _inner_backbone(inner: dict[str, Tensor], path: Path) -> Backbone:
    checkpoint = to_ours(inner)
    config = with_hf_settings(path, checkpoint.config, section=_BACKBONE_CONFIG)
    variant = variant_of(config)
    network = build_network(config)
    check_complete(network.state_dict(), checkpoint.tensors, source=path)
    network.load_state_dict({name: tensor.float() for name, tensor in checkpoint.tensors.items()})
    network.card = BackboneCard(
        name=path.stem,
        variant=variant,
        patch_size=network.patch_size,
        normalization=NORMALIZATIONS["chmv2"],
        notes="Backbone of CHMv2.",
    )
    return network.eval().requires_grad_(False)


def _blocks(path: Path, num_blocks: int) -> tuple[int, ...]:
    """Numbers of the blocks that are read: those of the configuration, else the released ones."""
    fields = read_json(path / HF_CONFIG) if (path / HF_CONFIG).is_file() else {}
    for name, wanted in (("bins_strategy", "chmv2_mixlog"), ("norm_strategy", "chmv2_mixlog")):
        if fields.get(name, wanted) != wanted:
            raise ConfigError(f"{path / HF_CONFIG} has {name} {fields[name]!r}; only {wanted!r} is read")
    stages = (fields.get(_BACKBONE_CONFIG) or {}).get("out_indices")
    if stages is not None and not (isinstance(stages, list) and all(type(s) is int for s in stages)):
        raise DataError(f"{path / HF_CONFIG} has out_indices {stages!r}, expected four numbers of blocks")
    # Theirs count the outputs of blocks from 1.
    blocks = BLOCKS if stages is None else tuple(stage - 1 for stage in stages)
    if len(blocks) != len(_FACTORS) or min(blocks) < 0 or max(blocks) >= num_blocks:
        raise DataError(f"the decoder reads blocks {blocks}, the backbone has {num_blocks}")
    return blocks
