"""The self-supervised recipe: student, teacher, gram teacher, and the loss terms by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch import distributed as dist

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.features import Features
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.data.crops import CropBatch
from dinov3geo.losses.dino import dino_loss
from dinov3geo.losses.gram import count_pairs, gram_loss, resize_features
from dinov3geo.losses.ibot import ibot_loss, mask_weights
from dinov3geo.losses.koleo import koleo_loss
from dinov3geo.losses.sinkhorn import sinkhorn_knopp
from dinov3geo.training.distributed import local_parts
from dinov3geo.training.projection import ProjectionHead, ProjectionSettings
from dinov3geo.training.recipe import Recipe, masked_order, put_in_order
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
    koleo_group: int | None = Field(
        None, gt=1, description="images among which neighbours are sought; all of the step if absent"
    )
    student_temperature: float = Field(0.1, gt=0)
    dino_head: ProjectionSettings = ProjectionSettings()
    ibot_head: ProjectionSettings = ProjectionSettings()


class GramSettings(BaseModel):
    """Gram anchoring: to which checkpoint's patch similarities the student is held."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    anchor: Path | None = Field(
        None, description="backbone weights, run folder or checkpoint; absent: no anchoring"
    )
    from_teacher: bool = Field(
        False, description="the anchor is the EMA teacher of the moment, without a network of its own"
    )
    weight: Schedule = Schedule(peak=2.0)
    per_image: bool = Field(True, description="similarities within images, not over the whole batch")
    refresh_every: int | None = Field(None, gt=0, description="steps after which the EMA teacher replaces it")
    first_refresh: int = Field(0, ge=0, description="no refresh before this many steps are made")
    max_refreshes: int | None = Field(None, gt=0)

    @property
    def wanted(self) -> bool:
        """Whether the run is anchored at all."""
        return self.anchor is not None or self.from_teacher


@dataclass(frozen=True, slots=True)
class Targets:
    """What the frozen networks say about a batch.

    Attributes:
        cls: [V, B, K] prototypes of the class tokens, rows sum to 1.
        patches: [M, K] prototypes of the masked patches, in the order of `patch_masks.nonzero()`.
        anchor: [V * B, N, D] patch features to keep the similarities of, or None.
        num_pairs: of valid patches, see `count_pairs`; None without an anchor.
        seen: the teacher's features of (the first part of) the global crops.
    """

    cls: Tensor
    patches: Tensor
    anchor: Tensor | None
    num_pairs: Tensor | None
    seen: Features | None = None

    def of_images(self, images: slice, patch_masks: Tensor) -> Targets:
        """The part of some images.

        Args:
            images: which of the B.
            patch_masks: [V * B, N] of the whole batch.
        """
        views, batch, _ = self.cls.shape
        numbers = torch.full(patch_masks.shape, -1, device=patch_masks.device)
        numbers[patch_masks] = torch.arange(len(self.patches), device=patch_masks.device)
        own = numbers.unflatten(0, (views, batch))[:, images]
        anchor = self.anchor
        if anchor is not None:
            anchor = anchor.unflatten(0, (views, batch))[:, images].flatten(0, 1)
        cls = self.cls[:, images]
        pairs = None if self.num_pairs is None else self.num_pairs * (cls.shape[1] / batch)
        return Targets(cls, self.patches[own[own >= 0]], anchor, pairs)


