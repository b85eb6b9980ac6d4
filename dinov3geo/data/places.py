"""Parts of scenes, each with a weight: where chips are drawn, and how often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Places:
    """Parts of scenes in which the corners of chips lie.

    A corner is told by its share of the way that a chip can be moved in its scene.

    Attributes:
        rows: [n] of the index, ascending.
        low: [n, 2] where a part begins, in 0..1.
        high: [n, 2] where it ends.
        weights: [n] how often a chip is drawn there, relative to the others.
        groups: [n] parts with one number are visited together by a superblock sampler; ascending.
    """

    rows: NDArray[np.int64]
    low: Floats
    high: Floats
    weights: Floats
    groups: NDArray[np.int64]

    def inside(self, parts: NDArray[np.int64], position: Floats) -> Floats:
        """Positions [..., 2] in 0..1 within parts [...] as positions within their scenes."""
        found: Floats = self.low[parts] + position * (self.high[parts] - self.low[parts])
        return found


def whole_scenes(weights: Floats) -> Places:
    """One part per scene: all of it."""
    rows = np.arange(len(weights))
    return Places(rows, np.zeros((len(rows), 2)), np.ones((len(rows), 2)), weights, rows)


def cells(steps: Floats, side: int, group_side: int, most: int) -> Places:
    """Squares of each scene; each weighs as much as the chips that begin in it.

    Args:
        steps: [scenes, 2] pixels by which a chip can be moved.
        side: of a cell in pixels.
        group_side: of the squares of cells that are visited together, pixels.
        most: cells along an axis of a scene; larger scenes have larger cells.
    """
    parts = []
    first_group = 0
    for row, room in enumerate(steps + 1):
        counts = np.clip(np.ceil(room / side), 1, most).astype(np.int64)
        per_group = np.maximum(group_side * counts // np.ceil(room).astype(np.int64), 1)
        x, y = (axis.ravel() for axis in np.meshgrid(np.arange(counts[0]), np.arange(counts[1])))
        place = np.stack([x, y], axis=1)
        blocks = place // per_group
        group = first_group + blocks[:, 1] * (-(-counts[0] // per_group[0])) + blocks[:, 0]
        first_group = int(group.max()) + 1
        size = room.prod() / counts.prod()
        parts.append(
            (np.full(len(x), row), place / counts, (place + 1) / counts, np.full(len(x), size), group)
        )
    rows, low, high, weights, groups = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(groups, kind="stable")
    return Places(rows[order], low[order], high[order], weights[order], groups[order])
