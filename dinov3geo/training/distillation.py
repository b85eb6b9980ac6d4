"""What a frozen teacher says, and how a student of another size or kind learns it.

Source: Siméoni et al. 2025 (DINOv3), section on multi-student distillation: the losses of pretraining on
unmasked crops against the teacher's own heads, and the moving average of the student as the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.features import Features
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.data.crops import CropBatch
from dinov3geo.errors import ConfigError
from dinov3geo.losses.cosine import cosine_loss
from dinov3geo.losses.dino import dino_loss
from dinov3geo.losses.gram import count_pairs, gram_loss, resize_features
from dinov3geo.losses.ibot import ibot_loss, mask_weights
from dinov3geo.losses.sinkhorn import sinkhorn_knopp
from dinov3geo.training.projection import ProjectionHead
from dinov3geo.training.recipe import Recipe, masked_order, put_in_order
from dinov3geo.training.settings import DistillSettings
from dinov3geo.training.ssl import Targets, koleo_of_views, local_class_tokens, share_of_pairs


@dataclass(frozen=True, slots=True)
class Answers:
    """What the teacher says before its prototypes; small enough to be sent to other processes.

    Attributes:
        cls: [V, B, W], a bottleneck or feature per class token.
        patches: [M, W], the same of the masked patches.
        anchor: [V * B, N, D] features of all patches, or None.
    """

    cls: Tensor
    patches: Tensor
    anchor: Tensor | None


class FrozenTeacher(nn.Module):
    """Backbone and heads that never learn.

    Attributes:
        backbone: network.
        heads: `dino_head` and `ibot_head`, or empty where the students learn features.
    """

    gain: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: Backbone,
        heads: dict[str, ProjectionHead],
        *,
        own: Normalization,
        run: Normalization,
    ) -> None:
        """Freezes the networks.

        Args:
            backbone: of the teacher.
            heads: `dino_head` and `ibot_head`, or none.
            own: what the teacher was trained with.
            run: what the crops are normalised by; the same bands.
        """
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        # From one normalisation to the other: x * run.std + run.mean, less own.mean, by own.std.
        std, mean = torch.tensor(own.std), torch.tensor(own.mean)
        self.register_buffer("gain", (torch.tensor(run.std) / std)[:, None, None])
        self.register_buffer("shift", ((torch.tensor(run.mean) - mean) / std)[:, None, None])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def answer(self, batch: CropBatch, *, parts: int = 1, anchored: bool = False) -> Answers:
        """Runs the backbone once over the global crops.

        Args:
            batch: crops; `patch_masks` says which patches are asked for.
            parts: in which the images go through the network, to save memory.
            anchored: whether the features of all patches are wanted too.
        """
        views, images = batch.global_crops.shape[:2]
        masks = batch.patch_masks.unflatten(0, (views, images))
        order = masked_order(batch)
        tokens, patches, places, kept = [], [], [], []
        for own in torch.arange(images).tensor_split(parts):
            rows = slice(int(own[0]), int(own[-1]) + 1)
            own_masks = masks[:, rows].flatten(0, 1)
            crops = batch.global_crops[:, rows].flatten(0, 1)
            seen: Features = self.backbone(crops * self.gain + self.shift)
            tokens.append(self._narrow("dino_head", seen.cls).unflatten(0, (views, -1)))
            patches.append(self._narrow("ibot_head", seen.patches[own_masks]))
            places.append(order[:, rows].flatten(0, 1)[own_masks])
            if anchored:
                kept.append(seen.patches.unflatten(0, (views, -1)))
        anchor = torch.cat(kept, 1).flatten(0, 1) if anchored else None
        return Answers(torch.cat(tokens, 1), put_in_order(patches, places), anchor)

    def _narrow(self, head: str, features: Tensor) -> Tensor:
        if not self.heads:
            return features.float()
        projection = self.heads[head]
        assert isinstance(projection, ProjectionHead)
        return projection.bottleneck(features).float()

    @torch.no_grad()
    def targets(
        self, answers: Answers, batch: CropBatch, *, temperature: float, group: dist.ProcessGroup | None
    ) -> Targets:
        """What students are to say.

        Args:
            answers: of the batch.
            batch: crops of the students.
            temperature: of the teacher's prototypes.
            group: processes that share Sinkhorn-Knopp.
        """
        pairs = None if answers.anchor is None else count_pairs(batch.patch_valid, group=group)
        if not self.heads:
            return Targets(answers.cls, answers.patches, answers.anchor, pairs)
        scores = self._scores("dino_head", answers.cls.flatten(0, 1))
        cls = sinkhorn_knopp(scores, temperature, group=group).unflatten(0, answers.cls.shape[:2])
        patches = sinkhorn_knopp(self._scores("ibot_head", answers.patches), temperature, group=group)
        return Targets(cls, patches, answers.anchor, pairs)

    def _scores(self, head: str, narrow: Tensor) -> Tensor:
        projection = self.heads[head]
        assert isinstance(projection, ProjectionHead)
        scores: Tensor = projection.prototypes(narrow)
        return scores


class DistillPass(nn.Module):
    """All that a student computes in a step; see `StudentPass`."""

    def __init__(
        self,
        student: nn.ModuleDict,
        settings: DistillSettings,
        *,
        teacher_patch: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Keeps the student: `backbone`, `dino_head`, `ibot_head`."""
        super().__init__()
        self.student = student
        self.settings = settings
        self.teacher_patch = teacher_patch
        self.group = group

    def forward(self, batch: CropBatch, targets: Targets) -> dict[str, Tensor]:
        """Unweighted loss terms."""
        views, side = batch.global_crops.shape[0], batch.global_crops.shape[-1] // self.teacher_patch
        backbone, losses = self.student["backbone"], self.settings.losses
        seen: Features = backbone(batch.global_crops.flatten(0, 1))
        # Another stride gives another grid: the student's patches are compared where the teacher's lie.
        patches = resize_features(seen.patches, seen.grid_hw, (side, side))
        tokens = [seen.cls]
        if batch.local_crops.shape[0]:
            tokens.append(local_class_tokens(backbone, batch))
        asked = self.student["ibot_head"](patches[batch.patch_masks])
        said = self.student["dino_head"](torch.cat(tokens)).unflatten(0, (-1, batch.global_crops.shape[1]))
        of_prototypes = self.settings.targets == "prototypes"
        terms = (self._scores if of_prototypes else self._directions)(said, asked, batch, targets)
        if losses.koleo_weight > 0:
            terms["koleo"] = koleo_of_views(seen.cls, views, losses, self.group)
        if targets.anchor is not None:
            terms["gram"] = gram_loss(
                patches, targets.anchor, valid=batch.patch_valid, num_pairs=targets.num_pairs
            )
        return terms

    def _scores(self, said: Tensor, asked: Tensor, batch: CropBatch, targets: Targets) -> dict[str, Tensor]:
        """Cross-entropies with the teacher's prototypes."""
        views, temperature = batch.global_crops.shape[0], self.settings.losses.student_temperature
        terms = {
            "dino_global": dino_loss(
                said[:views], targets.cls, student_temperature=temperature, ignore_diagonal=True
            ),
            "ibot": ibot_loss(
                asked,
                targets.patches,
                mask_weights(batch.patch_masks),
                num_images=len(batch.patch_masks),
                student_temperature=temperature,
            ),
        }
        if len(said) > views:
            terms["dino_local"] = dino_loss(said[views:], targets.cls, student_temperature=temperature)
        return terms

    def _directions(
        self, said: Tensor, asked: Tensor, batch: CropBatch, targets: Targets
    ) -> dict[str, Tensor]:
        """Cosines with the teacher's features, of the same crop; of local crops with all global ones."""
        views, images = batch.global_crops.shape[:2]
        even = said.new_ones((), dtype=torch.float32)
        patch_weights = mask_weights(batch.patch_masks) / len(batch.patch_masks)
        terms = {
            "cls_global": cosine_loss(
                said[:views], targets.cls, (even / (views * images)).expand(views, images)
            ),
            "patches": cosine_loss(asked, targets.patches, patch_weights),
        }
        if num_locals := len(said) - views:
            shape = (views, num_locals, images)
            terms["cls_local"] = cosine_loss(
                said[views:].expand(views, -1, -1, -1),
                targets.cls[:, None].expand(-1, num_locals, -1, -1),
                (even / (views * num_locals * images)).expand(shape),
            )
        return terms


