"""`dinov3geo detect`: fit, predict and evaluate boxes of objects."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.console import note, note_resumed, print_pairs, print_table, progress_bar, warn
from dinov3geo.commands.options import (
    Backbone,
    Cache,
    Changes,
    Device,
    DryRun,
    Epochs,
    HeadSettings,
    ModelFolder,
    Overwrite,
    Seed,
    command_line,
    open_cache,
)

if TYPE_CHECKING:
    from dinov3geo.data.boxes import BoxSet
    from dinov3geo.heads.detection import DetectionSettings

detect = typer.Typer(help="Boxes of objects.", no_args_is_help=True)

Annotations = Annotated[
    Path,
    typer.Argument(
        metavar="ANNOTATIONS",
        help=".csv (image_path,xmin,ymin,xmax,ymax,label), COCO .json, or a folder of .xml files.",
        show_default=False,
    ),
]
ImageFolder = Annotated[
    Path | None,
    typer.Option("--images", metavar="DIR", help="Their images.", show_default="where the annotations are"),
]
Model = Annotated[Path, typer.Option(metavar="DIR", help="Written by `detect fit`.", show_default=False)]


@detect.command("fit")
def fit(
    context: typer.Context,
    annotations: Annotations,
    out: ModelFolder,
    images: ImageFolder = None,
    backbone: Backbone = None,
    config: HeadSettings = None,
    epochs: Epochs = None,
    seed: Seed = None,
    changes: Changes = None,
    cache: Cache = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit a detector (FCOS) on a pyramid of frozen features.

    A fit that was cut off goes on where it was when the same command is given again. With
    --set fit.validation_share=0.2 it stops early by images kept out and reports their average precision.
    """
    from dinov3geo.config import load_model
    from dinov3geo.data.boxes import load_boxes
    from dinov3geo.heads.detection import DetectionSettings
    from dinov3geo.heads.detection_fit import fit_detection
    from dinov3geo.heads.folders import check_free

    given = {"fit.seed": seed, "fit.epochs": epochs}
    shortcuts = [f"{key}={value}" for key, value in given.items() if value is not None]
    settings = load_model(DetectionSettings, config, [*shortcuts, *(changes or [])])
    check_free(out, what="detection", overwrite=overwrite)
    data = load_boxes(annotations, images)
    if dry_run:
        print_plan(data, settings, backbone)
        return
    with progress_bar("fit") as tell:
        report = fit_detection(
            data,
            out=out,
            backbone=backbone,
            settings=settings,
            overwrite=overwrite,
            cache=open_cache(cache),
            command=command_line(context),
            progress=lambda stage, done, total: tell(done, total, label=stage),
        )
    result, scores = report.result, report.scores
    note_resumed(result.resumed_epoch)
    validation = "none (fit.validation_share=0)"
    if scores is not None:
        validation = (
            f"mAP {scores.map:.3f}, mAP 50 {scores.map_50:.3f} of {scores.boxes} boxes in {scores.images} "
            "windows kept out while the epoch was chosen"
        )
    print_pairs(
        [
            ("model", str(report.folder)),
            ("images", f"{len(data.images)} in {report.windows} windows"),
            ("boxes", ", ".join(f"{name} {count}" for name, count in report.counts.items())),
            ("loss", f"{result.losses[0]:.3f} to {result.losses[-1]:.3f}"),
            ("epoch kept", f"{result.best_epoch + 1} of {len(result.losses)}"),
            ("validation", validation),
        ]
    )


