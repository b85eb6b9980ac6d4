"""Checkpoints that are whole or absent, without pickles.

OUT/checkpoints/step_00000500/
model.safetensors       student, teacher and anchor
optimizer.safetensors   AdamW moments by parameter name
state.json              step, counters and settings of the run
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3geo.backbones.zoo import read_tensors, write_tensors
from dinov3geo.errors import DataError
from dinov3geo.training.optimizer import load_optimizer_tensors, optimizer_tensors
from dinov3geo.training.ssl import SelfSupervisedRecipe

FOLDER = "checkpoints"
_PREFIX = "step_"
_STATE = "state.json"
_UNFINISHED = ".unfinished-"


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(state.parent for state in (run / FOLDER).glob(f"{_PREFIX}*/{_STATE}"))


def locate_checkpoint(path: Path) -> Path:
    """A checkpoint folder, given itself or its run's folder (then the latest).

    Raises:
        DataError: there is none.
    """
    if (path / _STATE).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise DataError(f"{path} holds no checkpoint; expected a run folder or a {FOLDER}/{_PREFIX}* folder")
    return found[-1]


def save_checkpoint(
    run: Path,
    recipe: SelfSupervisedRecipe,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Writes a checkpoint and deletes old ones.

    Args:
        run: output folder of the run.
        recipe: networks.
        optimizer: of the student.
        state: JSON-able; must hold `step`, the number of steps made.
        keep: checkpoints that stay.

    Returns:
        The checkpoint's folder.
    """
    final = run / FOLDER / f"{_PREFIX}{state['step']:08d}"
    if (final / _STATE).is_file():
        return final  # equal steps of one run are equal bits
    unfinished = run / FOLDER / f"{_UNFINISHED}{final.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    write_tensors(unfinished / "model.safetensors", _on_cpu(recipe.state_dict()))
    write_tensors(unfinished / "optimizer.safetensors", _on_cpu(optimizer_tensors(optimizer)))
    with (unfinished / _STATE).open("w", encoding="utf-8") as opened:
        opened.write(json.dumps(state, indent=1) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    shutil.rmtree(final, ignore_errors=True)  # what an interrupted deletion left
    # The rename is the moment at which the checkpoint exists.
    os.rename(unfinished, final)
    for old in list_checkpoints(run)[:-keep]:
        # The file that makes a folder a checkpoint goes first.
        (old / _STATE).unlink()
        shutil.rmtree(old)
    return final


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return state


def load_networks(checkpoint: Path, recipe: SelfSupervisedRecipe, *, with_anchor: bool) -> None:
    """Loads student and teacher, and the anchor if asked.

    Raises:
        DataError: the checkpoint is of another network.
    """
    tensors = read_tensors(checkpoint / "model.safetensors")
    try:
        if with_anchor:
            recipe.load_state_dict(tensors)
        else:
            recipe.load_parts(tensors)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise DataError(
            f"{checkpoint} does not fit the configured network and heads: {first}; "
            "use the model and losses settings of the run that wrote it"
        ) from error


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimiser's state.

    Raises:
        DataError: the checkpoint is of another network.
    """
    try:
        load_optimizer_tensors(optimizer, read_tensors(checkpoint / "optimizer.safetensors"))
    except KeyError as error:
        raise DataError(f"{checkpoint} has no optimiser state for {error}") from error
