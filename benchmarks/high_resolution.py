"""What does a stage at high resolution do to features of images larger than those of the training?

One network is trained on crops of 96 pixels (the trunk). Three runs go on from its end over the same number
of images: at 96 pixels, at 96 pixels held to the trunk by Gram anchoring, and on a mixture of 192 and 288
pixels held in the same way, which is the high-resolution stage of DINOv3. A ridge regression then tells
canopy height from single patch features, by plots held out: of aerial images cut into windows of 1, 2 and 4
times the training size, and of windows of the training size enlarged 2 and 4 times. The ground is the same
in all columns, and so are the cells of 1.6 m that are predicted.

    python -m benchmarks.high_resolution --data DATA --work outputs/high_resolution \
        --out benchmarks/results/DATE_high_resolution

DATA holds neon_plots/, treesatai/, flair/ (trained on) and neon/, teak/ (other places; measured on where a
plot has 384 pixels). SIGTERM and Ctrl-C stop it after the step that is being made; the same command goes on
from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dinov3geo.allocator import keep_freed_memory
from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.zoo import load_backbone
from dinov3geo.config import PretrainConfig, load_config
from dinov3geo.data.pairs import find_pairs, load_pair
from dinov3geo.errors import DataError, UserError
from dinov3geo.evaluation.bootstrap import Interval, bootstrap
from dinov3geo.evaluation.figures import save_figure
from dinov3geo.evaluation.folds import balanced_folds
from dinov3geo.paths import written_whole
from dinov3geo.training.journal import commit
from dinov3geo.training.trainer import pretrain

ROOT = Path(__file__).resolve().parent.parent
TRUNK = "trunk"
ARMS = {
    TRUNK: "first stage, 96 px",
    "more": "96 px, longer",
    "gram": "96 px, longer, Gram",
    "high": "192 and 288 px, Gram",
}
BRANCH_STEPS, BRANCH_BATCH = 120, 16
# Side of the training's crops, and of the windows that plots of 400 pixels are cut into.
SIDE, LARGEST = 96, 384
VIEWS = [(96, 1), (192, 1), (384, 1), (96, 2), (96, 4)]
"""Side of the window in the scene's pixels, and how many times it is enlarged."""
FOLDS = 5
_RIDGE = 1e-3
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Plot:
    """A square of an aerial image with what is wanted of it.

    Attributes:
        image: [3, LARGEST, LARGEST] as the file holds it.
        height: [n, n] metres, mean of each cell of one patch.
        known: [n, n] bool, cells whose every pixel has image and height.
        group: plots that overlap share one.
    """

    image: Tensor
    height: Tensor
    known: Tensor
    group: str


def trunk_settings(options: argparse.Namespace) -> PretrainConfig:
    """Of the first stage."""
    changes = [*options.overrides, f"seed={options.seed}", f"data.root={options.data.resolve()}"]
    return load_config(options.config, changes)


def branch_settings(trunk: PretrainConfig, arm: str, checkpoint: Path, steps: int) -> PretrainConfig:
    """Of an arm: the trunk's, so many steps more on smaller batches."""
    values = trunk.model_dump(mode="json")
    values |= {"steps": steps, "batch_size": BRANCH_BATCH, "start_from": str(checkpoint), "name": arm}
    # The optimiser begins anew, as in the stages of DINOv3, so the rate warms up again.
    values["schedules"]["lr"]["warmup_steps"] = min(20, steps)
    if arm != "more":
        values["gram"]["anchor"] = str(checkpoint)
        values["crops"]["gram_size"] = 2 * SIDE
    if arm == "high":
        values["data"]["chip_size"] = 320
        values["resolutions"] = [
            {"global_size": 192, "local_size": 48, "gram_size": 288, "probability": 0.5},
            {"global_size": 192, "local_size": 96, "gram_size": 288, "probability": 0.25},
            {"global_size": 288, "local_size": 96, "gram_size": 384, "probability": 0.25},
        ]
    return PretrainConfig.model_validate(values)


