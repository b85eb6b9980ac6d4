"""Checkpoints that are whole or absent, without pickles, for any number of processes.

OUT/checkpoints/step_00000500/
model.safetensors       student, teacher and anchor
optimizer.safetensors   AdamW moments by parameter name
state.json              step, counters and settings of the run

A distillation has these files for each of its students, NAME.model and NAME.optimizer.

Where weights are sharded, `model/` and `optimizer/` hold one safetensors file per process instead, written
by `torch.distributed.checkpoint`. Either form is read by any number of processes in either layout.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3geo.backbones.zoo import read_tensors, write_tensors
from dinov3geo.errors import DataError
from dinov3geo.training.distributed import World
from dinov3geo.training.optimizer import optimizer_tensors
from dinov3geo.training.recipe import Recipe

FOLDER = "checkpoints"
MODEL, OPTIMIZER = "model", "optimizer"
_PREFIX = "step_"
_STATE = "state.json"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Part:
    """One file, or folder of shards, of a checkpoint.

    Attributes:
        name: of the file without its ending.
        tensors: by name, whole or this process's parts.
        world: the processes that hold them.
        sharded: every one of them writes its part; otherwise the first writes all.
    """

    name: str
    tensors: dict[str, Tensor]
    world: World
    sharded: bool = False


def part_name(kind: str, student: str) -> str:
    """Name of a student's networks (`MODEL`) or moments (`OPTIMIZER`); a lone student has no name."""
    return f"{student}.{kind}" if student else kind


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(state.parent for state in (run / FOLDER).glob(f"{_PREFIX}*/{_STATE}"))


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one whole checkpoint."""
    return (path / _STATE).is_file()


def locate_checkpoint(path: Path) -> Path:
    """A checkpoint folder, given itself or its run's folder (then the latest).

    Raises:
        DataError: there is none.
    """
    if is_checkpoint(path):
        return path
    found = list_checkpoints(path)
    if not found:
        raise DataError(f"{path} holds no checkpoint; expected a run folder or a {FOLDER}/{_PREFIX}* folder")
    return found[-1]


def save_checkpoint(
    run: Path,
    parts: Sequence[Part],
    state: dict[str, Any],
    *,
    keep: int,
    keep_every: int | None = None,
    world: World | None = None,
) -> Path:
    """Writes a checkpoint and deletes old ones; called by every process.

    Args:
        run: output folder of the run.
        parts: what this process has a share in.
        state: JSON-able; must hold `step`, the number of steps made.
        keep: latest checkpoints that stay.
        keep_every: checkpoints whose step is a multiple of this stay for ever.
        world: the processes of the run.

    Returns:
        The checkpoint's folder.
    """
    world = world or World()
    final = run / FOLDER / f"{_PREFIX}{state['step']:08d}"
    exists = is_checkpoint(final)
    world.wait()  # all have looked before the first of them writes
    if exists:
        return final  # equal steps of one run are equal bits
    unfinished = run / FOLDER / f"{_UNFINISHED}{final.name}"
    if world.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    world.wait()
    for part in parts:
        if part.sharded:
            _write_shards(unfinished / part.name, part.tensors, part.world)
        elif part.world.is_first:
            write_tensors(unfinished / f"{part.name}.safetensors", _on_cpu(part.tensors))
    world.wait()
    if world.is_first:
        _finish(unfinished, final, state)
        _delete_old(run, keep, keep_every)
    world.wait()
    return final


def _finish(unfinished: Path, final: Path, state: dict[str, Any]) -> None:
    with (unfinished / _STATE).open("w", encoding="utf-8") as opened:
        opened.write(json.dumps(state, indent=1) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    shutil.rmtree(final, ignore_errors=True)  # what an interrupted deletion left
    # The rename is the moment at which the checkpoint exists.
    os.rename(unfinished, final)


def _delete_old(run: Path, keep: int, keep_every: int | None) -> None:
    for old in list_checkpoints(run)[:-keep]:
        if keep_every is not None and int(old.name.removeprefix(_PREFIX)) % keep_every == 0:
            continue
        # The file that makes a folder a checkpoint goes first.
        (old / _STATE).unlink()
        shutil.rmtree(old)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write_shards(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder.mkdir(exist_ok=True)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    # Scalars (the optimiser's step counts) become vectors: a shard of a file has at least one dimension.
    shaped = {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}
    save(shaped, storage_writer=writer, process_group=world.group, no_dist=False)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return state


def load_networks(
    checkpoint: Path, recipe: Recipe, world: World, *, with_anchor: bool, student: str = ""
) -> None:
    """Loads student and teacher, and the anchor if asked; called by every process.

    Args:
        checkpoint: to read.
        recipe: to fill.
        world: the processes that hold it.
        with_anchor: the anchor too.
        student: name, where the checkpoint holds several.

    Raises:
        DataError: the checkpoint is of another network.
    """
    wanted = {n: t for n, t in recipe.state_dict().items() if with_anchor or not n.startswith("anchor.")}
    ignored = () if with_anchor else ("anchor.",)
    _fill(wanted, checkpoint, part_name(MODEL, student), world, ignored=ignored)


def load_optimizer(
    checkpoint: Path, optimizer: torch.optim.Optimizer, world: World, *, student: str = ""
) -> None:
    """Loads the optimiser's state; called by every process; arguments as in `load_networks`.

    Raises:
        DataError: the checkpoint is of another network.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    _fill(optimizer_tensors(optimizer), checkpoint, part_name(OPTIMIZER, student), world)


