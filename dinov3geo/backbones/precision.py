"""In which dtype to compute: what this machine gains is measured once, not assumed."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import torch

from dinov3geo.backbones.store import write_text
from dinov3geo.errors import ConfigError
from dinov3geo.paths import folder_obstacle, user_cache_folder

PRECISIONS = ("auto", "float32", "bfloat16")
WORTHWHILE = 1.2
"""Gain in speed from which `auto` takes bfloat16."""


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision.

    `auto` is bfloat16 on a GPU that it makes clearly faster. On the CPU it is float32 whatever the gain, so
    that a scene gives the same map on every machine; bfloat16 is taken where it is asked for.

    Raises:
        ConfigError: no such precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; valid names: {', '.join(PRECISIONS)}")
    if precision == "auto":
        gains = device.type != "cpu" and bfloat16_gain(device) >= WORTHWHILE
        return torch.bfloat16 if gains else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def bfloat16_gain(device: torch.device) -> float:
    """Speed of a bfloat16 matrix product over a float32 one, kept in the user's cache for next time."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.node()
    key = f"{name}, {device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    file = user_cache_folder() / "bfloat16.json"
    known = _read(file)
    if key not in known:
        known[key] = round(_measure(torch.float32, device) / _measure(torch.bfloat16, device), 3)
        if folder_obstacle(file.parent) is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(known, indent=2) + "\n")
    return known[key]


def _read(file: Path) -> dict[str, float]:
    if not (file.is_file() and os.access(file, os.R_OK)):
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}  # damaged: it costs a tenth of a second to measure again
    return {str(k): float(v) for k, v in known.items()} if isinstance(known, dict) else {}


def _measure(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the fastest of some products."""
    side = 4096 if device.type == "cuda" else 768
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        _ = (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
