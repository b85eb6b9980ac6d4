"""The one training loop: step, log, save, resume; one process or many."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from dinov3geo.backbones.card import BackboneCard
from dinov3geo.backbones.device import resolve_device
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.backbones.zoo import RUN_EXPORT, save_backbone
from dinov3geo.data.crops import CropBatch
from dinov3geo.data.mixture import check_bands, chip_loader, locate_chips, open_sources
from dinov3geo.errors import DataError
from dinov3geo.training import checkpoint as checkpoints
from dinov3geo.training.continuing import check_out, check_same_run
from dinov3geo.training.distributed import World, open_world, own_device, whole
from dinov3geo.training.journal import METRICS_FILE, Clock, Journal, commit
from dinov3geo.training.observe import Evaluator, Listeners, Observer, Progress
from dinov3geo.training.optimizer import build_optimizer, clip_per_module, set_rates
from dinov3geo.training.parallel import prepare
from dinov3geo.training.settings import TrainSettings
from dinov3geo.training.setup import build_crop_makers, build_recipe, build_student, run_normalization
from dinov3geo.training.ssl import Targets

# Streams of randomness must not meet: crops, the networks' own draws (dropped paths, RoPE scale), crop sizes.
_SEED_CROPS, _SEED_NETWORK, _SEED_SIZES = 1, 2, 3


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended.

    Attributes:
        steps: made in all, over every sitting.
        stopped_by: signal that asked it to stop early, `--resume` goes on; None if it made every step.
        weights: exported teacher backbone.
        metrics: of the last logged step.
    """

    steps: int
    stopped_by: int | None
    weights: Path
    metrics: dict[str, float]


def step_seed(seed: int, step: int, stream: int, rank: int = 0) -> int:
    """Seed of one step: the same whether the run was interrupted before it or not."""
    mixed = torch.tensor([seed, step, stream, rank], dtype=torch.int64)
    factors = torch.tensor([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F], dtype=torch.int64)
    value = int((mixed + 1) @ factors)
    return (value ^ (value >> 29)) & 0x7FFFFFFF


