"""The lines that a run writes about itself: metrics.jsonl always, TensorBoard if wanted."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from dinov3geo.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Journal:
    """Numbers of logged steps, as JSON lines and TensorBoard events; only the first process writes."""

    def __init__(self, out: Path, *, writes: bool, tensorboard: bool, step: int) -> None:
        """Opens the files and forgets what an earlier sitting said of steps that will be made again.

        Args:
            out: folder of the run.
            writes: whether this process writes.
            tensorboard: event files too.
            step: steps made so far.

        Raises:
            ConfigError: TensorBoard is wanted but not installed.
        """
        self._path = out / METRICS_FILE
        self._writes = writes
        self._events: Any = None
        if not writes:
            return
        if tensorboard:
            self._events = _open_events(out / TENSORBOARD_FOLDER, step)
        _drop_lines_after(self._path, step)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """One line; numbers that are not finite are written as null, which JSON knows."""
        if not self._writes:
            return
        clean = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **clean}) + "\n")
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Any) -> None:  # noqa: ANN401 (array [H, W, 3])
        """A picture for TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the event files."""
        if self._events is not None:
            self._events.close()


def _open_events(folder: Path, step: int) -> Any:  # noqa: ANN401 (TensorBoard may be absent)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "watch.tensorboard needs TensorBoard: pip install 'dinov3geo[tensorboard]', or set it to false"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # A killed run can leave half a line at the end.
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


class Clock:
    """Time per step and the share of it spent waiting for data, since the last report."""

    def __init__(self) -> None:
        """Starts the watch."""
        self._last = self._since = time.perf_counter()
        self._waited, self._steps = 0.0, 0

    def data_arrived(self) -> None:
        """Tells that the wait for a batch is over."""
        self._waited += time.perf_counter() - self._last

    def step_done(self) -> None:
        """Tells that the wait for the next batch begins."""
        self._steps += 1
        self._last = time.perf_counter()

    def rates(self, batch_size: int) -> dict[str, float]:
        """Images per second and share of waiting since the last call."""
        now = time.perf_counter()
        elapsed = now - self._since
        rates = {
            "images_per_s": (self._steps + 1) * batch_size / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        self._since, self._waited, self._steps = now, 0.0, -1
        return rates


def memory_gib(device: torch.device) -> float:
    """Largest memory so far: of the device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def commit() -> str:
    """Commit of the code, or "unknown" outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
