"""Gram anchoring: keep the patch similarities of an earlier checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist


def gram_loss(
    student_patches: Tensor,
    anchor_patches: Tensor,
    *,
    per_image: bool = True,
    valid: Tensor | None = None,
    num_pairs: Tensor | None = None,
) -> Tensor:
    """Mean squared difference between the patch-similarity matrices of student and gram teacher.

    Args:
        student_patches: [B, N, D], any scale; normalised here.
        anchor_patches: [B, N, D'], same grid, no gradient.
        per_image: similarities within each image; otherwise among all patches of the batch.
        valid: [B, N] bool; similarities with patches that hold no data are left out.
        num_pairs: what the sum over valid pairs is divided by; their own number if None. Where a step's
            images are spread over parts and processes, the mean number of a part makes the mean of the parts'
            values the value over all images.

    Returns:
        Scalar float32.

    Raises:
        ValueError: the grids differ.

    Source: Siméoni et al. 2025 (DINOv3), Gram anchoring loss, as a mean instead of the squared
    Frobenius norm so that its weight does not depend on the number of patches.
    """
    if student_patches.shape[:2] != anchor_patches.shape[:2]:
        raise ValueError(
            f"student {list(student_patches.shape)} and anchor {list(anchor_patches.shape)} have other grids"
        )
    if not per_image:
        student_patches, anchor_patches = (
            student_patches.flatten(0, 1)[None],
            anchor_patches.flatten(0, 1)[None],
        )
        valid = None if valid is None else valid.flatten()[None]
    # Autocast would take the products back to bfloat16, whose rounding exceeds the differences.
    with torch.autocast(student_patches.device.type, enabled=False):
        student = F.normalize(student_patches.float(), dim=-1)
        anchor = F.normalize(anchor_patches.float(), dim=-1)
        difference = student @ student.mT - anchor @ anchor.mT  # [B, N, N]
        if valid is None:
            return difference.square().mean()
        pairs = (valid[:, :, None] & valid[:, None, :]).to(difference.dtype)
        count = pairs.sum() if num_pairs is None else num_pairs
        return (difference.square() * pairs).sum() / count.clamp_min(torch.finfo(torch.float32).tiny)


def resize_features(patches: Tensor, grid_hw: tuple[int, int], target_hw: tuple[int, int]) -> Tensor:
    """Patch features of a higher-resolution gram crop on the student's grid.

    Args:
        patches: [B, N, D] over `grid_hw`, not yet normalised.
        grid_hw: rows and columns of the given features.
        target_hw: rows and columns wanted.

    Returns:
        [B, N', D]; bicubic, corners not aligned, no antialiasing.

    Source: DINOv3, appendix on Gram anchoring at higher resolution.
    """
    if grid_hw == target_hw:
        return patches
    images = patches.transpose(1, 2).unflatten(2, grid_hw)
    resized = F.interpolate(images.float(), target_hw, mode="bicubic", align_corners=False, antialias=False)
    return resized.flatten(2).transpose(1, 2)


def count_pairs(valid: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Pairs of valid patches within images: the mean over the processes of their sum over images.

    Args:
        valid: [B, N] bool.
        group: the processes; None for this one alone.

    Returns:
        Scalar float32.
    """
    count = valid.sum(1).float().square().sum()
    if group is not None:
        dist.all_reduce(count, group=group)
        count = count / dist.get_world_size(group)
    return count