def train(options: argparse.Namespace) -> int | None:
    """Trains what is not trained yet; gives the signal that asked to stop, if one did."""
    trunk = trunk_settings(options)
    for arm in ARMS:
        out = options.work / arm
        if (out / "backbone.safetensors").is_file():
            continue
        settings = trunk
        if arm != TRUNK:
            settings = branch_settings(trunk, arm, options.work / TRUNK, options.steps)
        print(f"{arm}: {settings.steps} steps of {settings.batch_size}", flush=True)
        result = pretrain(settings, out=out, resume=True, warn=lambda text: print(text, file=sys.stderr))
        if result.asked_by is not None:
            return result.asked_by
    return None


def read_plots(data: Path, patch: int) -> list[Plot]:
    """The plots with heights, as far as they are large enough.

    Raises:
        UserError: a folder is missing or holds something else.
    """
    found = []
    for pair in find_pairs([data / "neon/rgb", data / "teak/rgb"], [data / "neon/chm", data / "teak/chm"]):
        arrays = load_pair(pair)
        if min(arrays.image.shape[1:]) < LARGEST:
            continue
        cut = slice(0, LARGEST), slice(0, LARGEST)
        heights, known = (
            np.repeat(np.repeat(array, pair.factor, 0), pair.factor, 1)[cut]
            for array in (arrays.target, arrays.target_valid)
        )
        whole = torch.from_numpy((known & arrays.valid[cut]).astype(np.float32))[None]
        metres = torch.from_numpy(heights.astype(np.float32))[None]
        found.append(
            Plot(
                torch.from_numpy(arrays.image[(slice(0, 3), *cut)].astype(np.float32)),
                F.avg_pool2d(metres, patch)[0],
                F.avg_pool2d(whole, patch)[0] == 1,
                pair.group,
            )
        )
    if len({plot.group for plot in found}) < FOLDS:
        raise DataError(f"{data} has {len(found)} plots of {LARGEST} pixels with heights; expected {FOLDS}")
    return found


@torch.inference_mode()
def plot_features(backbone: Backbone, plot: Plot, window: int, enlarged: int) -> Tensor:
    """Patch features of a plot seen in windows, averaged over the cells of the plot's heights.

    Args:
        backbone: with a card.
        plot: to look at.
        window: side in pixels of the image.
        enlarged: times that each window is enlarged.

    Returns:
        [n, n, D] float64.
    """
    assert backbone.card is not None
    count = LARGEST // window
    image = backbone.card.normalization(plot.image[None])
    windows = F.unfold(image, window, stride=window)[0].T.reshape(count * count, -1, window, window)
    if enlarged > 1:
        windows = F.interpolate(windows, scale_factor=enlarged, mode="bicubic", antialias=True)
    features = backbone(windows)
    rows, cols = features.grid_hw
    maps = features.patches.transpose(1, 2).reshape(count * count, -1, rows, cols)
    maps = F.avg_pool2d(maps, enlarged).reshape(count, count, -1, rows // enlarged, cols // enlarged)
    return maps.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).double()


