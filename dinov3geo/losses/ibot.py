"""Cross-entropy between the masked patches of the student and the same patches of the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3geo.losses.cross_entropy import soft_cross_entropy


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    weights: Tensor,
    *,
    num_images: int,
    student_temperature: float = 0.1,
) -> Tensor:
    """Cross-entropy per masked patch, averaged within an image, then over *all* images.

    Images without a mask count in the average as zero, so with half of the images masked the value is
    about half of the naive mean over masked images.

    Args:
        student_logits: [M, K], M masked patches of the whole batch.
        teacher_probs: [M, K], rows sum to 1.
        weights: [M], one over the number of masked patches in the patch's image (see `mask_weights`).
        num_images: global crops in the batch, masked or not.
        student_temperature: tau.

    Returns:
        Scalar float32, zero if nothing is masked.

    Source: Zhou et al. 2022 (iBOT), equation 2; averaging as in DINOv2 and DINOv3.
    """
    return soft_cross_entropy(
        student_logits[None], teacher_probs, weights / num_images, temperature=student_temperature
    )


def mask_weights(patch_masks: Tensor) -> Tensor:
    """Weight of each masked patch: one over the masked patches of its image.

    Args:
        patch_masks: [V * B, N] bool.

    Returns:
        [M] float32 in the order of `patch_masks.flatten().nonzero()`.
    """
    counts = patch_masks.sum(1).clamp_min(1)
    return (1 / counts.to(torch.float32))[:, None].expand_as(patch_masks)[patch_masks]
