"""Do patch features decay in long training, and does Gram anchoring hold them?

For every seed one network is trained at constant rates (the trunk). From its end several runs go on with the
same images, crops and rates: one without Gram anchoring, the others held to the patch similarities of the
trunk's teacher at different times, or of crops at twice the resolution. Along all of them are measured: dense
scores (the scene class of each patch in mosaics of EuroSAT images, the land cover of patches of Sentinel-2
tiles, both on places held out), a global score (nearest neighbours of EuroSAT images), and how noisy patch
similarities are. No run trains on the images asked for, and EuroSAT's test part is never read.

    python -m benchmarks.gram_anchoring --eurosat DATA/eurosat --tiles DATA/sentinel2_landcover \
        --work outputs/gram_anchoring --out benchmarks/results/DATE_gram_anchoring

SIGTERM and Ctrl-C stop it after the step that is being made; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.gram_probes import Probe, make_mosaics, read_chips, read_images
from benchmarks.gram_report import PLAIN, TRUNK, Curves, draw, table
from dinov3geo.allocator import keep_freed_memory
from dinov3geo.config import PretrainConfig, load_config
from dinov3geo.errors import ConfigError, UserError
from dinov3geo.evaluation.image_sets import TEST_SHARE, class_folders, hash_share
from dinov3geo.paths import written_whole
from dinov3geo.training.checkpoint import FOLDER as CHECKPOINTS
from dinov3geo.training.journal import METRICS_FILE, commit
from dinov3geo.training.setup import build_student, run_normalization
from dinov3geo.training.trainer import pretrain

ROOT = Path(__file__).resolve().parent.parent
QUERIES = (0.3, 0.4)
"""Hashes of the images that are asked for and kept out of training. The settings of the trunk were chosen on
those of 0.2 to 0.3 and with seed 0."""
FIRST_SEED = 1
BRANCH_STEPS, EVERY, ANCHORS = 200, 100, [100, 200, 400, 800]
_LOGGED = ("patch_cls_similarity", "gram")
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Arm:
    """A run that goes on from the trunk's end.

    Attributes:
        name: of its folder.
        label: for tables and pictures.
        anchor: step of the trunk whose teacher it is held to, or None.
        scale: how many times larger the anchor sees the crops.
    """

    name: str
    label: str
    anchor: int | None = None
    scale: int = 1


@dataclass(frozen=True, slots=True)
class Study:
    """What is run.

    Attributes:
        config: YAML file of the trunk.
        overrides: of it, `"key=value"`.
        work: folder of the runs.
        seeds: number of trunks.
        branch_steps: that every arm goes on.
        every: steps between measurements.
        arms: those that branch off.
    """

    config: Path
    overrides: tuple[str, ...]
    work: Path
    seeds: int
    branch_steps: int
    every: int
    arms: tuple[Arm, ...]

    @property
    def all_seeds(self) -> range:
        """Numbers of the seeds."""
        return range(FIRST_SEED, FIRST_SEED + self.seeds)

    def trunk(self, seed: int) -> PretrainConfig:
        """Settings of a trunk, whose checkpoints at multiples of `every` are kept as anchors."""
        return load_config(
            self.config,
            [
                *self.overrides,
                f"seed={seed}",
                f"data.root={self.work / 'images'}",
                f"watch.evaluate_every={self.every}",
                f"checkpoints.every={self.every}",
                f"checkpoints.keep_every={self.every}",
            ],
        )

    def branch(self, seed: int, arm: Arm) -> PretrainConfig:
        """Settings of an arm: those of the trunk, some steps more, and the anchor."""
        trunk = self.trunk(seed)
        values = trunk.model_dump(mode="json")
        values["steps"] = trunk.steps + self.branch_steps
        values["start_from"] = str(self.checkpoint(seed, trunk.steps))
        values["keep_count"] = True
        values["checkpoints"] |= {"keep_last": 1, "keep_every": None}
        if arm.anchor is not None:
            values["gram"]["anchor"] = str(self.checkpoint(seed, arm.anchor))
            if arm.scale > 1:
                values["crops"]["gram_size"] = arm.scale * trunk.crops.global_size
        return PretrainConfig.model_validate(values)

    def folder(self, seed: int, name: str) -> Path:
        """Of a run."""
        return self.work / f"seed{seed}" / name

    def checkpoint(self, seed: int, step: int) -> Path:
        """Of the trunk."""
        return self.folder(seed, TRUNK) / CHECKPOINTS / f"step_{step:08d}"


class StoppedError(Exception):
    """A signal asked to stop; the state is saved."""

    def __init__(self, number: int) -> None:
        """Keeps the signal."""
        super().__init__(number)
        self.number = number


def choose_arms(anchors: Sequence[int], fine: int) -> tuple[Arm, ...]:
    """One arm without anchoring, one per anchor, and one whose anchor sees more.

    Args:
        anchors: steps of the trunk.
        fine: the one of them that also sees the crops at twice the resolution.
    """
    plain = Arm(PLAIN, "without Gram")
    swept = [Arm(f"gram_{step}", f"Gram, anchor of step {step}", step) for step in anchors]
    return (plain, *swept, Arm(f"gram_{fine}_2x", f"Gram, anchor of step {fine}, 2x resolution", fine, 2))


def check_study(study: Study) -> None:
    """Refuses a study whose arms would differ in more than their anchor.

    Raises:
        ConfigError: a schedule that is not constant at the trunk's end, or an anchor without a checkpoint.
    """
    trunk = study.trunk(FIRST_SEED)
    steps, end = trunk.steps, trunk.steps + study.branch_steps
    for name in type(trunk.schedules).model_fields:
        schedule = getattr(trunk.schedules, name)
        if not math.isclose(schedule.at(steps - 1, steps), schedule.at(end - 1, end)):
            raise ConfigError(
                f"{study.config}: schedules.{name} still changes at step {steps}, where the arms branch off; "
                "set its cosine_steps to 0"
            )
    for step in (steps, *(arm.anchor for arm in study.arms if arm.anchor is not None)):
        if step % study.every or not 0 < step <= steps:
            raise ConfigError(
                f"step {step} has no checkpoint; expected a multiple of --every {study.every} up to {steps}"
            )


def prepare(study: Study, options: argparse.Namespace) -> Probe:
    """Links to the images that are trained on, and the images that are measured.

    Raises:
        UserError: a folder that is missing or holds something else.
    """
    settings = study.trunk(FIRST_SEED)
    images = class_folders(options.eurosat)
    share = np.array([hash_share(name) for name in images.names])
    asked = (share >= QUERIES[0]) & (share < QUERIES[1])
    trained = (share >= TEST_SHARE) & ~asked
    chosen = {name for name, kept in zip(images.names, trained.tolist(), strict=True) if kept}
    for path in sorted(options.eurosat.rglob("*")):
        if path.name in chosen:
            link = study.work / "images" / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(path.resolve())
    size, patch = settings.crops.global_size, settings.model.patch_size
    gallery = read_images(images.take(np.flatnonzero(trained)).limit(options.per_class), size)
    queries = read_images(images.take(np.flatnonzero(asked)).limit(options.per_class // 2), size)
    pixels = gallery.images.float()
    tiles = read_chips(
        options.tiles,
        options.classes,
        bands=options.tile_bands,
        size=2 * size,
        patch=patch,
        per_tile=options.chips_per_tile,
        per_place=2 * options.chips_per_tile,
        folds=options.folds,
        like=(pixels.mean((0, 2, 3)).numpy(), pixels.std((0, 2, 3)).numpy()),
    )
    fitted, wanted = (
        make_mosaics(part, images.classes, count=options.mosaics, patch=patch) for part in (gallery, queries)
    )
    return Probe(gallery, queries, (fitted, wanted), tiles)


def run_seed(study: Study, seed: int, probe: Probe) -> None:
    """Trains and measures the trunk and the arms of a seed, or what is left of them.

    Raises:
        StoppedError: a signal came; the same call goes on.
    """
    trunk = study.trunk(seed)
    untrained = study.folder(seed, TRUNK) / "untrained.json"
    if not untrained.exists():
        torch.manual_seed(seed)
        backbone = build_student(trunk).eval().requires_grad_(False)
        numbers = probe.measure(backbone, run_normalization(trunk))
        untrained.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(untrained) as temporary:
            temporary.write_text(json.dumps({"step": 0, **numbers}) + "\n", encoding="utf-8")
    _run(study, seed, TRUNK, trunk, probe)
    for arm in study.arms:
        _run(study, seed, arm.name, study.branch(seed, arm), probe)


def _run(study: Study, seed: int, name: str, settings: PretrainConfig, probe: Probe) -> None:
    out = study.folder(seed, name)
    if any(step == settings.steps for step, _ in read_curve(out)):
        return
    print(f"seed {seed}, {name}: to step {settings.steps}", flush=True)
    normalization = run_normalization(settings)
    result = pretrain(
        settings,
        out=out,
        resume=True,
        warn=lambda text: print(text, file=sys.stderr, flush=True),
        evaluators={"study": lambda backbone: probe.measure(backbone, normalization)},
    )
    if result.asked_by is not None:
        raise StoppedError(result.asked_by)


def read_curve(run: Path) -> list[tuple[int, dict[str, float]]]:
    """The measurements of a run, [(step, numbers)], oldest first; empty if there are none yet."""
    found: dict[int, dict[str, float]] = {}
    untrained = run / "untrained.json"
    if untrained.exists():
        numbers = json.loads(untrained.read_text(encoding="utf-8"))
        found[numbers.pop("step")] = numbers
    logged: dict[str, float] = {}
    metrics = run / METRICS_FILE
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
        line = json.loads(text)
        own = {key.removeprefix("eval/"): value for key, value in line.items() if key.startswith("eval/")}
        logged |= {name: line[name] for name in _LOGGED if name in line}
        if own:
            found[line["step"]] = own | logged
    return sorted(found.items())


def gather(study: Study) -> Curves:
    """All measurements of the seeds whose every arm is finished."""
    runs = [TRUNK, *(arm.name for arm in study.arms)]
    curves: Curves = {name: [] for name in runs}
    for seed in study.all_seeds:
        own = {name: dict(read_curve(study.folder(seed, name))) for name in runs}
        end = study.trunk(seed).steps + study.branch_steps
        if all(end in own[arm.name] for arm in study.arms):
            for name in runs:
                curves[name].append(own[name])
    return curves


def write_report(study: Study, out: Path, command: str) -> bool:
    """Writes `results.json`, `curves.csv`, `table.md` and `curves.png` of the finished seeds.

    Returns:
        Whether any seed is finished.
    """
    curves = gather(study)
    seeds = len(curves[TRUNK])
    if not seeds:
        return False
    trunk, labels = study.trunk(FIRST_SEED), {arm.name: arm.label for arm in study.arms}
    rows = [
        {"run": name, "seed": seed, "step": step, "metric": metric, "value": value}
        for name, own in curves.items()
        for seed, curve in enumerate(own, start=FIRST_SEED)
        for step, numbers in curve.items()
        for metric, value in numbers.items()
    ]
    report = {
        "command": command,
        "commit": commit(),
        "seeds": seeds,
        "branch_steps": study.branch_steps,
        "arms": [{"name": a.name, "anchor": a.anchor, "scale": a.scale} for a in study.arms],
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__},
        "settings": trunk.model_dump(mode="json", exclude={"data": {"root"}}),
        "rows": rows,
    }
    with written_whole(out / "results.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with written_whole(out / "curves.csv") as temporary, temporary.open("w", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with written_whole(out / "table.md") as temporary:
        temporary.write_text(table(curves, labels, trunk.steps + study.branch_steps), encoding="utf-8")
    draw(curves, labels, out / "curves.png", batch_size=trunk.batch_size)
    return True


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--eurosat", type=Path, required=True, help="folder with one sub-folder per class")
    parser.add_argument("--tiles", type=Path, required=True, help="folder with image/ and mask/")
    parser.add_argument("--tile-bands", type=int, nargs=3, default=(3, 2, 1), help="red, green, blue")
    parser.add_argument("--classes", type=Path, default=ROOT / "configs/classes/sentinel2_landcover.yaml")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/pretrain/anchoring_study.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--branch-steps", type=int, default=BRANCH_STEPS, help="that every arm goes on")
    parser.add_argument("--every", type=int, default=EVERY, help="steps between measurements")
    parser.add_argument("--anchors", type=int, nargs="+", default=ANCHORS, help="steps of the trunk")
    parser.add_argument("--fine", type=int, help="anchor that also sees crops twice as large")
    parser.add_argument("--per-class", type=int, default=150, help="images that vote; half as many are asked")
    parser.add_argument("--mosaics", type=int, default=250, help="of four images each")
    parser.add_argument("--chips-per-tile", type=int, default=8)
    parser.add_argument("--folds", type=int, default=3, help="parts of the places of the tiles")
    parser.add_argument("--smoke", action="store_true", help="a few steps: does it run at all")
    return parser.parse_args(words)


def make_study(options: argparse.Namespace) -> Study:
    """The study that the options ask for."""
    if options.smoke:
        options.overrides = [
            "steps=4",
            "batch_size=4",
            "schedules.lr=1.0e-3",
            "log_every=2",
            *options.overrides,
        ]
        options.seeds, options.branch_steps, options.every, options.anchors = 2, 2, 2, [2, 4]
        options.per_class, options.chips_per_tile = min(options.per_class, 8), 1
    if min(options.seeds, options.branch_steps, options.every) < 1:
        raise ConfigError("--seeds, --branch-steps and --every must be at least 1")
    fine = options.anchors[0] if options.fine is None else options.fine
    return Study(
        options.config,
        tuple(options.overrides),
        options.work,
        options.seeds,
        options.branch_steps,
        options.every,
        choose_arms(options.anchors, fine),
    )


def main(words: Sequence[str] | None = None) -> int:
    """Runs what is left of the study, writing the results after every seed."""
    options = parse(words)
    keep_freed_memory()
    command = f"python -m benchmarks.gram_anchoring {' '.join(words or sys.argv[1:])}"
    try:
        study = make_study(options)
        check_study(study)
        probe = prepare(study, options)
        for seed in study.all_seeds:
            run_seed(study, seed, probe)
            write_report(study, options.out, command)
    except StoppedError as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED if stop.number == signal.SIGINT else 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print((options.out / "table.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
