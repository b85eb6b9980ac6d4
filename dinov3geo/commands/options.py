"""Options that several verbs share, and what stands behind them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dinov3geo.backbones import base
    from dinov3geo.features.extract import FeatureCache

_NAMES = "A name from `dinov3geo models`, the folder of a pretraining run, or a .safetensors file."
Backbone = Annotated[
    str | None, typer.Option(metavar="NAME|PATH", help=_NAMES, show_default="the starter weights")
]
HeightBackbone = Annotated[
    str | None,
    typer.Option("--backbone", metavar="NAME|PATH", help=_NAMES, show_default="that of the starter model"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of everything random.", show_default="0")]
Tile = Annotated[int, typer.Option(min=1, help="Side of the square read at a time, pixels.")]
Overlap = Annotated[int, typer.Option(min=0, help="Pixels that neighbouring tiles share and blend.")]
Gsd = Annotated[
    str | None,
    typer.Option(
        metavar="METRES|model",
        help="Pixel size at which the model sees the scene, and of the map: metres (in degrees, those of "
        "the centre), or the nearest one that the model was trained at. CRS and corner stay.",
        show_default="the scene's own",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Tiles per forward pass.", show_default="4 on the CPU, by the memory of a GPU"),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the backbone (torch.compile): a minute first, then faster on a GPU."
    ),
]
Precision = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU that gains), float32 or bfloat16.")]
Engine = Annotated[
    str, typer.Option(help="local, or ray: the workers of a Ray cluster (RAY_ADDRESS, else this machine).")
]
Scenes = Annotated[
    list[str],
    typer.Argument(
        metavar="SCENE...", help="Files, folders, globs or a STAC collection.", show_default=False
    ),
]
MapOutput = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="OUT", help="A .tif for one scene, else a folder.", show_default=False
    ),
]
ModelFolder = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the model.", show_default=False)]
NoSidecars = Annotated[bool, typer.Option("--no-sidecars", help="Write no STAC item, QGIS style and legend.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print settings and the data found; fit nothing.")]
HeadSettings = Annotated[
    Path | None,
    typer.Option(metavar="YAML", help="Settings, e.g. of configs/heads.", show_default="the defaults"),
]
_IMAGES = typer.Option(
    "--images", metavar="DIR|GLOB", help="Images: a folder, glob or file. Repeatable.", show_default=False
)
Images = Annotated[list[str], _IMAGES]
StoredFeatures = Annotated[
    list[str] | None,
    typer.Option(
        "--features",
        metavar="STORE",
        help="Instead of images: what `dinov3geo features` wrote. No backbone is loaded. Repeatable.",
        show_default=False,
    ),
]
ImagesOrNone = Annotated[list[str] | None, _IMAGES]
Heights = Annotated[
    list[str],
    typer.Option(
        metavar="DIR|GLOB",
        help="Heights in metres, matched to the images by their georeference. Repeatable.",
        show_default=False,
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace one setting, e.g. fit.learning_rate=3e-4; --dry-run lists them. Repeatable.",
    ),
]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Passes over the data.", show_default="by the settings")
]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of computed features.", show_default="the user's cache folder"),
]
OutputPicture = Annotated[
    Path, typer.Option("-o", "--output", metavar="PNG", help="Picture to write.", show_default=False)
]

RAY_SCENES = 4
"""Scenes whose rows are on a cluster at once: small ones alone would not keep its workers busy."""


def scenes_at_once(engine: str) -> int:
    """Scenes in the making: one here, several on a cluster."""
    return RAY_SCENES if engine == "ray" else 1


def command_line(context: typer.Context) -> str:
    """The command as it was typed, for the tags of what it writes."""
    return str(context.obj or context.command_path)


def load_network(name_or_path: str | None, device: str) -> base.Backbone:
    """The backbone that is named, or the starter weights, on its device."""
    from dinov3geo.backbones.device import resolve_device
    from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone

    return load_backbone(name_or_path or DEFAULT_BACKBONE).to(resolve_device(device))


def open_cache(folder: Path | None) -> FeatureCache:
    """The cache of features in a folder, or in the user's cache folder."""
    from dinov3geo.features.extract import FeatureCache, default_cache_folder

    return FeatureCache(folder or default_cache_folder())
