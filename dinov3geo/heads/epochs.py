"""The epochs of a fit, whatever is fitted: the best weights are kept, a fit that was cut off goes on."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov3geo.errors import DataError
from dinov3geo.heads.progress_file import ProgressFile

Progress = Callable[[int, int, float], None]
# A fit that was cut off loses at most the epochs of so many seconds.
SECONDS_BETWEEN_SAVES = 5.0


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a fit did.

    Attributes:
        losses: mean training loss per epoch.
        validation_errors: per epoch what held-out samples said, smaller being better; empty without them.
        best_epoch: 0-based epoch whose weights the head holds.
        resumed_epoch: epochs that an earlier, interrupted run had done.
    """

    losses: tuple[float, ...]
    validation_errors: tuple[float, ...]
    best_epoch: int
    resumed_epoch: int = 0


class EpochFit(ABC):
    """The state of one fit.

    Attributes:
        head: that is fitted, on its device.
        optimizer: of its weights.
        generator: of what is drawn at random, but for dropout.
        average: moving average of the weights, which is validated and kept in their place; empty for none.
        step: steps of the optimiser done.
        epoch: epochs done.
    """

    def __init__(
        self,
        head: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        patience: int,
        seed: int,
        validates: bool,
    ) -> None:
        """Begins at epoch 0.

        Args:
            head: to fit in place.
            optimizer: of its weights.
            epochs: at most.
            patience: epochs without a smaller validation error before the fit stops.
            seed: of everything random.
            validates: whether samples are held out.
        """
        self.head, self.optimizer, self.validates = head, optimizer, validates
        self.epochs, self.patience, self.seed = epochs, patience, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.average: dict[str, Tensor] = {}
        self.step = self.epoch = 0
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.best_epoch, self.best = -1, copy_state(head.state_dict())

    @abstractmethod
    def pass_over(self) -> float:
        """One epoch; gives its mean loss."""

    @abstractmethod
    def held_error(self) -> float:
        """Error of the held-out samples by the weights that the head holds; smaller is better."""

    @abstractmethod
    def facts(self) -> list[object]:
        """What tells this fit from others beside the weights it begins with: settings and data."""

    def run(self, progress: Progress | None, file: ProgressFile | None) -> FitResult:
        """All epochs; the head then holds the best weights, or the last ones where none are held out.

        Args:
            progress: called after each epoch with the epoch (from 1), their number and the mean loss.
            file: where the fit is kept while it runs, removed at the end; or None.
        """
        # Dropout draws from the global generator, so that one is seeded too and given back as it was.
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            fingerprint = "" if file is None else self._fingerprint()
            resumed = 0 if file is None else self._resume(file.read(fingerprint))
            saved = time.monotonic()
            while self.epoch < self.epochs and not self._has_stopped():
                self._advance()
                if progress is not None:
                    progress(self.epoch, self.epochs, self.losses[-1])
                if file is not None and time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                    file.write(fingerprint, self._snapshot())
                    saved = time.monotonic()
        self.head.load_state_dict(self.best if self.validates else self._state())
        self.head.eval()
        if file is not None:
            file.remove()
        best = self.best_epoch if self.validates else self.epoch - 1
        return FitResult(tuple(self.losses), tuple(self.errors), best, resumed)

    def _advance(self) -> None:
        self.losses.append(self.pass_over())
        self.epoch += 1
        if not self.validates:
            return
        self.errors.append(self._validate())
        if self.errors[-1] <= min(self.errors):
            self.best_epoch, self.best = self.epoch - 1, copy_state(self._state())

    def _has_stopped(self) -> bool:
        return bool(self.errors) and self.epoch - 1 - self.best_epoch >= self.patience

    def _state(self) -> dict[str, Tensor]:
        return self.average or self.head.state_dict()

    def _validate(self) -> float:
        current = copy_state(self.head.state_dict())
        self.head.load_state_dict(self._state())
        self.head.eval()
        with torch.no_grad():
            error = self.held_error()
        self.head.load_state_dict(current)
        return error

    def _fingerprint(self) -> str:
        """Equal for equal settings, weights to begin with and data (as far as their sums tell)."""
        sums = [float(tensor.double().sum()) for tensor in self.head.state_dict().values()]
        return repr([type(self).__name__, type(self.head).__name__, *sums, *self.facts()])

    def _snapshot(self) -> dict[str, Any]:
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "best": self.best,
            "losses": self.losses,
            "errors": self.errors,
            "numbers": [self.step, self.epoch, self.best_epoch],
            "generator": self.generator.get_state(),
            "dropout": torch.get_rng_state(),
        }

    def _resume(self, state: dict[str, Any] | None) -> int:
        if state is None:
            return 0
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.best = state["average"], state["best"]
        self.losses, self.errors = list(state["losses"]), list(state["errors"])
        self.step, self.epoch, self.best_epoch = state["numbers"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["dropout"])
        return self.epoch


def adamw(head: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that shrinks weights, but neither biases nor scales."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in head.parameters() if p.ndim > 1]},
        {"params": [p for p in head.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)


def copy_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def split_groups(groups: Sequence[str], share: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Splits samples so that no group lies on both sides.

    Args:
        groups: of each sample.
        share: of the groups to keep out; rounded up to one group if above 0.
        seed: of the draw.

    Returns:
        Indexes of the part to train on and of the part kept out.

    Raises:
        DataError: nothing would be left to train on.
    """
    if share == 0:
        return list(range(len(groups))), []
    names = sorted(set(groups))
    kept_out = max(1, round(share * len(names)))
    if kept_out >= len(names):
        raise DataError(
            f"a validation part of {share:g} leaves none of {len(names)} separate places to train on; "
            "set fit.validation_share=0, or add places that do not overlap"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {names[i] for i in order[:kept_out]}
    return (
        [i for i, g in enumerate(groups) if g not in chosen],
        [i for i, g in enumerate(groups) if g in chosen],
    )
