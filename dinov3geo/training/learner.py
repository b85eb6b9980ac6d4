"""One network that learns: its recipe, its layout, its optimiser, and what it does in a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.data.crops import CropBatch
from dinov3geo.training import checkpoint as checkpoints
from dinov3geo.training.distributed import World, whole
from dinov3geo.training.optimizer import build_optimizer, clip_per_module, optimizer_tensors, set_rates
from dinov3geo.training.parallel import prepare
from dinov3geo.training.recipe import Recipe
from dinov3geo.training.settings import RunSettings
from dinov3geo.training.ssl import Targets

# Streams of randomness must not meet: crops, the networks' own draws (dropped paths, RoPE scale), crop sizes.
SEED_CROPS, SEED_NETWORK, SEED_SIZES = 1, 2, 3


def step_seed(seed: int, step: int, stream: int, rank: int = 0) -> int:
    """Seed of one step: the same whether the run was interrupted before it or not."""
    mixed = torch.tensor([seed, step, stream, rank], dtype=torch.int64)
    factors = torch.tensor([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F], dtype=torch.int64)
    value = int((mixed + 1) @ factors)
    return (value ^ (value >> 29)) & 0x7FFFFFFF


class Learner:
    """A recipe in training.

    Attributes:
        name: of the student; empty for the only one of a run.
        recipe: networks.
        world: the processes that train it.
        call: the student's pass in the layout of the run.
        optimizer: of the student.
    """

    def __init__(
        self,
        settings: RunSettings,
        recipe: Recipe,
        world: World,
        device: torch.device,
        *,
        name: str = "",
        lr_factor: float = 1.0,
    ) -> None:
        """Lays the recipe out and builds its optimiser.

        Args:
            settings: of the run.
            recipe: with its initial weights; moved and changed in place.
            world: the processes that train it.
            device: of this process.
            name: of the student.
            lr_factor: of the run's learning rate.
        """
        self.settings = settings
        self.world = world
        self.device = device
        self.name = name
        self.lr_factor = lr_factor
        self.recipe = recipe.to(device)
        self.call = prepare(self.recipe, settings.parallel, world, precision=settings.precision)
        self.optimizer = build_optimizer(self.recipe.student, settings.optimizer)

    def lower_precision(self, *, sharded: bool | None = None) -> torch.autocast:
        """Autocast of the run; sharded weights are gathered in bfloat16 already."""
        sharded = self.call.sharded if sharded is None else sharded
        enabled = self.settings.precision == "bfloat16" and not sharded
        # Rounded weights that an earlier call left behind would make a repeated forward pass another one.
        cached = self.settings.parallel.recompute != "selective"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=cached)

    def loss_weights(self, step: int) -> dict[str, float]:
        """Factor of each loss term in a step."""
        settings = self.settings
        return self.recipe.weights(step, settings.steps, num_locals=settings.crops.local_count)

    def learn(self, step: int, crops: CropBatch, targets: Targets) -> dict[str, Tensor]:
        """Forms the gradients of a step; the networks are not changed.

        Returns:
            Loss terms and their weighted `loss`, means over the learner's processes, and gradient norms.
        """
        settings, schedules = self.settings, self.settings.schedules
        set_rates(
            self.optimizer,
            lr=self.lr_factor * schedules.lr.at(step, settings.steps),
            weight_decay=schedules.weight_decay.at(step, settings.steps),
            freeze_last_layer=step < settings.optimizer.freeze_last_layer_steps,
        )
        weights = self.loss_weights(step)
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._backward(step, crops, targets, weights)
        norms = clip_per_module(self.recipe.student.named_children(), settings.optimizer.clip_norm)
        means = self.world.mean(torch.stack(list(terms.values())))
        factors = means.new_tensor([weights[name] for name in terms])
        values = {"loss": means @ factors, **dict(zip(terms, means, strict=True))}
        return values | {f"grad_norm/{name}": norm for name, norm in norms.items()}

    def _backward(
        self, step: int, crops: CropBatch, targets: Targets, weights: dict[str, float]
    ) -> dict[str, Tensor]:
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
            torch.manual_seed(step_seed(self.settings.seed, step, SEED_NETWORK))
            with self.call.gathering(last=part == parts - 1):
                with self.lower_precision():
                    terms = self.call(own, own_targets)
                loss = torch.stack([value * weights[name] for name, value in terms.items()]).sum()
                (loss / parts).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / parts
        return sums

    def apply(self, step: int) -> None:
        """Makes the step whose gradients are there."""
        self.optimizer.step()
        self.recipe.after_step(step, momentum=self.settings.schedules.momentum.at(step, self.settings.steps))

    def averaged_backbone(self, build: Callable[[], Backbone]) -> Backbone:
        """The moving average's backbone, whole; every process must ask for it, if it is sharded.

        Args:
            build: gives a network of the same shape, to be filled where the average is sharded.
        """
        average = self.recipe.teacher["backbone"]
        assert isinstance(average, Backbone)
        if not self.call.sharded:
            return average
        tensors = {name: whole(tensor) for name, tensor in average.state_dict().items()}
        copy = build().to(self.device).eval().requires_grad_(False)
        copy.load_state_dict(tensors)
        return copy

    def parts(self) -> list[checkpoints.Part]:
        """What a checkpoint holds of it."""
        tensors = {
            checkpoints.MODEL: self.recipe.state_dict(),
            checkpoints.OPTIMIZER: optimizer_tensors(self.optimizer),
        }
        return [
            checkpoints.Part(checkpoints.part_name(kind, self.name), own, self.world, self.call.sharded)
            for kind, own in tensors.items()
        ]

    def load(self, checkpoint: Path, *, with_anchor: bool) -> None:
        """Takes networks and optimiser from a checkpoint.

        Raises:
            DataError: it is of another network.
        """
        checkpoints.load_networks(
            checkpoint, self.recipe, self.world, with_anchor=with_anchor, student=self.name
        )
        checkpoints.load_optimizer(checkpoint, self.optimizer, self.world, student=self.name)
