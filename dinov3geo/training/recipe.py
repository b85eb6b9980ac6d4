"""A network in training with its moving average: what every kind of run has."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.data.crops import CropBatch
from dinov3geo.training.distributed import local_parts


class Recipe(nn.Module, ABC):
    """A student, what follows it, and how its losses are formed.

    Attributes:
        student: `backbone`, `dino_head`, `ibot_head`.
        teacher: the same, moved by `after_step`, never by gradients.
        anchor: frozen backbone of Gram anchoring, or None.
        num_refreshes: times that the anchor was renewed.
    """

    def __init__(
        self, backbone: Backbone, heads: dict[str, nn.Module], *, anchor: Backbone | None = None
    ) -> None:
        """Builds student and moving average with the same weights.

        Args:
            backbone: of the student; the average gets a copy.
            heads: `dino_head` for class tokens, `ibot_head` for patches.
            anchor: a frozen backbone.
        """
        super().__init__()
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.anchor = None if anchor is None else anchor.requires_grad_(False).eval()
        self.num_refreshes = 0

    @property
    @abstractmethod
    def student_pass(self) -> nn.Module:
        """The student's forward pass and losses: called with a `CropBatch` and `Targets`, gives terms."""

    @abstractmethod
    def weights(self, step: int, total_steps: int, *, num_locals: int) -> dict[str, float]:
        """Factor of each loss term in the total."""

    def train(self, mode: bool = True) -> Self:
        """Only the student ever trains: teachers see no dropped paths and no rescaled positions."""
        self.student.train(mode)
        return self

    @torch.no_grad()
    def after_step(self, step: int, *, momentum: float) -> None:
        """Moves the average towards the student.

        Args:
            step: the step just made, from 0.
            momentum: share of the average that stays.
        """
        torch._foreach_lerp_(local_parts(self.teacher), local_parts(self.student), 1 - momentum)


def masked_order(batch: CropBatch) -> Tensor:
    """Where each masked patch stands among all masked ones, [V, B, N]; 0 elsewhere."""
    views, images = batch.global_crops.shape[:2]
    masks = batch.patch_masks.unflatten(0, (views, images))
    order = torch.zeros_like(masks, dtype=torch.long)
    order[masks] = torch.arange(int(masks.sum()), device=masks.device)
    return order


def put_in_order(rows: list[Tensor], places: list[Tensor]) -> Tensor:
    """Rows of the parts of a batch in the order of the whole batch.

    Args:
        rows: [m, K] of each part.
        places: [m] of each part, from `masked_order`; a single part is in order already.
    """
    if len(rows) == 1:
        return rows[0]
    ordered = torch.empty_like(joined := torch.cat(rows))
    ordered[torch.cat(places)] = joined
    return ordered
