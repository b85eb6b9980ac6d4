"""The self-supervised recipe: student, teacher, gram teacher, and the loss terms by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch import distributed as dist

from dinov3geo.backbones.features import Features
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.data.crops import CropBatch
from dinov3geo.losses.dino import dino_loss
from dinov3geo.losses.gram import gram_loss, resize_features
from dinov3geo.losses.ibot import ibot_loss, mask_weights
from dinov3geo.losses.koleo import koleo_loss
from dinov3geo.losses.sinkhorn import sinkhorn_knopp
from dinov3geo.training.projection import ProjectionHead, ProjectionSettings
from dinov3geo.training.schedules import Schedule


class LossSettings(BaseModel):
    """Weights of the loss terms and shapes of the projection heads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dino_weight: float = Field(1.0, ge=0)
    dino_local_weight: Schedule = Field(
        Schedule(peak=1.0), description="extra factor of the local term; lowered in the gram stage"
    )
    ibot_weight: float = Field(1.0, ge=0)
    koleo_weight: float = Field(0.1, ge=0)
    student_temperature: float = Field(0.1, gt=0)
    dino_head: ProjectionSettings = ProjectionSettings()
    ibot_head: ProjectionSettings = ProjectionSettings()


class GramSettings(BaseModel):
    """Gram anchoring: to which checkpoint's patch similarities the student is held."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    anchor: Path | None = Field(None, description="backbone weights or run folder; absent: no anchoring")
    weight: Schedule = Schedule(peak=2.0)
    per_image: bool = Field(True, description="similarities within images, not over the whole batch")
    refresh_every: int | None = Field(None, gt=0, description="steps after which the EMA teacher replaces it")
    max_refreshes: int | None = Field(None, gt=0)


class SelfSupervisedRecipe(nn.Module):
    """DINO, iBOT, KoLeo and Gram anchoring on one student and its EMA teacher.

    Attributes:
        student: `backbone`, `dino_head`, `ibot_head`.
        teacher: the same, moved by `after_step`, never by gradients.
        anchor: frozen backbone of Gram anchoring, or None.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        losses: LossSettings,
        gram: GramSettings,
        *,
        anchor: VisionTransformer | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Builds student and teacher with the same weights.

        Args:
            backbone: of the student; the teacher gets a copy.
            losses: weights and head shapes.
            gram: how the anchor is used.
            anchor: the frozen backbone, required if gram anchoring is on.
            group: processes that share Sinkhorn-Knopp and KoLeo.
        """
        super().__init__()
        self.settings = losses
        self.gram = gram
        self.group = group
        self.student = nn.ModuleDict(
            {
                "backbone": backbone,
                "dino_head": ProjectionHead(backbone.embed_dim, losses.dino_head),
                "ibot_head": ProjectionHead(backbone.embed_dim, losses.ibot_head),
            }
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.anchor = None if anchor is None else anchor.requires_grad_(False).eval()
        self.num_refreshes = 0

    def train(self, mode: bool = True) -> SelfSupervisedRecipe:
        """Only the student ever trains: teachers see no dropped paths and no rescaled positions."""
        self.student.train(mode)
        return self

    def losses(self, batch: CropBatch, *, teacher_temperature: float) -> dict[str, Tensor]:
        """Unweighted loss terms.

        Args:
            batch: crops with masks.
            teacher_temperature: of this step.

        Returns:
            Scalars `dino_global`, `dino_local`, `ibot`, `koleo` (summed over the two global crops) and,
            with an anchor, `gram`.
        """
        views, images = batch.global_crops.shape[:2]
        global_crops = batch.global_crops.flatten(0, 1)  # [V * B, C, H, W]
        targets, patch_targets = self._targets(global_crops, batch.patch_masks, teacher_temperature)
        seen: Features = self.student["backbone"](global_crops, batch.patch_masks)
        class_tokens = [seen.cls]
        num_locals = batch.local_crops.shape[0]
        if num_locals:
            local: Features = self.student["backbone"](batch.local_crops.flatten(0, 1), local_crops=True)
            class_tokens.append(local.cls)
        logits = self.student["dino_head"](torch.cat(class_tokens)).unflatten(0, (views + num_locals, images))
        targets = targets.unflatten(0, (views, images))
        temperature = self.settings.student_temperature
        terms = {
            "dino_global": dino_loss(
                logits[:views], targets, student_temperature=temperature, ignore_diagonal=True
            ),
            "ibot": ibot_loss(
                self.student["ibot_head"](seen.patches[batch.patch_masks]),
                patch_targets,
                mask_weights(batch.patch_masks),
                num_images=views * images,
                student_temperature=temperature,
            ),
        }
        if num_locals:
            terms["dino_local"] = dino_loss(logits[views:], targets, student_temperature=temperature)
        if self.settings.koleo_weight > 0:
            terms["koleo"] = sum(
                (koleo_loss(view, group=self.group) for view in seen.cls.chunk(views)),
                start=seen.cls.new_zeros(()),
            )
        if self.anchor is not None:
            terms["gram"] = self._gram_term(batch, seen)
        return terms

    def weights(self, step: int, total_steps: int, *, num_locals: int) -> dict[str, float]:
        """Factor of each term in the total.

        The DINO weight is shared out by the number of crop pairs: V (V - 1) global, V L local.
        """
        global_pairs, local_pairs = 2, 2 * num_locals
        share = self.settings.dino_weight / (global_pairs + local_pairs)
        return {
            "dino_global": share * global_pairs,
            "dino_local": share * local_pairs * self.settings.dino_local_weight.at(step, total_steps),
            "ibot": self.settings.ibot_weight,
            "koleo": self.settings.koleo_weight,
            "gram": self.gram.weight.at(step, total_steps),
        }

    @torch.no_grad()
    def _targets(
        self, global_crops: Tensor, patch_masks: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        features: Features = self.teacher["backbone"](global_crops)
        logits = self.teacher["dino_head"](features.cls)
        patch_logits = self.teacher["ibot_head"](features.patches[patch_masks])
        return (
            sinkhorn_knopp(logits, temperature, group=self.group),
            sinkhorn_knopp(patch_logits, temperature, group=self.group),
        )

    def _gram_term(self, batch: CropBatch, seen: Features) -> Tensor:
        assert self.anchor is not None
        crops = batch.global_crops if batch.gram_crops is None else batch.gram_crops
        with torch.no_grad():
            kept: Features = self.anchor(crops.flatten(0, 1))
            patches = resize_features(kept.patches, kept.grid_hw, seen.grid_hw)
        return gram_loss(seen.patches, patches, per_image=self.gram.per_image, valid=batch.patch_valid)

    @torch.no_grad()
    def after_step(self, step: int, *, momentum: float) -> None:
        """Moves the teacher towards the student and renews the anchor when it is due.

        Args:
            step: the step just made, from 0.
            momentum: share of the teacher that stays.
        """
        teacher = [parameter.data for parameter in self.teacher.parameters()]
        student = [parameter.data for parameter in self.student.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        every, limit = self.gram.refresh_every, self.gram.max_refreshes
        if self.anchor is None or every is None or (step + 1) % every:
            return
        if limit is None or self.num_refreshes < limit:
            self.anchor.load_state_dict(self.teacher["backbone"].state_dict())
            self.num_refreshes += 1

    def load_parts(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads a state dict that may lack the anchor (when a run is continued with anchoring)."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("anchor.")}
        kept = {f"anchor.{n}": t for n, t in self.anchor.state_dict().items()} if self.anchor else {}
        self.load_state_dict({**kept, **own})
