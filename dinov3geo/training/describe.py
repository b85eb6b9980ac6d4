"""What a run would do, without doing it."""

from __future__ import annotations

from pathlib import Path

import torch

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.device import resolve_device
from dinov3geo.backbones.hub import is_hub_name
from dinov3geo.backbones.zoo import BUNDLED
from dinov3geo.data.indexed import IndexedChips
from dinov3geo.data.mixture import DataSettings, check_bands, network_bands, open_sources
from dinov3geo.training.checkpoint import locate_checkpoint
from dinov3geo.training.continuing import check_out
from dinov3geo.training.distillation import check_width
from dinov3geo.training.distiller import build_student as build_student_of
from dinov3geo.training.distiller import load_teacher, student_worlds
from dinov3geo.training.distributed import World
from dinov3geo.training.filter_fit import check_weights, empty_bank
from dinov3geo.training.memory import count_parameters, memory_bytes, size_of, tokens_per_image
from dinov3geo.training.projection import ProjectionHead
from dinov3geo.training.settings import (
    DistillSettings,
    FilterSettings,
    ModelSettings,
    RunSettings,
    TrainSettings,
)
from dinov3geo.training.setup import build_crop_makers, build_student, load_anchor, run_normalization


def describe(
    settings: TrainSettings, out: Path | None = None, *, resume: bool = False, ranks: int = 1
) -> list[tuple[str, str]]:
    """Lines of a dry run: data found, model size, memory estimate, steps.

    Args:
        settings: of the run.
        out: its folder, or None to leave it unchecked.
        resume: whether the run would go on from a checkpoint in `out`.
        ranks: processes that the run would have.

    Raises:
        UserError: anything that would stop the run before its first step, except an anchor, filters or a run
            to start from whose path does not exist yet: these are told among the lines.
    """
    patch_size = settings.model.patch_size
    lines, per_rank = _beginning(settings, out, resume=resume, ranks=ranks, patch_size=patch_size)
    filters = settings.model.filters
    if filters is not None and _is_missing(filters):
        lines.append(("filters", f"{filters} ARE MISSING"))
        model = settings.model.model_copy(update={"filters": None})
        settings = settings.model_copy(update={"model": model})
    backbone, heads = count_parameters(settings)
    lines += [
        *_other_runs(settings),
        ("backbone", f"{settings.model.variant}, {backbone / 1e6:,.1f} M parameters"),
        ("heads", f"{heads / 1e6:,.1f} M parameters"),
        *_crop_lines(settings),
        (
            "processes",
            f"{ranks} with {per_rank} images each, {settings.accumulate} part(s) a step, "
            f"layout {settings.parallel.layout}, recompute {settings.parallel.recompute}",
        ),
        (
            "memory per process (estimate)",
            f"{memory_bytes(settings, ranks) / 2**30:,.1f} GiB for weights, optimiser and activations",
        ),
        *_ending(settings),
    ]
    return lines


def describe_distillation(
    settings: DistillSettings, out: Path | None = None, *, resume: bool = False, ranks: int = 1
) -> list[tuple[str, str]]:
    """The same of a distillation; arguments and errors as in `describe`."""
    teacher, patch_size, width = _teacher_line(settings)
    lines, per_rank = _beginning(settings, out, resume=resume, ranks=ranks, patch_size=patch_size)
    counts = [student.processes for student in settings.students]
    if counts[0] is not None:
        student_worlds(settings, World(0, ranks))
    lines.append(("teacher", teacher))
    for student in settings.students:
        if student.filters is not None and _is_missing(student.filters):
            lines.append((f"filters of {student.name}", f"{student.filters} ARE MISSING"))
            student = student.model_copy(update={"filters": None})
        with torch.device("meta"):
            backbone = build_student_of(settings, student, patch_size)
        if width is not None:
            check_width(settings, backbone.embed_dim, width)
        own = World(0, student.processes or ranks).images_per_process(
            settings.batch_size, settings.accumulate
        )
        memory = _student_bytes(settings, backbone, student.processes or ranks) / 2**30
        often = (
            f"{student.processes or ranks} process(es), {own} images each; at least {memory:,.1f} GiB for "
            "weights, gradients and optimiser"
        )
        lines.append(
            (
                f"student {student.name}",
                f"{student.variant}, {size_of(backbone) / 1e6:,.1f} M parameters, stride "
                f"{backbone.patch_size}; {often}",
            )
        )
    order = "in turn" if counts[0] is None else "at the same time"
    lines += [
        ("processes", f"{ranks}; the teacher sees {per_rank} images in each, students learn {order}"),
        *_ending(settings),
    ]
    return lines


