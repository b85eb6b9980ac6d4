"""Tiles on the workers of a Ray cluster, several machines or the GPUs of one.

Workers compute ranges of rows; this process puts them in order. Batches are formed as in one process, and
torch gets as many threads, so the bytes are the same. A range whose worker died is computed again by another.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from rasterio.windows import Window

from dinov3geo.errors import ConfigError
from dinov3geo.predict.engines import Strips, TileTask, split_rows
from dinov3geo.predict.stream import Floats, Mask, RunTiles

RANGES_PER_WORKER = 4
"""More and smaller ranges share the work better, but each one runs its first row of tiles once more."""

_starting = threading.Lock()

# Of this worker process: the model it holds, by the name of the work.
_runners: dict[str, RunTiles] = {}


def ray_rows(task: TileTask, first: int, stop: int, *, tell: Callable[[int], None]) -> Strips:
    """Computes rows on a cluster: the one of `RAY_ADDRESS`, else all of this machine.

    Args:
        task: what to compute; every machine must see the scene under the same path.
        first: first row wanted.
        stop: the one after the last.
        tell: told about tiles done.

    Yields:
        As `stream_rows`.

    Raises:
        ConfigError: Ray is not installed or the cluster cannot be reached.
    """
    ray = _start()
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    workers = max(gpus or int(resources.get("CPU", 1)), 1)
    compute = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=-1)(_compute)
    shared, name = ray.put(task), _name(ray, task)
    ranges = deque(split_rows(task, first, stop, RANGES_PER_WORKER * workers))
    waiting: deque[Any] = deque()
    try:
        while ranges or waiting:
            # One range more than there are workers: nobody waits, and memory stays bounded.
            while ranges and len(waiting) <= workers:
                waiting.append(compute.remote(shared, name, *ranges.popleft(), torch.get_num_threads()))
            for row, values, valid in ray.get(waiting.popleft()):
                # What comes out of the object store must not be written to.
                yield Window(0, row, values.shape[2], values.shape[1]), values.copy(), valid
                tell(task.tiles_above(row + values.shape[1]))
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _name(ray: Any, task: TileTask) -> str:  # noqa: ANN401 (a module that may not be installed)
    """Of the model and its settings: tasks of several scenes share what a worker holds."""
    return hashlib.sha256(ray.cloudpickle.dumps(task.make_runner)).hexdigest()


def _start() -> Any:  # noqa: ANN401 (a module that may not be installed)
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray; install it: pip install 'dinov3geo[ray]'") from error
    with _starting:
        if ray.is_initialized():
            return ray
        try:
            ray.init(
                address=os.environ.get("RAY_ADDRESS"),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"no Ray cluster at {os.environ.get('RAY_ADDRESS')}: {error}") from error
    return ray


def _compute(
    task: TileTask, name: str, first: int, stop: int, threads: int
) -> list[tuple[int, Floats, Mask]]:
    """Runs on a worker: the rows of a range."""
    torch.set_num_threads(threads)
    if name not in _runners:
        _runners.clear()
        _runners[name] = task.make_runner()
    rows: Generator[tuple[Window, Floats, Mask]] = task.rows(first, stop, _runners[name])
    return [(int(window.row_off), np.asarray(values), valid) for window, values, valid in rows]
