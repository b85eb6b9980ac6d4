"""How many parameters a run has, and how much memory it needs."""

from __future__ import annotations

import os

import torch

from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.data.crops import CropSettings
from dinov3geo.errors import ConfigError
from dinov3geo.training.projection import ProjectionHead
from dinov3geo.training.settings import TrainSettings
from dinov3geo.training.setup import build_student

# Saved per token, block and channel for the backward pass: two norms, q, k, v, attention output and
# projection, four times the width before and after GELU, two scaled branches.
_SAVED_PER_CHANNEL = 2 + 3 + 2 + 8 + 2
# The same where only matrix products and attention are kept, and where only a block's input is.
_SAVED = {"none": _SAVED_PER_CHANNEL, "selective": 3 + 2 + 4 + 1, "full": 1}


def count_parameters(settings: TrainSettings) -> tuple[int, int]:
    """Parameters of the backbone and of both heads, counted on the meta device."""
    with torch.device("meta"):
        backbone = build_student(settings)
        heads = [
            ProjectionHead(backbone.embed_dim, settings.losses.dino_head),
            ProjectionHead(backbone.embed_dim, settings.losses.ibot_head),
        ]
    return size_of(backbone), sum(size_of(head) for head in heads)


def size_of(module: torch.nn.Module) -> int:
    """Numbers in the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def tokens_per_image(settings: TrainSettings, crops: CropSettings | None = None) -> int:
    """Tokens that the student processes for one image: two global crops and the local ones."""
    crops, patch = crops or settings.crops, settings.model.patch_size
    with torch.device("meta"):
        backbone = build_student(settings)
    prefix = backbone.num_prefix if isinstance(backbone, VisionTransformer) else 0
    per_global = (crops.global_size // patch) ** 2 + prefix
    per_local = (crops.local_size // patch) ** 2 + prefix
    return 2 * per_global + crops.local_count * per_local


def memory_bytes(settings: TrainSettings, ranks: int = 1) -> int:
    """Estimate of the memory that a step needs on each device.

    What must be there in any case, see `least_memory_bytes`; saved activations of the student for the largest
    crops; the student's gradients of the scores over prototypes.
    """
    with torch.device("meta"):
        backbone = build_student(settings)
    width = 2 if settings.precision == "bfloat16" else 4
    part = settings.batch_size // ranks // settings.accumulate
    tokens = max(tokens_per_image(settings, crops) for crops, _ in settings.crop_choices())
    kept = _SAVED[settings.parallel.recompute]
    saved = width * part * tokens * backbone.num_blocks * backbone.embed_dim * kept
    dino, ibot = settings.losses.dino_head.prototypes, settings.losses.ibot_head.prototypes
    rows = 2 * masked_patches(settings)
    gradients = width * part * ((2 + settings.crops.local_count) * dino + rows * ibot)
    return int(least_memory_bytes(settings, ranks) + saved + gradients)


def least_memory_bytes(settings: TrainSettings, ranks: int = 1) -> int:
    """Memory without which no step can be made, whatever is computed again or in parts.

    Weights, gradients and two AdamW moments of the student, weights of the teacher (and the anchor), all
    divided by the processes if they are sharded; the teacher's targets over the prototypes.
    """
    with torch.device("meta"):
        backbone = build_student(settings)
    trained = sum(count_parameters(settings))
    frozen = trained + (0 if settings.gram.anchor is None else size_of(backbone))
    weights = 4 * (4 * trained + frozen)
    if settings.parallel.layout == "shard" and ranks > 1:
        # Gathered at one time: a block and the next one, and the heads, with their gradients.
        whole = 2 * size_of(backbone) // backbone.num_blocks + count_parameters(settings)[1]
        width = 2 if settings.precision == "bfloat16" else 4
        weights = weights // ranks + 2 * width * whole
    dino, ibot = settings.losses.dino_head.prototypes, settings.losses.ibot_head.prototypes
    targets = 4 * 2 * (settings.batch_size // ranks) * (dino + masked_patches(settings) * ibot)
    return int(weights + targets)


def masked_patches(settings: TrainSettings) -> float:
    """Masked patches of a global crop, in the mean."""
    side = max(crops.global_size for crops, _ in settings.crop_choices()) // settings.model.patch_size
    return side**2 * settings.masks.probability * sum(settings.masks.ratio) / 2


def device_memory_bytes(device: torch.device) -> int | None:
    """Memory of a GPU, or of the machine for the CPU; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None


def check_memory(settings: TrainSettings, device: torch.device, ranks: int = 1) -> None:
    """Refuses a run that cannot make a step, before anything is built.

    Raises:
        ConfigError: says what takes the memory and what to change.
    """
    there, needed = device_memory_bytes(device), least_memory_bytes(settings, ranks)
    if there is None or needed <= there:
        return
    backbone, heads = (count / 1e6 for count in count_parameters(settings))
    dino, ibot = settings.losses.dino_head.prototypes, settings.losses.ibot_head.prototypes
    raise ConfigError(
        f"a step needs at least {needed / 2**30:,.1f} GiB but {device} has {there / 2**30:,.1f} GiB: heads "
        f"with {dino:,} and {ibot:,} prototypes are {heads:,.1f} M parameters, the backbone "
        f"{backbone:,.1f} M; lower losses.dino_head.prototypes, losses.ibot_head.prototypes, batch_size or "
        "model.variant, or shard over more processes (parallel.layout: shard)"
    )