class StudentPass(nn.Module):
    """All that the student computes in a step, as one call: what replicas and shards are built around."""

    def __init__(
        self,
        student: nn.ModuleDict,
        losses: LossSettings,
        *,
        gram_per_image: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Keeps the student: `backbone`, `dino_head`, `ibot_head`."""
        super().__init__()
        self.student = student
        self.settings = losses
        self.gram_per_image = gram_per_image
        self.group = group

    def forward(self, batch: CropBatch, targets: Targets) -> dict[str, Tensor]:
        """Unweighted loss terms."""
        views, images = batch.global_crops.shape[:2]
        backbone = self.student["backbone"]
        masked = isinstance(backbone, VisionTransformer)  # others take no masks, and there are none
        seen: Features = backbone(batch.global_crops.flatten(0, 1), *([batch.patch_masks] if masked else []))
        class_tokens = [seen.cls]
        num_locals = batch.local_crops.shape[0]
        if num_locals:
            class_tokens.append(local_class_tokens(backbone, batch))
        logits = self.student["dino_head"](torch.cat(class_tokens)).unflatten(0, (views + num_locals, images))
        temperature = self.settings.student_temperature
        terms = {
            "dino_global": dino_loss(
                logits[:views], targets.cls, student_temperature=temperature, ignore_diagonal=True
            ),
            "ibot": ibot_loss(
                self.student["ibot_head"](seen.patches[batch.patch_masks]),
                targets.patches,
                mask_weights(batch.patch_masks),
                num_images=views * images,
                student_temperature=temperature,
            ),
        }
        if num_locals:
            terms["dino_local"] = dino_loss(logits[views:], targets.cls, student_temperature=temperature)
        if self.settings.koleo_weight > 0:
            terms["koleo"] = koleo_of_views(seen.cls, views, self.settings, self.group)
        if targets.anchor is not None:
            terms["gram"] = gram_loss(
                seen.patches,
                targets.anchor,
                per_image=self.gram_per_image,
                valid=batch.patch_valid,
                num_pairs=targets.num_pairs if self.gram_per_image else None,
            )
        return terms


def local_class_tokens(backbone: nn.Module, batch: CropBatch) -> Tensor:
    """Class tokens of the local crops, [L * B, D]."""
    options = {"local_crops": True} if isinstance(backbone, VisionTransformer) else {}
    seen: Features = backbone(batch.local_crops.flatten(0, 1), **options)
    return seen.cls


def koleo_of_views(
    class_tokens: Tensor, views: int, settings: LossSettings, group: dist.ProcessGroup | None
) -> Tensor:
    """KoLeo summed over the global crops.

    Averaged over the groups of images, if neighbours are sought within such.
    """
    size = settings.koleo_group
    total = class_tokens.new_zeros(())
    for view in class_tokens.chunk(views):
        if size is None or size >= len(view):
            total = total + koleo_loss(view, group=group if size is None else None)
        else:
            groups = view.tensor_split(len(view) // size)
            total = total + torch.stack([koleo_loss(part) for part in groups]).mean()
    return total


def share_of_pairs(settings: LossSettings, step: int, total_steps: int, num_locals: int) -> dict[str, float]:
    """The DINO weight, shared out by the number of crop pairs: V (V - 1) global, V L local."""
    global_pairs, local_pairs = 2, 2 * num_locals
    share = settings.dino_weight / (global_pairs + local_pairs)
    return {
        "dino_global": share * global_pairs,
        "dino_local": share * local_pairs * settings.dino_local_weight.at(step, total_steps),
    }


class SelfSupervisedRecipe(Recipe):
    """DINO, iBOT, KoLeo and Gram anchoring on one student and its EMA teacher."""

    def __init__(
        self,
        backbone: Backbone,
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
            anchor: the frozen backbone, required if gram anchoring is on with a network of its own.
            group: processes that share Sinkhorn-Knopp and KoLeo.
        """
        heads: dict[str, nn.Module] = {
            "dino_head": ProjectionHead(backbone.embed_dim, losses.dino_head),
            "ibot_head": ProjectionHead(backbone.embed_dim, losses.ibot_head),
        }
        super().__init__(backbone, heads, anchor=anchor)
        self.settings = losses
        self.gram = gram
        self.group = group
        # In a tuple, so that its parameters are not registered a second time.
        self._passes = (StudentPass(self.student, losses, gram_per_image=gram.per_image, group=group),)

    @property
    def student_pass(self) -> StudentPass:
        """The student's forward pass and losses."""
        return self._passes[0]

    def losses(self, batch: CropBatch, *, teacher_temperature: float) -> dict[str, Tensor]:
        """Unweighted loss terms.

        Args:
            batch: crops with masks.
            teacher_temperature: of this step.

        Returns:
            Scalars `dino_global`, `dino_local`, `ibot`, `koleo` (summed over the two global crops) and,
            with an anchor, `gram`.
        """
        terms: dict[str, Tensor] = self.student_pass(
            batch, self.targets(batch, teacher_temperature=teacher_temperature)
        )
        return terms

    def weights(self, step: int, total_steps: int, *, num_locals: int) -> dict[str, float]:
        """Factor of each term in the total."""
        return {
            **share_of_pairs(self.settings, step, total_steps, num_locals),
            "ibot": self.settings.ibot_weight,
            "koleo": self.settings.koleo_weight,
            "gram": self.gram.weight.at(step, total_steps),
        }

    @torch.no_grad()
    def targets(
        self, batch: CropBatch, *, teacher_temperature: float, parts: int = 1, anchored: bool = True
    ) -> Targets:
        """What teacher and anchor say of a batch; each network sees each crop once.

        Args:
            batch: crops with masks.
            teacher_temperature: of this step.
            parts: in which the images go through the networks, to save memory; the targets are those of
                the whole batch.
            anchored: whether the anchor is asked at all; in steps that give it no weight it is not.
        """
        views, images = batch.global_crops.shape[:2]
        masks = batch.patch_masks.unflatten(0, (views, images))
        order = masked_order(batch)
        logits, patch_logits, places, kept = [], [], [], []
        first: Features | None = None
        anchored = anchored and (self.anchor is not None or self.gram.from_teacher)
        for own in torch.arange(images).tensor_split(parts):
            rows = slice(int(own[0]), int(own[-1]) + 1)
            features: Features = self.teacher["backbone"](batch.global_crops[:, rows].flatten(0, 1))
            first = first or features
            own_masks = masks[:, rows].flatten(0, 1)
            logits.append(self.teacher["dino_head"](features.cls).unflatten(0, (views, -1)))
            patch_logits.append(self.teacher["ibot_head"](features.patches[own_masks]))
            places.append(order[:, rows].flatten(0, 1)[own_masks])
            if anchored:
                kept.append(self._anchor_patches(batch, rows, features).unflatten(0, (views, -1)))
        patches = put_in_order(patch_logits, places)
        cls = sinkhorn_knopp(torch.cat(logits, 1).flatten(0, 1), teacher_temperature, group=self.group)
        return Targets(
            cls.unflatten(0, (views, images)),
            sinkhorn_knopp(patches, teacher_temperature, group=self.group),
            torch.cat(kept, 1).flatten(0, 1) if anchored else None,
            count_pairs(batch.patch_valid, group=self.group) if anchored else None,
            first,
        )

    def _anchor_patches(self, batch: CropBatch, rows: slice, features: Features) -> Tensor:
        """Patch features of the anchor on the student's grid, [V * b, N, D]."""
        if self.anchor is None and batch.gram_crops is None:
            return features.patches  # the teacher has seen these crops already
        network = self.teacher["backbone"] if self.anchor is None else self.anchor
        crops = batch.global_crops if batch.gram_crops is None else batch.gram_crops
        kept: Features = network(crops[:, rows].flatten(0, 1))
        return resize_features(kept.patches, kept.grid_hw, features.grid_hw)

    @torch.no_grad()
    def after_step(self, step: int, *, momentum: float) -> None:
        """Moves the teacher towards the student and renews the anchor when it is due; see `Recipe`."""
        super().after_step(step, momentum=momentum)
        every, limit = self.gram.refresh_every, self.gram.max_refreshes
        made = step + 1
        if self.anchor is None or every is None or made % every or made < self.gram.first_refresh:
            return
        if limit is None or self.num_refreshes < limit:
            for kept, new in zip(
                local_parts(self.anchor), local_parts(self.teacher["backbone"]), strict=True
            ):
                kept.copy_(new)
            self.num_refreshes += 1

    def load_parts(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads a state dict that may lack the anchor (when a run is continued with anchoring)."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("anchor.")}
        kept = {f"anchor.{n}": t for n, t in self.anchor.state_dict().items()} if self.anchor else {}
        self.load_state_dict({**kept, **own})
