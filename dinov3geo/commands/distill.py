"""`dinov3geo distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinov3geo.commands.pretrain import print_plan, run_training


def distill(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/distill.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one value, e.g. teacher=RUN. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of checkpoints, metrics and one folder of weights per student.",
            show_default="outputs/NAME",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print configuration, data, networks and steps; train nothing."),
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: processes to divide the work by.")
    ] = None,
) -> None:
    """Teach several small backbones at once what a frozen one knows.

    On one device the students learn in turn. With students.processes each learns on processes of its own:
    torchrun --nproc-per-node 8 -m dinov3geo distill ...
    """
    from dinov3geo.config import DistillConfig, load_model

    checked = load_model(DistillConfig, config, settings or [])
    folder = out or Path("outputs") / checked.name
    if dry_run:
        from dinov3geo.training.describe import describe_distillation

        lines = describe_distillation(checked, folder, resume=resume, ranks=ranks or 1)
        print_plan(checked, folder, lines)
        return
    from dinov3geo.training.distiller import distill as train

    run_training(checked, folder, train, resume=resume, all_evaluate=True)
