"""`dinov3geo landcover`: fit, predict and evaluate classes of land cover."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.canopy import check_files, plan_outputs
from dinov3geo.commands.console import (
    check_folder,
    format_seconds,
    note,
    note_resumed,
    print_pairs,
    print_table,
    progress_bar,
    run_all,
    warn,
)
from dinov3geo.commands.options import (
    Backbone,
    BatchSize,
    Cache,
    Changes,
    Device,
    DryRun,
    Engine,
    Epochs,
    Gsd,
    HeadSettings,
    Images,
    MapOutput,
    ModelFolder,
    NoSidecars,
    Overwrite,
    Precision,
    Scenes,
    Seed,
    command_line,
    open_cache,
    scenes_at_once,
)
from dinov3geo.errors import ConfigError

if TYPE_CHECKING:
    from dinov3geo.data.labels import ClassScheme
    from dinov3geo.heads.landcover import LandcoverModel, LandcoverSettings
    from dinov3geo.predict.landcover import LandcoverReport

landcover = typer.Typer(help="Classes of land cover.", no_args_is_help=True)

PRODUCT = "land_cover"

Masks = Annotated[
    list[str],
    typer.Option(
        metavar="DIR|GLOB",
        help="Masks of classes, matched to the images by their georeference. Repeatable.",
        show_default=False,
    ),
]
Classes = Annotated[
    Path,
    typer.Option(
        metavar="YAML",
        help="Which stored numbers are which class, e.g. configs/classes/sentinel2_landcover.yaml.",
        show_default=False,
    ),
]


@landcover.command("fit")
def fit(
    context: typer.Context,
    images: Images,
    masks: Masks,
    classes: Classes,
    out: ModelFolder,
    backbone: Backbone = None,
    config: HeadSettings = None,
    epochs: Epochs = None,
    seed: Seed = None,
    changes: Changes = None,
    cache: Cache = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit a head for classes on a frozen backbone.

    A fit that was cut off goes on where it was when the same command is given again.
    """
    from dinov3geo.heads.folders import check_free
    from dinov3geo.heads.landcover import fit_landcover

    scheme = read_scheme(classes)
    settings = read_settings(config, changes, epochs=epochs, seed=seed)
    check_free(out, what="land-cover", overwrite=overwrite)
    if dry_run:
        print_plan(images, masks, scheme, settings, backbone)
        return
    with progress_bar("fit") as tell:
        report = fit_landcover(
            images,
            masks,
            scheme,
            out=out,
            backbone=backbone,
            settings=settings,
            overwrite=overwrite,
            cache=open_cache(cache),
            command=command_line(context),
            progress=lambda stage, done, total: tell(done, total, label=stage),
        )
    warn(unmatched_warnings(report.unmatched_images, report.unmatched_masks))
    result = report.result
    note_resumed(result.resumed_epoch)
    errors = result.validation_errors
    validation = f"mIoU {1 - errors[result.best_epoch]:.3f}" if errors else "none (fit.validation_share=0)"
    print_pairs(
        [
            ("model", str(report.folder)),
            ("windows", str(report.pairs)),
            ("pixels", ", ".join(f"{name} {count}" for name, count in report.counts.items())),
            ("epoch kept", f"{result.best_epoch + 1} of {len(result.losses)}"),
            ("validation", validation),
        ]
    )


