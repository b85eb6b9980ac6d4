"""Dense features of a frozen backbone, and their cache on disk."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.paths import user_cache_folder

NUM_VIEWS = 8


def default_blocks(num_blocks: int, count: int = 4) -> tuple[int, ...]:
    """Blocks evenly spread over the depth, the last one included.

    For 24 blocks this gives (5, 11, 17, 23), the choice of CHMv2.

    Args:
        num_blocks: depth of the backbone.
        count: how many to take; fewer if the backbone has fewer.

    Returns:
        Increasing 0-based block numbers.

    Raises:
        ConfigError: either number is below 1.
    """
    if num_blocks < 1 or count < 1:
        raise ConfigError(f"expected at least 1 block, got {count} of {num_blocks}")
    count = min(count, num_blocks)
    return tuple(round((i + 1) * num_blocks / count) - 1 for i in range(count))


def apply_view(image: Tensor, view: int) -> Tensor:
    """One of the eight flips and right-angle turns of a nadir image.

    The bits of the number say what is done: 1 mirrors left-right, 2 mirrors up-down, 4 then exchanges
    rows and columns. Views 0 to 3 therefore keep the shape; view 0 is the image itself, view 3 a half turn.

    Args:
        image: [..., H, W].
        view: 0 to 7.

    Returns:
        [..., H, W] or, for views 4 to 7, [..., W, H].

    Raises:
        ValueError: another view number.
    """
    if not 0 <= view < NUM_VIEWS:
        raise ValueError(f"view must be 0..{NUM_VIEWS - 1}, got {view}")
    flipped = [-axis for axis, bit in ((1, 1), (2, 2)) if view & bit]
    turned = image.flip(flipped) if flipped else image
    return turned.transpose(-1, -2) if view & 4 else turned


def undo_view(image: Tensor, view: int) -> Tensor:
    """The inverse of `apply_view`.

    Args:
        image: [..., H, W] as `apply_view` returned it.
        view: 0 to 7.

    Raises:
        ValueError: another view number.
    """
    if not 0 <= view < NUM_VIEWS:
        raise ValueError(f"view must be 0..{NUM_VIEWS - 1}, got {view}")
    turned = image.transpose(-1, -2) if view & 4 else image
    flipped = [-axis for axis, bit in ((1, 1), (2, 2)) if view & bit]
    return turned.flip(flipped) if flipped else turned


def pixels_per_patch(patch_size: int, image_scale: float) -> int:
    """Side of one patch in pixels of the image before scaling.

    Args:
        patch_size: of the backbone, in pixels that it sees.
        image_scale: how much larger the image is made for the backbone.

    Raises:
        ConfigError: the side is no whole number, so that patches and pixels would not line up.
    """
    side = patch_size / image_scale if image_scale > 0 else 0.0
    if side < 1 or side != int(side):
        valid = [patch_size / s for s in range(1, 2 * patch_size + 1) if (patch_size / s) in (0.5, 1, 2, 4)]
        raise ConfigError(
            f"image_scale {image_scale:g} does not divide the patch size {patch_size}; "
            f"use for example one of {', '.join(f'{v:g}' for v in sorted(valid))}"
        )
    return int(side)


def extract_feature_maps(
    backbone: Backbone,
    numbers: Tensor,
    valid: Tensor | None = None,
    *,
    blocks: Sequence[int],
    image_scale: float = 1.0,
    colours: bool = False,
) -> list[Tensor]:
    """Normed patch features of several blocks as images.

    The maps cover the image from its upper left corner in steps of `pixels_per_patch`; the last row
    and column may reach beyond the image, whose edge pixels are repeated there.

    Args:
        backbone: with a card (it says how to normalise), in evaluation mode.
        numbers: [B, C, H, W], in the file's own dtype and unit.
        valid: [B, H, W] bool, or None if all pixels hold data.
        blocks: increasing 0-based block numbers.
        image_scale: the image is made this many times larger (bilinear) before the backbone sees it,
            so that a patch covers less ground.
        colours: whether `colour_map` follows the features.

    Returns:
        One [B, D, h, w] float32 per block, h = ceil(H / pixels_per_patch).

    Raises:
        DataError: another number of bands than the backbone takes, or the backbone has no card.
        ConfigError: `image_scale` does not divide the patch size.
    """
    if backbone.card is None:
        raise DataError(
            "the backbone has no card, so its normalisation is unknown; load it with load_backbone"
        )
    if numbers.ndim != 4 or numbers.shape[1] != backbone.in_channels:
        raise DataError(
            f"the backbone takes {backbone.in_channels} bands "
            f"({', '.join(backbone.card.normalization.bands)}), "
            f"but the image has {numbers.shape[1] if numbers.ndim == 4 else 'no'} bands"
        )
    side = pixels_per_patch(backbone.patch_size, image_scale)
    with torch.no_grad():
        images = backbone.card.normalization(numbers, valid)
        if image_scale != 1:
            height, width = images.shape[-2:]
            images = F.pad(images, (0, -width % side, 0, -height % side), mode="replicate")
            size_hw = tuple(length * backbone.patch_size // side for length in images.shape[-2:])
            images = F.interpolate(images, size_hw, mode="bilinear", antialias=image_scale < 1)
        maps = [features.map() for features in backbone.intermediate(images, blocks)]
        return [*maps, colour_map(backbone, numbers, valid, image_scale=image_scale)] if colours else maps


def colour_map(
    backbone: Backbone, numbers: Tensor, valid: Tensor | None = None, *, image_scale: float = 1.0
) -> Tensor:
    """Mean and deviation of each normalised band within each patch.

    Args:
        backbone: with a card.
        numbers: [B, C, H, W], in the file's own dtype and unit.
        valid: [B, H, W] bool, or None if all pixels hold data.
        image_scale: see `extract_feature_maps`.

    Returns:
        [B, 2C, h, w], on the grid of the feature maps.

    Raises:
        DataError: the backbone has no card.
    """
    if backbone.card is None:
        raise DataError("the backbone has no card, so its normalisation is unknown")
    side = pixels_per_patch(backbone.patch_size, image_scale)
    with torch.no_grad():
        images = backbone.card.normalization(numbers, valid).float()
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % side, 0, -height % side), mode="replicate")
        means = F.avg_pool2d(images, side)
        squares = F.avg_pool2d(images**2, side)
        return torch.cat([means, (squares - means**2).clamp(min=0).sqrt()], dim=1)


def weights_digest(module: torch.nn.Module) -> str:
    """A short name for exactly these weights: equal digests mean equal tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def feature_key(
    weights: str,
    path: Path,
    *,
    bands: Sequence[int],
    normalization: Normalization,
    window: Sequence[int],
    blocks: Sequence[int],
    view: int,
    image_scale: float,
) -> str:
    """Name of cached features; any change of weights, file, bands, window or treatment gives another.

    Args:
        weights: from `weights_digest`.
        path: of the image; its size and time of modification are part of the key.
        bands: 1-based bands of the image, in the backbone's order.
        normalization: how their numbers are scaled for the backbone.
        window: column, row, width and height in pixels.
        blocks: block numbers.
        view: see `apply_view`.
        image_scale: see `extract_feature_maps`.

    Raises:
        DataError: the image is gone.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    parts = [
        weights,
        str(path.resolve()),
        state.st_size,
        state.st_mtime_ns,
        list(bands),
        asdict(normalization),
        list(window),
        list(blocks),
        view,
        float(image_scale),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


class FeatureCache:
    """Feature maps on disk, one safetensors file of float16 tensors per key.

    Attributes:
        folder: where the files lie, or None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        """Opens a cache; the folder is made with the first entry."""
        self.folder = folder

    def get(self, key: str) -> list[Tensor] | None:
        """The maps of a key in float16, or None if it is not there or its file is damaged."""
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            # A damaged entry costs no more than computing it again; `put` then replaces it.
            return None
        return [tensors[name] for name in sorted(tensors)]

    def put(self, key: str, maps: Sequence[Tensor]) -> None:
        """Stores maps as float16; the file appears under its name only when whole.

        Raises:
            DataError: the folder cannot be written.
        """
        if self.folder is None:
            return
        tensors = {f"map{i:03d}": m.detach().cpu().half().contiguous() for i, m in enumerate(maps)}
        # Two processes may fill one cache, so the temporary name is their own.
        temporary = self.folder / f".{key}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, temporary)
                os.replace(temporary, self.folder / f"{key}.safetensors")
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise DataError(f"the feature cache {self.folder} cannot be written ({error})") from error

    def get_or_compute(self, key: str, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The maps of a key in float16, computed and stored if they are not there yet."""
        maps = self.get(key)
        if maps is None:
            # In the layout of a file, so that cached and computed features give the same bits.
            maps = [m.detach().cpu().half().contiguous() for m in compute()]
            self.put(key, maps)
        return maps


def default_cache_folder() -> Path:
    """`dinov3geo/features` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    return user_cache_folder() / "features"
