"""Cross-entropy between the class tokens of student and teacher."""

from __future__ import annotations

from torch import Tensor

from dinov3geo.losses.cross_entropy import soft_cross_entropy


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
    shared = min(num_student, num_teacher) if ignore_diagonal else 0
    num_pairs = num_student * num_teacher - shared
    if num_pairs == 0:
        raise ValueError("no pair of different crops: give at least two global crops")
    weights = teacher_probs.new_full((batch,), 1 / (num_pairs * batch))
    # Summing over the teacher's crops first turns S * T products over K into S.
    everyone = teacher_probs.sum(0)  # [B, K]
    total = student_logits.new_zeros((), dtype=weights.dtype)
    if shared < num_student:
        total = soft_cross_entropy(
            student_logits[shared:], everyone, weights, temperature=student_temperature
        )
    if shared:
        # Crop s meets the teacher's crops but its own.
        others = (everyone - teacher_probs[:shared]).flatten(0, 1)  # [s * B, K]
        own = student_logits[:shared].flatten(0, 1)[None]
        total = total + soft_cross_entropy(
            own, others, weights.repeat(shared), temperature=student_temperature
        )
    return total