class DistilledStudent(Recipe):
    """A student of a frozen teacher, and its moving average: what is exported."""

    def __init__(
        self,
        backbone: Backbone,
        settings: DistillSettings,
        *,
        teacher_dim: int,
        teacher_patch: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Builds heads for what the teacher says.

        Args:
            backbone: of the student, of any kind.
            settings: of the run.
            teacher_dim: width of the teacher's features.
            teacher_patch: side of the teacher's patches in pixels.
            group: processes that share KoLeo.

        Raises:
            ConfigError: no map between features of different widths.
        """
        losses, width = settings.losses, backbone.embed_dim
        heads: dict[str, nn.Module]
        if settings.targets == "prototypes":
            heads = {
                "dino_head": ProjectionHead(width, losses.dino_head),
                "ibot_head": ProjectionHead(width, losses.ibot_head),
            }
        else:
            check_width(settings, width, teacher_dim)
            heads = {
                name: nn.Linear(width, teacher_dim) if settings.feature_map == "linear" else nn.Identity()
                for name in ("dino_head", "ibot_head")
            }
        if isinstance(backbone, VisionTransformer):
            backbone.mask_token.requires_grad_(False)  # no crop of a student is masked
        super().__init__(backbone, heads)
        self.settings = settings
        # In a tuple, so that its parameters are not registered a second time.
        self._passes = (DistillPass(self.student, settings, teacher_patch=teacher_patch, group=group),)

    @property
    def student_pass(self) -> DistillPass:
        """The student's forward pass and losses."""
        return self._passes[0]

    def weights(self, step: int, total_steps: int, *, num_locals: int) -> dict[str, float]:
        """Factor of each term in the total."""
        losses = self.settings.losses
        dino = share_of_pairs(losses, step, total_steps, num_locals)
        return {
            **dino,
            "cls_global": dino["dino_global"],
            "cls_local": dino["dino_local"],
            "ibot": losses.ibot_weight,
            "patches": losses.ibot_weight,
            "koleo": losses.koleo_weight,
            "gram": self.settings.gram_weight.at(step, total_steps),
        }


def check_width(settings: DistillSettings, width: int, teacher_dim: int) -> None:
    """Makes sure that features can be compared.

    Raises:
        ConfigError: there is no map between features of different widths.
    """
    if settings.feature_map == "none" and width != teacher_dim:
        raise ConfigError(
            f"feature_map: none needs students of the teacher's width {teacher_dim}, got {width}; use "
            "feature_map: linear"
        )


def asked_patches(settings: DistillSettings, batch: CropBatch) -> Tensor:
    """[V * B, N] bool: the patches that the teacher is asked about, drawn ones or all with data."""
    return batch.patch_masks if settings.targets == "prototypes" else batch.patch_valid
