"""`dinov3geo curate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.console import check_folder, note, print_pairs, progress_bar
from dinov3geo.commands.options import Backbone, Device, Overwrite, load_network
from dinov3geo.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from dinov3geo.backbones import base
    from dinov3geo.curation.kmeans import Assign

_KINDS = ("scenes", "images")
_ASSIGN = ("auto", "faiss", "torch")


def curate(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="The pool: a folder, glob or file.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PARQUET", help="Table to write.", show_default=False)
    ],
    count: Annotated[
        int | None,
        typer.Option(
            min=1, help="Chips to draw evenly from the clusters.", show_default="a tenth of the pool"
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="scenes (GeoTIFFs) or images (JPEG, PNG).")] = "scenes",
    sensor: Annotated[str, typer.Option(metavar="NAME|YAML", help="Of scenes.")] = "aerial_rgb",
    chip_size: Annotated[int, typer.Option(min=1, help="Side of a chip, pixels.")] = 224,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Pixels between chips.", show_default="the chip's side")
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...", help="Clusters per level, falling.", show_default="by the size of the pool"
        ),
    ] = None,
    duplicates: Annotated[
        float, typer.Option(min=0, max=1, help="Cosine from which on two chips count as one; 1 keeps all.")
    ] = 0.995,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="DIR|GLOB", help="Choose neighbours of these as well.", show_default=False),
    ] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Of each seed.")] = 8,
    least: Annotated[
        float, typer.Option("--least-similarity", min=-1, max=1, help="Cosine of a neighbour to its seed.")
    ] = 0.0,
    min_valid: Annotated[
        float, typer.Option("--min-valid-share", min=0, max=1, help="Chips with less data are left out.")
    ] = 0.5,
    backbone: Backbone = None,
    assign: Annotated[str, typer.Option(help="Who finds centroids: auto, faiss or torch.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Chips per forward pass.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Reading processes.")] = 0,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep embeddings there for other choices from this pool.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Choose chips of a pool: near-duplicates out, rare content as often as frequent, no labels needed.

    Embeddings of a frozen backbone are clustered on several levels, and chips drawn evenly from the clusters
    (DINOv3, section 3.1). Train on them with `chips: PARQUET` beside `path` in data.sources. A run that was
    cut off goes on when the command is given again.
    """
    for name, value, valid in (("kind", kind, _KINDS), ("assign", assign, _ASSIGN)):
        if value not in valid:
            raise UnknownNameError(name, value, valid)
    numbers = _parse_levels(levels)
    check_folder(output.parent)
    from dinov3geo.curation import pipeline
    from dinov3geo.curation.pipeline import ChoiceSettings, PoolSettings
    from dinov3geo.paths import check_free
    from dinov3geo.rasters.parquet import import_pyarrow

    check_free(output, overwrite=overwrite)
    import_pyarrow("tables of chips")
    pool = PoolSettings(data, kind, sensor, chip_size, stride, min_valid)
    similarity = None if duplicates == 1 else duplicates
    choice = ChoiceSettings(count, numbers, similarity, seeds, neighbours, least, seed)
    network = load_network(backbone, device)
    with progress_bar(Path(data).name or data) as tell:
        result = pipeline.curate(
            pool,
            choice,
            output,
            backbone=network,
            assign=_assigner(assign, network),
            batch_size=batch_size,
            workers=workers,
            work=embeddings,
            keep_work=embeddings is not None,
            tell=lambda stage, done, total: tell(done, total, label=stage),
        )
    print_pairs(
        [
            ("chips", f"{result.pool:,} in the pool, {result.unusable:,} with too little data"),
            ("near-duplicates", f"{result.duplicates:,} left out"),
            ("clusters", " > ".join(f"{number:,}" for number in result.levels)),
            ("chosen", f"{result.balanced:,} evenly, {result.retrieved:,} as neighbours of seeds"),
            ("table", str(result.output)),
        ]
    )
    note(f"train on them with chips: {output} beside path: {data} in data.sources")


def _assigner(name: str, network: base.Backbone) -> Assign:
    from dinov3geo.curation.kmeans import assign_with_faiss, assign_with_torch

    device = next(network.parameters()).device
    found = assign_with_faiss() if name == "faiss" or (name == "auto" and device.type == "cpu") else None
    if name == "faiss" and found is None:
        raise ConfigError("faiss is not installed: pip install 'dinov3geo[curate]', or --assign torch")
    return found or assign_with_torch(str(device))


def _parse_levels(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--levels takes whole numbers with commas between them, got {text!r}") from error