def read_networks(checkpoint: Path, prefix: str, *, student: str = "") -> dict[str, Tensor]:
    """Tensors of a checkpoint whose names begin with a prefix, without it, whole and on the CPU."""
    name = part_name(MODEL, student)
    single = checkpoint / f"{name}.safetensors"
    tensors = read_tensors(single) if single.is_file() else _read_shards(checkpoint / name)
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _fill(
    wanted: Mapping[str, Tensor],
    checkpoint: Path,
    part: str,
    world: World,
    *,
    ignored: tuple[str, ...] = (),
) -> None:
    """Writes a checkpoint's numbers into tensors, whole or sharded."""
    single = checkpoint / f"{part}.safetensors"
    tensors = read_tensors(single) if single.is_file() else None
    shapes = _shard_shapes(checkpoint / part) if tensors is None else {n: t.shape for n, t in tensors.items()}
    found = {name: shape for name, shape in shapes.items() if not name.startswith(ignored or ("\0",))}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name])}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].numel() != tensor.numel()
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(
            f"{checkpoint} does not fit the configured network and heads: {problems[0]}{more}; "
            "use the model and losses settings of the run that wrote it"
        )
    with torch.no_grad():
        if tensors is None:
            _load_shards(wanted, checkpoint / part, world)
        else:
            for name, target in wanted.items():
                _copy_whole(target, tensors[name])


def _copy_whole(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded: every process takes its own part, none speaks."""
    if not hasattr(target, "device_mesh"):
        target.copy_(source)
        return
    from torch.distributed.tensor import distribute_tensor

    own = source.to(target.device)
    target.copy_(distribute_tensor(own, target.device_mesh, target.placements, src_data_rank=None))  # type: ignore[attr-defined]


def _shard_shapes(folder: Path) -> dict[str, torch.Size]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if not folder.is_dir():
        raise DataError(f"{folder.parent} holds neither {folder.name}.safetensors nor {folder.name}/")
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in found.items()}  # type: ignore[union-attr]


def _load_shards(wanted: Mapping[str, Tensor], folder: Path, world: World) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    shaped = {name: tensor.view(1) if tensor.ndim == 0 else tensor for name, tensor in wanted.items()}
    load(
        shaped,
        storage_reader=HuggingFaceStorageReader(str(folder)),
        process_group=world.group,
        no_dist=world.group is None,
    )


def _read_shards(folder: Path) -> dict[str, Tensor]:
    tensors = {name: torch.empty(shape) for name, shape in _shard_shapes(folder).items()}
    _load_shards(tensors, folder, World())
    return tensors
