"""`dinov3geo classify`: fit, predict and evaluate classes of whole images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from dinov3geo.commands.console import (
    check_folder,
    note,
    print_pairs,
    print_table,
    progress_bar,
    warn,
)
from dinov3geo.commands.options import Backbone, Cache, Changes, Device, Overwrite, Seed, command_line
from dinov3geo.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dinov3geo.evaluation.results import Row

# About so many of them tell of a wrong scale; reading all would cost a cached fit its speed.
_CHECKED_CHIPS = 200

classify = typer.Typer(help="Classes of whole images.", no_args_is_help=True)

ClassFolder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="One sub-folder of images per class.", show_default=False),
]
Encoders = Annotated[
    list[str] | None,
    typer.Option(
        "--backbone",
        metavar="NAME|PATH",
        help="As elsewhere, or rcf, colours, pixels, untrained[:VARIANT], timm:MODEL@FILE, "
        "transformers:FOLDER. Repeatable.",
        show_default="the starter weights",
    ),
]
Size = Annotated[int, typer.Option(min=1, help="Side that images are resized to, pixels.")]
CropFrom = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Resize the shorter side to this and cut out the middle, as is usual for photographs.",
        show_default="resize the whole image",
    ),
]
Bands = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="Bands of rasters, by name.",
        show_default="the sensor's; else the weights' (fit), all (evaluate)",
    ),
]
Sensor = Annotated[
    str | None,
    typer.Option(metavar="NAME|YAML", help="Whose bands and statistics hold.", show_default="the weights'"),
]
Stem = Annotated[
    str | None,
    typer.Option(
        metavar="mean|zero", help="Kernels of bands that the weights do not know.", show_default=False
    ),
]


@classify.command("fit")
def fit(
    context: typer.Context,
    folder: ClassFolder,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the model.", show_default=False)],
    backbone: Backbone = None,
    kind: Annotated[str, typer.Option(help="logistic, knn or attention (pooling of patches).")] = "logistic",
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours of knn.")] = 20,
    size: Size = 224,
    bands: Bands = None,
    sensor: Sensor = None,
    stem: Stem = None,
    changes: Changes = None,
    cache: Cache = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Fit a classifier on a frozen backbone to a folder of classes."""
    from dinov3geo.backbones.device import resolve_device
    from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone
    from dinov3geo.config import load_model
    from dinov3geo.evaluation.classification import ClassificationSettings
    from dinov3geo.evaluation.classifier import Kind, fit_classifier
    from dinov3geo.evaluation.image_sets import class_folders, list_images
    from dinov3geo.predict.checks import ModelInput, check_chips
    from dinov3geo.rasters.sensors import get_sensor

    if kind not in get_args(Kind):
        raise UnknownNameError("kind", kind, get_args(Kind))
    settings = load_model(ClassificationSettings, None, changes or [])
    wanted = sensor_bands(bands, sensor)
    name = backbone or DEFAULT_BACKBONE
    network = load_backbone(
        name,
        bands=wanted if sensor is not None else None,
        sensor=None if sensor is None else get_sensor(sensor),
        stem=stem,
    )
    # Chips are seen at whatever size the classes were.
    expected = replace(ModelInput.of_backbone(network), gsd_m=None)
    own_bands = wanted is None
    if own_bands:
        wanted = expected.normalization.bands
    images = class_folders(folder, bands=wanted, order=sensor_order(sensor))
    if own_bands:
        # As `predict` looks at all it is given; here some tell of numbers of another scale.
        files = list_images(folder)
        check_chips(files[:: max(len(files) // _CHECKED_CHIPS, 1)], expected, size)
    with progress_bar("fit") as tell:
        model = fit_classifier(
            images,
            network.to(resolve_device(device)),
            # A changed stem makes other weights than those of the name.
            name if sensor is None else "",
            out,
            kind=cast("Kind", kind),
            size=size,
            bands=wanted,
            settings=settings,
            k=k,
            cache=vector_cache(cache),
            overwrite=overwrite,
            command=command_line(context),
            progress=lambda stage, done, total: tell(done, total, label=stage),
        )
    print_pairs(
        [
            ("model", str(out)),
            ("classes", ", ".join(model.classes)),
            ("accuracy", f"{model.score:.3f} on images held out while it was chosen; then fitted to all"),
        ]
    )


@classify.command("predict")
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE|FOLDER...", help="Images, or folders of them.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="OUT", help=".csv, or .gpkg with footprints", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR",
            help="A name from `dinov3geo models`, or written by `classify fit`.",
            show_default="the starter model",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Classify images into a table, or into a GeoPackage where they are georeferenced."""
    from dinov3geo.evaluation.classifier import DEFAULT_MODEL, classify_files, load_classifier
    from dinov3geo.evaluation.image_sets import list_images
    from dinov3geo.paths import check_target
    from dinov3geo.predict.checks import ModelInput, check_chips

    files = [file for path in images for file in (list_images(path) if path.is_dir() else [path])]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"no such image: {missing[0]}")
    check_target(output, sources=files, overwrite=overwrite)
    classifier = load_classifier(DEFAULT_MODEL if model is None else model)
    gsd_m = classifier.card.get("gsd_m")
    wanted = replace(
        ModelInput.of_backbone(classifier.backbone),
        name=str(classifier.card.get("name", model)),
        gsd_m=None if gsd_m is None else (float(gsd_m[0]), float(gsd_m[1])),
    )
    warn(check_chips(files, wanted, classifier.encoder.size))
    with progress_bar("classify") as tell:
        table = classify_files(classifier, files, output, progress=tell)
    counts = table["class"].value_counts()
    print_pairs([("table", str(output)), ("images", str(len(table)))])
    print_table(["class", "images"], [[str(name), str(count)] for name, count in counts.items()])


@classify.command("evaluate")
def evaluate(
    context: typer.Context,
    folder: ClassFolder,
    backbones: Encoders = None,
    baselines: Annotated[
        bool,
        typer.Option(help="Put an untrained network, random convolutions and colour statistics beside it."),
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for table, picture, report, confusion matrices.", show_default=False
        ),
    ] = None,
    size: Size = 224,
    crop_from: CropFrom = None,
    bands: Bands = None,
    sensor: Sensor = None,
    stem: Stem = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="Use so many images of each class.", show_default="all")
    ] = None,
    seed: Seed = None,
    changes: Changes = None,
    cache: Cache = None,
    device: Device = "auto",
) -> None:
    """Compare backbones: nearest neighbours, logistic regression and few labels, with intervals.

    Images are split 80/20 by a hash of their file names.
    """
    from dinov3geo.backbones.device import resolve_device
    from dinov3geo.backbones.zoo import DEFAULT_BACKBONE
    from dinov3geo.config import load_model
    from dinov3geo.evaluation.classification import ClassificationSettings
    from dinov3geo.evaluation.compare import Task, compare, write_comparison
    from dinov3geo.evaluation.image_sets import class_folders
    from dinov3geo.evaluation.named_encoders import BASELINES, Input

    settings = load_model(
        ClassificationSettings, None, [] if changes is None else changes, values={"seed": seed or 0}
    )
    if out is not None:
        check_folder(out)
    names = [*(backbones or [DEFAULT_BACKBONE]), *(BASELINES if baselines else ())]
    wanted = sensor_bands(bands, sensor)
    seen = Input(
        size=size,
        crop_from=crop_from,
        bands=wanted,
        sensor=sensor,
        stem=stem,
        device=resolve_device(device),
        seed=settings.seed,
    )
    images = class_folders(folder, bands=wanted, order=sensor_order(sensor))
    task = Task(images.limit(per_class), names, seen, settings)
    with progress_bar("classify") as tell:
        comparison = compare(
            task,
            cache=vector_cache(cache),
            progress=lambda stage, done, total: tell(done, total, label=stage),
        )
    warn(comparison.notes)
    print_rows(comparison.rows)
    if out is not None:
        for path in write_comparison(comparison, out, command=command_line(context)):
            note(f"wrote {path}")


def sensor_bands(bands: str | None, sensor: str | None) -> tuple[str, ...] | None:
    """Names of the bands to read: those given, else all of the sensor's, else None.

    Raises:
        UserError: no such sensor or band.
    """
    from dinov3geo.rasters.sensors import get_sensor

    names = None if bands is None else tuple(name.strip() for name in bands.split(","))
    if sensor is None:
        return names
    return tuple(band.name for band in get_sensor(sensor).select(names))


def sensor_order(sensor: str | None) -> tuple[str, ...] | None:
    """Names of a sensor's bands as its files hold them, which files that describe none are read by."""
    from dinov3geo.rasters.sensors import get_sensor

    return None if sensor is None else get_sensor(sensor).band_names


def vector_cache(folder: Path | None) -> Path:
    """Folder of vectors."""
    from dinov3geo.features.extract import default_cache_folder

    return (folder or default_cache_folder()) / "vectors"


def print_rows(rows: Sequence[Row]) -> None:
    """The main metric: encoders down, methods across, per data set; the intervals below."""
    for data in dict.fromkeys(row.data for row in rows):
        own = [row for row in rows if row.data == data and row.main]
        methods = list(dict.fromkeys(row.method for row in own))
        cells = {(row.encoder, row.method): row for row in own}
        metrics = ", ".join(dict.fromkeys(row.metric.replace("_", " ") for row in own))
        print_pairs([("data", data), ("metric", f"{metrics}, and the 95 % interval")])
        lines = []
        for encoder in dict.fromkeys(row.encoder for row in own):
            found = [cells.get((encoder, method)) for method in methods]
            lines.append([encoder, *("" if r is None else f"{r.value:.3f}" for r in found)])
            lines.append(["", *("" if r is None else f"{r.low:.3f}-{r.high:.3f}" for r in found)])
        print_table(["encoder", *methods], lines)
