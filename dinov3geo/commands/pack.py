"""`dinov3geo pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinov3geo.commands.console import check_folder, note, print_pairs, progress_bar


def pack(
    config: Annotated[Path, typer.Argument(help="YAML file of a pretraining run.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the shards.", show_default=False)
    ],
    chips: Annotated[int, typer.Option(min=1, help="How many to draw.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace one value, e.g. data.root=scenes. Repeatable."
        ),
    ] = None,
    per_shard: Annotated[int, typer.Option("--per-shard", min=1, help="Chips in a tar file.")] = 1000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that write a shard each.")] = 1,
) -> None:
    """Draw chips as a run would and write them to tar shards, for slow disks and object stores.

    Scenes become georeferenced GeoTIFFs, images PNG files (WebDataset's names). Train on them with the same
    configuration and --set data.root=DIR --set 'data.sources=[{kind: shards}]'. Given again, the command
    writes the shards that are missing.
    """
    check_folder(output)
    from dinov3geo.config import load_config
    from dinov3geo.data.packing import Packing
    from dinov3geo.data.packing import pack as write

    checked = load_config(config, settings or [])
    packing = Packing(checked.data, chips, per_shard, checked.seed)
    with progress_bar("shards") as tell:
        already = write(packing, output, workers=workers, tell=tell)
    print_pairs(
        [
            ("chips", f"{chips:,} of {checked.data.chip_size} pixels"),
            ("shards", f"{packing.num_shards:,}, {already:,} of them were there"),
            ("folder", str(output)),
        ]
    )
    note(f"train on them with --set data.root={output} --set 'data.sources=[{{kind: shards}}]'")
