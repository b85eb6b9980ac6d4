"""`dinov3geo stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinov3geo.commands.console import note


def stats(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="Rasters: folders, globs or files.", show_default=False),
    ],
    sensor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|YAML",
            help="Whose bands these are; without it they are called as in the files, or b1, b2, ...",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="YAML", help="Sensor file to write.", show_default=False),
    ] = None,
    name: Annotated[str, typer.Option(help="Of the sensor in the file.")] = "my_sensor",
    nodata: Annotated[
        float | None,
        typer.Option(help="Number that means no data where files declare none.", show_default="the sensor's"),
    ] = None,
    percentiles: Annotated[
        str, typer.Option(metavar="P,P,...", help="Percentiles to print, of stored numbers.")
    ] = "1,50,99",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing sensor file.")] = False,
) -> None:
    """Exact mean, standard deviation and percentiles per band over all valid pixels; writes a sensor file.

    Pixels that several files share count once for each.
    """
    from dinov3geo.data.survey import measure_sensor, parse_percents
    from dinov3geo.paths import check_free
    from dinov3geo.rasters.sensor_files import save_sensor

    percents = parse_percents(percentiles)
    if output is not None:
        check_free(output, overwrite=overwrite)
    found = measure_sensor(data, sensor=sensor, name=name, nodata=nodata, percents=percents)
    heading = " ".join(f"{f'p{percent:g}':>10}" for percent in percents)
    print(f"{'band':16}{'pixels':>12} {'mean':>10} {'std':>10} {'min':>10} {'max':>10} {heading}")
    for band, row in zip(found.sensor.bands, found.bands, strict=True):
        numbers = (row.mean, row.std, row.minimum, row.maximum, *row.percentiles.values())
        print(f"{band.name:16}{row.count:>12} " + " ".join(f"{number:>10.5g}" for number in numbers))
    if output is not None:
        save_sensor(found.sensor, output)
        note(f"wrote {output}; use it as data.sensor={output}")
