"""Speed of backbones beside timm and transformers, with the same weights and images.

Each cell (model, size, dtype) builds one random network, hands its weights to the peers, checks that all give
the same numbers, and then runs them in turns, so that whatever else the machine does falls on all alike. Ours
is what prediction runs (`inference.for_inference`), the peers are in evaluation mode under inference_mode;
with --compile all three go through torch.compile. The share of the matmul rate is that of the machine's own
large matrix products in the same dtype.

    python benchmarks/backbone_speed.py --out results/backbone_speed.json
    python benchmarks/backbone_speed.py --quick
    python benchmarks/backbone_speed.py --merge results/*.json      # one table of several runs
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.convert import from_ours
from dinov3geo.backbones.convnext import ConvNextConfig
from dinov3geo.backbones.inference import for_inference
from dinov3geo.backbones.rewrite import TIMM_NAMES, hf_config
from dinov3geo.backbones.variants import VARIANTS, build_network
from dinov3geo.backbones.vit import VitConfig

LIBRARIES = ("ours", "timm", "transformers")
MODELS = ("vit_small", "vit_base", "vit_large", "convnext_tiny")
SIZES = (224, 512, 1024)
DTYPES = ("float32", "bfloat16")
# Largest relative difference of patch features from the peers' before a cell counts as wrong.
AGREEMENT = {"float32": 1e-4, "bfloat16": 0.1}
PATCH = 16

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """One library's result for one model, size and dtype.

    Attributes:
        model: name of the variant.
        size: side of the square images in pixels.
        dtype: of weights and images.
        library: one of `LIBRARIES`.
        batch: images per run.
        images_per_s: from the median time of a run.
        spread: (slowest - fastest) / median over the runs.
        peak_mib: memory above that of weights and images.
        matmul_share: floating-point operations per second over the machine's own rate.
        difference: relative difference of patch features from ours.
    """

    model: str
    size: int
    dtype: str
    library: str
    batch: int
    images_per_s: float
    spread: float
    peak_mib: float
    matmul_share: float
    difference: float


class Memory:
    """Peak memory of a run: of the CUDA allocator, or of the process where Linux tells it."""

    def __init__(self, device: torch.device) -> None:
        """Starts a measurement."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = float(torch.cuda.memory_allocated(device))
        else:
            # Freed pages that the C library keeps would hide what the run needs.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
            _write_if_there(Path("/proc/self/clear_refs"), "5")
            self._before = _status("VmRSS")

    def peak_mib(self) -> float:
        """MiB above the start, or NaN where it is not known."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self._before) / 2**20
        return (_status("VmHWM") - self._before) / 2**20


def _write_if_there(path: Path, text: str) -> None:
    if path.exists():
        path.write_text(text, encoding="ascii")


def _status(key: str) -> float:
    path = Path("/proc/self/status")
    if not path.exists():
        return math.nan
    line = next(line for line in path.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1024


def randomise(module: nn.Module) -> None:
    """Weights that keep activations near 1 in every branch, drawn with torch's global generator."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            matrix = tensor.ndim > 1 and "token" not in name
            tensor.normal_(std=tensor[0].numel() ** -0.5 if matrix else 0.1)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1)


def build(library: str, backbone: Backbone, model: str, size: int) -> tuple[nn.Module, Run]:
    """A peer's network with the weights of ours, and the function from images to patch features.

    Args:
        library: `"timm"` or `"transformers"`.
        backbone: ours, float32 on the CPU.
        model: name of its variant.
        size: side of the images.
    """
    config = VARIANTS[model]
    tensors = from_ours(backbone.state_dict(), config, "hf" if library == "transformers" else "timm")
    prefix = 1 + config.num_registers if isinstance(config, VitConfig) else 1
    if library == "transformers":
        import transformers

        # Its networks have the names of version 5, its files those of version 4.
        with_prefix = {
            f"model.{n}" if n.startswith(("layer.", "stages.")) else n: t for n, t in tensors.items()
        }
        fields = hf_config(config)
        kind = "ViT" if isinstance(config, VitConfig) else "ConvNext"
        settings = getattr(transformers, f"DINOv3{kind}Config")(**fields)
        peer: Any = getattr(transformers, f"DINOv3{kind}Model")(settings)
        peer.load_state_dict(with_prefix)
        return peer, lambda images: peer(images).last_hidden_state[:, prefix:]
    import timm

    sized: dict[str, Any] = {} if isinstance(config, ConvNextConfig) else {"img_size": size}
    network: Any = timm.create_model(TIMM_NAMES[model], num_classes=0, **sized)
    network.load_state_dict(tensors)
    if isinstance(config, ConvNextConfig):
        # Its last norm comes only after pooling; here it runs over all cells of the map.
        return network, lambda images: network.head.norm(network.forward_features(images)).flatten(2).mT
    return network, lambda images: network.forward_features(images)[:, prefix:]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = min(_time(lambda: left @ right, device) for _ in range(5))
    return 2 * side**3 / best


