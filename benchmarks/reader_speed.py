"""Speed of reading chips beside torchgeo's own data set and beside a bare loop over rasterio windows.

Makes files of 8192 x 8192 pixels and 4 bands from real tiles (any folder of rasters), then measures in turns,
so that whatever else the machine does falls on all alike:

* warm: every block that is needed lies decoded in the contender's cache (GDAL's, or ours);
* cold: new handles, empty caches, and the kernel told to forget the file;
* reprojected: windows never asked for before, from decoded blocks;
* loader: batches through torch's DataLoader with two processes, warm; the bare loop is in the processes, too.

    python benchmarks/reader_speed.py --tiles FOLDER --work FOLDER --out benchmarks/results/DATE_reader_speed

Cells that stand in the output folder already are not measured again, so a long run may be made in pieces.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS as RasterioCRS
from rasterio.env import set_gdal_config
from rasterio.windows import Window
from torch.utils.data import DataLoader, Dataset
from torchgeo.datasets import RasterDataset
from torchgeo.samplers import RandomPatchSampler

from dinov3geo.data.sampling import SuperblockSampler
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.rasters.blocks import BLOCKS
from dinov3geo.rasters.geotiff import write_geotiff
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import find_rasters

SIDE, BANDS = 8192, 4
CORNER, PIXEL, CRS, OTHER_CRS = (800_000.0, 6_600_000.0), 0.5, "EPSG:2154", "EPSG:32631"
GRID_TRANSFORM = Affine(PIXEL, 0, CORNER[0], 0, -PIXEL, CORNER[1])
SIZES = (224, 512)
CODECS = {"uint8": ("deflate", "zstd", "lzw", "jpeg"), "uint16": ("deflate", "zstd", "lzw")}
BLOCKSIZES = (256, 512)
MODES = ("warm", "cold", "reprojected", "loader")
# Chips per measurement; ours needs more for whole groups of superblocks.
COUNT = {"torchgeo": 48, "bare": 48, "ours": 192, "ours_random": 48}
REPEATS = 3
BATCH, PROCESSES = 16, 2
CACHE_BYTES = 2 * 2**30


class TorchgeoDataset(RasterDataset):
    """torchgeo's own reading, as its documentation has it."""

    filename_glob = "*.tif"


class BareWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows of a file and nothing else: what processes and batches cost by themselves."""

    def __init__(self, path: Path) -> None:
        """Keeps the path; each process opens the file for itself."""
        self.path = path
        self._opened: tuple[int, Any] = (0, None)

    def __getitem__(self, window: Window) -> dict[str, torch.Tensor]:
        """The numbers of a window."""
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), rasterio.open(self.path)
        return {"image": torch.from_numpy(self._opened[1].read(window=window))}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        mode: one of `MODES`.
        file: name of the file, which says dtype, codec and block size.
        size: side of a chip in pixels.
        contender: "torchgeo", "bare", "ours" or "ours_random" (torchgeo's positions and order).
        chips_per_s: the median of the repeats.
        spread: (fastest - slowest) / median.
    """

    mode: str
    file: str
    size: int
    contender: str
    chips_per_s: float
    spread: float


# Reads chips and returns how many per second.
Run = Callable[[], float]