@landcover.command("evaluate")
def evaluate(
    context: typer.Context,
    images: Images,
    masks: Masks,
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML", help="Which stored numbers are which class, with --folds.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="Score this model on masks new to it.", show_default=False),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Fit and score in N parts by place.", show_default=False),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="linear, batchnorm, upernet, dpt, forest, forest-around, unet.",
            show_default="all of them",
        ),
    ] = None,
    unet_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Training time of the U-Net per part.", show_default="that of the slowest head"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of table, report and pictures; a run that was cut off goes on there.",
            show_default=False,
        ),
    ] = None,
    backbone: Backbone = None,
    config: HeadSettings = None,
    epochs: Epochs = None,
    seed: Seed = None,
    changes: Changes = None,
    cache: Cache = None,
) -> None:
    """Measure errors of land cover: a saved model, or cross-validation by place beside baselines."""
    from dinov3geo.evaluation.landcover import METHODS, evaluate_landcover_folds, evaluate_landcover_model
    from dinov3geo.evaluation.landcover_report import table, write_report
    from dinov3geo.heads.landcover import load_landcover_model

    if (model is None) == (folds is None):
        raise ConfigError("give either --model, to score it, or --folds, to cross-validate a backbone")
    fold_options = (classes, methods, unet_seconds, backbone, config, epochs, seed, changes or None, cache)
    if folds is None and any(option is not None for option in fold_options):
        raise ConfigError("a model is scored as it is; of the options only --out goes with --model")
    if out is not None:
        check_folder(out)
    with progress_bar("evaluate") as tell:
        if model is not None:
            evaluation = evaluate_landcover_model(
                images,
                masks,
                model=load_landcover_model(model),
                command=command_line(context),
                progress=lambda stage, done, total: tell(done, total, label=stage),
            )
        else:
            if classes is None:
                raise ConfigError("--folds needs --classes: which stored numbers are which class")
            evaluation = evaluate_landcover_folds(
                images,
                masks,
                read_scheme(classes),
                methods=METHODS if methods is None else [m.strip() for m in methods.split(",")],
                backbone=backbone,
                folds=folds or 0,
                seed=seed or 0,
                settings=read_settings(config, changes, epochs=epochs, seed=seed),
                unet_seconds=unet_seconds,
                parts=None if out is None else out / "parts",
                cache=open_cache(cache),
                command=command_line(context),
                progress=lambda stage, done, total: tell(done, total, label=stage),
            )
    details = evaluation.details
    warn(unmatched_warnings(details["unmatched_images"], details["unmatched_masks"]))
    warn(evaluation.warnings)
    print_table(*table(evaluation))
    if out is not None:
        write_report(evaluation, out)
        note(f"written to {out}")