def _time(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def count_flops(model: str, size: int) -> int:
    """Floating-point operations for one image, counted without computing."""
    with torch.device("meta"):
        network, image = build_network(VARIANTS[model]).eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        network(image)
    return int(counter.get_total_flops())


def measure(model: str, size: int, dtype_name: str, arguments: argparse.Namespace, rate: float) -> list[Cell]:
    """All libraries in one cell, in turns."""
    device, dtype = torch.device(arguments.device), getattr(torch, dtype_name)
    torch.manual_seed(0)
    backbone = build_network(VARIANTS[model]).eval()
    randomise(backbone)
    batch = max(1, arguments.tokens * PATCH**2 // size**2)
    images = torch.randn(batch, 3, size, size).to(device, dtype)
    runs: dict[str, Run] = {}
    for library in [name for name in LIBRARIES if name != "ours" and name in arguments.libraries]:
        network, run = build(library, backbone, model, size)
        network.to(device, dtype).eval()
        if arguments.compile:
            network.compile()
        runs[library] = run
    view = for_inference(backbone.to(device), dtype=dtype, compiled=arguments.compile)
    if "ours" in arguments.libraries:
        runs = {"ours": lambda images: view(images).patches, **runs}
    del backbone
    reference = view(images[:1]).patches.float()
    results: dict[str, dict[str, Any]] = {}
    for library, run in runs.items():
        memory = Memory(device)
        found = run(images)[:1].float()
        results[library] = {
            "peak_mib": memory.peak_mib(),
            "difference": float((found - reference).norm() / reference.norm()),
        }
    times = _take_turns(runs, images, device, arguments)
    flops = batch * count_flops(model, size)
    for library, seconds in times.items():
        middle = statistics.median(seconds)
        results[library] |= {
            "images_per_s": batch / middle,
            "spread": (max(seconds) - min(seconds)) / middle,
            "matmul_share": flops / middle / rate,
        }
    return [Cell(model, size, dtype_name, library, batch, **results[library]) for library in runs]


def _take_turns(
    runs: dict[str, Run], images: Tensor, device: torch.device, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of every run; all have run once before."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for turn in range(arguments.repeats):
        if turn >= 2 and time.perf_counter() - began > arguments.seconds:
            break
        # Who begins changes, so that nobody always runs on warm or on throttled hardware.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(_time(lambda run=runs[name]: run(images), device))  # type: ignore[misc]
    return times


def table(cells: Sequence[Cell]) -> str:
    """The results as Markdown, with the ratio of our speed to the fastest peer's."""
    lines = [
        "| model | size | dtype | batch | library | images/s | spread | peak MiB | of matmul | ours / it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {(c.model, c.size, c.dtype): c.images_per_s for c in cells if c.library == "ours"}
    for c in cells:
        own = ours.get((c.model, c.size, c.dtype), math.nan)
        lines.append(
            f"| {c.model} | {c.size} | {c.dtype} | {c.batch} | {c.library} | {c.images_per_s:.2f} "
            f"| {c.spread:.0%} | {c.peak_mib:.0f} | {c.matmul_share:.0%} | {own / c.images_per_s:.2f} |"
        )
    return "\n".join(lines)


def ratios(cells: Sequence[Cell]) -> list[float]:
    """Our speed over the fastest peer's, cell by cell."""
    groups: dict[tuple[str, int, str], dict[str, float]] = {}
    for c in cells:
        groups.setdefault((c.model, c.size, c.dtype), {})[c.library] = c.images_per_s
    return [
        speeds["ours"] / max(speed for library, speed in speeds.items() if library != "ours")
        for speeds in groups.values()
        if "ours" in speeds and len(speeds) > 1
    ]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=sorted(VARIANTS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=LIBRARIES)
    parser.add_argument("--device", default=device)
    parser.add_argument("--threads", type=int, help="of the CPU; torch's default if left out")
    parser.add_argument(
        "--tokens", type=int, help="patches per batch", default=65536 if device == "cuda" else 4096
    )
    parser.add_argument("--repeats", type=int, default=10, help="runs per cell and library, at most")
    parser.add_argument("--seconds", type=float, default=60, help="no new repeat of a cell after so long")
    parser.add_argument("--merge", nargs="+", type=Path, help="only print the table of these results")
    parser.add_argument("--compile", action="store_true", help="torch.compile every library")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--quick", action="store_true", help="one small cell per dtype, two repeats")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.models, arguments.sizes = ["vit_tiny"], [64]
        arguments.tokens, arguments.repeats = 32, 2
    return arguments


@torch.inference_mode()
def main(words: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0, or 1 if a peer gives other numbers than ours.
    """
    arguments = parse(words)
    if arguments.merge:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.merge]
        summarise([Cell(**cell) for result in results for cell in result["cells"]])
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cells: list[Cell] = []
    for dtype in arguments.dtypes:
        rate = matmul_rate(torch.device(arguments.device), getattr(torch, dtype))
        print(f"{dtype}: matrix multiplication at {rate / 1e9:.0f} GFLOP/s", file=sys.stderr, flush=True)
        for model in arguments.models:
            for size in arguments.sizes:
                cells += measure(model, size, dtype, arguments, rate)
                _save(cells, arguments)  # a run that is cut off has measured what it has
                print(f"{model} {size} {dtype} done", file=sys.stderr, flush=True)
    summarise(cells)
    wrong = [c for c in cells if not c.difference <= AGREEMENT[c.dtype]]
    for c in wrong:
        print(f"{c.library} differs by {c.difference:.2g} in {c.model} {c.size} {c.dtype}", file=sys.stderr)
    return int(bool(wrong))


def summarise(cells: Sequence[Cell]) -> None:
    """The table and our speed over that of the fastest peer, on stdout."""
    print(table(cells))
    against = ratios(cells)
    if against:
        mean = math.exp(statistics.fmean(map(math.log, against)))
        print(f"\nours / fastest peer: {mean:.2f} in the geometric mean, {min(against):.2f} at least")


def _save(cells: Sequence[Cell], arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(_report(cells, arguments), indent=2) + "\n", encoding="utf-8")


def _report(cells: Sequence[Cell], arguments: argparse.Namespace) -> dict[str, Any]:
    import timm
    import transformers

    device = torch.device(arguments.device)
    return {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "transformers": transformers.__version__,
        },
        "cells": [asdict(cell) for cell in cells],
    }


if __name__ == "__main__":
    sys.exit(main())