def height_errors(
    backbone: Backbone, plots: Sequence[Plot], window: int, enlarged: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared errors of a ridge regression and squared heights, both from the plot's mean, summed per plot.

    What tells one plot from another (light, season, the site's height) is in a plot's mean, and there are few
    plots; so both features and heights are taken from the mean of their plot.
    """
    rows = [plot_features(backbone, plot, window, enlarged)[plot.known] for plot in plots]
    rows = [own - own.mean(0) for own in rows]
    wanted = [plot.height[plot.known].double() for plot in plots]
    wanted = [own - own.mean() for own in wanted]
    fold_of = balanced_folds([plot.group for plot in plots], [len(own) for own in wanted], FOLDS, seed=0)
    residual = np.zeros(len(plots))
    for fold in range(FOLDS):
        fitted = [i for i, own in enumerate(fold_of) if own != fold]
        x, y = torch.cat([rows[i] for i in fitted]), torch.cat([wanted[i] for i in fitted])
        gram = x.T @ x
        gram.diagonal().add_(_RIDGE * gram.trace() / len(gram))
        solution = torch.linalg.solve(gram, x.T @ y)
        for i in (i for i, own in enumerate(fold_of) if own == fold):
            residual[i] = float((rows[i] @ solution - wanted[i]).square().sum())
    return residual, np.array([float(own.square().sum()) for own in wanted])


def measure(work: Path, plots: Sequence[Plot]) -> Iterator[dict[str, Any]]:
    """A row per arm and view: R2 within plots and its gain over the trunk, with 95 % intervals over plots."""
    trunk: dict[tuple[int, int], NDArray[np.float64]] = {}
    for arm in ARMS:
        backbone = load_backbone(work / arm).eval()
        for view in VIEWS:
            residual, spread = height_errors(backbone, plots, *view)
            before = trunk.setdefault(view, residual)
            row: dict[str, Any] = {"arm": arm, "window": view[0], "enlarged": view[1]}
            for name, saved in (("r2", spread - residual), ("gain", before - residual)):
                found = _share(saved, spread)
                row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            print(f"{ARMS[arm]}: {view[0]} px x {view[1]}: R2 {row['r2']:.3f}", flush=True)
            yield row | {"errors": residual.tolist()}


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> Interval:
    return bootstrap(lambda chosen: float(part[chosen].sum() / whole[chosen].sum()), len(part), seed=0)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: an arm per line, a view per column; then the gains over the trunk."""
    names = [f"{w} px" if e == 1 else f"{w} px enlarged {e} times" for w, e in VIEWS]
    texts = []
    for name, title in (("r2", "R2 of heights within plots"), ("gain", "gain over the first stage")):
        lines = [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for arm, label in ARMS.items():
            own = [row for row in rows if row["arm"] == arm]
            cells = [f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" for row in own]
            if name == "r2" or arm != TRUNK:
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """R2 over the side of the input, for windows that show more and for windows that are enlarged."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    chosen = {"a larger window": VIEWS[:3], "the same window, enlarged": [VIEWS[0], *VIEWS[3:]]}
    for ax, (title, views) in zip(axes, chosen.items(), strict=True):
        for arm, label in ARMS.items():
            own = {(r["window"], r["enlarged"]): r["r2"] for r in rows if r["arm"] == arm}
            ax.plot([w * e for w, e in views], [own[v] for v in views], marker="o", label=label)
        ax.set(
            title=title, xlabel="input side [px]", ylabel="R2 of heights within plots", xticks=[96, 192, 384]
        )
    axes[0].set_ylabel("R2 of heights within plots")
    axes[0].legend()
    save_figure(figure, path)


def write_report(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Writes `results.json`, `table.md` and `heights.png`."""
    report = {
        "command": " ".join(["python -m benchmarks.high_resolution", *sys.argv[1:]]),
        "commit": commit(),
        "seed": options.seed,
        "branch": {"steps": options.steps, "batch_size": BRANCH_BATCH},
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__},
        "settings": trunk_settings(options).model_dump(mode="json", exclude={"data": {"root"}}),
        "rows": list(rows),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    with written_whole(options.out / "results.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with written_whole(options.out / "table.md") as temporary:
        temporary.write_text(table(rows), encoding="utf-8")
    draw(rows, options.out / "heights.png")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets named above")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=BRANCH_STEPS, help="of each arm after the trunk")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/pretrain/resolution_study.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; gives its exit code."""
    options = parse(words)
    keep_freed_memory()
    try:
        plots = read_plots(options.data, trunk_settings(options).model.patch_size)
        stopped = train(options)
        if stopped is not None:
            print("stopped; the same command goes on", file=sys.stderr)
            return _INTERRUPTED if stopped == signal.SIGINT else 0
        write_report(options, list(measure(options.work, plots)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
