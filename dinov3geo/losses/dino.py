"""Cross-entropy between the class tokens of student and teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dino_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    *,
    student_temperature: float = 0.1,
    ignore_diagonal: bool = False,
) -> Tensor:
    """Mean cross-entropy over all pairs of a student crop and a teacher crop of one image.

    In words: `mean over s, t, b of -sum_k teacher[t, b, k] * log softmax(student[s, b] / tau)[k]`, where
    pairs with s = t are left out if `ignore_diagonal` (then both are the same crop).

    Args:
        student_logits: [S, B, K].
        teacher_probs: [T, B, K], rows sum to 1.
        student_temperature: tau.
        ignore_diagonal: leave out s = t.

    Returns:
        Scalar float32.

    Raises:
        ValueError: the shapes do not belong together, or no pair is left.

    Source: Caron et al. 2021 (DINO), equation 3.
    """
    num_student, batch, _ = student_logits.shape
    num_teacher = teacher_probs.shape[0]
    if student_logits.shape[1:] != teacher_probs.shape[1:]:
        raise ValueError(
            f"student {list(student_logits.shape)} and teacher {list(teacher_probs.shape)} differ"
        )
    num_pairs = num_student * num_teacher - (min(num_student, num_teacher) if ignore_diagonal else 0)
    if num_pairs == 0:
        raise ValueError("no pair of different crops: give at least two global crops")
    log_probs = F.log_softmax(student_logits.float() / student_temperature, dim=-1)
    # Summing over crops first turns S * T products over K into one.
    total = (log_probs.sum(0) * teacher_probs.sum(0)).sum()
    if ignore_diagonal:
        shared = min(num_student, num_teacher)
        total = total - (log_probs[:shared] * teacher_probs[:shared]).sum()
    return -total / (num_pairs * batch)
