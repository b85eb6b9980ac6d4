"""Self-supervised runs: one student and its moving average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import BackboneCard
from dinov3geo.backbones.device import resolve_device
from dinov3geo.data.crops import CropBatch
from dinov3geo.training.distributed import World, own_device
from dinov3geo.training.learner import Learner
from dinov3geo.training.loop import Loop, RunResult, run_loop
from dinov3geo.training.memory import check_memory
from dinov3geo.training.observe import Evaluator, Listeners, Progress
from dinov3geo.training.settings import TrainSettings
from dinov3geo.training.setup import build_recipe, build_student
from dinov3geo.training.ssl import Targets


class Trainer(Loop):
    """A run whose targets come from the moving average of its own student.

    Attributes:
        recipe: student, teacher and anchor.
    """

    settings: TrainSettings

    def __init__(
        self,
        settings: TrainSettings,
        out: Path,
        world: World | None = None,
        listeners: Listeners | None = None,
    ) -> None:
        """Builds everything at step 0; arguments as in `Loop`."""
        super().__init__(settings, out, world, listeners, patch_size=settings.model.patch_size)
        self.recipe = build_recipe(settings, group=self.world.group)
        self.learners = {"": Learner(settings, self.recipe, self.world, self.device)}

    def ask_teacher(self, batch: dict[str, Tensor]) -> tuple[CropBatch, Targets]:
        """Crops and what the EMA teacher and the anchor say of them."""
        settings, learner = self.settings, self.learners[""]
        crops = self.make_crops(batch)
        with learner.lower_precision():
            targets = self.recipe.targets(
                crops,
                teacher_temperature=settings.schedules.teacher_temperature.at(self.step, settings.steps),
                parts=settings.accumulate,
                anchored=learner.loss_weights(self.step)["gram"] > 0,
            )
        return crops, targets

    def backbones(self) -> dict[str, Backbone]:
        """The EMA teacher's backbone."""
        return {"": self.learners[""].averaged_backbone(lambda: build_student(self.settings))}

    def card(self, name: str) -> BackboneCard:
        """What a user of the exported weights must know."""
        model = self.settings.model
        return self.describe_weights(
            variant=model.variant, patch_size=model.patch_size, name=self.settings.name
        )

    def saved_state(self) -> dict[str, Any]:
        """See `Loop`; with the number of times that the anchor was renewed."""
        return super().saved_state() | {"num_refreshes": self.recipe.num_refreshes}


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

    def begin(world: World) -> Trainer:
        check_memory(settings, resolve_device(own_device(settings.device)), world.size)
        return Trainer(settings, out, world, Listeners(progress, warn, evaluators or {}))

    return run_loop(begin, settings, out=out, resume=resume)
