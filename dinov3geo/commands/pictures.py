"""`dinov3geo features` and `dinov3geo show`: what a backbone sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.console import check_folder, format_seconds, print_pairs, progress_bar, warn
from dinov3geo.commands.options import (
    Backbone,
    BatchSize,
    Compile,
    Device,
    OutputPicture,
    Overlap,
    Overwrite,
    Tile,
    command_line,
    load_network,
)

if TYPE_CHECKING:
    pass

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
    scene: Scene,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT", help=".tif, .zarr or .parquet", show_default=False),
    ],
    backbone: Backbone = None,
    pca: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="Keep K principal components.", show_default=False)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32 or int8 with a scale; in .zarr and .parquet also float16.")
    ] = "float32",
    image_scale: Annotated[
        float, typer.Option(help="Enlarge the scene this many times before the backbone sees it.")
    ] = 1.0,
    tile: Tile = 512,
    overlap: Overlap = 128,
    batch_size: BatchSize = None,
    compiled: Compile = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write the patch features of a scene as a GeoTIFF, a Zarr store or a table."""
    from dinov3geo.predict.products import predict_features

    check_folder(output.parent)
    network = load_network(backbone, device)
    with progress_bar(scene.name) as tell:
        report = predict_features(
            scene,
            output,
            backbone=network,
            pca=pca,
            dtype=dtype,
            image_scale=image_scale,
            tile=tile,
            overlap=overlap,
            batch_size=batch_size,
            compiled=compiled,
            overwrite=overwrite,
            progress=tell,
            command=command_line(context),
        )
    warn(report.warnings)
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
    backbone: Backbone = None,
    image_scale: Scale = None,
    device: Device = "auto",
) -> None:
    """Draw how similar every patch of a scene is to the patch at a point."""
    from dinov3geo.predict import pictures

    pictures.show_similarity(
        scene, output, backbone=load_network(backbone, device), xy=xy, image_scale=image_scale
    )
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
