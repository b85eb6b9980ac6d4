"""`dinov3geo pretrain`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov3geo.commands.console import check_folder, note, print_pairs, progress_bar, warn
from dinov3geo.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from dinov3geo.config import PretrainConfig
    from dinov3geo.training.loop import RunResult
    from dinov3geo.training.observe import Evaluator
    from dinov3geo.training.settings import RunSettings

INTERRUPTED = 130
"""Exit status after Ctrl-C. A scheduler's SIGTERM is no failure: the state is saved, the status is 0."""

_SET_HELP = "Replace one value, e.g. data.root=scenes. Repeatable."
_FROM_HELP = "Branch off a run or checkpoint: networks, optimiser and step count go on; its settings too."
_ANCHOR_HELP = (
    "Of the stage: a run, checkpoint or weights; 'start' (the teacher of --from), or 'teacher' (EMA)."
)


def pretrain(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML file; see configs/pretrain. With --from it may be left out."),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=_SET_HELP)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints, metrics and weights.", show_default="outputs/NAME"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    start: Annotated[Path | None, typer.Option("--from", metavar="RUN", help=_FROM_HELP)] = None,
    stage: Annotated[
        str | None, typer.Option(help="With --from: gram (anchoring) or highres (larger crops).")
    ] = None,
    anchor: Annotated[str | None, typer.Option(help=_ANCHOR_HELP)] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print configuration, data, model, memory and steps; train nothing."),
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: processes to divide the work by.")
    ] = None,
) -> None:
    """Pretrain a backbone on scenes or images without labels.

    On several GPUs: torchrun --nproc-per-node 8 -m dinov3geo pretrain ...

    Ctrl-C (status 130) and SIGTERM, the signal of a scheduler that needs the machine (status 0), both save
    the state first; --resume goes on from there.
    """
    checked = _settings(config, settings or [], start, stage, anchor)
    folder = out or Path("outputs") / checked.name
    if dry_run:
        from dinov3geo.training.describe import describe

        print_plan(checked, folder, describe(checked, folder, resume=resume, ranks=ranks or 1))
        return
    from dinov3geo.training.trainer import pretrain as train

    run_training(checked, folder, train, resume=resume)


def run_training(
    checked: RunSettings,
    folder: Path,
    train: Callable[..., RunResult],
    *,
    resume: bool,
    all_evaluate: bool = False,
) -> None:
    """Runs a checked configuration to its end, or to a signal, and prints how it ended.

    Args:
        checked: configuration.
        folder: output.
        train: `trainer.pretrain` or `distiller.distill`.
        resume: go on from the last checkpoint.
        all_evaluate: processes beside the first may have a network to evaluate.
    """
    check_folder(folder)
    from dinov3geo.training.distributed import is_first_process

    first = is_first_process()
    with progress_bar(checked.name) if first else _silence() as tell:
        result = train(
            checked,
            out=folder,
            resume=resume,
            progress=tell,
            warn=lambda text: warn([text]),
            evaluators=_evaluators(checked) if first or all_evaluate else None,
        )
    if result.stopped_by is not None:
        if first:
            note(f"stopped after step {result.steps} of {checked.steps}; go on with --resume --out {folder}")
        raise typer.Exit(INTERRUPTED if result.stopped_by == signal.SIGINT else 0)
    metrics = [(name, f"{value:.4g}") for name, value in result.metrics.items()]
    if first:
        print_pairs([("steps", str(result.steps)), *metrics, ("weights", str(result.weights))])


def _settings(
    config: Path | None,
    overrides: Sequence[str],
    start: Path | None,
    stage: str | None,
    anchor: str | None,
) -> PretrainConfig:
    from dinov3geo.config import PretrainConfig, load_config, load_model

    if start is None:
        if config is None:
            raise ConfigError(
                "name a configuration (see configs/pretrain), or a run to branch off with --from"
            )
        if stage is not None or anchor is not None:
            raise ConfigError("--stage and --anchor change the settings of a run; name it with --from")
        return load_config(config, overrides)
    from dinov3geo.training.stages import STAGES, branch_settings

    if stage is not None and stage not in STAGES:
        raise UnknownNameError("stage", stage, STAGES)
    base = None if config is None else load_config(config, overrides)
    values = branch_settings(start, stage, anchor, base)
    return load_model(PretrainConfig, None, overrides, values=values)


def print_plan(checked: RunSettings, folder: Path, lines: Sequence[tuple[str, str]]) -> None:
    """Prints the whole configuration, and what the run would do."""
    from dinov3geo.config import dump_model

    print(dump_model(checked))
    print_pairs([*lines, ("output folder", str(folder))])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No progress in the processes beside the first."""
    yield None


def _evaluators(checked: RunSettings) -> dict[str, Evaluator]:
    """The probes that the configuration asks for, with their data read once and before the first step."""
    watch = checked.watch
    wanted: dict[str, Evaluator] = {}
    if watch.evaluate_every is None:
        return wanted
    from dinov3geo.evaluation import probes
    from dinov3geo.training.setup import run_normalization

    normalization = run_normalization(checked)
    if watch.knn is not None:
        data = probes.load_labelled(
            watch.knn, size=watch.knn_size, per_class=watch.knn_per_class, hold_out=watch.knn_hold_out
        )

        def knn(backbone: Any) -> dict[str, float]:  # noqa: ANN401 (torch is not loaded here)
            tokens = probes.class_tokens(backbone, data.images, normalization)
            return {"knn_accuracy": probes.knn_accuracy(tokens, data)}

        wanted["knn"] = knn
    images, heights = watch.dense_images, watch.dense_heights
    if images is not None and heights is not None:
        wanted["dense"] = _height_probe(images, heights, normalization)
    return wanted


def _height_probe(images: Path, heights: Path, normalization: Any) -> Callable[[Any], dict[str, float]]:  # noqa: ANN401
    from dinov3geo.evaluation import probes

    return lambda backbone: {"height_r2": probes.height_probe(backbone, images, heights, normalization)}
