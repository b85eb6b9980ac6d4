"""`dinov3geo view`: maps in the web browser."""

from __future__ import annotations

import signal
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from dinov3geo.commands.console import note
from dinov3geo.errors import ConfigError


def view(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Maps and scenes (.tif), and features (.zarr).", show_default=False
        ),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="To listen on; 0 takes a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address only.")] = False,
) -> None:
    """Show maps and scenes in the web browser: opacity, legends, pixel values on click.

    With features (dinov3geo features SCENE -o X.zarr) a click shows where similar patches are. The page is
    served on this machine only, and needs no network. Ctrl-C ends it.
    """
    from dinov3geo.viewer.layers import open_layers
    from dinov3geo.viewer.server import Viewer, ViewerServer
    from dinov3geo.viewer.similarity import SimilarityLayer

    stores = [path for path in files if path.suffix.lower() == ".zarr"]
    if len(stores) > 1:
        raise ConfigError(f"one .zarr of features can be shown at a time, got {len(stores)}")
    layers = open_layers([path for path in files if path not in stores])
    similarity = SimilarityLayer(stores[0]) if stores else None
    with ViewerServer(Viewer(layers, similarity), port) as server:
        print(server.url, flush=True)
        note("the page is open until Ctrl-C")
        if not no_browser:
            # A browser on the terminal would take it over until it is left.
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        # A job in the background starts with SIGINT ignored, and SIGTERM would skip the closing of files.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            note("stopped")
