"""What a run shows of itself: lines, warnings, evaluations, pictures, and the batch that broke it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.store import write_tensors, write_text
from dinov3geo.training.journal import Clock, Journal, memory_gib
from dinov3geo.training.pictures import normalise, pca_grid, save_picture
from dinov3geo.training.settings import RunSettings
from dinov3geo.training.ssl import Targets
from dinov3geo.training.watch import CollapseWatch, feature_statistics, target_statistics

PICTURES, BROKEN = "pictures", "broken_batches"

Progress = Callable[[int, int, dict[str, float]], None]
Evaluator = Callable[[Backbone], dict[str, float]]


@dataclass(frozen=True)
class Listeners:
    """What the caller of a run wants to hear, and what it knows to measure.

    Attributes:
        progress: called after every step with step, total and the latest metrics.
        warn: called with one line when something looks wrong.
        evaluators: by name; each takes the teacher's backbone and gives numbers for the metrics.
    """

    progress: Progress | None = None
    warn: Callable[[str], None] | None = None
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)


class Observer:
    """Writes down and reports; changes nothing in the run."""

    def __init__(self, settings: RunSettings, out: Path, listeners: Listeners, *, writes: bool) -> None:
        """Keeps what is needed.

        Args:
            settings: of the run.
            out: its folder.
            listeners: of the caller.
            writes: whether this process writes the files.
        """
        self.settings = settings
        self.out = out
        self.listeners = listeners
        self.writes = writes
        self.collapse = CollapseWatch(quiet_steps=settings.schedules.lr.warmup_steps)
        self._fixed: Tensor | None = None

    def is_due(self, every: int | None, step: int) -> bool:
        """Whether something that happens every so many steps happens after this one, the last included."""
        return every is not None and (step % every == 0 or step == self.settings.steps)

    def statistics(self, targets: Targets) -> dict[str, Tensor]:
        """Of this process's images; see `watch`."""
        numbers = target_statistics(targets.cls.flatten(0, 1))
        if len(targets.patches):
            own = target_statistics(targets.patches)
            numbers |= {f"patch_{name}": value for name, value in own.items()}
        return numbers if targets.seen is None else numbers | feature_statistics(targets.seen)

    def log(
        self, journal: Journal, step: int, values: dict[str, Tensor], clock: Clock, *, skipped: int
    ) -> dict[str, float]:
        """Writes a line, warns if need be, and returns the numbers."""
        metrics = {name: float(value) for name, value in values.items()}
        rates = clock.rates(self.settings.batch_size)
        rates["memory_gib"] = memory_gib(next(iter(values.values())).device)
        lr = self.settings.schedules.lr.at(step - 1, self.settings.steps)
        counted = {"skipped": float(skipped)} if skipped else {}
        journal.write(step, {"lr": lr, **metrics, **rates, **counted})
        for warning in self.collapse.check(step, metrics):
            self.warn(warning)
        return metrics

    def warn(self, text: str) -> None:
        """One line to who started the run."""
        if self.writes and self.listeners.warn is not None:
            self.listeners.warn(text)

    def evaluate(self, backbone: Backbone) -> dict[str, float]:
        """The numbers of all evaluators, under `eval/`."""
        numbers: dict[str, float] = {}
        for evaluator in self.listeners.evaluators.values():
            numbers |= {f"eval/{name}": value for name, value in evaluator(backbone).items()}
        return numbers

    def picture(
        self,
        journal: Journal,
        step: int,
        backbone: Backbone,
        chips: Callable[[int], dict[str, Tensor]],
        normalization: Normalization,
        *,
        name: str = "",
    ) -> None:
        """A PNG of the same chips every time.

        Args:
            journal: gets the picture too.
            step: for the name.
            backbone: of the teacher.
            chips: gives the first so many chips of the run; asked once.
            normalization: of the run.
            name: of the learner.
        """
        device = next(backbone.parameters()).device
        if self._fixed is None:
            batch = chips(self.settings.watch.pictures)
            self._fixed = normalise(batch["image"].to(device), batch["valid"].to(device), normalization)
        pixels = pca_grid(backbone, self._fixed)
        stem = f"{name}_step" if name else "step"
        save_picture(self.out / PICTURES / f"{stem}_{step:08d}.png", pixels)
        journal.picture(step, f"{name}/patches" if name else "patches", pixels)

    def keep_broken_batch(
        self, step: int, rank: int, batch: dict[str, Tensor], values: dict[str, Tensor], sources: list[str]
    ) -> Path:
        """Writes down a batch that gave no finite step.

        Args:
            step: that was skipped.
            rank: of this process.
            batch: its chips.
            values: losses and gradient norms.
            sources: file and place of each chip.

        Returns:
            A JSON file with the sources and numbers of each chip; the chips lie beside it.
        """
        path = self.out / BROKEN / f"step_{step:08d}_rank_{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path.with_suffix(".safetensors"), {n: t.cpu().contiguous() for n, t in batch.items()})
        lines = []
        for number, source in enumerate(sources):
            image = batch["image"][number].float()
            finite = image[torch.isfinite(image)]
            low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (None, None)
            share = finite.numel() / image.numel()
            valid = float(batch["valid"][number].float().mean())
            lines.append({"source": source, "low": low, "high": high, "finite": share, "valid": valid})
        numbers = {name: repr(float(value)) for name, value in values.items()}
        report = {"step": step, "rank": rank, "values": numbers, "chips": lines}
        write_text(path, json.dumps(report, indent=1) + "\n")
        return path
