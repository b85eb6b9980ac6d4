"""`dinov3geo zonal` and `dinov3geo polygons`: tables and polygons from maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinov3geo.commands.console import print_pairs
from dinov3geo.commands.options import Overwrite

Map = Annotated[Path, typer.Argument(metavar="MAP.tif", help="A map.", show_default=False)]


def zonal(
    raster: Map,
    zones: Annotated[
        Path, typer.Argument(metavar="ZONES", help="Vector file of polygons.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT", help=".gpkg, .parquet or .csv", show_default=False),
    ],
    statistics: Annotated[
        list[str] | None,
        typer.Option(
            "--statistic",
            metavar="NAME",
            help="count, mean, min, max, median, stdev, sum, majority or variety. Repeatable.",
            show_default="count, mean, stdev, min, max",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write statistics of a map within polygons; of a map of classes, the area of each class."""
    from dinov3geo.predict.zonal import write_zonal_statistics

    count = write_zonal_statistics(raster, zones, output, statistics=statistics or (), overwrite=overwrite)
    print_pairs([("table", str(output)), ("zones", str(count))])


def polygons(
    classes: Map,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help=".gpkg or .parquet", show_default=False)
    ],
    min_area: Annotated[float, typer.Option(min=0, help="Leave out smaller polygons, square metres.")] = 0.0,
    overwrite: Overwrite = False,
) -> None:
    """Turn a map of classes into polygons with class, name and area."""
    from dinov3geo.predict.landcover import write_polygons

    count = write_polygons(classes, output, min_area_m2=min_area, overwrite=overwrite)
    print_pairs([("polygons", str(output)), ("number", str(count))])