class Trainer:
    """One run: networks, optimiser, data position and files."""

    def __init__(
        self,
        settings: TrainSettings,
        out: Path,
        world: World | None = None,
        listeners: Listeners | None = None,
    ) -> None:
        """Builds everything at step 0.

        Args:
            settings: of the run.
            out: its folder.
            world: the processes; this one alone if None.
            listeners: who hears of the run.
        """
        self.settings = settings
        self.out = out
        self.world = world or World()
        self.batch_size = self.world.images_per_process(settings.batch_size, settings.accumulate)
        self.device = resolve_device(own_device(settings.device))
        self.normalization = run_normalization(settings)
        self.crop_makers = build_crop_makers(settings)
        self.datasets = open_sources(settings.data)
        check_bands(self.datasets, settings.data)
        self.recipe = build_recipe(settings, group=self.world.group).to(self.device)
        self.student_call = prepare(self.recipe, settings.parallel, self.world, precision=settings.precision)
        self.optimizer = build_optimizer(self.recipe.student, settings.optimizer)
        self.observer = Observer(settings, out, listeners or Listeners(), writes=self.world.is_first)
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0

    def start_from(self, path: Path) -> None:
        """Takes networks and optimiser from another run.

        Steps and schedules begin anew, or go on from there if the settings say `keep_count`.
        """
        checkpoint = checkpoints.locate_checkpoint(path)
        checkpoints.load_networks(checkpoint, self.recipe, with_anchor=False)
        checkpoints.load_optimizer(checkpoint, self.optimizer)
        if self.settings.keep_count:
            self.step = checkpoints.read_state(checkpoint)["step"]

    def resume(self) -> None:
        """Goes on after this run's latest checkpoint.

        Raises:
            ConfigError: the settings differ from those of the run.
        """
        checkpoint = checkpoints.locate_checkpoint(self.out)
        state = checkpoints.read_state(checkpoint)
        check_same_run(state, self.settings, checkpoint)
        checkpoints.load_networks(checkpoint, self.recipe, with_anchor=True)
        checkpoints.load_optimizer(checkpoint, self.optimizer)
        self.recipe.num_refreshes = state["num_refreshes"]
        self.step = state["step"]
        self.skipped = state.get("skipped", 0)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)

    def save(self) -> None:
        """Writes a checkpoint and the teacher's backbone with its card."""
        state = {
            "step": self.step,
            "num_refreshes": self.recipe.num_refreshes,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "settings": self.settings.model_dump(mode="json"),
        }
        checkpoints.save_checkpoint(
            self.out,
            self.recipe,
            self.optimizer,
            state,
            keep=self.settings.checkpoints.keep_last,
            keep_every=self.settings.checkpoints.keep_every,
            world=self.world,
            sharded=self.student_call.sharded,
        )
        self.export()

    def teacher_backbone(self) -> VisionTransformer:
        """The EMA teacher's backbone, whole; every process must ask for it, if it is sharded."""
        teacher = self.recipe.teacher["backbone"]
        assert isinstance(teacher, VisionTransformer)
        if not self.student_call.sharded:
            return teacher
        tensors = {name: whole(tensor) for name, tensor in teacher.state_dict().items()}
        copy = build_student(self.settings).to(self.device).eval().requires_grad_(False)
        copy.load_state_dict(tensors)
        return copy

    def export(self) -> None:
        """Writes the teacher's backbone with its card: always one plain file."""
        teacher = self.teacher_backbone()
        if self.world.is_first:
            dtype = getattr(torch, self.settings.export.dtype)
            save_backbone(self.out / RUN_EXPORT, teacher, self.card(), dtype=dtype)

    def card(self) -> BackboneCard:
        """What a user of the exported weights must know."""
        sizes = [size for size in (dataset.gsd_range_m for dataset in self.datasets) if size is not None]
        export = self.settings.export
        return BackboneCard(
            name=self.settings.name,
            variant=self.settings.model.variant,
            patch_size=self.settings.model.patch_size,
            normalization=self.normalization,
            gsd_m=_round_outwards(sizes),
            trained_on=export.trained_on or tuple(source.path for source in self.settings.data.sources),
            licence=export.licence,
            notes=export.notes,
            recipe={
                "steps": self.step,
                "commit": commit(),
                "settings": self.settings.model_dump(mode="json", exclude={"data": {"root"}, "export": True}),
            },
        )

    def make_crops(self, batch: dict[str, Tensor]) -> CropBatch:
        """Crops of this process's chips for the present step, in the sizes drawn for all processes."""
        settings, step = self.settings, self.step
        generator = torch.Generator().manual_seed(step_seed(settings.seed, step, _SEED_SIZES))
        shares = torch.tensor([share for _, share in self.crop_makers])
        maker, _ = self.crop_makers[int(torch.multinomial(shares, 1, generator=generator))]
        seed = step_seed(settings.seed, step, _SEED_CROPS)
        return maker(batch["image"], batch["valid"], seed=seed, share=self.world.share)

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimiser step.

        Args:
            batch: `image` [B, C, S, S] and `valid` [B, S, S] of this process, on the device.

        Returns:
            Loss terms and their weighted `loss`, means over the processes, and gradient norms; scalars.
        """
        settings, step = self.settings, self.step
        schedules = settings.schedules
        crops = self.make_crops(batch)
        set_rates(
            self.optimizer,
            lr=schedules.lr.at(step, settings.steps),
            weight_decay=schedules.weight_decay.at(step, settings.steps),
            freeze_last_layer=step < settings.optimizer.freeze_last_layer_steps,
        )
        weights = self.recipe.weights(step, settings.steps, num_locals=settings.crops.local_count)
        with self._lower_precision():
            targets = self.recipe.targets(
                crops,
                teacher_temperature=schedules.teacher_temperature.at(step, settings.steps),
                parts=settings.accumulate,
                anchored=weights["gram"] > 0,
            )
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._backward(crops, targets, weights)
        norms = clip_per_module(self.recipe.student.named_children(), settings.optimizer.clip_norm)
        values = {**self._over_processes(terms, weights), **{f"grad_norm/{n}": v for n, v in norms.items()}}
        # Before the step: a finite loss with a gradient that is not would poison student and teacher.
        finite = self._is_finite(values, batch)
        if finite:
            self.optimizer.step()
            self.recipe.after_step(step, momentum=schedules.momentum.at(step, settings.steps))
        self.step += 1
        if finite and settings.watch.statistics and self.observer.is_due(settings.log_every, self.step):
            values |= self.observer.statistics(targets)
        return values

    def _backward(self, crops: CropBatch, targets: Targets, weights: dict[str, float]) -> dict[str, Tensor]:
        """Runs the student over the parts of a step and sums the gradients; returns the mean of each term."""
        parts = self.settings.accumulate
        size = crops.global_crops.shape[1] // parts
        sums: dict[str, Tensor] = {}
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            own, own_targets = crops, targets
            if parts > 1:
                own, own_targets = crops.of_images(rows), targets.of_images(rows, crops.patch_masks)
            # Every part and every process draws the same, so that their number does not matter.
            torch.manual_seed(step_seed(self.settings.seed, self.step, _SEED_NETWORK))
            with self.student_call.gathering(last=part == parts - 1):
                with self._lower_precision():
                    terms = self.student_call(own, own_targets)
                loss = torch.stack([value * weights[name] for name, value in terms.items()]).sum()
                (loss / parts).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / parts
        return sums

    def _over_processes(self, terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
        means = self.world.mean(torch.stack(list(terms.values())))
        factors = means.new_tensor([weights[name] for name in terms])
        return {"loss": means @ factors, **dict(zip(terms, means, strict=True))}

    def _is_finite(self, values: dict[str, Tensor], batch: dict[str, Tensor]) -> bool:
        """Whether the step may be made. Means over processes agree everywhere, and so does this answer.

        Raises:
            DataError: too many steps in a row could not be made.
        """
        if bool(torch.isfinite(torch.stack(list(values.values()))).all()):
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row <= self.settings.watch.max_skipped:
            self.observer.warn(
                f"step {self.step} is skipped: loss or gradient is not finite ({self.skipped} so far)"
            )
            return False
        kept = self.observer.keep_broken_batch(self.step, self.world.rank, batch, values, self._sources())
        names = [name for name, value in values.items() if name != "loss" and not bool(torch.isfinite(value))]
        raise DataError(
            f"loss or gradient is not finite in step {self.step} ({', '.join(names)}) and "
            f"{self.skipped_in_a_row - 1} before it; the last checkpoint is kept and the batch is described "
            f"in {kept}: look for corrupt pixels there, or lower schedules.lr, then go on with --resume"
        )

    def _lower_precision(self) -> torch.autocast:
        # Sharded weights are gathered in bfloat16 already.
        enabled = self.settings.precision == "bfloat16" and not self.student_call.sharded
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def run(self) -> RunResult:
        """Trains to the last step, or until SIGTERM or Ctrl-C asks to stop after the current one."""
        settings, progress = self.settings, self.observer.listeners.progress
        self.recipe.train()
        loader = self._batches()
        journal = Journal(
            self.out, writes=self.world.is_first, tensorboard=settings.watch.tensorboard, step=self.step
        )
        metrics: dict[str, float] = {}
        clock = Clock()
        with _stop_requests() as stop_asked, contextlib.closing(journal):
            while not (stopped_by := self._stop(stop_asked())) and self.step < settings.steps:
                batch = {
                    name: tensor.to(self.device, non_blocking=True) for name, tensor in next(loader).items()
                }
                clock.data_arrived()
                values = self.train_step(batch)
                if self.observer.is_due(settings.log_every, self.step):
                    metrics = self.observer.log(journal, self.step, values, clock, skipped=self.skipped)
                self._look(journal)
                if self.observer.is_due(settings.checkpoints.every, self.step):
                    self.save()
                if progress is not None:
                    progress(self.step, settings.steps, metrics)
                clock.step_done()
        early = self.step < settings.steps
        if early:
            self.save()
        return RunResult(self.step, stopped_by if early else None, self.out / RUN_EXPORT, metrics)

    def _look(self, journal: Journal) -> None:
        """Evaluations and pictures, where they are due."""
        watch, observer = self.settings.watch, self.observer
        evaluates = observer.is_due(watch.evaluate_every, self.step)
        draws = observer.is_due(watch.pictures_every, self.step)
        if not (evaluates or draws):
            return
        teacher = self.teacher_backbone()
        if not self.world.is_first:
            return
        if evaluates:
            numbers = observer.evaluate(teacher)
            if numbers:
                journal.write(self.step, numbers)
        if draws:
            observer.picture(journal, self.step, teacher, self._first_chips, self.normalization)

    def _first_chips(self, count: int) -> dict[str, Tensor]:
        data = self.settings.data.model_copy(update={"workers": 0})
        return next(iter(chip_loader(self.datasets, data, batch_size=count, seed=self.settings.seed)))

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        return iter(
            chip_loader(
                self.datasets,
                self.settings.data,
                batch_size=self.batch_size,
                seed=self.settings.seed,
                start=self.step * self.batch_size,
                rank=self.world.rank,
                world_size=self.world.size,
            )
        )

    def _sources(self) -> list[str]:
        """File and place of each chip of the present step."""
        return locate_chips(
            self.datasets,
            self.settings.data,
            batch_size=self.batch_size,
            seed=self.settings.seed,
            start=self.step * self.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def _stop(self, asked: int | None) -> int:
        """The signal that any process was sent, or 0: all stop after the same step."""
        if self.world.size == 1:
            return asked or 0
        return int(self.world.largest(torch.tensor([asked or 0], device=self.device)))


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], int | None]]:
    """Turns SIGTERM and SIGINT into a question that the loop asks between steps."""
    asked: int | None = None

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = number

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _round_outwards(ranges: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Range over all sources; pixel sizes carry rounding noise in their ninth digit."""
    if not ranges:
        return None
    return round(min(low for low, _ in ranges), 6), round(max(high for _, high in ranges), 6)


