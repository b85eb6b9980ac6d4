"""Speed of a whole training step beside the package lightly-train, in one run and in turns.

Both train the same network (192 wide, 12 blocks of patch 16) on the same folder of images with the same
crops, batch, prototypes and hidden width, data reading and augmentation included, each in a process of its
own on the same number of threads. A step is the time between two calls of the optimiser, seen by the same
hook of torch.

The peer is run, nothing of it is used here; its licence is AGPL, so it lives in an environment of its own:

    python -m venv peer && peer/bin/pip install lightly-train
    python benchmarks/trainer_speed.py --images FOLDER --peer-python peer/bin/python --out results.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

BATCH, GLOBAL, LOCAL, LOCALS = 64, 96, 48, 6
PROTOTYPES, HIDDEN = 65536, 2048
_PEER_PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed"}
# The first steps allocate memory and warm caches.
_WARM_UP = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both in turns and prints the ratio, or is one of the processes that are timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG or PNG files")
    parser.add_argument("--peer-python", type=Path, help="interpreter that can import lightly_train")
    parser.add_argument("--precision", choices=list(_PEER_PRECISION), default="bfloat16")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="ours with compiled blocks")
    parser.add_argument("--small", action="store_true", help="256 prototypes, 8 images: does it run at all")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        print(json.dumps(_worker(options)))
        return 0
    results = _in_turns(options)
    text = json.dumps(results, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


def _in_turns(options: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[list[float]]] = {"ours": []}
    pythons = {"ours": sys.executable}
    if options.peer_python is not None:
        runs["peer"], pythons["peer"] = [], str(options.peer_python)
    for _ in range(options.rounds):
        for name, python in pythons.items():
            command = [python, __file__, "--worker", name, "--images", str(options.images)]
            command += ["--precision", options.precision, "--steps", str(options.steps)]
            command += ["--threads", str(options.threads), *(["--small"] if options.small else [])]
            command += ["--compile"] if options.compile else []
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(answer.stdout.splitlines()[-1]))
    batch = 8 if options.small else BATCH
    speed = {name: batch / statistics.median(sum(times, [])) for name, times in runs.items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "precision": options.precision,
        "images_per_s": {name: round(value, 2) for name, value in speed.items()},
        "ratio": round(speed["ours"] / speed["peer"], 2) if "peer" in speed else None,
        "seconds_per_step": runs,
    }


def _worker(options: argparse.Namespace) -> list[float]:
    """Seconds of each timed step of one library."""
    torch.set_num_threads(options.threads)
    stamps: list[float] = []
    register_optimizer_step_post_hook(lambda *_: stamps.append(time.perf_counter()))
    steps = options.steps + _WARM_UP + 1
    own_stdout = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not stand beside the answer
    with tempfile.TemporaryDirectory() as folder:
        (_train_ours if options.worker == "ours" else _train_peer)(options, steps, Path(folder) / "run")
    sys.stdout.flush()
    os.dup2(own_stdout, 1)
    times = [after - before for before, after in zip(stamps[:-1], stamps[1:], strict=True)]
    return [round(seconds, 4) for seconds in times[_WARM_UP:]]


def _train_ours(options: argparse.Namespace, steps: int, out: Path) -> None:
    from dinov3geo.allocator import keep_freed_memory
    from dinov3geo.training.settings import TrainSettings
    from dinov3geo.training.trainer import pretrain

    head = {"prototypes": 256 if options.small else PROTOTYPES, "hidden": HIDDEN}
    settings = TrainSettings.model_validate(
        {
            "steps": steps,
            "batch_size": 8 if options.small else BATCH,
            "precision": options.precision,
            "device": "cpu",
            "log_every": 10**9,
            "model": {"variant": "vit_tiny"},
            "crops": {"global_size": GLOBAL, "local_size": LOCAL, "local_count": LOCALS},
            "losses": {"dino_head": head, "ibot_head": head},
            "data": {
                "root": str(options.images),
                "sources": [{"kind": "images"}],
                "chip_size": GLOBAL,
                "workers": 0,
            },
            "checkpoints": {"every": 10**9},
            "parallel": {"compile": options.compile},
        }
    )
    keep_freed_memory()  # as the command does
    pretrain(settings, out=out)


def _train_peer(options: argparse.Namespace, steps: int, out: Path) -> None:
    peer = importlib.import_module("lightly_train")
    peer.pretrain(
        out=str(out),
        data=str(options.images),
        model="dinov3/vitt16-notpretrained",
        method="dinov2",
        batch_size=8 if options.small else BATCH,
        num_workers=0,
        epochs=1,
        precision=_PEER_PRECISION[options.precision],
        accelerator="cpu",
        devices=1,
        method_args={
            "output_dim": 256 if options.small else PROTOTYPES,
            "hidden_dim": HIDDEN,
            "ibot_separate_head": True,
        },
        transform_args={
            "image_size": (GLOBAL, GLOBAL),
            "local_view": {"view_size": (LOCAL, LOCAL), "num_views": LOCALS},
        },
        trainer_args={"max_steps": steps},
    )


if __name__ == "__main__":
    sys.exit(main())
