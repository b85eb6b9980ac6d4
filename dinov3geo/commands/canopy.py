"""`dinov3geo canopy`: fit, predict and evaluate canopy height."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.canopy_settings import print_plan, read_settings, read_variants
from dinov3geo.commands.canopy_tables import print_evaluation, print_reports
from dinov3geo.commands.console import (
    check_folder,
    note_resumed,
    print_pairs,
    progress_bar,
    run_all,
    warn,
)
from dinov3geo.commands.options import (
    BatchSize,
    Cache,
    Changes,
    Compile,
    Device,
    DryRun,
    Engine,
    Epochs,
    Gsd,
    HeadSettings,
    HeightBackbone,
    Heights,
    Images,
    ImagesOrNone,
    MapOutput,
    ModelFolder,
    NoSidecars,
    Overlap,
    Overwrite,
    Precision,
    Scenes,
    Seed,
    StoredFeatures,
    Tile,
    command_line,
    open_cache,
    scenes_at_once,
)
from dinov3geo.errors import ConfigError

if TYPE_CHECKING:
    from dinov3geo.heads.base import HeightModel
    from dinov3geo.heads.canopy_report import CanopyFitReport
    from dinov3geo.predict.products import PredictionReport

canopy = typer.Typer(help="Canopy height in metres.", no_args_is_help=True)

PRODUCT = "canopy_height"

Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|PATH",
        help="A name from `dinov3geo models`, a folder written by `canopy fit`, or CHMv2.",
        show_default="the starter model",
    ),
]


@canopy.command("fit")
def fit(
    context: typer.Context,
    heights: Heights,
    out: ModelFolder,
    images: ImagesOrNone = None,
    features: StoredFeatures = None,
    backbone: HeightBackbone = None,
    config: HeadSettings = None,
    epochs: Epochs = None,
    seed: Seed = None,
    changes: Changes = None,
    cache: Cache = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit a head on a frozen backbone to images, or features of theirs, and heights."""
    from dinov3geo.heads.canopy import fit_canopy
    from dinov3geo.heads.folders import check_free
    from dinov3geo.heads.stored import fit_canopy_from_features, open_scenes, required_settings, shared_facts

    if bool(images) == bool(features):
        raise ConfigError("give either --images, or --features that were computed from them")
    if features and (backbone is not None or cache is not None):
        raise ConfigError("--features say which backbone they are of; leave out --backbone and --cache")
    required = required_settings(shared_facts(open_scenes(features))) if features else {}
    settings = read_settings(config, changes, epochs=epochs, seed=seed, required=required)
    check_free(out, what="canopy", overwrite=overwrite)
    if dry_run:
        print_plan(images, heights, settings, backbone, features)
        return
    with progress_bar("fit") as tell:
        fit_on: Callable[..., CanopyFitReport] = partial(fit_canopy_from_features, features or [])
        if images:
            fit_on = partial(fit_canopy, images, backbone=backbone, cache=open_cache(cache))
        report = fit_on(
            heights,
            out=out,
            settings=settings,
            overwrite=overwrite,
            command=command_line(context),
            progress=lambda stage, done, total: tell(done, total, label=stage),
        )
    warn(unmatched_warnings(report.unmatched_images, report.unmatched_heights))
    note_resumed(report.result.resumed_epoch)
    print_pairs(
        [
            ("model", str(report.folder)),
            ("pairs", str(report.pairs)),
            ("heights", str(report.cells)),
            ("epoch kept", f"{report.result.best_epoch + 1} of {len(report.result.losses)}"),
            (
                "MAE",
                f"{report.training_mae_m:.2f} m where it was fitted; elsewhere: canopy evaluate --folds 5",
            ),
        ]
    )