def make_file(path: Path, tiles: Sequence[NDArray[Any]], dtype: str, codec: str, blocksize: int) -> None:
    """Fills a file with real tiles, turned and flipped."""
    generator = np.random.default_rng(0)
    step = tiles[0].shape[1]
    scene = np.empty((BANDS, SIDE, SIDE), dtype=dtype)
    for row in range(0, SIDE, step):
        for col in range(0, SIDE, step):
            tile = np.rot90(tiles[generator.integers(len(tiles))], generator.integers(4), (1, 2))
            scene[:, row : row + step, col : col + step] = tile[:, : SIDE - row, : SIDE - col]
    if dtype == "uint16":
        # The lower bits of a real sensor are noise.
        scene *= 40
        scene += generator.integers(0, 40, (SIDE, SIDE), dtype=np.uint16)
    grid = PixelGrid(RasterioCRS.from_user_input(CRS), GRID_TRANSFORM, SIDE, SIDE)
    base, temporary = path.with_suffix(".base"), path.with_suffix(".part")
    write_geotiff(base, scene, grid, nodata=None, overwrite=True)
    options = {} if codec == "jpeg" else {"PREDICTOR": "2"}
    if codec == "zstd":
        options["ZSTD_LEVEL"] = "3"
    options |= {"TILED": "YES", "BLOCKXSIZE": str(blocksize), "BLOCKYSIZE": str(blocksize)}
    options |= {"COMPRESS": codec.upper(), "INTERLEAVE": "PIXEL", "COPY_SRC_OVERVIEWS": "NO"}
    # The project's writer knows one codec only: rasterio's command line makes the others.
    rio = str(Path(sys.executable).with_name("rio"))
    words = [word for name, value in options.items() for word in ("--co", f"{name}={value}")]
    subprocess.run([rio, "convert", str(base), str(temporary), "--driver", "GTiff", *words], check=True)
    base.unlink()
    temporary.replace(path)


def make_files(folder: Path, tiles_folder: str, names: Sequence[str] | None = None) -> list[Path]:
    """The files of every dtype, codec and block size (or those named), made where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        (folder / f"{dtype}_{codec}_{blocksize}.tif", dtype, codec, blocksize)
        for dtype, codecs in CODECS.items()
        for codec in codecs
        for blocksize in BLOCKSIZES
        if not names or f"{dtype}_{codec}_{blocksize}" in names
    ]
    missing = [each for each in wanted if not each[0].is_file()]
    if missing:
        tiles = list(_tiles(tiles_folder))
        for each in missing:
            make_file(each[0], tiles, *each[1:])
    return [each[0] for each in wanted]


def _tiles(folder: str) -> Iterator[NDArray[np.uint8]]:
    """8-bit tiles of `BANDS` bands and one size from whatever rasters there are."""
    for path in find_rasters(folder):
        with rasterio.open(path) as dataset:
            if dataset.count >= BANDS and min(dataset.shape) >= 512 and dataset.dtypes[0] == "uint8":
                yield dataset.read(list(range(1, BANDS + 1)), window=Window(0, 0, 512, 512))


def forget(path: Path) -> None:
    """Closes torchgeo's handles, empties our cache and asks the kernel to drop the file from memory."""
    RasterDataset._cached_load_warp_file.cache_clear()
    BLOCKS.clear()
    gc.collect()
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def torchgeo_queries(path: Path, size: int, count: int, seed: int) -> list[Any]:
    """Places drawn by torchgeo's sampler."""
    return list(RandomPatchSampler(TorchgeoDataset(path), size=size, length=count, generator=seed))


def our_sampler(dataset: SceneDataset, size: int, count: int, seed: int, **lanes: int) -> SuperblockSampler:
    """Superblocks whose chips are mixed over four visits."""
    return SuperblockSampler(
        dataset, chip_size=size, chips_per_epoch=count, seed=seed, shuffled_visits=4, **lanes
    )


