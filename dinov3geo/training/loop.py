"""The one training loop: step, log, save, resume; one process or many, one student or several."""

from __future__ import annotations

import contextlib
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import BackboneCard
from dinov3geo.backbones.device import resolve_device
from dinov3geo.backbones.zoo import RUN_EXPORT, save_backbone
from dinov3geo.data.crops import CropBatch, CropMaker, Share
from dinov3geo.data.failures import readers_watched
from dinov3geo.data.mixture import check_bands, chip_loader, locate_chips, open_sources
from dinov3geo.errors import DataError
from dinov3geo.training import checkpoint as checkpoints
from dinov3geo.training.continuing import check_out, check_same_run
from dinov3geo.training.distributed import World, open_world, own_device
from dinov3geo.training.journal import METRICS_FILE, Clock, Journal, commit
from dinov3geo.training.learner import SEED_CROPS, SEED_SIZES, Learner, step_seed
from dinov3geo.training.observe import Listeners, Observer
from dinov3geo.training.settings import RunSettings
from dinov3geo.training.setup import build_crop_makers, run_normalization
from dinov3geo.training.ssl import Targets

# Folders of this machine say nothing to others.
_NOT_IN_CARDS: Any = {
    "data": {"root"},
    "export": True,
    "watch": {"knn", "dense_images", "dense_heights"},
}


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended.

    Attributes:
        steps: made in all, over every sitting.
        stopped_by: signal that asked it to stop early, `--resume` goes on; None if it made every step.
        weights: exported backbone, or the folder of those of several students.
        metrics: of the last logged step.
        asked_by: signal that asked it to stop, also where that came in the last step; callers with more to do
            end there.
    """

    steps: int
    stopped_by: int | None
    weights: Path
    metrics: dict[str, float]
    asked_by: int | None = None


class Loop(ABC):
    """One run: who learns, the data's position, and the files.

    What is learnt is up to the classes below: `Trainer` (self-supervised) and `Distiller`.

    Attributes:
        learners: by name, those that this process trains.
        step: number of steps made.
    """

    settings: RunSettings
    learners: dict[str, Learner]

    def __init__(
        self,
        settings: RunSettings,
        out: Path,
        world: World | None = None,
        listeners: Listeners | None = None,
        *,
        patch_size: int,
    ) -> None:
        """Opens the data at step 0; the classes below then build the networks.

        Args:
            settings: of the run.
            out: its folder.
            world: the processes; this one alone if None.
            listeners: who hears of the run.
            patch_size: that crops are multiples of, and masks are made of.
        """
        self.settings = settings
        self.out = out
        self.world = world or World()
        self.batch_size = self.world.images_per_process(settings.batch_size, settings.accumulate)
        self.device = resolve_device(own_device(settings.device))
        self.normalization = run_normalization(settings)
        self.crop_makers = build_crop_makers(settings, patch_size=patch_size)
        self.datasets = open_sources(settings.data)
        check_bands(self.datasets, settings.data)
        self.observer = Observer(settings, out, listeners or Listeners(), writes=self.world.is_first)
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0

    @abstractmethod
    def ask_teacher(self, batch: dict[str, Tensor]) -> tuple[CropBatch, Targets]:
        """The crops that this process's students see in the present step, and what they are to say of them.

        Args:
            batch: `image` [B, C, S, S] and `valid` [B, S, S] of this process, on the device.
        """

    @abstractmethod
    def backbones(self) -> dict[str, Backbone]:
        """Averaged backbones by learner, whole; every process must ask for them."""

    @abstractmethod
    def card(self, name: str) -> BackboneCard:
        """What a user of a learner's exported weights must know."""

    def describe_weights(self, *, variant: str, patch_size: int, name: str) -> BackboneCard:
        """A card with what the run knows of itself."""
        sizes = [size for size in (dataset.gsd_range_m for dataset in self.datasets) if size is not None]
        export = self.settings.export
        return BackboneCard(
            name=name,
            variant=variant,
            patch_size=patch_size,
            normalization=self.normalization,
            gsd_m=export.gsd_m or round_outwards(sizes),
            trained_on=export.trained_on or tuple(source.path for source in self.settings.data.sources),
            licence=export.licence,
            notes=export.notes,
            recipe={
                "steps": self.step,
                "commit": commit(),
                "settings": self.settings.model_dump(mode="json", exclude=_NOT_IN_CARDS),
            },
        )

    def join_values(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the numbers of learners that this process does not train; called by every process."""
        return values

    def statistics(self, targets: Targets) -> dict[str, Tensor]:
        """Numbers of a logged step that show how the targets lie."""
        return self.observer.statistics(targets)

    def saved_state(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "settings": self.settings.model_dump(mode="json"),
        }

    def start_from(self, path: Path) -> None:
        """Takes networks and optimiser from another run.

        Steps and schedules begin anew, or go on from there if the settings say `keep_count`.
        """
        checkpoint = checkpoints.locate_checkpoint(path)
        for learner in self.learners.values():
            learner.load(checkpoint, with_anchor=False)
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
        for learner in self.learners.values():
            learner.load(checkpoint, with_anchor=True)
            learner.recipe.num_refreshes = state.get("num_refreshes", 0)
        self.step = state["step"]
        self.skipped = state.get("skipped", 0)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)

    def save(self) -> None:
        """Writes a checkpoint, and the averaged backbones with their cards."""
        checkpoints.save_checkpoint(
            self.out,
            [part for learner in self.learners.values() for part in learner.parts()],
            self.saved_state(),
            keep=self.settings.checkpoints.keep_last,
            keep_every=self.settings.checkpoints.keep_every,
            world=self.world,
        )
        self.export()

    @property
    def weights(self) -> Path:
        """Where the exported weights are."""
        return self.out / RUN_EXPORT

    def export_path(self, name: str) -> Path:
        """Where a learner's weights are written."""
        return self.out / name / RUN_EXPORT

    def export(self) -> None:
        """Writes the averaged backbones with their cards: always one plain file each."""
        dtype = getattr(torch, self.settings.export.dtype)
        for name, backbone in self.backbones().items():
            if self.learners[name].world.is_first:
                save_backbone(self.export_path(name), backbone, self.card(name), dtype=dtype)

    def make_crops(
        self,
        batch: dict[str, Tensor],
        share: Share | None = None,
        makers: Sequence[tuple[CropMaker, float]] | None = None,
    ) -> CropBatch:
        """Crops of chips for the present step, in the sizes drawn for all processes.

        Args:
            batch: chips.
            share: of the step's chips that these are; this process's if None.
            makers: for each choice of sizes, with its share of the steps; those of the run if None.
        """
        settings, step = self.settings, self.step
        generator = torch.Generator().manual_seed(step_seed(settings.seed, step, SEED_SIZES))
        makers = makers or self.crop_makers
        often = torch.tensor([part for _, part in makers])
        maker, _ = makers[int(torch.multinomial(often, 1, generator=generator))]
        seed = step_seed(settings.seed, step, SEED_CROPS)
        return maker(batch["image"], batch["valid"], seed=seed, share=share or self.world.share)

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimiser step of every learner.

        Args:
            batch: `image` [B, C, S, S] and `valid` [B, S, S] of this process, on the device.

        Returns:
            Loss terms and their weighted `loss`, means over the processes, and gradient norms; scalars, by
            learner.
        """
        settings, step = self.settings, self.step
        crops, targets = self.ask_teacher(batch)
        values = {
            _under(name, key): value
            for name, learner in self.learners.items()
            for key, value in learner.learn(step, crops, targets).items()
        }
        # Before the step: a finite loss with a gradient that is not would poison student and teacher.
        finite = self._is_finite(values, batch)
        if finite:
            for learner in self.learners.values():
                learner.apply(step)
        self.step += 1
        if finite and settings.watch.statistics and self.observer.is_due(settings.log_every, self.step):
            values |= self.statistics(targets)
        return values

    def _is_finite(self, values: dict[str, Tensor], batch: dict[str, Tensor]) -> bool:
        """Whether the step may be made: the same answer in all processes.

        Raises:
            DataError: too many steps in a row could not be made.
        """
        broken = (~torch.isfinite(torch.stack(list(values.values())))).any()
        if not bool(self.world.largest(broken.to(torch.int32))):
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
        names = [
            name
            for name, value in values.items()
            if not name.endswith("loss") and not bool(torch.isfinite(value))
        ]
        raise DataError(
            f"loss or gradient is not finite in step {self.step} ({', '.join(names)}) and "
            f"{self.skipped_in_a_row - 1} before it; the last checkpoint is kept and the batch is described "
            f"in {kept}: look for corrupt pixels there, or lower schedules.lr, then go on with --resume"
        )

    def run(self) -> RunResult:
        """Trains to the last step, or until SIGTERM or Ctrl-C asks to stop after the current one."""
        settings, progress = self.settings, self.observer.listeners.progress
        for learner in self.learners.values():
            learner.recipe.train()
        loader = self._batches()
        journal = Journal(
            self.out, writes=self.world.is_first, tensorboard=settings.watch.tensorboard, step=self.step
        )
        metrics: dict[str, float] = {}
        clock = Clock()
        with _stop_requests() as stop_asked, contextlib.closing(journal), readers_watched():
            while not (stopped_by := self._stop(stop_asked())) and self.step < settings.steps:
                batch = {
                    name: tensor.to(self.device, non_blocking=True) for name, tensor in next(loader).items()
                }
                clock.data_arrived()
                values = self.train_step(batch)
                if self.observer.is_due(settings.log_every, self.step):
                    values = self.join_values(values)
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
        asked_by = stopped_by or None
        return RunResult(self.step, asked_by if early else None, self.weights, metrics, asked_by)

    def _look(self, journal: Journal) -> None:
        """Evaluations and pictures, where they are due."""
        watch, observer = self.settings.watch, self.observer
        evaluates = observer.is_due(watch.evaluate_every, self.step)
        draws = observer.is_due(watch.pictures_every, self.step)
        if not (evaluates or draws):
            return
        numbers: dict[str, Tensor] = {}
        for name, backbone in self.backbones().items():
            if not self.learners[name].world.is_first:
                continue
            if evaluates:
                found = observer.evaluate(backbone)
                numbers |= {_under(name, key): torch.tensor(value) for key, value in found.items()}
            if draws:
                observer.picture(
                    journal, self.step, backbone, self._first_chips, self.normalization, name=name
                )
        numbers = self.join_values(numbers)
        if numbers:
            journal.write(self.step, {name: float(value) for name, value in numbers.items()})

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
                warn=self.observer.warn,
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


def _under(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key


def round_outwards(ranges: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Range over all sources; pixel sizes carry rounding noise in their ninth digit."""
    if not ranges:
        return None
    return round(min(low for low, _ in ranges), 6), round(max(high for _, high in ranges), 6)


def run_loop(begin: Callable[[World], Loop], settings: RunSettings, *, out: Path, resume: bool) -> RunResult:
    """Builds a run, takes up what there is of it, and lets it run.

    Args:
        begin: builds it at step 0 for the given processes.
        settings: of the run.
        out: its folder.
        resume: go on from the latest checkpoint in `out`.
    """
    existing = check_out(out, resume=resume)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with open_world(resolve_device(own_device(settings.device))) as world:
        loop = begin(world)
        if world.is_first:
            out.mkdir(parents=True, exist_ok=True)
        world.wait()
        if existing:
            loop.resume()
        else:
            if world.is_first:
                (out / METRICS_FILE).unlink(missing_ok=True)
            if settings.start_from is not None:
                loop.start_from(settings.start_from)
        if loop.step == settings.steps:
            loop.export()
        if world.is_first:
            temporary = out / "settings.json.tmp"
            temporary.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
            temporary.replace(out / "settings.json")
        return loop.run()
