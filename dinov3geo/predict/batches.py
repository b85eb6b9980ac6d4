"""How many tiles a forward pass takes."""

from __future__ import annotations

import torch

from dinov3geo.backbones.base import Backbone

CPU_BATCH = 4
"""On a CPU the cores are busy with few tiles, and more only take memory."""
LARGEST = 64
_SHARE = 0.5
# Copies of a block's tokens and of the tile that live at once, in float32. ViT-S takes 30 MiB for a tile of
# 512 pixels, 19 times its tokens; a head works on some blocks of tokens and on maps of the tile's size.
_COPIES_OF_TOKENS = 40
_COPIES_OF_PIXELS = 64


def batch_that_fits(backbone: Backbone, tile: int, *, image_scale: float = 1.0) -> int:
    """Tiles per forward pass when the user names no number: a power of two.

    It depends on the device's whole memory, not on what is free at the moment: a map's last bits depend on
    the batches, so a run that is taken up again should choose the same. Where it is too many after all,
    `runners.InParts` divides it.

    Args:
        backbone: on the device to compute on.
        tile: side in pixels of the scene.
        image_scale: tiles are made this many times larger before the backbone sees them.
    """
    device = next(backbone.parameters()).device
    if device.type != "cuda":
        return CPU_BATCH
    memory = torch.cuda.get_device_properties(device).total_memory
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    return fitting_batch(memory - weights, tile_bytes(backbone, round(tile * image_scale)))


def tile_bytes(backbone: Backbone, side: int) -> int:
    """Estimated bytes that a tile of `side` pixels takes on the way through backbone and head."""
    tokens = (-(-side // backbone.patch_size)) ** 2
    return 4 * (_COPIES_OF_TOKENS * tokens * backbone.embed_dim + _COPIES_OF_PIXELS * side**2)


def fitting_batch(memory: int, of_tile: int) -> int:
    """The largest power of two, at most `LARGEST`, of tiles that fill half of so many bytes; at least one."""
    count = max(int(memory * _SHARE / of_tile), 1)
    return min(1 << (count.bit_length() - 1), LARGEST)
