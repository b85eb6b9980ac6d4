"""Agreement of directions between the features of two networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of `1 - cos(student, teacher)`.

    Args:
        student: [..., D], any scale, any float dtype.
        teacher: [..., D], as many rows, no gradient.
        weights: [...] float32.

    Returns:
        Scalar float32.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} differ")
    # Autocast would round the products to bfloat16.
    with torch.autocast(student.device.type, enabled=False):
        cosine = (F.normalize(student.float(), dim=-1) * F.normalize(teacher.float(), dim=-1)).sum(-1)
        return (weights * (1 - cosine)).sum()
