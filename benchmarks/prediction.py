"""Prediction of whole scenes: time, memory, seams and files, beside torchgeo, terratorch and geoai.

    python benchmarks/scenes.py scene.tif --rows 6000 --cols 6000 --plots DATA/neon_plots/rgb DATA/teak/rgb
    python benchmarks/prediction.py compare scene.tif --out results/compare.json
    python benchmarks/prediction.py overhead scene.tif     # everything but the model, over the model alone
    python benchmarks/prediction.py run ours scene.tif out.tif [--starter]
    python benchmarks/prediction.py seams scene.tif        # jumps across tile borders, by overlap
    python benchmarks/prediction.py kills scene.tif        # killed at random, taken up again: same bytes?

Every contender runs in a process of its own with the same model, tiles and overlap; PEER=PYTHON names the
interpreter of a peer that lives in an environment of its own.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch

from benchmarks.peers import predict_with_geoai, predict_with_terratorch, predict_with_torchgeo
from benchmarks.scenes import two_block_model
from dinov3geo.allocator import keep_freed_memory
from dinov3geo.heads.canopy import CanopyModel, load_canopy_model
from dinov3geo.predict.checks import ModelInput
from dinov3geo.predict.jobs import SceneJob, prepare
from dinov3geo.predict.products import predict_canopy
from dinov3geo.predict.runners import canopy_runner
from dinov3geo.predict.stream import read_tile
from dinov3geo.rasters.grid import TilePlan
from dinov3geo.rasters.reader import SceneReader

CONTENDERS = ("ours", "torchgeo", "terratorch", "geoai")
TILE, OVERLAP, BATCH = 512, 128, 4
PATCH = 16


def predict(name: str, scene: Path, output: Path, model: CanopyModel, tile: int, overlap: int) -> None:
    """One contender, from the scene's file to the map's."""
    peers = {
        "torchgeo": predict_with_torchgeo,
        "terratorch": predict_with_terratorch,
        "geoai": predict_with_geoai,
    }
    if name == "ours":
        predict_canopy(
            scene, output, model=model, tile=tile, overlap=overlap, batch_size=BATCH, overwrite=True
        )
    else:
        peers[name](scene, output, model, tile, overlap)


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return float(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def import_peer(name: str) -> None:
    """Imports what a contender needs, so that its time is not that of imports."""
    if name == "torchgeo":
        import torchgeo.datasets  # noqa: F401
    elif name == "terratorch":
        import terratorch.tasks.tiled_inference  # noqa: F401
    elif name == "geoai":
        import geoai.inference  # noqa: F401


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender in this process."""
    model = load_canopy_model() if arguments.starter else two_block_model()
    import_peer(arguments.name)
    before = peak_mib()
    began, cpu = time.perf_counter(), time.process_time()
    predict(arguments.name, arguments.scene, arguments.output, model, arguments.tile, arguments.overlap)
    return {
        "name": arguments.name,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": peak_mib(),
        "imports_mib": before,
    }


def run_words(name: str, scene: Path, output: Path, arguments: argparse.Namespace) -> list[str]:
    """The command that runs a contender."""
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    words = [pythons.get(name, sys.executable), __file__, "run", name, str(scene), str(output)]
    words += ["--tile", str(arguments.tile), "--overlap", str(arguments.overlap)]
    return words + (["--starter"] if arguments.starter else [])