def describe_filters(settings: FilterSettings, out: Path, *, overwrite: bool) -> list[tuple[str, str]]:
    """The same of a filter bank; arguments and errors as in `filter_fit.fit_filters`."""
    check_weights(out, overwrite=overwrite)
    with torch.device("meta"):
        bank = empty_bank(settings, run_normalization(settings))
    kernels = ", ".join(f"{kernel.count} of {kernel.size} x {kernel.size}" for kernel in settings.kernels)
    return [
        ("device", str(resolve_device(settings.device))),
        *_data_lines(settings.data),
        ("filters", f"{kernels} pixels: {bank.config.num_responses:,} responses a cell"),
        ("features", f"{settings.embed_dim}, whitened over {settings.images:,} chips"),
    ]


def _teacher_line(settings: DistillSettings) -> tuple[str, int, int | None]:
    """What the students learn from, the patch size of those that name none, and its width if it is there."""
    what = "scores of its heads" if settings.targets == "prototypes" else "its features"
    path = settings.teacher
    if _is_missing(path):
        return f"{path} IS MISSING; students learn {what}", ModelSettings().patch_size, None
    teacher = load_teacher(settings)
    size = size_of(teacher) / 1e6
    line = f"{path}: {size:,.1f} M parameters; students learn {what}"
    return line, teacher.backbone.patch_size, teacher.backbone.embed_dim


def _is_missing(path: Path) -> bool:
    """Whether nothing is there yet: another run may be to make it."""
    return str(path) not in BUNDLED and not is_hub_name(str(path)) and not path.exists()


def _student_bytes(settings: DistillSettings, backbone: Backbone, ranks: int) -> int:
    """Weights, gradients, two AdamW moments and the moving average of a student, on each process."""
    heads = (settings.losses.dino_head, settings.losses.ibot_head)
    with torch.device("meta"):
        own = [ProjectionHead(backbone.embed_dim, head) for head in heads]
    trained = size_of(backbone)
    if settings.targets == "prototypes":
        trained += sum(size_of(head) for head in own)
    return 4 * 5 * trained // (ranks if settings.parallel.layout == "shard" else 1)


def _beginning(
    settings: RunSettings, out: Path | None, *, resume: bool, ranks: int, patch_size: int
) -> tuple[list[tuple[str, str]], int]:
    """Lines about device and data, and the images of a step for each process."""
    lines = [("device", str(resolve_device(settings.device))), ("precision", settings.precision)]
    per_rank = World(0, ranks).images_per_process(settings.batch_size, settings.accumulate)
    if out is not None:
        check_out(out, resume=resume)
    build_crop_makers(settings, patch_size=patch_size)
    return [*lines, *_data_lines(settings.data)], per_rank


def _data_lines(data: DataSettings) -> list[tuple[str, str]]:
    """What was found in every source, and the bands."""
    datasets = open_sources(data)
    check_bands(datasets, data)
    lines = []
    for source, dataset in zip(data.sources, datasets, strict=True):
        noun = dataset.noun if isinstance(dataset, IndexedChips) else "scenes"
        lines.append((f"data {source.path}", f"{len(dataset):,} {noun}"))
    return [*lines, ("bands", ", ".join(network_bands(data)))]


def _ending(settings: RunSettings) -> list[tuple[str, str]]:
    images = settings.steps * settings.batch_size
    return [
        ("steps", f"{settings.steps:,} of {settings.batch_size} images = {images:,}"),
        ("learning rate", _rates(settings)),
    ]


def _other_runs(settings: TrainSettings) -> list[tuple[str, str]]:
    """What the run begins from, and whether it is there."""
    lines = []
    if settings.start_from is not None:
        missing = not settings.start_from.exists()
        if not missing:
            locate_checkpoint(settings.start_from)
        lines.append(("start from", f"{settings.start_from}{' IS MISSING' if missing else ''}"))
    anchor = settings.gram.anchor
    if anchor is not None and _is_missing(anchor):
        lines.append(("gram anchor", f"{anchor} IS MISSING"))
    else:
        with torch.device("meta"):
            student = build_student(settings)
        load_anchor(settings, student)
        if settings.gram.wanted:
            lines.append(("gram anchor", "the EMA teacher" if anchor is None else str(anchor)))
    return lines


def _crop_lines(settings: TrainSettings) -> list[tuple[str, str]]:
    lines = []
    for crops, share in settings.crop_choices():
        gram = "" if crops.gram_size is None else f", gram {crops.gram_size}"
        often = "" if share == 1 else f" in {share:.0%} of the steps"
        tokens = tokens_per_image(settings, crops)
        lines.append(
            (
                "crops",
                f"2 x {crops.global_size} + {crops.local_count} x {crops.local_size}{gram}{often}: "
                f"{tokens} tokens per image with gradient",
            )
        )
    return lines


def _rates(settings: RunSettings) -> str:
    rate = settings.schedules.lr
    values = [rate.at(step, settings.steps) for step in (0, settings.steps // 2, settings.steps - 1)]
    return ", ".join(f"{value:.3g}" for value in values) + " in the first, middle and last step"
