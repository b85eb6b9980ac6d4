"""`dinov3geo benchmark`: published protocols, one YAML file each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.classify import Encoders, print_rows, vector_cache
from dinov3geo.commands.console import check_folder, note, progress_bar, warn
from dinov3geo.commands.options import Cache, Changes, Device, command_line

if TYPE_CHECKING:
    from dinov3geo.evaluation.results import Row


def benchmark(
    context: typer.Context,
    configs: Annotated[
        list[Path],
        typer.Argument(metavar="CONFIG...", help="YAML files of benchmarks.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the results.", show_default=False)
    ],
    backbones: Encoders = None,
    readme: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the table of each benchmark between <!-- benchmark NAME --> and <!-- /benchmark -->.",
            show_default=False,
        ),
    ] = None,
    changes: Changes = None,
    cache: Cache = None,
    device: Device = "auto",
) -> None:
    """Run benchmarks: any number of backbones in one table as JSON, CSV, Markdown and a picture.

    What is finished is kept in the folder of the results, so a run that was cut off goes on where it was.
    --backbone takes the place of the encoders in the files; `--backbone baselines` adds the baselines again.
    """
    from dinov3geo.backbones.device import resolve_device
    from dinov3geo.config import dump_model, load_model
    from dinov3geo.evaluation.benchmark import (
        BenchmarkConfig,
        distinct_names,
        replace_between_marks,
        run_benchmark,
    )
    from dinov3geo.evaluation.compare import commit_of, hardware
    from dinov3geo.evaluation.results import markdown, write_results
    from dinov3geo.paths import written_whole

    loaded = [load_model(BenchmarkConfig, path, changes or []) for path in configs]
    check_folder(out)
    if readme is not None:
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        for config in loaded:
            replace_between_marks(text, config.name, "")
    rows: list[Row] = []
    for config in loaded:
        with progress_bar(config.name) as tell:
            run = run_benchmark(
                config,
                out / "parts",
                encoders=backbones or (),
                device=resolve_device(device),
                cache=vector_cache(cache),
                progress=lambda stage, done, total, tell=tell: tell(done, total, label=stage),  # type: ignore[misc]
            )
        warn(run.notes)
        if run.kept:
            note(f"{config.name}: {run.kept} parts were finished before")
        rows += run.rows
    rows = distinct_names(rows)
    details = {
        "command": command_line(context),
        "commit": commit_of(Path.cwd()),
        **hardware(),
        "configurations": {config.name: dump_model(config) for config in loaded},
    }
    print_rows(rows)
    for path in write_results(out, rows, details):
        note(f"wrote {path}")
    if readme is not None:
        for config in loaded:
            own = [row for row in rows if row.data == config.name]
            text = replace_between_marks(text, config.name, markdown(own))
        with written_whole(readme) as temporary:
            temporary.write_text(text, encoding="utf-8")
        note(f"wrote {readme}")