def in_own_process(name: str, scene: Path, output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a contender with its interpreter."""
    done = subprocess.run(
        run_words(name, scene, output, arguments), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"name": name, "error": done.stderr.strip().splitlines()[-1] if done.stderr else "?"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders in turn, twice; the better time of each, and what their files are like."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scene.parent) as folder:
        for turn in range(arguments.rounds):
            for name in arguments.names:
                if "error" in results.get(name, {}):
                    continue
                output = Path(folder) / f"{name}.tif"
                result = in_own_process(name, arguments.scene, output, arguments)
                print(f"{name} {turn}: {result}", file=sys.stderr, flush=True)
                if turn and result.get("seconds", 0) >= results[name]["seconds"]:
                    continue
                results[name] = result | (describe(arguments.scene, output) if output.exists() else {})
    return {"scene": arguments.scene.name, "results": results}


def describe(scene: Path, output: Path) -> dict[str, Any]:
    """What a map is like as a file."""
    from rio_cogeo.cogeo import cog_validate

    with rasterio.open(scene) as source, rasterio.open(output) as target:
        heights = target.read(1)
        holes = (source.read() == 0).all(axis=0)
        kept = target.nodata is not None and bool(((heights == target.nodata) == holes).all())
        plan = PlanOf(source.height, source.width).plan
        seam = seam_ratio(np.where(holes, np.nan, heights), plan)
        return {
            "crs": target.crs == source.crs and target.transform == source.transform,
            "nodata": kept,
            "overviews": target.overviews(1),
            "cog": cog_validate(output, quiet=True, strict=True)[0],
            "unit": target.units[0] or "",
            "seam": seam,
            "mib": output.stat().st_size / 2**20,
        }


class PlanOf:
    """The tiles of a scene of a size at the default tile and overlap."""

    def __init__(self, height: int, width: int, tile: int = TILE, overlap: int = OVERLAP) -> None:
        """Plans them."""
        step = tile - overlap
        rows, cols = ((*range(0, max(n - tile, 0), step), max(n - tile, 0)) for n in (height, width))
        self.plan = TilePlan((min(tile, height), min(tile, width)), rows, cols, overlap)


def seam_ratio(heights: np.ndarray[Any, Any], plan: TilePlan) -> float:
    """Mean absolute jump across the borders of tiles over that between other cells of the patch grid.

    A network of patches jumps at every patch border; so the comparison is with those of other patches, not
    with all pixels. Only borders on the patch grid count, which are all but those of the last row and column.

    Args:
        heights: [H, W], NaN where there is no data.
        plan: tiles.
    """
    jumps: dict[bool, list[float]] = {True: [], False: []}
    for axis, starts, size in ((0, plan.row_starts, plan.size_hw[0]), (1, plan.col_starts, plan.size_hw[1])):
        borders = {edge for start in starts[:-1] for edge in (start, start + size)}
        lines = np.moveaxis(heights, axis, 0)
        for edge in range(PATCH, len(lines), PATCH):
            jump = np.nanmean(np.abs(lines[edge] - lines[edge - 1]))
            jumps[edge in borders].append(float(jump))
    return float(np.nanmean(jumps[True]) / np.nanmean(jumps[False]))


def seams(arguments: argparse.Namespace) -> dict[str, Any]:
    """The seam measure at several overlaps; without any, tiles stand side by side."""
    model = load_canopy_model() if arguments.starter else two_block_model()
    table = {}
    with tempfile.TemporaryDirectory(dir=arguments.scene.parent) as folder:
        for overlap in (0, 64, 128, 256):
            output = Path(folder) / f"{overlap}.tif"
            predict("ours", arguments.scene, output, model, arguments.tile, overlap)
            with rasterio.open(output) as target:
                heights = np.where(target.dataset_mask() > 0, target.read(1), np.nan)
            plan = PlanOf(*heights.shape, arguments.tile, overlap).plan
            table[str(overlap)] = seam_ratio(heights, plan)
    return {"seams": table}


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """Wall time of a prediction over that of the model alone on the same batches, in turns."""
    model = load_canopy_model() if arguments.starter else two_block_model()
    job = prepare(arguments.scene, ModelInput.of_backbone(model.backbone), TILE, OVERLAP, BATCH)
    batches = read_batches(job)
    runner = canopy_runner(model)
    runner(*batches[0])
    found = []
    with tempfile.TemporaryDirectory(dir=arguments.scene.parent) as folder:
        for turn in range(arguments.rounds):
            began = time.perf_counter()
            for batch in batches:
                runner(*batch)
            alone = time.perf_counter() - began
            began = time.perf_counter()
            predict("ours", arguments.scene, Path(folder) / f"{turn}.tif", model, TILE, OVERLAP)
            found.append({"model": alone, "whole": time.perf_counter() - began})
    ratios = [turn["whole"] / turn["model"] for turn in found]
    return {"turns": found, "overhead": min(ratios) - 1, "all": [r - 1 for r in ratios]}


def kills(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kills a prediction at random moments, takes it up again, and compares with one that ran through."""
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.scene.parent) as folder:
        whole, killed = Path(folder) / "whole.tif", Path(folder) / "killed.tif"
        whole_seconds = in_own_process("ours", arguments.scene, whole, arguments)["seconds"]
        work = killed.with_name(f".{killed.name}.unfinished")
        while len(found) < arguments.rounds:
            process = subprocess.Popen(
                run_words("ours", arguments.scene, killed, arguments), stdout=subprocess.DEVNULL
            )
            while not is_locked(work / "lock") and process.poll() is None:
                time.sleep(0.01)
            # So short that the last one still finds work to be killed in.
            wait = float(rng.uniform(0, 2.5 * whole_seconds / arguments.rounds))
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            journal = work / "journal.jsonl"
            strips = len(journal.read_text(encoding="utf-8").splitlines()) if journal.exists() else 0
            found.append({"after_s": wait, "returned": process.returncode, "strips": strips})
            if process.returncode == 0:
                break
        last = in_own_process("ours", arguments.scene, killed, arguments) if work.exists() else found[-1]
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (whole, killed)]
    return {"kills": found, "last": last, "sha256": digests, "same": digests[0] == digests[1]}


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a work folder: it is at work, not importing."""
    if not path.exists():
        return False
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_batches(job: SceneJob) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The batches of a scene in memory."""
    with SceneReader(job.scene, bands=job.bands) as reader:
        tiles = [
            read_tile(reader, job.plan, (row, col))
            for row in job.plan.row_starts
            for col in job.plan.col_starts
        ]
    tiles = [tile for tile in tiles if tile.valid.any()]
    groups = [tiles[start : start + BATCH] for start in range(0, len(tiles), BATCH)]
    return [(np.stack([t.image for t in g]), np.stack([t.valid for t in g])) for g in groups]