@landcover.command("predict")
def predict(
    context: typer.Context,
    scenes: Scenes,
    output: MapOutput,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR",
            help="A name from `dinov3geo models`, or a folder of `landcover fit`.",
            show_default="the starter model",
        ),
    ] = None,
    gsd: Gsd = None,
    tile: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the square read at a time, pixels.", show_default="as in the fit"),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pixels that neighbouring tiles share and blend.",
            show_default="tile / 4",
        ),
    ] = None,
    batch_size: BatchSize = 4,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Write the entropy too: X_uncertainty.tif, percent.")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write X_probabilities.tif, percent, a band per class.")
    ] = False,
    polygons: Annotated[
        str | None,
        typer.Option(metavar="gpkg|parquet", help="Write polygons beside the map.", show_default=False),
    ] = None,
    precision: Precision = "auto",
    engine: Engine = "local",
    no_sidecars: NoSidecars = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Predict the land cover of scenes as cloud-optimised GeoTIFFs.

    A run that was cut off goes on where it was when the same command is given again.
    """
    from dinov3geo.backbones.device import resolve_device
    from dinov3geo.heads.landcover import DEFAULT_MODEL, load_landcover_model
    from dinov3geo.predict.jobs import count_tiles, model_input
    from dinov3geo.predict.landcover import predict_landcover, write_polygons
    from dinov3geo.predict.pixel_size import parse_pixel_size
    from dinov3geo.predict.sidecars import write_sidecars
    from dinov3geo.rasters.reader import find_rasters

    if polygons not in (None, "gpkg", "parquet"):
        raise ConfigError(f"--polygons takes gpkg or parquet, got {polygons!r}")
    size = parse_pixel_size(gsd)
    jobs = plan_outputs(find_rasters(scenes), output, product=PRODUCT)
    check_files(jobs, [None] * len(jobs), overwrite=overwrite, sidecars=not no_sidecars)
    classifier = load_landcover_model(DEFAULT_MODEL if model is None else model)
    classifier = classifier.to(resolve_device(device))
    side = tile or min(int(classifier.card["settings"]["max_window"]), 512)
    shared = side // 4 if overlap is None else overlap
    # What is wrong with any scene is found before the first one is worked on.
    seen = size, model_input(classifier)
    tiles = [count_tiles(scene, side, shared, seen=seen) for scene, _ in jobs]

    def work(number: int, tell: Callable[[int, int], None]) -> LandcoverReport:
        scene, target = jobs[number]
        report = predict_landcover(
            scene,
            target,
            model=classifier,
            gsd=size,
            uncertainty=beside(target, "uncertainty") if uncertainty else None,
            probabilities=beside(target, "probabilities") if probabilities else None,
            tile=side,
            overlap=shared,
            batch_size=batch_size,
            precision=precision,
            engine=engine,
            overwrite=overwrite,
            progress=tell,
            command=command_line(context),
            model_name=str(classifier.card.get("name", "")),
        )
        if polygons is not None:
            write_polygons(target, target.with_suffix(f".{polygons}"), overwrite=overwrite)
        if not no_sidecars:
            write_sidecars(target, scene=scene)
        return report

    reports = run_all(work, tiles, [scene.name for scene, _ in jobs], at_once=scenes_at_once(engine))
    for report in reports:
        warn(report.warnings)
    print_reports(reports, classifier)


def beside(target: Path, what: str) -> Path:
    """The name of a further map of a scene."""
    return target.with_name(f"{target.stem}_{what}.tif")


def read_scheme(path: Path) -> ClassScheme:
    """The classes of a YAML file.

    Raises:
        ConfigError: the file cannot be read or names something that does not fit.
    """
    from dinov3geo.config import load_model as load_settings
    from dinov3geo.data.labels import ClassScheme

    return load_settings(ClassScheme, path)


def read_settings(
    config: Path | None, changes: Sequence[str] | None, *, epochs: int | None, seed: int | None
) -> LandcoverSettings:
    """The settings of a fit; `changes` win over epochs and seed, those over the file.

    Raises:
        ConfigError: an unknown key or a value that does not fit.
    """
    from dinov3geo.config import load_model as load_settings
    from dinov3geo.heads.landcover import LandcoverSettings

    given = {"fit.seed": seed, "fit.epochs": epochs}
    shortcuts = [f"{key}={value}" for key, value in given.items() if value is not None]
    return load_settings(LandcoverSettings, config, [*shortcuts, *(changes or [])])


def print_plan(
    images: list[str],
    masks: list[str],
    scheme: ClassScheme,
    settings: LandcoverSettings,
    backbone: str | None,
) -> None:
    """What a fit would do, on stdout.

    Raises:
        UserError: data, settings or backbone cannot be used.
    """
    from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, locate_weights
    from dinov3geo.config import dump_model
    from dinov3geo.heads.landcover import check_settings, match_masks

    check_settings(settings)
    weights = locate_weights(backbone or DEFAULT_BACKBONE)
    match = match_masks(images, masks, settings)
    print(dump_model(settings))
    print_pairs(
        [
            ("backbone", str(weights)),
            ("classes", scheme.describe()),
            ("windows", str(len(match.pairs))),
            ("places", str(len({pair.group for pair in match.pairs}))),
            ("images without a mask", str(len(match.unmatched_images))),
            ("masks without an image", str(len(match.unmatched_targets))),
        ]
    )


def unmatched_warnings(images: int, masks: int) -> list[str]:
    """A line if rasters found no partner."""
    if not images and not masks:
        return []
    return [f"{images} images have no mask and {masks} masks no image at their place; left out"]


def print_reports(reports: Sequence[LandcoverReport], model: LandcoverModel) -> None:
    """A summary of predictions on stdout."""
    note(f"classes: {', '.join(f'{k} {name}' for k, name in enumerate(model.output.class_names))}")
    rows = [[str(r.output), f"{r.valid_share:.1%}", str(r.tiles), format_seconds(r.seconds)] for r in reports]
    print_table(["classes", "valid", "tiles", "time"], rows)
