"""Distillation runs: one frozen teacher, several students at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.filter_bank import has_filters
from dinov3geo.backbones.variants import VARIANTS, build_backbone
from dinov3geo.backbones.vit import VitConfig
from dinov3geo.backbones.zoo import load_backbone
from dinov3geo.data.crops import CropBatch
from dinov3geo.errors import ConfigError
from dinov3geo.training.checkpoint import is_checkpoint, list_checkpoints, read_networks, read_state
from dinov3geo.training.continuing import settings_of
from dinov3geo.training.distillation import Answers, DistilledStudent, FrozenTeacher, asked_patches
from dinov3geo.training.distributed import World
from dinov3geo.training.learner import Learner
from dinov3geo.training.loop import Loop, RunResult, run_loop
from dinov3geo.training.observe import Evaluator, Listeners, Progress
from dinov3geo.training.parallel import prepare_frozen
from dinov3geo.training.projection import ProjectionHead
from dinov3geo.training.settings import DistillSettings, StudentSettings
from dinov3geo.training.setup import (
    build_crop_makers,
    check_filter_precision,
    load_filters,
    load_teacher_backbone,
    run_normalization,
)
from dinov3geo.training.ssl import Targets

_HEADS = ("dino_head", "ibot_head")


class Distiller(Loop):
    """A run whose targets come from a frozen teacher.

    The teacher sees every image of a step once: each process asks it about its share. Where students have
    processes of their own, the answers (not the scores over prototypes, which are many times larger) and the
    chips are gathered, and each process goes on with its share among those of its student.

    Attributes:
        teacher: frozen.
        alone: whether every student has processes of its own.
    """

    settings: DistillSettings

    def __init__(
        self,
        settings: DistillSettings,
        out: Path,
        world: World | None = None,
        listeners: Listeners | None = None,
    ) -> None:
        """Builds everything at step 0; arguments as in `Loop`.

        Raises:
            UserError: teacher, students and settings do not fit.
        """
        teacher = load_teacher(settings)
        patch_size = teacher.backbone.patch_size
        super().__init__(settings, out, world, listeners, patch_size=patch_size)
        self.teacher = teacher.to(self.device)
        prepare_frozen([self.teacher.backbone], settings.parallel, self.world, precision=settings.precision)
        self.alone = settings.students[0].processes is not None
        without_locals = settings.crops.model_copy(update={"local_count": 0})
        self.teacher_crop_makers = build_crop_makers(
            settings.model_copy(update={"crops": without_locals}), patch_size=patch_size
        )
        worlds = student_worlds(settings, self.world)
        self.learners = {
            student.name: self._learner(student, own)
            for student, own in zip(settings.students, worlds, strict=True)
            if own is not None
        }

    def _learner(self, student: StudentSettings, world: World) -> Learner:
        world.images_per_process(self.settings.batch_size, self.settings.accumulate)
        torch.manual_seed(self.settings.seed)
        recipe = DistilledStudent(
            build_student(self.settings, student, self.teacher.backbone.patch_size),
            self.settings,
            teacher_dim=self.teacher.backbone.embed_dim,
            teacher_patch=self.teacher.backbone.patch_size,
            group=world.group,
        )
        return Learner(
            self.settings, recipe, world, self.device, name=student.name, lr_factor=student.lr_factor
        )

    def ask_teacher(self, batch: dict[str, Tensor]) -> tuple[CropBatch, Targets]:
        """Crops of the students, and what the teacher says of their global ones."""
        settings = self.settings
        temperature = settings.schedules.teacher_temperature.at(self.step, settings.steps)
        crops = self.make_crops(batch, makers=self.teacher_crop_makers if self.alone else None)
        crops = self._ask_about(crops)
        learner = next(iter(self.learners.values()))
        sharded = settings.parallel.layout == "shard" and self.world.group is not None
        with learner.lower_precision(sharded=sharded):
            answers = self.teacher.answer(
                crops,
                parts=settings.accumulate,
                anchored=settings.gram_weight.at(self.step, settings.steps) > 0,
            )
        if self.alone:
            answers = share_answers(answers, crops.patch_masks, self.world, learner.world)
            share = learner.world.share
            own = {name: share.of(self.world.gather_images(tensor)) for name, tensor in batch.items()}
            crops = self._ask_about(self.make_crops(own, share))
        with learner.lower_precision(sharded=False):
            targets = self.teacher.targets(answers, crops, temperature=temperature, group=learner.world.group)
        return crops, targets

    def _ask_about(self, crops: CropBatch) -> CropBatch:
        return dataclasses.replace(crops, patch_masks=asked_patches(self.settings, crops))

    def backbones(self) -> dict[str, Backbone]:
        """The students' moving averages."""
        patch_size = self.teacher.backbone.patch_size
        found = {}
        for student in self.settings.students:
            if student.name in self.learners:
                learner = self.learners[student.name]
                found[student.name] = learner.averaged_backbone(
                    lambda student=student: build_student(self.settings, student, patch_size)  # type: ignore[misc]
                )
        return found

    def card(self, name: str) -> BackboneCard:
        """What a user of a student's weights must know."""
        student = next(each for each in self.settings.students if each.name == name)
        backbone = self.learners[name].recipe.teacher["backbone"]
        assert isinstance(backbone, Backbone)
        return self.describe_weights(
            variant=student.variant, patch_size=backbone.patch_size, name=f"{self.settings.name}-{name}"
        )

    def join_values(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Loop`."""
        if not self.alone or self.world.group is None:
            return values
        own = {name: float(value) for name, value in values.items()}
        everyone: list[dict[str, float]] = [{} for _ in range(self.world.size)]
        dist.all_gather_object(everyone, own, group=self.world.group)
        joined: dict[str, float] = {}
        for each in reversed(everyone):  # where several know a number, the first process is heard
            joined |= each
        return {name: torch.tensor(value, device=self.device) for name, value in joined.items()}

    def statistics(self, targets: Targets) -> dict[str, Tensor]:
        """How the targets lie; features have no entropy."""
        return super().statistics(targets) if self.settings.targets == "prototypes" else {}

    @property
    def weights(self) -> Path:
        """The folder that holds one folder of weights for each student."""
        return self.out


def build_student(settings: DistillSettings, student: StudentSettings, teacher_patch: int) -> Backbone:
    """A student's network with its initial weights.

    Args:
        settings: of the run.
        student: which.
        teacher_patch: patch size of a vision transformer that names none.

    Raises:
        ConfigError: the crops do not fit its stride.
        UnknownNameError: no such variant.
    """
    transformer = isinstance(VARIANTS.get(student.variant), VitConfig)
    patch_size = teacher_patch if student.patch_size is None and transformer else student.patch_size
    backbone = build_backbone(
        student.variant,
        in_channels=len(run_normalization(settings).bands),
        patch_size=patch_size,
        drop_path=student.drop_path,
        layer_scale=student.layer_scale,
        num_registers=student.num_registers,
        filters=load_filters(student.filters, settings),
    )
    stride = backbone.patch_size
    for crops, _ in settings.crop_choices():
        if crops.global_size % stride:
            below = max(crops.global_size // stride, 1) * stride
            raise ConfigError(
                f"crops.global_size {crops.global_size} is not a multiple of {stride}, the stride of student "
                f"{student.name!r} ({student.variant}); use {below} or {below + stride}"
            )
    return backbone


def student_worlds(settings: DistillSettings, world: World) -> list[World | None]:
    """For each student the processes that train it, or None where this process is not one of them.

    Raises:
        ConfigError: the students' processes do not add up to those of the run.
    """
    counts = [student.processes for student in settings.students]
    if counts[0] is None:
        return [world] * len(counts)
    wanted = sum(count or 0 for count in counts)
    if wanted != world.size:
        raise ConfigError(
            f"students.processes add up to {wanted} but the run has {world.size}; start it with "
            f"torchrun --nproc-per-node {wanted}, or leave students.processes out to train them in turn"
        )
    worlds: list[World | None] = []
    first = 0
    for count in counts:
        assert count is not None
        ranks = list(range(first, first + count))
        # Every process takes part in the founding of every group.
        group: Any = None if world.group is None else dist.new_group(ranks)
        mine = world.rank in ranks
        worlds.append(World(world.rank - first, count, group if count > 1 else None) if mine else None)
        first += count
    return worlds


def share_answers(answers: Answers, asked: Tensor, everyone: World, learner: World) -> Answers:
    """The teacher's answers about this process's share of the images of its student.

    Args:
        answers: of this process's share of all images.
        asked: [V * b, N] bool, the patches that they are about.
        everyone: all processes.
        learner: those of the student.
    """
    views, images = answers.cls.shape[:2]
    share = learner.share

    def of_images(values: Tensor) -> Tensor:
        """[V, b, ...] of all processes -> [V, own, ...]."""
        return share.of(everyone.gather_images(values.transpose(0, 1))).transpose(0, 1)

    masks = everyone.gather_images(asked.unflatten(0, (views, images)).transpose(0, 1))  # [B, V, N]
    rows = everyone.gather_rows(answers.patches)  # [W, M, D]
    places = torch.zeros(masks.shape, dtype=torch.long, device=masks.device)
    for rank in range(everyone.size):
        own = masks[rank :: everyone.size].transpose(0, 1)
        numbers = torch.zeros(own.shape, dtype=torch.long, device=masks.device)
        numbers[own] = torch.arange(int(own.sum()), device=masks.device) + rank * rows.shape[1]
        places[rank :: everyone.size] = numbers.transpose(0, 1)
    wanted = share.of(places).transpose(0, 1)[share.of(masks).transpose(0, 1)]
    anchor = answers.anchor
    if anchor is not None:
        anchor = of_images(anchor.unflatten(0, (views, images))).flatten(0, 1)
    return Answers(of_images(answers.cls), rows.flatten(0, 1)[wanted], anchor)


def load_teacher(settings: DistillSettings) -> FrozenTeacher:
    """The teacher's networks, on the CPU.

    Raises:
        UserError: it cannot be loaded, or does not fit the run.
    """
    path, run = settings.teacher, run_normalization(settings)
    checkpoint = path if is_checkpoint(path) else next(reversed(list_checkpoints(path)), None)
    if settings.targets == "prototypes" and checkpoint is None:
        raise ConfigError(
            f"teacher {path} is no run and no checkpoint, so it has no heads whose prototypes could be "
            "learnt; set targets: features, which needs the weights alone"
        )
    heads: dict[str, ProjectionHead] = {}
    if checkpoint is None:
        backbone = load_backbone(path)
        assert backbone.card is not None
        own = backbone.card.normalization
    else:
        backbone, own = load_teacher_backbone(checkpoint)
        if settings.targets == "prototypes":
            heads = _teacher_heads(checkpoint, settings, backbone.embed_dim)
    _check_bands(path, own, run)
    if has_filters(backbone):
        check_filter_precision(settings)
    return FrozenTeacher(backbone, heads, own=own, run=run)


def _check_bands(path: Path, own: Normalization, run: Normalization) -> None:
    if own.bands != run.bands:
        raise ConfigError(
            f"teacher {path} was trained on the bands {', '.join(own.bands)} but data.sensor and data.bands "
            f"give {', '.join(run.bands)}; students see what their teacher sees"
        )


def _teacher_heads(checkpoint: Path, settings: DistillSettings, width: int) -> dict[str, ProjectionHead]:
    losses = settings_of(read_state(checkpoint), checkpoint).losses
    heads = {}
    for name in _HEADS:
        shape = getattr(losses, name)
        wanted = getattr(settings.losses, name).prototypes
        if wanted != shape.prototypes:
            raise ConfigError(
                f"losses.{name}.prototypes is {wanted} but the teacher {checkpoint} has {shape.prototypes}; "
                f"set it to {shape.prototypes}"
            )
        heads[name] = ProjectionHead(width, shape)
        heads[name].load_state_dict(read_networks(checkpoint, f"teacher.{name}."))
    return heads


def distill(
    settings: DistillSettings,
    *,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
) -> RunResult:
    """Runs a distillation; arguments and errors as in `trainer.pretrain`.

    Where students have processes of their own, the first process of each must be given the evaluators.
    """

    def begin(world: World) -> Distiller:
        return Distiller(settings, out, world, Listeners(progress, warn, evaluators or {}))

    return run_loop(begin, settings, out=out, resume=resume)
