"""`dinov3geo export`: a backbone as a file that runs without this library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.console import check_folder, print_pairs
from dinov3geo.commands.options import Overwrite
from dinov3geo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(
    backbone: Annotated[
        str,
        typer.Argument(
            metavar="NAME|PATH",
            help="A name from `dinov3geo models`, a run's folder, or weights of any dialect.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write (.pt2, .pt or .onnx).", show_default=False)
    ],
    file_format: Annotated[
        str,
        typer.Option(
            "--format", metavar="FORMAT", help="exported-program, torchscript or onnx.", show_default=False
        ),
    ],
    size: Annotated[
        tuple[int, int],
        typer.Option(metavar="ROWS COLUMNS", help="Pixels; whole patches unless --dynamic."),
    ] = (224, 224),
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Let batch and size differ later on.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Export a backbone and check the file against it at several sizes."""
    check_folder(output.absolute().parent)
    run = onnx_runner() if file_format == "onnx" else None
    from dinov3geo.backbones.export import OUTPUTS, export_backbone
    from dinov3geo.backbones.zoo import load_backbone

    report = export_backbone(
        load_backbone(backbone),
        output,
        file_format,
        size_hw=size,
        dynamic=dynamic,
        run=run,
        overwrite=overwrite,
    )
    checks = [
        (f"{height} x {width}", f"differs by at most {difference:.1e}")
        for (height, width), difference in report.differences.items()
    ]
    print_pairs(
        [
            ("file", str(report.output)),
            ("takes", f"normalised images [B, C, H, W]{'' if dynamic else f' of {size[0]} x {size[1]}'}"),
            ("gives", ", ".join(OUTPUTS)),
            *checks,
        ]
    )


def onnx_runner() -> Callable[[Path, Tensor], Sequence[Tensor]]:
    """A function that runs an ONNX file with ONNX Runtime on the CPU.

    Raises:
        ConfigError: a package is missing.
    """
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX export needs {', '.join(ONNX_PACKAGES)}; missing: {', '.join(missing)} "
            "(pip install 'dinov3geo[onnx]')"
        )
    runtime = import_module("onnxruntime")

    def run(path: Path, images: Tensor) -> Sequence[Tensor]:
        import torch

        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]

    return run