def table(results: dict[str, dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| | time [s] | peak memory [MiB] | CRS, grid | nodata kept | overviews | COG | unit | seams |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        if "error" in found:
            lines.append(f"| {name} | failed: {found['error'][:80]} | | | | | | | |")
            continue
        yes = {key: "yes" if found[key] else "no" for key in ("crs", "nodata", "overviews", "cog", "unit")}
        lines.append(
            f"| {name} | {found['seconds']:.1f} | {found['peak_mib']:.0f} | {yes['crs']} | {yes['nodata']} "
            f"| {yes['overviews']} | {yes['cog']} | {yes['unit']} | {found['seam']:.3f} |"
        )
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "compare", "seams", "overhead", "kills"):
        own = verbs.add_parser(verb)
        if verb == "run":
            own.add_argument("name", choices=CONTENDERS)
        own.add_argument("scene", type=Path)
        if verb == "run":
            own.add_argument("output", type=Path)
        own.add_argument("--starter", action="store_true", help="the starter model; else one of two blocks")
        own.add_argument("--tile", type=int, default=TILE)
        own.add_argument("--overlap", type=int, default=OVERLAP)
        own.add_argument("--rounds", type=int, default=2)
        own.add_argument("--names", nargs="+", default=CONTENDERS, choices=CONTENDERS)
        own.add_argument("--python", nargs="*", default=[], metavar="PEER=PYTHON")
        own.add_argument("--out", type=Path, help="JSON file of the results")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs a measurement."""
    arguments = parse(words)
    if getattr(arguments, "name", "ours") == "ours":
        keep_freed_memory()  # as the command line does
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    verbs = {"run": run, "compare": compare, "seams": seams, "overhead": overhead, "kills": kills}
    found = verbs[arguments.verb](arguments)
    if arguments.verb == "compare":
        print(table(found["results"]))
    else:
        print(json.dumps(found))
    if arguments.out is not None:
        facts = {
            "command": " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**facts, **found}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