def our_dataset(path: Path, **options: Any) -> SceneDataset:  # noqa: ANN401
    """The file through our reader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statistics for 8 bits do not matter here
        return SceneDataset(path, sensor="aerial_rgbn", **options)


def _read_all(dataset: Any, queries: Sequence[Any]) -> float:  # noqa: ANN401
    began = time.perf_counter()
    for query in queries:
        dataset[query]
    return len(queries) / (time.perf_counter() - began)


def _read_bare(dataset: Any, windows: Sequence[Window]) -> float:  # noqa: ANN401
    began = time.perf_counter()
    for window in windows:
        torch.from_numpy(dataset.read(window=window))
    return len(windows) / (time.perf_counter() - began)


def _windows(queries: Sequence[Any], size: int) -> list[Window]:
    return [
        Window(round((x.start - CORNER[0]) / PIXEL), round((CORNER[1] - y.stop) / PIXEL), size, size)
        for x, y in queries
    ]


def warm_runs(path: Path, size: int) -> dict[str, Run]:
    """Each contender on the same places again and again; the first turn fills its cache."""
    queries = torchgeo_queries(path, size, COUNT["torchgeo"], 0)
    ours = our_dataset(path)
    places = list(our_sampler(ours, size, COUNT["ours"], 0))
    return {
        "torchgeo": functools.partial(_read_all, TorchgeoDataset(path), queries),
        "bare": functools.partial(_read_bare, rasterio.open(path), _windows(queries, size)),
        "ours": functools.partial(_read_all, ours, places),
        "ours_random": functools.partial(_read_all, ours, queries),
    }


def cold_runs(path: Path, size: int) -> dict[str, Run]:
    """Each contender from new handles and empty caches, on other places every time."""
    turn = dict.fromkeys(COUNT, 0)

    def fresh(name: str) -> float:
        turn[name] += 1
        queries = torchgeo_queries(path, size, COUNT["torchgeo"], turn[name])
        forget(path)
        if name == "torchgeo":
            return _read_all(TorchgeoDataset(path), queries)
        if name == "bare":
            with rasterio.open(path) as dataset:
                return _read_bare(dataset, _windows(queries, size))
        ours = our_dataset(path)
        if name == "ours_random":
            return _read_all(ours, queries)
        return _read_all(ours, list(our_sampler(ours, size, COUNT["ours"], turn[name])))

    return {name: functools.partial(fresh, name) for name in COUNT}


def reprojected_runs(path: Path, size: int) -> dict[str, Run]:
    """Fresh places on a square of decoded blocks, read in another reference system."""
    theirs = TorchgeoDataset(path, crs=OTHER_CRS)
    ours = our_dataset(path, crs=OTHER_CRS, res=theirs.res)
    generator = np.random.default_rng(0)
    xmin, ymin, xmax, ymax = ours.index.total_bounds
    low = np.array([(xmin + xmax) / 2, (ymin + ymax) / 2]) - 500

    def read(dataset: Any) -> float:  # noqa: ANN401
        corners = low + generator.random((24, 2)) * 600
        side = size * theirs.res[0]
        return _read_all(dataset, [(slice(x, x + side), slice(y, y + side)) for x, y in corners.tolist()])

    return {"torchgeo": lambda: read(theirs), "ours": lambda: read(ours)}


def loader_runs(path: Path, size: int) -> dict[str, Run]:
    """Through the DataLoader, whose processes live on from turn to turn."""
    theirs, ours = TorchgeoDataset(path), our_dataset(path)
    count = 2 * COUNT["ours"]
    lanes = {"lanes": PROCESSES, "batch_size": BATCH}
    queries = torchgeo_queries(path, size, COUNT["torchgeo"] * 2, 0)
    samplers = {
        "torchgeo": queries,
        # As many as ours, each of the same places several times.
        "bare": _windows(queries, size) * (count // len(queries)),
        "ours": list(our_sampler(ours, size, count, 0, **lanes)),
    }
    datasets = {"torchgeo": theirs, "bare": BareWindows(path), "ours": ours}
    runs: dict[str, Run] = {}
    for name, dataset in datasets.items():
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=BATCH,
            sampler=samplers[name],
            num_workers=PROCESSES,
            persistent_workers=True,
        )
        runs[name] = functools.partial(_drain, loader)
    return runs


def _drain(loader: DataLoader[Any]) -> float:
    began = time.perf_counter()
    count = sum(len(batch["image"]) for batch in loader)
    return count / (time.perf_counter() - began)


BUILDERS = {
    "warm": warm_runs,
    "cold": cold_runs,
    "reprojected": reprojected_runs,
    "loader": loader_runs,
}


def measure(mode: str, path: Path, size: int) -> list[Cell]:
    """All contenders of one cell, in turns; but for cold reads the first turn only fills the caches."""
    runs = BUILDERS[mode](path, size)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(REPEATS + 1):
        for name, run in runs.items():
            rate = run()
            if turn or mode == "cold":
                rates[name].append(rate)
    return [
        Cell(mode, path.stem, size, name, statistics.median(found), (max(found) - min(found)) / min(found))
        for name, found in rates.items()
    ]


def table(cells: Sequence[Cell]) -> str:
    """The rates as Markdown, a row per file and size, with the ratios that matter."""
    lines = [
        "| mode | file | size | torchgeo | bare | ours, same places | ours | ours / torchgeo | ours / bare |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str, int], dict[str, float]] = {}
    for cell in cells:
        rows.setdefault((cell.mode, cell.file, cell.size), {})[cell.contender] = cell.chips_per_s
    for (mode, file, size), rates in rows.items():
        shown = [f"{rates[n]:.0f}" if n in rates else "" for n in ("torchgeo", "bare", "ours_random", "ours")]
        ratios = [f"{rates['ours'] / rates[n]:.2f}" if n in rates else "" for n in ("torchgeo", "bare")]
        lines.append(f"| {mode} | {file} | {size} | {' | '.join(shown)} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def summary(cells: Sequence[Cell]) -> list[str]:
    """Smallest and median ratio of each mode and size, one line each."""
    lines = []
    for mode, size in dict.fromkeys((cell.mode, cell.size) for cell in cells):
        rates = {(c.file, c.contender): c.chips_per_s for c in cells if (c.mode, c.size) == (mode, size)}
        files = sorted({file for file, _ in rates})
        for other in ("torchgeo", "bare"):
            ratios = [rates[f, "ours"] / rates[f, other] for f in files if (f, other) in rates]
            if ratios:
                lines.append(
                    f"{mode} {size} px, ours / {other}: median {statistics.median(ratios):.2f}, "
                    f"smallest {min(ratios):.2f} of {len(ratios)} files"
                )
    return lines


def main(words: Sequence[str] | None = None) -> int:
    """Runs the benchmark; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiles", required=True, help="folder of 8-bit rasters with at least 4 bands")
    parser.add_argument("--work", type=Path, required=True, help="folder for 3 GB of files")
    parser.add_argument("--out", type=Path, required=True, help="results folder: cells.json and table.md")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    names = [f"{d}_{codec}_{side}" for d, codecs in CODECS.items() for codec in codecs for side in BLOCKSIZES]
    parser.add_argument("--files", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after this time")
    arguments = parser.parse_args(words)
    began = time.perf_counter()
    torch.set_num_threads(1)
    set_gdal_config("GDAL_CACHEMAX", CACHE_BYTES)
    BLOCKS.limit_bytes = CACHE_BYTES
    paths = make_files(arguments.work, arguments.tiles, arguments.files)
    store = arguments.out / "cells.json"
    cells = [Cell(**each) for each in json.loads(store.read_text())["cells"]] if store.is_file() else []
    done = {(cell.mode, cell.file, cell.size) for cell in cells}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        for mode in arguments.modes:
            for size in arguments.sizes:
                late = time.perf_counter() - began > arguments.seconds
                if late or (mode, path.stem, size) in done:
                    continue
                cells += measure(mode, path, size)
                forget(path)
                store.write_text(json.dumps(record(cells), indent=1) + "\n", encoding="utf-8")
    text = "\n".join([table(cells), "", *summary(cells), ""])
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def record(cells: Sequence[Cell]) -> dict[str, Any]:
    """The cells with what they were measured on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "cache_bytes": CACHE_BYTES,
        "chips": COUNT,
        "repeats": REPEATS,
        "versions": {
            "torchgeo": importlib.metadata.version("torchgeo"),
            "rasterio": rasterio.__version__,
            "gdal": rasterio.__gdal_version__,
            "torch": torch.__version__,
        },
        "cells": [asdict(cell) for cell in cells],
    }


if __name__ == "__main__":
    sys.exit(main())
