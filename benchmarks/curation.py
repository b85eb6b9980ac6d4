"""What `dinov3geo curate` does to a long-tailed pool, and how much memory it takes.

    python benchmarks/curation.py entropy EUROSAT -o RESULTS   # folder of one sub-folder of images per class
    python benchmarks/curation.py memory -o RESULTS

`entropy` draws images so that the classes go from 1600 down to 20 in equal ratios, in an order of classes
that each seed shuffles, chooses among them, and reports the entropy of the classes over that of equal ones.
No label is read before that report. For comparison the same is done with made embeddings: one direction per
class and noise, whose nearest neighbours are as often right as stated. `memory` measures peak memory over the
number of vectors, each number in a process of its own, and fits a line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST, LEAST = 1600, 20
WIDTH = 192


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    entropy = verbs.add_parser("entropy")
    entropy.add_argument("images", type=Path)
    entropy.add_argument("--backbone", default="vit-tiny-aerial")
    entropy.add_argument("--counts", type=int, nargs="+", default=[200, 400, 800])
    entropy.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    memory = verbs.add_parser("memory")
    memory.add_argument("--vectors", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    for verb in (entropy, memory):
        verb.add_argument("-o", "--output", type=Path, required=True)
    one = verbs.add_parser("one")
    one.add_argument("count", type=int)
    options = parser.parse_args(arguments)
    if options.verb == "one":
        print(json.dumps(_measure_once(options.count)))
        return 0
    found = _entropies(options) if options.verb == "entropy" else _memories(options.vectors)
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": ["benchmarks/curation.py", *sys.argv[1:]], **found}, indent=1)
    (options.output / f"{options.verb}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def long_tail(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Ascending rows of a pool whose classes become rarer in equal ratios, in an order drawn by the seed."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(labels))
    steps = np.arange(len(classes)) / (len(classes) - 1)
    sizes = np.rint(MOST * (LEAST / MOST) ** steps).astype(int)
    rows = [
        rng.permutation(np.flatnonzero(labels == name))[:size]
        for name, size in zip(classes, sizes, strict=True)
    ]
    return np.sort(np.concatenate(rows))


def entropy_share(labels: NDArray[np.int64], classes: int) -> float:
    """Entropy of the classes over that of equally frequent ones."""
    shares = np.bincount(labels, minlength=classes) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum() / np.log(classes))


def neighbour_accuracy(vectors: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """How often the nearest other vector is of the same class, all classes counted alike."""
    nearest = np.empty(len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), 1024):
        scores = vectors[start : start + 1024] @ vectors.T
        scores[np.arange(len(scores)), start + np.arange(len(scores))] = -np.inf
        nearest[start : start + 1024] = scores.argmax(1)
    right = labels[nearest] == labels
    return float(np.mean([right[labels == name].mean() for name in np.unique(labels)]))


def _entropies(options: argparse.Namespace) -> dict[str, Any]:
    from dinov3geo.backbones.zoo import load_backbone

    backbone = load_backbone(options.backbone)
    files = sorted(options.images.glob("*/*.jpg"))
    names = sorted({path.parent.name for path in files})
    labels = np.array([names.index(path.parent.name) for path in files])
    runs = []
    for seed in options.seeds:
        rows = long_tail(labels, seed)
        runs.append(_real(backbone, [files[row] for row in rows], labels[rows], options.counts, seed))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    made = [
        _made(noise, labels[long_tail(labels, seed)], options.counts, seed)
        for noise in (0.5, 0.3, 0.2, 0.1, 0.05)
        for seed in options.seeds
    ]
    return {"classes": names, "backbone": options.backbone, "images": runs, "made_embeddings": made}


def _real(
    backbone: Any,  # noqa: ANN401 (torch is loaded later)
    files: list[Path],
    labels: NDArray[np.int64],
    counts: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    from dinov3geo.curation.pipeline import ChoiceSettings, PoolSettings, curate
    from dinov3geo.curation.vectors import VectorFile
    from dinov3geo.data.chosen import read_chosen

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = folder / "pool"
        pool.mkdir()
        # Names that say nothing of the class.
        for number, file in enumerate(files):
            os.symlink(file.resolve(), pool / f"{number:05}.jpg")
        shares = {}
        for count in counts:
            table = folder / f"{count}.parquet"
            settings = PoolSettings(str(pool), kind="images", chip_size=64)
            choice = ChoiceSettings(count, seed=seed)
            curate(settings, choice, table, backbone=backbone, work=folder / "work", keep_work=True)
            chosen = [int(Path(path).stem) for path in read_chosen(table).paths]
            shares[str(count)] = entropy_share(labels[chosen], 10)
        vectors = VectorFile(folder / "work" / "vectors.f16", backbone.embed_dim)
        accuracy = neighbour_accuracy(vectors.read(0, len(vectors)), labels)
    return {
        "seed": seed,
        "pool": len(files),
        "raw": entropy_share(labels, 10),
        "neighbour_accuracy": accuracy,
        "chosen": shares,
    }


def _made(noise: float, labels: NDArray[np.int64], counts: Sequence[int], seed: int) -> dict[str, Any]:
    from dinov3geo.curation.hierarchy import balanced_rows, build_hierarchy, default_levels
    from dinov3geo.curation.kmeans import InMemory

    rng = np.random.default_rng(seed)
    vectors = np.eye(10, 32)[labels] + noise * rng.standard_normal((len(labels), 32))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    hierarchy = build_hierarchy(InMemory(unit), default_levels(len(unit)), seed=seed)
    usable = np.ones(len(unit), dtype=np.bool_)
    shares = {
        str(count): entropy_share(
            labels[balanced_rows(hierarchy, count, usable=usable, generator=np.random.default_rng(seed))],
            10,
        )
        for count in counts
    }
    accuracy = neighbour_accuracy(unit, labels)
    return {"noise": noise, "seed": seed, "neighbour_accuracy": accuracy, "chosen": shares}


def _memories(counts: Sequence[int]) -> dict[str, Any]:
    rows = []
    for count in counts:
        done = subprocess.run(
            [sys.executable, __file__, "one", str(count)], check=True, capture_output=True, text=True
        )
        rows.append(json.loads(done.stdout))
        print(done.stdout.strip(), file=sys.stderr, flush=True)
    slope, base = np.polyfit([row["vectors"] for row in rows], [row["peak_bytes"] for row in rows], 1)
    return {
        "width": WIDTH,
        "runs": rows,
        "bytes_per_vector": float(slope),
        "bytes_without_vectors": float(base),
        "ten_million_gib": float((base + slope * 10_000_000) / 2**30),
    }


def _measure_once(count: int) -> dict[str, float]:
    """All stages on random vectors around as many directions as there are clusters; their peak memory."""
    from dinov3geo.curation.duplicates import find_duplicates
    from dinov3geo.curation.hierarchy import balanced_rows, build_hierarchy, default_levels
    from dinov3geo.curation.retrieval import nearest_rows
    from dinov3geo.curation.vectors import BLOCK, VectorFile

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        vectors = VectorFile(Path(folder) / "v.f16", WIDTH)
        rng = np.random.default_rng(0)
        for start in range(0, count, BLOCK):
            vectors.append(rng.standard_normal((min(BLOCK, count - start), WIDTH), dtype=np.float32))
        # Memory does not depend on the number of rounds.
        hierarchy = build_hierarchy(vectors, default_levels(count), seed=0, rounds=1)
        usable = ~find_duplicates(vectors, hierarchy.labels, 0.995)
        rows = balanced_rows(hierarchy, count // 10, usable=usable, generator=rng)
        hierarchy.paths(rows)
        nearest_rows(vectors, vectors.read(0, 256), 8, usable=usable)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"vectors": count, "peak_bytes": peak, "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    sys.exit(main())
