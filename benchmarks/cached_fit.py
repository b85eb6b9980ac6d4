"""What a head costs the first time and from cached features: the second fit runs without the backbone.

Each row fits the same head twice on the same images, first with an empty cache, then with the one that the
first fit filled, and checks that both give the same weights. Larger backbones have random weights of their
variant, since time does not depend on them.

    python benchmarks/cached_fit.py --images image --masks mask --classes classes.yaml --windows 24 \
        --backbone vit-tiny-aerial --variant vit_base --out results/cached_fit.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dinov3geo.backbones.variants import VARIANTS, build_network
from dinov3geo.backbones.zoo import load_backbone, save_backbone
from dinov3geo.config import load_model
from dinov3geo.data.labels import ClassScheme
from dinov3geo.data.pairs import PairMatch
from dinov3geo.features.extract import FeatureCache, weights_digest
from dinov3geo.heads import landcover
from dinov3geo.heads.landcover import LandcoverSettings

RGB = "vit-tiny-aerial"


def random_backbone(variant: str, folder: Path) -> Path:
    """Random weights of a variant with the card of the starter weights.

    Args:
        variant: e.g. `"vit_base"`.
        folder: to write into.
    """
    card = load_backbone(RGB).card
    assert card is not None
    torch.manual_seed(0)
    path = folder / f"{variant}.safetensors"
    named = dataclasses.replace(card, name=variant, variant=variant, recipe={}, scores={})
    save_backbone(path, build_network(VARIANTS[variant]), named)
    return path


def measure(source: str | Path, kind: str, arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Both fits of one backbone and head."""
    scheme = load_model(ClassScheme, arguments.classes)
    settings = LandcoverSettings.model_validate(
        {
            "image_scale": arguments.image_scale,
            "max_window": arguments.window,
            "head": {"kind": kind, "finest": 1},
            "fit": {"epochs": arguments.epochs, "batch_pixels": 65536},
        }
    )
    seconds, digests = [], []
    whole: PairMatch = landcover.match_masks(arguments.images, arguments.masks, settings)
    match = dataclasses.replace(whole, pairs=whole.pairs[: arguments.windows])
    backbone = load_backbone(source)
    for _ in range(2):
        began = time.perf_counter()
        samples = landcover.label_samples(match, scheme, backbone, settings, cache=FeatureCache(cache))
        head, _ = landcover.fit_class_head(samples, scheme, settings, device=torch.device("cpu"))
        seconds.append(time.perf_counter() - began)
        digests.append(weights_digest(head))
    assert backbone.card is not None and digests[0] == digests[1], "the cache changed the head"
    return {
        "backbone": backbone.card.name,
        "head": kind,
        "windows": len(match.pairs),
        "first_s": round(seconds[0], 2),
        "second_s": round(seconds[1], 2),
        "ratio": round(seconds[0] / seconds[1], 1),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows in Markdown."""
    lines = ["| backbone | head | first fit [s] | from the cache [s] | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['backbone']} | {r['head']} | {r['first_s']:.1f} | {r['second_s']:.2f} | {r['ratio']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--masks", required=True)
    parser.add_argument("--classes", required=True)
    parser.add_argument("--backbone", action="append", default=[])
    parser.add_argument("--variant", action="append", default=[], help="random weights of a variant")
    parser.add_argument("--head", action="append", default=[])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=128, help="side in pixels")
    parser.add_argument("--image-scale", type=float, default=4.0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sources = [*arguments.backbone, *(random_backbone(v, folder) for v in arguments.variant)]
        for source in sources:
            for kind in arguments.head or ["linear"]:
                rows.append(measure(source, kind, arguments, folder / f"cache{len(rows)}"))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    report = {
        "command": f"python benchmarks/cached_fit.py {' '.join(words or sys.argv[1:])}",
        "threads": arguments.threads,
        "torch": torch.__version__,
        "rows": rows,
    }
    print(table(rows), end="")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
