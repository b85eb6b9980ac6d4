"""Objects followed through frames by the similarity of patches: a first mask spreads, nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dinov3geo.errors import DataError

# Similarities held at a time: 64 MiB of float32.
_CHUNK = 1 << 24

Encode = Callable[[Tensor], Tensor]


class TrackSettings(BaseModel):
    """How labels spread. Source: DINOv3's segmentation tracking, after Jabri et al. 2020."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: int = Field(7, ge=1, description="earlier frames that are looked at, beside the first one")
    neighbourhood: float = Field(12.0, gt=0, description="radius of a circle around a patch, in patches")
    top: int = Field(5, ge=1, description="most similar patches that give their labels")
    temperature: float = Field(0.2, gt=0)


@dataclass(frozen=True, slots=True)
class PatchFrame:
    """One frame as patches.

    Attributes:
        features: [h, w, D] of unit length.
        shares: [K, h, w] of each patch that belongs to each label; 0 is the background.
    """

    features: Tensor
    shares: Tensor


def mask_shares(mask: Tensor, num_labels: int, grid_hw: tuple[int, int]) -> Tensor:
    """Share of each patch that each label covers, [K, h, w].

    Args:
        mask: [H, W] int64, 0 for the background.
        num_labels: K, the background included.
        grid_hw: rows and columns of patches.

    Raises:
        ValueError: a label from K on.
    """
    if int(mask.max()) >= num_labels or int(mask.min()) < 0:
        raise ValueError(f"labels must be 0..{num_labels - 1}, got {int(mask.min())}..{int(mask.max())}")
    layers = F.one_hot(mask.long(), num_labels).permute(2, 0, 1).float()
    return F.adaptive_avg_pool2d(layers, grid_hw)


def propagate(
    context: Sequence[PatchFrame], features: Tensor, settings: TrackSettings | None = None
) -> Tensor:
    """Labels of a frame's patches from those of frames before it.

    Args:
        context: frames of one grid.
        features: [h, w, D] of unit length.
        settings: None for the defaults.

    Returns:
        [K, h, w] shares, which sum to 1 over K where those of the context do.

    Raises:
        ValueError: no context, or another grid.
    """
    settings = settings or TrackSettings()
    if not context or any(frame.features.shape != features.shape for frame in context):
        raise ValueError(f"expected context frames of shape {list(features.shape)}")
    height, width, _ = features.shape
    known = torch.stack([frame.features for frame in context]).flatten(0, 2)
    labels = torch.stack([frame.shares for frame in context]).permute(0, 2, 3, 1).flatten(0, 2)
    rows, cols = torch.meshgrid(
        torch.arange(height, device=features.device),
        torch.arange(width, device=features.device),
        indexing="ij",
    )
    places = torch.stack([rows.flatten(), cols.flatten()], dim=1).float()
    # A circle always holds the place itself, so at least one similarity is finite.
    top = min(settings.top, len(known))
    found = []
    for part in torch.arange(height * width, device=features.device).split(max(1, _CHUNK // len(known))):
        near = torch.cdist(places[part], places) <= settings.neighbourhood
        similarity = features.flatten(0, 1)[part] @ known.T
        similarity = similarity.masked_fill(~near.repeat(1, len(context)), -torch.inf)
        values, nearest = similarity.topk(top, dim=1)
        weights = (values / settings.temperature).softmax(1)
        found.append(torch.einsum("nt,ntk->nk", weights, labels[nearest]))
    shares: Tensor = torch.cat(found).T.unflatten(1, (height, width))
    return shares


def track(
    frames: Sequence[Callable[[], Tensor]],
    first_mask: Tensor,
    encode: Encode,
    *,
    num_labels: int,
    settings: TrackSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Follows the labels of a first mask.

    Args:
        frames: functions that read a frame each, [C, H, W]; the first one belongs to the mask. Only the
            context is in memory.
        first_mask: [H, W] int64, 0 for the background.
        encode: features [D, h, w] of a frame.
        num_labels: K, the background included.
        settings: None for the defaults.
        progress: called with how many frames are done.

    Yields:
        [H, W] int64 masks, the first one as it was given.

    Raises:
        DataError: a frame of another size than the mask.
    """
    settings = settings or TrackSettings()
    kept: list[PatchFrame] = []
    size_hw = (int(first_mask.shape[0]), int(first_mask.shape[1]))
    for number, read in enumerate(frames):
        numbers = read()
        own_hw = (numbers.shape[-2], numbers.shape[-1])
        if own_hw != size_hw:
            raise DataError(
                f"frame {number + 1} has {own_hw[0]} x {own_hw[1]} pixels, the mask {size_hw[0]} x "
                f"{size_hw[1]}; all frames and the mask must agree"
            )
        features = F.normalize(encode(numbers).float(), dim=0).permute(1, 2, 0)
        if number == 0:
            shares = mask_shares(
                first_mask.to(features.device), num_labels, (features.shape[0], features.shape[1])
            )
            mask = first_mask
        else:
            shares = propagate(kept, features, settings)
            mask = sharpen(shares, size_hw).cpu()
        kept.append(PatchFrame(features, shares))
        if len(kept) > settings.context + 1:
            del kept[1]
        if progress is not None:
            progress(number + 1, len(frames))
        yield mask


def sharpen(shares: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """The label of each pixel, [H, W] int64.

    Shares are enlarged, and each label stretched to 0..1 first, as in DINO's evaluation: labels that have
    faded, those of thin objects above all, keep their place beside the background.
    """
    large = F.interpolate(shares[None], size_hw, mode="bilinear")[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    stretched = torch.where(high > low, (large - low) / (high - low).clamp_min(1e-12), large)
    return stretched.argmax(0)
