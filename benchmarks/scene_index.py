"""An index of many scenes, and the memory of processes that read from many files.

    python benchmarks/scene_index.py index  --work FOLDER -o RESULTS   # 100,000 files of one tiny image
    python benchmarks/scene_index.py memory --work FOLDER -o RESULTS   # 20,000 reads of 2,000 files

`index` writes files that differ in their place only, reads all headers, keeps an inventory on disk, opens the
data set anew from it, and asks for random places. `memory` draws chips at random from files that decode to
several times what may be kept, in two reading processes, and follows the resident memory of each.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from affine import Affine
from rasterio.crs import CRS
from torch.utils.data import DataLoader, Dataset

from dinov3geo.data import catalog
from dinov3geo.data.sampling import ChipSampler
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.rasters.blocks import BLOCKS
from dinov3geo.rasters.geotiff import write_geotiff
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.inventory import default_folder

ORIGIN, SIDE, PIXEL = (400_000.0, 3_280_000.0), 16, 1.0
QUERIES = 10_000
PROCESSES, BATCH, CHIP, IMAGE_SIDE = 2, 10, 128, 512


def write_tiny(folder: Path, count: int) -> None:
    """Files side by side in a square, made from one by changing the place that its header states."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = PixelGrid(CRS.from_epsg(32617), Affine(PIXEL, 0, ORIGIN[0], 0, -PIXEL, ORIGIN[1]), SIDE, SIDE)
    numbers = np.full((3, SIDE, SIDE), 7, dtype=np.uint8)
    write_geotiff(folder / "0.tif", numbers, grid, nodata=None, overwrite=True)
    template = (folder / "0.tif").read_bytes()
    place = struct.pack("<2d", *ORIGIN)
    assert template.count(place) == 1
    per_row = int(np.ceil(count**0.5))
    for number in range(1, count):
        row, col = divmod(number, per_row)
        # A gap of a quarter between neighbours.
        x, y = ORIGIN[0] + 1.25 * col * SIDE * PIXEL, ORIGIN[1] - 1.25 * row * SIDE * PIXEL
        (folder / f"{number}.tif").write_bytes(template.replace(place, struct.pack("<2d", x, y)))


def measure_index(work: Path, count: int) -> dict[str, Any]:
    """Seconds to build, to reload and to ask; the inventory lies below `work`."""
    folder = work / f"tiny_{count}"
    if len(list(folder.glob("*.tif"))) != count:
        write_tiny(folder, count)
    os.environ["XDG_CACHE_HOME"] = str(work / f"cache_{count}_{os.getpid()}")
    seconds = {}
    for name in ("build", "reload"):
        began = time.perf_counter()
        dataset = SceneDataset(folder, sensor="aerial_rgb")
        dataset.complete(slice(None))  # lookup arrays are made at the first query
        seconds[f"{name}_s"] = time.perf_counter() - began
    assert len(dataset) == count
    found = dataset._catalog
    rng = np.random.default_rng(0)
    (x0, x1), (y0, y1), _ = found.bounds
    corners = rng.uniform((x0, y0), (x1 - 20, y1 - 20), (QUERIES, 2)).tolist()
    times, hits = [], 0
    for x, y in corners:
        began = time.perf_counter()
        rows = found.find((x, y, x + 12, y + 12), None, None)
        times.append(time.perf_counter() - began)
        hits += len(rows)
    inventory = sum(path.stat().st_size for path in default_folder().glob("*.npz"))
    return {
        "files": count,
        **seconds,
        "inventory_mb": inventory / 1e6,
        "queries": QUERIES,
        "scenes_per_query": hits / QUERIES,
        "query_ms_mean": 1e3 * float(np.mean(times)),
        "query_ms_median": 1e3 * float(np.median(times)),
        "query_ms_99": 1e3 * float(np.percentile(times, 99)),
    }


def write_images(folder: Path, count: int) -> None:
    """Images of noise, whose blocks are never shared."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 255, (3, IMAGE_SIDE, IMAGE_SIDE), dtype=np.uint8)
    for number in range(count):
        transform = Affine(PIXEL, 0, ORIGIN[0] + 600.0 * number, 0, -PIXEL, ORIGIN[1])
        grid = PixelGrid(CRS.from_epsg(32617), transform, IMAGE_SIDE, IMAGE_SIDE)
        path = folder / f"{number}.tif"
        if not path.is_file():
            write_geotiff(path, np.roll(numbers, number, axis=2), grid, nodata=None)


class Watched(Dataset[dict[str, torch.Tensor]]):
    """Chips with the memory of the process that read them."""

    def __init__(self, scenes: SceneDataset) -> None:
        """Keeps the scenes."""
        self.scenes = scenes

    def __getitem__(self, query: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
        """A chip's sum (so that it is read), the process, and its resident memory in bytes."""
        image = self.scenes[query]["image"]
        status = Path("/proc/self/status").read_text(encoding="ascii")
        resident = int(status.split("RssAnon:")[1].split()[0]) * 1024
        return {"sum": image.sum(), "process": torch.tensor(os.getpid()), "bytes": torch.tensor(resident)}


def measure_memory(work: Path, files: int, reads: int) -> dict[str, Any]:
    """Anonymous resident memory of two reading processes against what they may keep."""
    folder = work / f"images_{files}"
    write_images(folder, files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scenes = SceneDataset(folder, sensor="aerial_rgb")
    sampler = ChipSampler(scenes, chip_size=CHIP, chips_per_epoch=reads, seed=0)
    loader: DataLoader[Any] = DataLoader(
        Watched(scenes), batch_size=BATCH, sampler=list(sampler), num_workers=PROCESSES
    )
    traces: dict[int, list[int]] = {}
    for batch in loader:
        for process, resident in zip(batch["process"].tolist(), batch["bytes"].tolist(), strict=True):
            traces.setdefault(process, []).append(resident)
    bound = BLOCKS.limit_bytes + catalog.MAX_OPEN_BYTES + catalog._GDAL_CACHE_BYTES
    growth = [max(trace) - trace[0] for trace in traces.values()]
    return {
        "files": files,
        "reads": sum(map(len, traces.values())),
        "decoded_mib": files * 3 * IMAGE_SIDE**2 / 2**20,
        "bound_mib": bound / 2**20,
        "growth_mib": [each / 2**20 for each in growth],
        "trace_mib": [list(_every(trace, 20)) for trace in traces.values()],
        "under_bound": max(growth) <= bound,
    }


def _every(trace: Sequence[int], count: int) -> Iterator[float]:
    """Evenly spaced values, in MiB."""
    for position in np.linspace(0, len(trace) - 1, count).astype(int).tolist():
        yield round(trace[position] / 2**20, 1)


def main(words: Sequence[str] | None = None) -> int:
    """Runs one of the measurements; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("index", "memory"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of index.json and memory.json")
    parser.add_argument("--files", type=int, help="100,000 and 2,000 if absent")
    parser.add_argument("--reads", type=int, default=20_000)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    if arguments.what == "index":
        found = measure_index(arguments.work, arguments.files or 100_000)
    else:
        found = measure_memory(arguments.work, arguments.files or 2_000, arguments.reads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), **found}, indent=1) + "\n"
    (arguments.out / f"{arguments.what}.json").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
