"""Backbones as files that run without this library, compared with the network before they are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.errors import ConfigError, DataError, RasterError, UnknownNameError

FORMATS = {"exported-program": ".pt2", "torchscript": ".pt", "onnx": ".onnx"}
OUTPUTS = ("cls", "registers", "patches")
TOLERANCE = 1e-3

Run = Callable[[Path, Tensor], Sequence[Tensor]]


class TensorOutputs(nn.Module):
    """A backbone that returns (cls [B, D], registers [B, R, D], patches [B, N, D])."""

    def __init__(self, backbone: Backbone) -> None:
        """Wraps a backbone."""
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class; images [B, C, H, W] are normalised, sides are multiples of the patch."""
        features = self.backbone(images)
        return features.cls, features.registers, features.patches


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        output: the file.
        differences: largest absolute difference to the network by (rows, columns) of the image.
    """

    output: Path
    differences: dict[tuple[int, int], float]


def export_backbone(
    backbone: Backbone,
    output: Path,
    file_format: str,
    *,
    size_hw: tuple[int, int],
    dynamic: bool,
    run: Run | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Exports a backbone and runs the file beside it.

    Args:
        backbone: in evaluation mode, on the CPU.
        output: the file; its suffix is that of the format.
        file_format: a key of `FORMATS`.
        size_hw: rows and columns of the images in pixels, multiples of the patch.
        dynamic: batch and size may differ from the example's later on; the file is then checked at a second,
            oblong size and another batch too.
        run: runs a file of the format; needed for `onnx`, which torch itself cannot run.
        overwrite: replace an existing file.

    Returns:
        What was measured; the file is there only if it agrees with the network.

    Raises:
        UnknownNameError: no such format.
        ConfigError: a suffix or size that does not fit, or no way to run the file.
        RasterError: the file exists already.
        DataError: the file gives other numbers than the network, or cannot be made.
    """
    _check(backbone, output, file_format, size_hw=size_hw, overwrite=overwrite)
    run = run or {"exported-program": _run_program, "torchscript": _run_script}.get(file_format)
    if run is None:
        raise ConfigError(f"no runtime for {file_format} files was given, so the result could not be checked")
    module = TensorOutputs(backbone).eval()
    step = backbone.patch_size
    cases = [(2, *size_hw)]
    if dynamic:
        cases += [(1, 3 * step, 5 * step), (3, size_hw[0] + step, size_hw[1])]
    images = torch.randn(2, backbone.in_channels, *size_hw, generator=torch.Generator().manual_seed(0))
    temporary = output.with_name(f".{output.stem}.tmp{output.suffix}")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(module, images, temporary, file_format, dynamic=dynamic)
        differences = {(h, w): _compare(module, run, temporary, (b, h, w)) for b, h, w in cases}
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return ExportReport(output, differences)


def _check(
    backbone: Backbone, output: Path, file_format: str, *, size_hw: tuple[int, int], overwrite: bool
) -> None:
    if file_format not in FORMATS:
        raise UnknownNameError("export format", file_format, FORMATS)
    if output.suffix != FORMATS[file_format]:
        raise ConfigError(f"{file_format} files end in {FORMATS[file_format]}, got {output}")
    if min(size_hw) < 1 or any(side % backbone.patch_size for side in size_hw):
        raise ConfigError(
            f"an exported network takes whole patches: expected multiples of {backbone.patch_size} pixels, "
            f"got {size_hw[0]} x {size_hw[1]}"
        )
    if output.exists() and not overwrite:
        raise RasterError(f"{output} exists; give another name or allow overwriting")


def _write(module: TensorOutputs, images: Tensor, path: Path, file_format: str, *, dynamic: bool) -> None:
    shapes = {"images": _dynamic_dimensions(module.backbone.patch_size)} if dynamic else None
    try:
        with torch.no_grad():
            if file_format == "torchscript":
                torch.jit.save(torch.jit.trace(module, images), path)
                return
            program = torch.export.export(module, (images,), dynamic_shapes=shapes)
            if file_format == "exported-program":
                torch.export.save(program, path)
            else:
                torch.onnx.export(
                    program,
                    f=path,
                    input_names=["images"],
                    output_names=list(OUTPUTS),
                    dynamo=True,
                    external_data=False,
                )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(f"the network cannot be exported as {file_format}: {reason}") from error


def _dynamic_dimensions(patch_size: int) -> dict[int, object]:
    rows, columns = torch.export.Dim("rows", min=2, max=1024), torch.export.Dim("columns", min=2, max=1024)
    return {0: torch.export.Dim("batch", max=4096), 2: patch_size * rows, 3: patch_size * columns}


def _compare(module: TensorOutputs, run: Run, path: Path, size: tuple[int, int, int]) -> float:
    """Largest difference between the file and the network, which must be small.

    Raises:
        DataError: it is not.
    """
    batch, height, width = size
    channels = module.backbone.in_channels
    images = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height))
    with torch.no_grad():
        expected = module(images)
    found = run(path, images)
    largest = 0.0
    for name, theirs, ours in zip(OUTPUTS, found, expected, strict=True):
        if theirs.shape != ours.shape:
            raise DataError(
                f"{name} of the exported file has shape {list(theirs.shape)}, not {list(ours.shape)}"
            )
        if ours.numel():
            largest = max(largest, float((theirs - ours).abs().max()))
    if not largest <= TOLERANCE:
        raise DataError(
            f"the exported file differs from the network by {largest:.2g} at {height} x {width} pixels, "
            f"more than {TOLERANCE:g}; nothing was written"
        )
    return largest


def _run_program(path: Path, images: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        outputs: Sequence[Tensor] = torch.export.load(path).module()(images)
    return outputs


def _run_script(path: Path, images: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        outputs: Sequence[Tensor] = torch.jit.load(path)(images)
    return outputs
