"""`dinov3geo pretrain`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from dinov3geo.commands.console import check_folder, note, print_pairs, progress_bar

INTERRUPTED = 130
"""Exit status after Ctrl-C. A scheduler's SIGTERM is no failure: the state is saved, the status is 0."""


def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/pretrain.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace one value, e.g. data.root=scenes. Repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints, metrics and weights.", show_default="outputs/NAME"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print configuration, data, model, memory and steps; train nothing."),
    ] = False,
) -> None:
    """Pretrain a backbone on scenes or images without labels.

    Ctrl-C (status 130) and SIGTERM, the signal of a scheduler that needs the machine (status 0), both save
    the state first; --resume goes on from there.
    """
    from dinov3geo.config import dump_model, load_config

    checked = load_config(config, settings or [])
    folder = out or Path("outputs") / checked.name
    if dry_run:
        from dinov3geo.training.describe import describe

        print(dump_model(checked))
        print_pairs([*describe(checked, folder, resume=resume), ("output folder", str(folder))])
        return
    check_folder(folder)
    from dinov3geo.training import trainer

    with progress_bar(checked.name) as tell:
        result = trainer.pretrain(checked, out=folder, resume=resume, progress=tell)
    if result.stopped_by is not None:
        note(f"stopped after step {result.steps} of {checked.steps}; go on with --resume --out {folder}")
        raise typer.Exit(INTERRUPTED if result.stopped_by == signal.SIGINT else 0)
    metrics = [(name, f"{value:.4g}") for name, value in result.metrics.items()]
    print_pairs([("steps", str(result.steps)), *metrics, ("weights", str(result.weights))])