@canopy.command("evaluate")
def evaluate(
    context: typer.Context,
    images: Images,
    heights: Heights,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR",
            help="Score this model on data it was not fitted to.",
            show_default="the starter model",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Fit and score by plot in N parts, beside baselines.", show_default=False
        ),
    ] = None,
    backbone: HeightBackbone = None,
    report_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the whole report.", show_default=False),
    ] = None,
    variants: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML",
            help="Several settings by name, a row each, e.g. configs/heads/canopy_variants.yaml.",
            show_default=False,
        ),
    ] = None,
    choose: Annotated[
        bool,
        typer.Option(
            "--choose", help="Also a row for the variant that each fold's own training plots would choose."
        ),
    ] = False,
    across_sites: Annotated[
        bool, typer.Option("--across-sites", help="Hold out one site after the other, not parts of all.")
    ] = False,
    register: Annotated[
        int,
        typer.Option(metavar="CELLS", min=0, help="Tell how far heights lie from their image; up to CELLS."),
    ] = 0,
    block: Annotated[
        int | None, typer.Option(metavar="CELLS", min=1, help="Side of block R2.", show_default="10")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of table and pictures; a run cut off goes on."),
    ] = None,
    config: HeadSettings = None,
    epochs: Epochs = None,
    seed: Seed = None,
    changes: Changes = None,
    cache: Cache = None,
) -> None:
    """Measure errors of canopy height: a saved model, or cross-validation beside baselines."""
    from dinov3geo.evaluation.canopy import DEFAULT_BLOCK, evaluate_folds, evaluate_model
    from dinov3geo.evaluation.canopy_report import write_report

    fitting = folds is not None or across_sites
    if folds is not None and across_sites:
        raise ConfigError("--across-sites makes a part of each site; leave out --folds")
    if model is not None and fitting:
        raise ConfigError("give either --model, to score it, or --folds, to cross-validate a backbone")
    options = (backbone, config, epochs, seed, changes or None, cache, variants, register or None)
    if not fitting and any(option is not None for option in options):
        raise ConfigError(
            "a model is scored as it is; --backbone, --config, --epochs, --seed, --set, --cache, --variants "
            "and --register go with --folds"
        )
    if choose and variants is None:
        raise ConfigError("--choose chooses between --variants; give a file of them")
    if variants is not None and (changes or config is not None or epochs is not None):
        raise ConfigError("--variants holds all settings; leave out --config, --set and --epochs")
    if out is not None:
        check_folder(out)
    if report_file is not None:
        check_folder(report_file.parent)
    with progress_bar("evaluate") as tell:
        if fitting:
            evaluation = evaluate_folds(
                images,
                heights,
                backbone=backbone,
                folds=folds or 0,
                seed=seed or 0,
                settings=read_settings(config, changes, epochs=epochs, seed=seed),
                variants=None if variants is None else read_variants(variants),
                across_sites=across_sites,
                choose=choose,
                register_cells=register,
                block=block or DEFAULT_BLOCK,
                cache=open_cache(cache),
                parts=None if out is None else out / "parts",
                json_path=report_file,
                command=command_line(context),
                progress=lambda stage, done, total: tell(done, total, label=stage),
            )
        else:
            evaluation = evaluate_model(
                images,
                heights,
                model=load_model(model, "cpu"),
                block=block or DEFAULT_BLOCK,
                json_path=report_file,
                command=command_line(context),
                progress=lambda stage, done, total: tell(done, total, label=stage),
            )
    details = evaluation.details
    warn(unmatched_warnings(details["unmatched_images"], details["unmatched_heights"]))
    print_evaluation(evaluation)
    if out is not None:
        write_report(evaluation, out)


