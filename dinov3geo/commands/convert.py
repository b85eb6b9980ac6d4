"""`dinov3geo convert`: weights in another dialect, or for other bands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinov3geo.commands.console import check_folder, print_pairs
from dinov3geo.commands.options import Overwrite

_MAX_NAMES = 4


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A name, an official .pth, a .safetensors file, or a Hugging Face folder.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="official: a .pth file; hf: a folder; timm, ours: a .safetensors file.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="DIALECT", help="official, hf, timm or ours.", show_default=False)
    ],
    sensor: Annotated[
        str | None,
        typer.Option(
            help="Sensor whose bands and statistics the output shall take.", show_default="as in IN"
        ),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(metavar="B,B,...", help="Bands by name, in order.", show_default="all of the sensor"),
    ] = None,
    stem: Annotated[
        str | None,
        typer.Option(
            help="Kernels of new bands: mean (of the RGB kernels, rescaled) or zero.", show_default="refuse"
        ),
    ] = None,
    normalization: Annotated[
        str | None,
        typer.Option(help="Statistics: web, sat or chmv2.", show_default="what the weights tell"),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert weights between the official, Hugging Face, timm and own dialects."""
    check_folder(output.absolute().parent)
    from dinov3geo.backbones.rewrite import rewrite_checkpoint
    from dinov3geo.rasters.sensors import get_sensor

    report = rewrite_checkpoint(
        source,
        output,
        to,
        bands=None if bands is None else [name.strip() for name in bands.split(",")],
        sensor=None if sensor is None else get_sensor(sensor),
        normalization=normalization,
        stem=stem,
        overwrite=overwrite,
    )
    print_pairs(
        [
            ("weights", str(report.output)),
            ("recognised as", f"{report.source_dialect}, {report.variant}"),
            ("bands", " ".join(report.bands)),
            ("tensors", f"{report.tensors}, each compared with its source"),
            ("left out", _some(report.lost) or "nothing"),
            ("open with", report.opens_with),
        ]
    )


def _some(names: tuple[str, ...]) -> str:
    more = f", ... {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
