"""Tables and pictures of the study of Gram anchoring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinov3geo.evaluation.figures import save_figure

TRUNK, PLAIN = "trunk", "no_gram"
METRICS = {
    "mosaic_linear": "dense: mosaics, linear, mIoU",
    "mosaic_knn": "dense: mosaics, nearest patches, mIoU",
    "landcover": "dense: land cover, linear, mIoU",
    "global_knn": "global: nearest images, accuracy",
    "pair_error": "pairs of patches in wrong order",
    "noise": "speckle of patch similarities",
    "patch_cls_similarity": "cosine of patches and class token",
}
# 97.5th percentile of Student's t for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


Curves = dict[str, list[dict[int, dict[str, float]]]]
"""By run the measurements of each finished seed: step to numbers."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t); no interval for one seed."""

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of one value per seed."""
        count = len(values)
        if count < 2:
            return cls(float(np.mean(values)), math.nan, count)
        factor = _T[min(count - 1, len(_T)) - 1]
        return cls(float(np.mean(values)), factor * float(np.std(values, ddof=1)) / math.sqrt(count), count)

    def __str__(self) -> str:
        """`0.412 ± 0.010`."""
        return f"{self.mean:.3f}" if math.isnan(self.half) else f"{self.mean:.3f} ± {self.half:.3f}"

    def signed(self) -> str:
        """`+0.012 ± 0.010`."""
        return f"{self.mean:+.3f}" + ("" if math.isnan(self.half) else f" ± {self.half:.3f}")


def table(curves: Curves, labels: Mapping[str, str], end: int) -> str:
    """Markdown: the trunk's way, then every arm at its end, and its difference to that without.

    Args:
        curves: of the trunk and the arms.
        labels: of the arms, by name.
        end: last step of the arms.
    """
    seeds = len(curves[TRUNK])
    lines = [
        f"Mean of {seeds} seeds ± half of the 95 % interval (Student's t). Less is better in the last three.",
        "",
        f"| | {' | '.join(METRICS.values())} |",
        "|---" * (len(METRICS) + 1) + "|",
    ]

    def line(label: str, cells: Sequence[str]) -> str:
        return f"| {label} | {' | '.join(cells)} |"

    def at(name: str, step: int) -> list[str]:
        return [str(_estimate(curves[name], step, m)) for m in METRICS]

    for step in sorted(set.intersection(*(set(own) for own in curves[TRUNK]))):
        lines.append(line("untrained" if not step else f"trunk, step {step}", at(TRUNK, step)))
    lines += [line(f"{label}, step {end}", at(name, end)) for name, label in labels.items()]
    lines += [
        "",
        f"Differences to the arm without Gram at step {end}, seed by seed:",
        "",
        *lines[2:4],
    ]
    for name, label in labels.items():
        if name != PLAIN:
            cells = [difference(curves, name, PLAIN, end, m).signed() for m in METRICS]
            lines.append(line(label, cells))
    return "\n".join(lines) + "\n"


def difference(curves: Curves, one: str, other: str, step: int, metric: str) -> Estimate:
    """One run minus another at a step, seed by seed."""
    return Estimate.of(
        [
            a[step].get(metric, math.nan) - b[step].get(metric, math.nan)
            for a, b in zip(curves[one], curves[other], strict=True)
        ]
    )


def _estimate(seeds: Sequence[dict[int, dict[str, float]]], step: int, metric: str) -> Estimate:
    return Estimate.of([own[step].get(metric, math.nan) for own in seeds])


def draw(curves: Curves, labels: Mapping[str, str], png: Path, *, batch_size: int) -> None:
    """Four panels over training steps; bands are 95 % intervals over seeds.

    Args:
        curves: of the trunk and the arms.
        labels: of the arms, by name.
        png: to write.
        batch_size: images of a step.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    names = ("mosaic_knn", "global_knn", "noise", "pair_error")
    panels = figure.subplots(2, 2)
    for axes, metric in zip(panels.flat, names, strict=True):
        _draw_panel(axes, curves, {TRUNK: "trunk", **labels}, metric)
        axes.set_xlabel(f"steps of {batch_size} images")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, png)


def _draw_panel(axes: Axes, curves: Curves, labels: Mapping[str, str], metric: str) -> None:
    end_of_trunk = max(curves[TRUNK][0])
    colours = ("#444444", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
    for number, (name, label) in enumerate(labels.items()):
        own = curves[name]
        if name != TRUNK:  # begins where the trunk ends
            own = [{end_of_trunk: t[end_of_trunk], **c} for t, c in zip(curves[TRUNK], own, strict=True)]
        steps = sorted(set.intersection(*(set(c) for c in own)))
        found = [_estimate(own, step, metric) for step in steps]
        means = np.array([e.mean for e in found])
        halves = np.array([e.half for e in found])
        colour = colours[number % len(colours)]
        axes.plot(steps, means, color=colour, label=label, lw=1.6, marker="o", ms=2.5)
        if np.isfinite(halves).any():
            axes.fill_between(steps, means - halves, means + halves, color=colour, alpha=0.12, lw=0)
    axes.axvline(end_of_trunk, color="#999999", lw=0.8, ls=":")
    axes.set_title(METRICS[metric], loc="left", fontsize=10)
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