@detect.command("predict")
def predict(
    scenes: Annotated[
        list[Path],
        typer.Argument(metavar="SCENE|FOLDER...", help="Images, or folders of them.", show_default=False),
    ],
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="OUT", help=".gpkg with a CRS, or .csv in pixels.", show_default=False
        ),
    ],
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Leave out boxes below.")] = 0.3,
    tile: Annotated[
        int | None,
        typer.Option(min=16, help="Side of the square read at a time, pixels.", show_default="as in the fit"),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(min=0, help="Pixels that neighbouring squares share.", show_default="tile / 4"),
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Find objects in scenes of any size."""
    from dinov3geo.backbones.device import resolve_device
    from dinov3geo.data.boxes import is_image
    from dinov3geo.errors import ConfigError
    from dinov3geo.heads.detection import load_detection_model
    from dinov3geo.heads.scene_boxes import find_objects
    from dinov3geo.paths import check_target
    from dinov3geo.predict.objects import SUFFIXES, write_objects

    if output.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{output}: unknown form of table; valid suffixes: {', '.join(SUFFIXES)}")
    files = [
        file
        for path in scenes
        for file in (sorted(f for f in path.iterdir() if is_image(f)) if path.is_dir() else [path])
    ]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise ConfigError(f"no such image: {missing[0]}" if missing else f"no image in {scenes[0]}")
    check_target(output, sources=files, overwrite=overwrite)
    detector = load_detection_model(model).to(resolve_device(device))
    found = []
    for file in files:
        with progress_bar(file.name) as tell:
            found.append(
                find_objects(file, detector, tile=tile, overlap=overlap, min_score=min_score, progress=tell)
            )
    table = write_objects(found, output, classes=detector.classes)
    counts = table["label"].value_counts()
    print_pairs([("table", str(output)), ("scenes", str(len(files)))])
    print_table(["class", "boxes"], [[str(name), str(count)] for name, count in counts.items()])


@detect.command("evaluate")
def evaluate(
    context: typer.Context,
    annotations: Annotations,
    model: Model,
    images: ImageFolder = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="JSON", help="Report.", show_default=False)
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Score a detector by mean average precision (COCO) on images that are new to it."""
    from dinov3geo.backbones.device import resolve_device
    from dinov3geo.data.boxes import load_boxes
    from dinov3geo.evaluation.detection import evaluate_detection
    from dinov3geo.evaluation.results import finite
    from dinov3geo.heads.box_scores import COUNTED
    from dinov3geo.heads.detection import load_detection_model
    from dinov3geo.paths import check_target, written_whole

    detector = load_detection_model(model).to(resolve_device(device))
    data = load_boxes(annotations, images)
    if out is not None:
        check_target(out, sources=[annotations], overwrite=overwrite)
    with progress_bar("evaluate") as tell:
        scores = evaluate_detection(data, detector, progress=tell)
    crowded = sum(len(image.boxes) > COUNTED for image in data.images)
    if crowded:
        warn(
            [f"{crowded} images hold more than {COUNTED} objects; COCO's metrics count so many boxes of each"]
        )
    print_pairs([("images", str(scores.images)), ("boxes", str(scores.boxes))])
    numbers = (scores.map, scores.map_50, scores.map_75, scores.recall)
    print_table(
        ["", "mAP", "mAP 50", "mAP 75", "recall"], [["all", *(f"{number:.3f}" for number in numbers)]]
    )
    print_table(["class", "mAP"], [[name, f"{value:.3f}"] for name, value in scores.per_class.items()])
    if out is not None:
        report = {"command": command_line(context), "model": detector.card.get("name"), **asdict(scores)}
        with written_whole(out) as temporary:
            temporary.write_text(json.dumps(finite(report), indent=2) + "\n", encoding="utf-8")
        note(f"wrote {out}")


def print_plan(data: BoxSet, settings: DetectionSettings, backbone: str | None) -> None:
    """What a fit would do, on stdout.

    Raises:
        UserError: the backbone cannot be used, or no part of the images kept out.
    """
    from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, locate_weights
    from dinov3geo.config import dump_model
    from dinov3geo.heads.detection_fit import check_held_out

    kept_out = check_held_out(data, settings)
    weights = locate_weights(backbone or DEFAULT_BACKBONE)
    print(dump_model(settings))
    print_pairs(
        [
            ("backbone", str(weights)),
            ("images", str(len(data.images))),
            ("kept out", str(kept_out)),
            ("without an object", str(sum(not len(image.boxes) for image in data.images))),
            *((f"boxes of {name}", str(count)) for name, count in data.counts.items()),
        ]
    )
