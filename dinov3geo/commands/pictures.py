"""`dinov3geo features` and `dinov3geo show`: what a backbone sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.canopy import plan_outputs
from dinov3geo.commands.console import (
    check_folder,
    format_seconds,
    print_pairs,
    print_table,
    progress_bar,
    run_all,
    warn,
)
from dinov3geo.commands.options import (
    Backbone,
    BatchSize,
    Compile,
    Device,
    Engine,
    Gsd,
    OutputPicture,
    Overlap,
    Overwrite,
    Scenes,
    Tile,
    command_line,
    load_network,
    scenes_at_once,
)
from dinov3geo.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from dinov3geo.predict.products import FeatureReport

show = typer.Typer(help="Draw pictures of features and heights.", no_args_is_help=True)

Scene = Annotated[Path, typer.Argument(help="GeoTIFF or another raster.", show_default=False)]
Scale = Annotated[
    float | None,
    typer.Option(
        "--image-scale",
        help="Enlarge the scene this many times before the backbone sees it.",
        show_default="1, 2 or 4 by its size",
    ),
]


def features(
    context: typer.Context,
    scenes: Scenes,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help=".tif, .zarr or .parquet for one scene, else a folder.",
            show_default=False,
        ),
    ],
    kind: Annotated[
        str, typer.Option("--format", help="In a folder: tif, zarr or parquet.", metavar="KIND")
    ] = "zarr",
    backbone: Backbone = None,
    pca: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=1, help="Keep K principal components, fitted on all scenes.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32 or int8 with a scale; in .zarr and .parquet also float16.")
    ] = "float32",
    image_scale: Annotated[
        float, typer.Option(help="Enlarge the scene this many times before the backbone sees it.")
    ] = 1.0,
    gsd: Gsd = None,
    tile: Tile = 512,
    overlap: Overlap = 128,
    batch_size: BatchSize = None,
    compiled: Compile = False,
    engine: Engine = "local",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write the patch features of scenes as GeoTIFFs, Zarr stores or tables.

    A run that was cut off goes on where it was when the same command is given again.
    """
    from dinov3geo.backbones.zoo import DEFAULT_BACKBONE
    from dinov3geo.predict.checks import ModelInput
    from dinov3geo.predict.jobs import count_tiles
    from dinov3geo.predict.pixel_size import parse_pixel_size
    from dinov3geo.predict.products import predict_features, sample_scenes
    from dinov3geo.rasters.reader import find_rasters

    jobs = _feature_files(find_rasters(scenes), output, kind)
    check_folder(jobs[0][1].parent)
    size = parse_pixel_size(gsd)
    network, sample = load_network(backbone, device), None
    seen = size, ModelInput.of_backbone(network)
    sizes = {scene: count_tiles(scene, tile, overlap, seen=seen) for scene, _ in jobs}
    if len(jobs) > 1 and (pca is not None or dtype == "int8"):
        with progress_bar("sample") as tell:
            files = [scene for scene, _ in jobs]
            sample, empty = sample_scenes(
                files, network, image_scale=image_scale, gsd=size, tile=tile, overlap=overlap, progress=tell
            )
        if empty:
            names = ", ".join(map(str, empty))
            warn([f"{len(empty)} of {len(files)} scenes hold no valid pixel and are left out: {names}"])
        jobs = [(scene, target) for scene, target in jobs if scene not in empty]

    def work(number: int, tell: Callable[[int, int], None]) -> FeatureReport:
        scene, target = jobs[number]
        return predict_features(
            scene,
            target,
            backbone=network,
            pca=pca,
            dtype=dtype,
            image_scale=image_scale,
            gsd=size,
            tile=tile,
            overlap=overlap,
            batch_size=batch_size,
            compiled=compiled,
            sample=sample,
            engine=engine,
            overwrite=overwrite,
            progress=tell,
            command=command_line(context),
            source=backbone or DEFAULT_BACKBONE,
        )

    reports = run_all(
        work,
        [sizes[scene] for scene, _ in jobs],
        [scene.name for scene, _ in jobs],
        at_once=scenes_at_once(engine),
    )
    for report in reports:
        warn(report.warnings)
    _print_features(reports)


