"""Learning curves of a fit as a picture."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from dinov3geo.heads.epochs import FitResult

CURVE_FILE = "learning_curve.png"


def draw_curves(result: FitResult, *, error: str) -> bytes:
    """Loss and validation error per epoch, and the epoch whose weights were kept.

    Args:
        result: of a fit.
        error: what the validation error is, with its unit.

    Returns:
        A PNG.
    """
    figure = Figure(figsize=(5.0, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(result.losses) + 1)
    axes.plot(epochs, result.losses, color="tab:blue", label="training loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss", color="tab:blue")
    axes.axvline(result.best_epoch + 1, color="0.6", linestyle=":", label="weights kept")
    if result.validation_errors:
        beside = axes.twinx()
        beside.plot(epochs, result.validation_errors, color="tab:orange")
        beside.set_ylabel(f"validation: {error}", color="tab:orange")
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