def pretrain(
    settings: TrainSettings,
    *,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
) -> RunResult:
    """Runs a configuration, together with the other processes that a launcher has started.

    Args:
        settings: of the run.
        out: folder for checkpoints, metrics and weights.
        resume: go on from the latest checkpoint in `out`; begins at step 0 if there is none yet.
        progress: called after every step with step, total and the latest metrics.
        warn: called with one line when something looks wrong.
        evaluators: by name; each gives numbers of the teacher's backbone, every `watch.evaluate_every` steps.

    Raises:
        ConfigError: `out` already holds a run and `resume` is false, or the settings do not fit it.
    """
    existing = check_out(out, resume=resume)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with open_world(resolve_device(own_device(settings.device))) as world:
        trainer = Trainer(settings, out, world, Listeners(progress, warn, evaluators or {}))
        if world.is_first:
            out.mkdir(parents=True, exist_ok=True)
        world.wait()
        if existing:
            trainer.resume()
        else:
            if world.is_first:
                (out / METRICS_FILE).unlink(missing_ok=True)
            if settings.start_from is not None:
                trainer.start_from(settings.start_from)
        if trainer.step == settings.steps:
            trainer.export()
        if world.is_first:
            temporary = out / "settings.json.tmp"
            temporary.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
            temporary.replace(out / "settings.json")
        return trainer.run()