def _feature_files(scenes: Sequence[Path], output: Path, kind: str) -> list[tuple[Path, Path]]:
    """Scenes with the files to write."""
    kinds = ("tif", "zarr", "parquet")
    if kind not in kinds:
        raise UnknownNameError("format", kind, kinds)
    if output.suffix.lower() in (".tif", ".tiff", ".zarr", ".parquet"):
        if len(scenes) > 1:
            raise ConfigError(f"{len(scenes)} scenes cannot go into {output}; give a folder to -o")
        return [(scenes[0], output)]
    targets = plan_outputs(scenes, output, product="features")
    return [(scene, target.with_suffix(f".{kind}")) for scene, target in targets]


def _print_features(reports: Sequence[FeatureReport]) -> None:
    if len(reports) > 1:
        rows = [
            [str(one.output), "x".join(map(str, one.grid_hw)), str(one.dimensions), f"{one.valid_share:.1%}"]
            for one in reports
        ]
        print_table(["features", "patches", "bands", "valid"], rows)
        return
    (report,) = reports
    pairs = [
        ("features", str(report.output)),
        ("size", f"{report.grid_hw[0]} x {report.grid_hw[1]} patches, {report.dimensions} bands"),
        ("valid", f"{report.valid_share:.1%} of the patches"),
        ("time", format_seconds(report.seconds)),
    ]
    if report.explained:
        pairs.insert(3, ("variance", " ".join(f"{share:.1%}" for share in report.explained)))
    print_pairs(pairs)


@show.command("pca")
def show_pca(
    scene: Scene,
    output: OutputPicture,
    backbone: Backbone = None,
    image_scale: Scale = None,
    device: Device = "auto",
) -> None:
    """Draw a scene beside the principal components of its features."""
    from dinov3geo.predict import pictures

    pictures.show_pca(scene, output, backbone=load_network(backbone, device), image_scale=image_scale)
    print_pairs([("picture", str(output))])


@show.command("similarity")
def show_similarity(
    scene: Scene,
    output: OutputPicture,
    xy: Annotated[
        tuple[float, float],
        typer.Option(metavar="X Y", help="Point in the scene's reference system.", show_default=False),
    ],
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y", help="A further point; the most similar one counts. Repeatable."),
    ] = None,
    backbone: Backbone = None,
    image_scale: Scale = None,
    device: Device = "auto",
) -> None:
    """Draw how similar every patch of a scene is to the patch at a point, or at any of some points."""
    from dinov3geo.predict import pictures

    points = [xy, *(_parse_point(text) for text in also or [])]
    pictures.show_similarity(
        scene, output, backbone=load_network(backbone, device), points=points, image_scale=image_scale
    )
    print_pairs([("picture", str(output))])


@show.command("neighbours")
def show_neighbours(
    scenes: Annotated[
        list[str],
        typer.Argument(
            metavar="SCENE...", help="The scene of the point, then others to search.", show_default=False
        ),
    ],
    output: OutputPicture,
    xy: Annotated[
        tuple[float, float],
        typer.Option(metavar="X Y", help="Point in the first scene's reference system.", show_default=False),
    ],
    count: Annotated[int, typer.Option("--count", "-k", min=1, max=63, help="Neighbours to find.")] = 7,
    backbone: Backbone = None,
    image_scale: Scale = None,
    device: Device = "auto",
) -> None:
    """Find the patches of some scenes that look most like the patch at a point, and draw them."""
    from dinov3geo.predict import neighbours
    from dinov3geo.predict.checks import check_picture
    from dinov3geo.rasters.reader import find_rasters

    first = find_rasters(scenes[0])
    if len(first) > 1:
        raise ConfigError(f"{scenes[0]} names {len(first)} scenes; name the one that holds the point first")
    others = [scene for scene in find_rasters(scenes[1:]) if scene != first[0]] if scenes[1:] else []
    check_picture(output, sources=[*first, *others], overwrite=True)
    network = load_network(backbone, device)
    with progress_bar("neighbours") as tell:
        asked, found, side = neighbours.find_neighbours(
            [*first, *others], backbone=network, xy=xy, count=count, image_scale=image_scale, progress=tell
        )
    neighbours.draw_neighbours(asked, found, output, side=side)
    rows = [
        [str(one.scene), f"{one.xy[0]:.10g}", f"{one.xy[1]:.10g}", f"{one.similarity:.3f}"] for one in found
    ]
    print_table(["scene", "x", "y", "similarity"], rows)
    print_pairs([("picture", str(output))])


