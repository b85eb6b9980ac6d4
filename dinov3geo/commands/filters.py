"""`dinov3geo filters`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinov3geo.commands.console import check_folder, print_pairs, progress_bar, warn


def filters(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file; see configs/filters. May be left out.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace one value, e.g. data.root=scenes. Repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the weights and their card.", show_default="outputs/NAME")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration and data; compute nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace weights in --out.")] = False,
) -> None:
    """Compute a backbone from images in minutes: patches as filters, their responses whitened.

    No labels and no training. The result is named wherever a backbone is: to benchmark, to classify, or as
    the teacher of a vision transformer (dinov3geo distill, targets=features).
    """
    from dinov3geo.config import dump_model, load_model
    from dinov3geo.training.settings import FilterSettings

    checked = load_model(FilterSettings, config, settings or [])
    folder = out or Path("outputs") / checked.name
    if dry_run:
        from dinov3geo.training.describe import describe_filters

        print(dump_model(checked))
        print_pairs([*describe_filters(checked, folder, overwrite=overwrite), ("output folder", str(folder))])
        return
    check_folder(folder)
    from dinov3geo.training.filter_fit import fit_filters

    with progress_bar(checked.name) as tell:
        found = fit_filters(
            checked, folder, progress=tell, warn=lambda text: warn([text]), overwrite=overwrite
        )
    print_pairs(
        [
            ("images", str(found.images)),
            ("variance kept", f"{found.explained:.1%}"),
            ("weights", str(found.weights)),
        ]
    )
