"""One process or many: who this process is, and how they speak."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from dinov3geo.data.crops import Share
from dinov3geo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        group: what collectives run over; None for a single process, which needs none.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """Which images of a step are this process's."""
        return Share(self.rank, self.size)

    def images_per_process(self, batch_size: int, accumulate: int = 1) -> int:
        """Images of a step that fall to each process.

        Raises:
            ConfigError: the batch does not divide evenly.
        """
        parts = self.size * accumulate
        if batch_size % parts:
            below = max(batch_size // parts, 1) * parts
            raise ConfigError(
                f"batch_size {batch_size} does not divide by {self.size} processes times accumulate "
                f"{accumulate}; use {below} or {below + parts}"
            )
        return batch_size // self.size

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.group is None:
            return values
        summed = values.clone()
        dist.all_reduce(summed, group=self.group)
        return summed / self.size

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all processes, which must be of one shape."""
        if self.group is None:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return parts

    def gather_images(self, values: Tensor) -> Tensor:
        """[b, ...] of every process's images -> [B, ...] in the order of the step."""
        return torch.stack(self.gather(values), 1).flatten(0, 1)

    def gather_rows(self, values: Tensor) -> Tensor:
        """[m, ...] of every process, m its own -> [W, M, ...], filled up with zeros to the largest m."""
        most = int(self.largest(torch.tensor(len(values), device=values.device)))
        padded = values.new_zeros(most, *values.shape[1:])
        padded[: len(values)] = values
        return torch.stack(self.gather(padded))

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over the processes."""
        if self.group is None:
            return values
        reduced = values.clone()
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=self.group)
        return reduced


@contextlib.contextmanager
def open_world(device: torch.device) -> Iterator[World]:
    """Joins the processes that `torchrun` started; a process started by hand is alone.

    Args:
        device: of this process; its type decides between NCCL and Gloo.

    Raises:
        ConfigError: only some of the launcher's variables are set.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start with torchrun, or unset it"
        )
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """The device setting with this process's number, where each process has a GPU of its own."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{rank}"


def is_first_process() -> bool:
    """Whether this process is the one that talks to the user; true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def local_parts(module: nn.Module) -> list[Tensor]:
    """This process's part of every parameter, as plain tensors that share its memory."""
    return [local_part(parameter.data) for parameter in module.parameters()]


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; the tensor itself if it is not sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from all processes if it is sharded."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