@show.command("heights")
def show_heights(
    heights: Annotated[Path, typer.Argument(help="Raster of heights in metres.", show_default=False)],
    output: OutputPicture,
    scene: Annotated[
        Path | None, typer.Option(help="Draw this image beside the heights.", show_default=False)
    ] = None,
) -> None:
    """Draw a height raster, with the image beside it."""
    from dinov3geo.predict.checks import check_picture
    from dinov3geo.predict.preview import write_preview

    sources = [heights] if scene is None else [heights, scene]
    check_picture(output, sources=sources, overwrite=True)
    write_preview(scene, heights, output)
    print_pairs([("picture", str(output))])


@show.command("objects")
def show_objects(
    image: Annotated[Path, typer.Argument(help="Picture or raster.", show_default=False)],
    output: OutputPicture,
    count: Annotated[int, typer.Option(min=1, max=20, help="Objects to look for at most.")] = 1,
    threshold: Annotated[
        float, typer.Option(min=-1, max=1, help="Cosine from which patches are alike.")
    ] = 0.2,
    short_side: Annotated[
        int, typer.Option(min=32, max=1024, help="The image is resized to it before the backbone sees it.")
    ] = 320,
    backbone: Backbone = None,
    device: Device = "auto",
) -> None:
    """Draw the objects that a normalised cut of the patches finds, without any label."""
    from dinov3geo.backbones.inference import for_inference
    from dinov3geo.evaluation.discovery import draw_objects, object_boxes
    from dinov3geo.evaluation.frames import patch_encoder
    from dinov3geo.evaluation.image_sets import read_image
    from dinov3geo.predict.checks import check_picture

    check_picture(output, sources=[image], overwrite=True)
    network = load_network(backbone, device)
    assert network.card is not None
    numbers = read_image(image, network.card.normalization.bands)
    encode = patch_encoder(for_inference(network), short_side=short_side)
    found = object_boxes(numbers, encode, count=count, threshold=threshold)
    draw_objects(numbers, found, output)
    rows = [[str(k), *(f"{side:.0f}" for side in box)] for k, (box, _) in enumerate(found, start=1)]
    print_table(["object", "xmin", "ymin", "xmax", "ymax"], rows)
    print_pairs([("picture", str(output))])


@show.command("landcover")
def show_landcover(
    classes: Annotated[
        Path, typer.Argument(help="Raster of classes with a colour table.", show_default=False)
    ],
    output: OutputPicture,
    scene: Annotated[
        Path | None, typer.Option(help="Draw this image beside the classes.", show_default=False)
    ] = None,
) -> None:
    """Draw a map of classes with its legend, and the image beside it."""
    from dinov3geo.predict.checks import check_picture
    from dinov3geo.predict.class_picture import write_class_preview

    check_picture(output, sources=[classes] if scene is None else [classes, scene], overwrite=True)
    write_class_preview(scene, classes, output)
    print_pairs([("picture", str(output))])


def _parse_point(text: str) -> tuple[float, float]:
    """`X,Y` as numbers."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"a point is given as X,Y, e.g. 404215,3285100; got {text!r}") from error
    return x, y
