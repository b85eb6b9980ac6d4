"""`dinov3geo split`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.console import check_folder, note, print_table
from dinov3geo.commands.options import Overwrite
from dinov3geo.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    import geopandas

    from dinov3geo.data import splits

_WAYS = ("blocks", "files", "polygons")


def split(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="Scenes: folders, globs or files.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="GPKG", help="GeoPackage to write.", show_default=False)
    ],
    by: Annotated[str, typer.Option(help="blocks of ground, files, or polygons.")] = "blocks",
    shares: Annotated[
        str,
        typer.Option(metavar="NAME=SHARE,...", help="Of the covered area; the first gives way to others."),
    ] = "train=0.8,val=0.1,test=0.1",
    block: Annotated[float, typer.Option(min=0.001, help="Side of a block, metres.")] = 1000.0,
    buffer: Annotated[
        float, typer.Option(min=0, help="Ground between two splits that belongs to none, metres.")
    ] = 0.0,
    polygons: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of --by polygons.", show_default=False)
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Names the split of each polygon.", show_default="test inside the polygons, train outside"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the dealing.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Split scenes by place, without leakage, into a GeoPackage that QGIS shows.

    Train on a part with `split: GPKG#train` beside `path` in data.sources: pixels outside count as no data.
    Whole files (--by files) are also read wherever scenes are asked for: --images GPKG#train.
    """
    if by not in _WAYS:
        raise UnknownNameError("way to split", by, _WAYS)
    if (by == "polygons") != (polygons is not None):
        raise ConfigError("--by polygons needs --polygons FILE, and no other way takes it")
    if output.suffix.lower() != ".gpkg":
        raise ConfigError(f"splits are written as GeoPackage: name the output *.gpkg, got {output}")
    check_folder(output.parent)
    from dinov3geo.data import splits
    from dinov3geo.paths import check_free

    check_free(output, overwrite=overwrite)
    wanted = splits.parse_shares(shares)
    ground = splits.find_ground(data)
    if by == "blocks":
        frame = splits.split_blocks(ground, wanted, block_m=block, buffer_m=buffer, seed=seed)
    elif by == "files":
        frame = splits.split_files(ground, wanted, buffer_m=buffer, seed=seed)
    else:
        assert polygons is not None
        frame = splits.split_polygons(ground, polygons, column=column, buffer_m=buffer)
    splits.write_splits(frame, output)
    _report(frame, ground)
    note(f"wrote {output}; train on a part with split: {output}#{frame['split'].iloc[0]} in data.sources")


def _report(frame: geopandas.GeoDataFrame, ground: splits.Ground) -> None:
    """Polygons, covered area and scenes of each split."""
    import shapely

    union = ground.union
    rows = []
    for name, part in frame.groupby("split", sort=False):
        shape = shapely.intersection(shapely.union_all(part.geometry.to_numpy()), union)
        scenes = int(shapely.intersects(ground.shapes, shape).sum())
        share = f"{shape.area / union.area:.1%}"
        rows.append([str(name), str(len(part)), f"{shape.area / 1e4:,.2f}", share, str(scenes)])
    print_table(["split", "polygons", "hectares", "of the ground", "scenes touched"], rows)
