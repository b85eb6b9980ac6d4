"""What a run would do, without doing it."""

from __future__ import annotations

from pathlib import Path

import torch

from dinov3geo.backbones.device import resolve_device
from dinov3geo.backbones.variants import build_vit
from dinov3geo.data.image_folder import ImageFolder
from dinov3geo.data.mixture import check_bands, network_bands, open_sources
from dinov3geo.training.checkpoint import locate_checkpoint
from dinov3geo.training.projection import ProjectionHead
from dinov3geo.training.settings import TrainSettings
from dinov3geo.training.trainer import build_crop_maker, check_out, load_anchor

# Saved per token, block and channel for the backward pass: two norms, q, k, v, attention output and
# projection, four times the width before and after GELU, two scaled branches.
_SAVED_PER_CHANNEL = 2 + 3 + 2 + 8 + 2


def describe(
    settings: TrainSettings, out: Path | None = None, *, resume: bool = False
) -> list[tuple[str, str]]:
    """Lines of a dry run: data found, model size, memory estimate, steps.

    Args:
        settings: of the run.
        out: its folder, or None to leave it unchecked.
        resume: whether the run would go on from a checkpoint in `out`.

    Raises:
        UserError: anything that would stop the run before its first step.
    """
    device = resolve_device(settings.device)
    lines = [("device", str(device)), ("precision", settings.precision)]
    if out is not None:
        check_out(out, resume=resume)
    if settings.start_from is not None:
        locate_checkpoint(settings.start_from)
    build_crop_maker(settings)
    datasets = open_sources(settings.data)
    check_bands(datasets, settings.data)
    with torch.device("meta"):
        student = build_vit(
            settings.model.variant,
            in_channels=len(network_bands(settings.data)),
            patch_size=settings.model.patch_size,
        )
    load_anchor(settings, student)
    for source, dataset in zip(settings.data.sources, datasets, strict=True):
        noun = "images" if isinstance(dataset, ImageFolder) else "scenes"
        lines.append((f"data {source.path}", f"{len(dataset):,} {noun}"))
    lines.append(("bands", ", ".join(network_bands(settings.data))))
    backbone, heads = count_parameters(settings)
    tokens = tokens_per_image(settings)
    lines += [
        ("backbone", f"{settings.model.variant}, {backbone / 1e6:.1f} M parameters"),
        ("heads", f"{heads / 1e6:.1f} M parameters"),
        ("tokens per image", f"{tokens} with gradient"),
        (
            "memory estimate",
            f"{memory_bytes(settings) / 2**30:.1f} GiB for weights, optimiser and activations",
        ),
        (
            "steps",
            f"{settings.steps:,} of {settings.batch_size} images = {settings.steps * settings.batch_size:,}",
        ),
    ]
    return lines


def count_parameters(settings: TrainSettings) -> tuple[int, int]:
    """Parameters of the backbone and of both heads, counted on the meta device."""
    with torch.device("meta"):
        backbone = build_vit(
            settings.model.variant,
            in_channels=len(network_bands(settings.data)),
            patch_size=settings.model.patch_size,
        )
        heads = [
            ProjectionHead(backbone.embed_dim, settings.losses.dino_head),
            ProjectionHead(backbone.embed_dim, settings.losses.ibot_head),
        ]
    return _size(backbone), sum(_size(head) for head in heads)


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tokens_per_image(settings: TrainSettings) -> int:
    """Tokens that the student processes for one image: two global crops and the local ones."""
    crops, patch = settings.crops, settings.model.patch_size
    with torch.device("meta"):
        prefix = build_vit(settings.model.variant).num_prefix
    per_global = (crops.global_size // patch) ** 2 + prefix
    per_local = (crops.local_size // patch) ** 2 + prefix
    return 2 * per_global + crops.local_count * per_local


def memory_bytes(settings: TrainSettings) -> int:
    """Estimate of the memory that a step needs on the device.

    Weights, gradients and two AdamW moments of the student, weights of the teacher (and the anchor),
    saved activations of the student, and the logits over prototypes with their gradients.
    """
    with torch.device("meta"):
        backbone = build_vit(settings.model.variant)
    trained = sum(count_parameters(settings))
    frozen = trained + (0 if settings.gram.anchor is None else _size(backbone))
    width = 2 if settings.precision == "bfloat16" else 4
    batch = settings.batch_size
    saved = batch * tokens_per_image(settings) * backbone.num_blocks * backbone.embed_dim * _SAVED_PER_CHANNEL
    per_crop = (settings.crops.global_size // settings.model.patch_size) ** 2
    masked = 2 * batch * per_crop * settings.masks.probability * sum(settings.masks.ratio) / 2
    rows = {
        settings.losses.dino_head.prototypes: (4 + settings.crops.local_count) * batch,
        settings.losses.ibot_head.prototypes: 2 * masked,
    }
    logits = sum(3 * count * prototypes for prototypes, count in rows.items())
    return int(4 * (4 * trained + frozen) + width * saved + 4 * logits)
