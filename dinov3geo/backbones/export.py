"""Backbones as files that run without this library, compared with the network before they are kept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.errors import ConfigError, DataError, RasterError, UnknownNameError

FORMATS = {"exported-program": ".pt2", "torchscript": ".pt", "onnx": ".onnx"}
OUTPUTS = ("cls", "registers", "patches")
TOLERANCE = 1e-3
_MAX_PATCHES = 1024
# The limit of a protobuf message, less room for the graph.
_ONNX_BYTES = 2**31 - 2**24

Run = Callable[[Path, Tensor], Sequence[Tensor]]


class TensorOutputs(nn.Module):
    """A backbone that returns (cls [B, D], registers [B, R, D], patches [B, N, D])."""

    def __init__(self, backbone: Backbone, *, any_size: bool = False) -> None:
        """Wraps a backbone.

        Args:
            backbone: to wrap.
            any_size: repeat the right and lower edge up to whole patches in a way that can be traced.
        """
        super().__init__()
        self.backbone = backbone
        self.any_size = any_size

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class; images [B, C, H, W] are normalised."""
        if self.any_size:
            images = _repeat_edges(images, self.backbone.patch_size)
        features = self.backbone(images)
        return features.cls, features.registers, features.patches


def _repeat_edges(images: Tensor, step: int) -> Tensor:
    """As padding by replication does, but without asking whether there is anything to pad."""
    height, width = images.shape[2], images.shape[3]
    rows = torch.arange((height + step - 1) // step * step, device=images.device).clamp(max=height - 1)
    columns = torch.arange((width + step - 1) // step * step, device=images.device).clamp(max=width - 1)
    return images[:, :, rows][:, :, :, columns]


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
        size_hw: rows and columns of the images in pixels; multiples of the patch unless `dynamic`.
        dynamic: batch and size may differ from the example's later on, also to sizes that are no multiple of
            the patch (the right and lower edge is repeated); the file is then checked at an oblong and at an
            odd size and with other batches too.
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
    _check(backbone, output, file_format, size_hw=size_hw, dynamic=dynamic, overwrite=overwrite)
    run = run or {"exported-program": _run_program, "torchscript": _run_script}.get(file_format)
    if run is None:
        raise ConfigError(f"no runtime for {file_format} files was given, so the result could not be checked")
    module = TensorOutputs(backbone, any_size=dynamic).eval()
    step = backbone.patch_size
    cases = [(2, *size_hw)]
    if dynamic:
        cases += [(1, 3 * step, 5 * step), (3, size_hw[0] + step + 1, size_hw[1] + step // 2 + 1)]
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
    backbone: Backbone,
    output: Path,
    file_format: str,
    *,
    size_hw: tuple[int, int],
    dynamic: bool,
    overwrite: bool,
) -> None:
    if file_format not in FORMATS:
        raise UnknownNameError("export format", file_format, FORMATS)
    if output.suffix != FORMATS[file_format]:
        raise ConfigError(f"{file_format} files end in {FORMATS[file_format]}, got {output}")
    size = sum(t.numel() * t.element_size() for t in backbone.state_dict().values())
    if file_format == "onnx" and size >= _ONNX_BYTES:
        raise ConfigError(
            f"an ONNX file holds less than 2 GB, these weights take {size / 1e9:.1f} GB; "
            "export them as exported-program"
        )
    step = backbone.patch_size
    if dynamic and not all(step < side <= _MAX_PATCHES * step for side in size_hw):
        raise ConfigError(
            f"the example of a dynamic network has {step + 1} to {_MAX_PATCHES * step} pixels a side, "
            f"got {size_hw[0]} x {size_hw[1]}"
        )
    if not dynamic and (min(size_hw) < 1 or any(side % step for side in size_hw)):
        raise ConfigError(
            f"a network exported for one size takes whole patches: expected multiples of {step} pixels, "
            f"got {size_hw[0]} x {size_hw[1]}; --dynamic takes any size"
        )
    if output.exists() and not overwrite:
        raise RasterError(f"{output} exists; give another name or allow overwriting")
    if output.is_dir():
        raise ConfigError(f"{file_format} goes into a file, got the folder {output}")


def _write(module: TensorOutputs, images: Tensor, path: Path, file_format: str, *, dynamic: bool) -> None:
    shapes = {"images": _dynamic_dimensions(module.backbone.patch_size)} if dynamic else None
    try:
        with torch.no_grad(), _without_tracing_warnings():
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
                    verbose=False,
                )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(f"the network cannot be exported as {file_format}: {reason}") from error


@contextmanager
def _without_tracing_warnings() -> Iterator[None]:
    """Silences what tracing says of every branch: the file is run and compared afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def _dynamic_dimensions(patch_size: int) -> dict[int, object]:
    # Below two patches a side is a broadcast, which would be another program.
    smallest, largest = patch_size + 1, _MAX_PATCHES * patch_size
    return {
        0: torch.export.Dim("batch", max=4096),
        2: torch.export.Dim("height", min=smallest, max=largest),
        3: torch.export.Dim("width", min=smallest, max=largest),
    }


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
    with torch.no_grad(), _without_tracing_warnings():
        outputs: Sequence[Tensor] = torch.jit.load(path)(images)
    return outputs