@canopy.command("predict")
def predict(
    context: typer.Context,
    scenes: Scenes,
    output: MapOutput,
    model: Model = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Weights for a --model without its own: CHMv2's decoder, or one fitted from --features.",
            show_default=False,
        ),
    ] = None,
    gsd: Gsd = None,
    tile: Tile = 512,
    overlap: Overlap = 128,
    batch_size: BatchSize = None,
    integer: Annotated[
        str | None,
        typer.Option(
            metavar="dm|m",
            help="Store whole decimetres (uint16) or metres (uint8).",
            show_default="float32 metres",
        ),
    ] = None,
    uncertainty: Annotated[
        bool,
        typer.Option("--uncertainty", help="Add a band: spread over four flips and turns [m]. 4 x slower."),
    ] = False,
    precision: Precision = "auto",
    compiled: Compile = False,
    engine: Engine = "local",
    preview: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Picture of scene and heights.", show_default="beside the output"),
    ] = None,
    no_preview: Annotated[bool, typer.Option("--no-preview", help="Draw no picture.")] = False,
    no_sidecars: NoSidecars = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Predict the canopy height of scenes as cloud-optimised GeoTIFFs.

    A run that was cut off goes on where it was when the same command is given again.
    """
    from dinov3geo.predict.jobs import count_tiles, model_input
    from dinov3geo.predict.pixel_size import parse_pixel_size
    from dinov3geo.predict.products import predict_canopy
    from dinov3geo.predict.sidecars import write_sidecars
    from dinov3geo.rasters.reader import find_rasters

    if preview and no_preview:
        raise ConfigError("--preview and --no-preview exclude each other; give one of them")
    jobs = plan_outputs(find_rasters(scenes), output)
    if preview and len(jobs) > 1:
        raise ConfigError(f"--preview names one picture, but there are {len(jobs)} scenes; leave it out")
    pictures = [None if no_preview else preview or target.with_suffix(".png") for _, target in jobs]
    size = parse_pixel_size(gsd)
    # What is wrong with any scene or output is found before the first one is worked on.
    check_files(jobs, pictures, overwrite=overwrite, sidecars=not no_sidecars)
    heights_model = load_model(model, device, backbone=backbone)
    seen = size, model_input(heights_model)
    tiles = [count_tiles(scene, tile, overlap, seen=seen) for scene, _ in jobs]

    def work(number: int, tell: Callable[[int, int], None]) -> PredictionReport:
        (scene, target), picture = jobs[number], pictures[number]
        report = predict_canopy(
            scene,
            target,
            model=heights_model,
            gsd=size,
            tile=tile,
            overlap=overlap,
            batch_size=batch_size,
            integer=integer,
            uncertainty=uncertainty,
            precision=precision,
            compiled=compiled,
            engine=engine,
            overwrite=overwrite,
            preview=picture,
            progress=tell,
            command=command_line(context),
        )
        if not no_sidecars:
            write_sidecars(target, scene=scene)
        return report

    reports = run_all(work, tiles, [scene.name for scene, _ in jobs], at_once=scenes_at_once(engine))
    for report in reports:
        warn(report.warnings)
    print_reports(reports)


def plan_outputs(scenes: Sequence[Path], output: Path, *, product: str = PRODUCT) -> list[tuple[Path, Path]]:
    """Scenes with the files to write.

    Args:
        scenes: at least one.
        output: a file (.tif, .tiff) for one scene; else a folder.
        product: what the files of a folder are called after.

    Raises:
        ConfigError: several scenes and one file, or two scenes of one name.
    """
    if output.suffix.lower() in (".tif", ".tiff") and not output.is_dir():
        if len(scenes) > 1:
            raise ConfigError(f"{len(scenes)} scenes cannot go into one file {output}; give a folder to -o")
        return [(scenes[0], output)]
    jobs = [(scene, output / f"{scene.stem}_{product}.tif") for scene in scenes]
    sources: dict[Path, Path] = {}
    for scene, target in jobs:
        if target in sources:
            raise ConfigError(
                f"{sources[target]} and {scene} would both be written to {target}; run them apart"
            )
        sources[target] = scene
    return jobs


def check_files(
    jobs: Sequence[tuple[Path, Path]],
    pictures: Sequence[Path | None],
    *,
    overwrite: bool,
    sidecars: bool = False,
) -> None:
    """Makes sure that every output and picture can be written and that none takes the place of a scene.

    Args:
        jobs: scenes with the files to write.
        pictures: of each job, or None.
        overwrite: whether existing files may be replaced.
        sidecars: whether STAC item, style and legend are written beside each output.

    Raises:
        RasterError: one cannot be written.
        ConfigError: one is a scene.
    """
    from dinov3geo.paths import check_target
    from dinov3geo.predict.checks import check_picture
    from dinov3geo.predict.sidecars import sidecar_paths

    scenes = {scene.resolve() for scene, _ in jobs}
    for (scene, target), picture in zip(jobs, pictures, strict=True):
        for file in (target, picture):
            if file is not None and file.resolve() in scenes:
                raise ConfigError(f"cannot write {file}: it is one of the scenes; choose another name")
        check_target(target, sources=(scene,), overwrite=overwrite)
        for file in sidecar_paths(target) if sidecars else ():
            check_target(file, sources=(scene,), overwrite=overwrite)
        if picture is not None:
            check_picture(picture, sources=(scene, target), overwrite=overwrite)


def unmatched_warnings(images: int, heights: int) -> list[str]:
    """A line if rasters found no partner."""
    if not images and not heights:
        return []
    return [f"{images} images have no heights and {heights} height rasters no image at their place; left out"]


def load_model(name_or_path: str | None, device: str, *, backbone: str | None = None) -> HeightModel:
    """The model of a name, folder or file, or the starter model, on a device.

    Raises:
        UserError: no such model or device.
    """
    from dinov3geo.backbones.device import resolve_device
    from dinov3geo.heads.canopy import DEFAULT_MODEL
    from dinov3geo.heads.models import load_height_model

    return load_height_model(name_or_path or DEFAULT_MODEL, backbone=backbone).to(resolve_device(device))
