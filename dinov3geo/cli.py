"""The command `dinov3geo`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dinov3geo import __version__
from dinov3geo.allocator import keep_freed_memory
from dinov3geo.commands.benchmark import benchmark
from dinov3geo.commands.canopy import canopy
from dinov3geo.commands.classify import classify
from dinov3geo.commands.console import note
from dinov3geo.commands.convert import convert
from dinov3geo.commands.curate import curate
from dinov3geo.commands.demo import demo
from dinov3geo.commands.detect import detect
from dinov3geo.commands.distill import distill
from dinov3geo.commands.export import export
from dinov3geo.commands.filters import filters
from dinov3geo.commands.landcover import landcover
from dinov3geo.commands.maps import polygons, zonal
from dinov3geo.commands.models import models
from dinov3geo.commands.pack import pack
from dinov3geo.commands.pictures import features, show
from dinov3geo.commands.pretrain import pretrain
from dinov3geo.commands.split import split
from dinov3geo.commands.stats import stats
from dinov3geo.commands.track import track
from dinov3geo.commands.view import view
from dinov3geo.errors import UserError

USER_ERROR, INTERNAL_ERROR = 2, 1
_TRACEBACK = "--traceback"

app = typer.Typer(
    name="dinov3geo",
    help="DINOv3 self-supervised learning and dense prediction on georeferenced rasters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(models)
app.command()(pretrain)
app.command()(distill)
app.command()(filters)
app.command()(stats)
app.command()(curate)
app.command()(split)
app.command()(pack)
app.command()(convert)
app.command()(export)
app.add_typer(canopy, name="canopy")
app.add_typer(landcover, name="landcover")
app.add_typer(classify, name="classify")
app.add_typer(detect, name="detect")
app.command()(benchmark)
app.command()(track)
app.command()(features)
app.add_typer(show, name="show")
app.command()(view)
app.command()(zonal)
app.command()(polygons)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dinov3geo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option(_TRACEBACK, help="Show where in the program an error arose (any position).")
    ] = False,
) -> None:
    """DINOv3 self-supervised learning and dense prediction on georeferenced rasters."""
    keep_freed_memory()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: words after `dinov3geo`; those of the process if None.

    Returns:
        Exit status: 0 if all went well, 2 for what the user can mend (one line on stderr), 1 for an error
        of the program, 130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_trace = _TRACEBACK in words
    words = [word for word in words if word != _TRACEBACK]
    try:
        app(args=words, prog_name="dinov3geo", obj=shlex.join(["dinov3geo", *words]))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else INTERNAL_ERROR
    except UserError as error:
        if show_trace:
            raise
        note(f"error: {error}")
        return USER_ERROR
    except Exception as error:
        # The last resort of the whole program: a user gets a line instead of a page.
        if show_trace:
            raise
        note(f"internal error: {type(error).__name__}: {error} (run again with {_TRACEBACK} to see where)")
        return INTERNAL_ERROR
    return 0
