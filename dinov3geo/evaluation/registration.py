"""How far height rasters lie from their images, and whether a known displacement is found again."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3geo.heads.registration import Shift, ShiftFinder, displaced, find_shift

Heights = NDArray[np.float32]
Mask = NDArray[np.bool_]
# South and east in cells: lengths of 1 to 3.6 cells in several directions.
DISPLACEMENTS = ((1, 0), (0, -1), (2, 0), (0, 2), (-2, 1), (3, 0), (0, -3), (-3, 2))


class RegistrationReport:
    """Shifts of each plot, and of all plots of a site together, by predictions of held-out plots.

    It also moves all heights on purpose and looks whether that is found again: the difference between the
    shifts of moved and unmoved heights should be the displacement.
    """

    def __init__(self, reach: int, displacements: Sequence[tuple[int, int]] = DISPLACEMENTS) -> None:
        """Starts empty.

        Args:
            reach: largest shift in cells, each way.
            displacements: cells to the south and east by which heights are moved on purpose.
        """
        self.reach = reach
        self.displacements = tuple(displacements)
        # Displaced heights must be found where they are, beside the shift that was there before.
        self._far = reach + max(max(abs(r), abs(c)) for r, c in self.displacements)
        self._plots: list[dict[str, Any]] = []
        self._sites: dict[str, ShiftFinder] = {}
        self._moved: dict[tuple[str, tuple[int, int]], ShiftFinder] = {}
        self._errors: dict[tuple[int, int], list[float]] = {d: [] for d in self.displacements}

    def add(self, site: str, name: str, predicted: Heights, heights: Heights, valid: Mask) -> None:
        """Adds a held-out plot; arguments as in `ShiftFinder.add`."""
        own = find_shift(predicted, heights, valid, reach=self.reach)
        self._plots.append({"plot": name, "site": site, **_numbers(own), "believable": own.is_believable})
        self._sites.setdefault(site, ShiftFinder(self.reach)).add(predicted, heights, valid)
        for rows, cols in self.displacements:
            moved, known = displaced(heights, valid, rows, cols)
            finder = self._moved.setdefault((site, (rows, cols)), ShiftFinder(self._far))
            finder.add(predicted, moved, known)
            found = find_shift(predicted, moved, known, reach=self._far)
            error = np.hypot(found.rows - own.rows - rows, found.cols - own.cols - cols)
            self._errors[rows, cols].append(float(error))

    def to_json(self) -> dict[str, Any]:
        """All shifts in cells: per plot, per site, and what became of heights moved on purpose."""
        sites = {site: finder.find() for site, finder in sorted(self._sites.items())}
        recovered = []
        for rows, cols in self.displacements:
            for site, own in sites.items():
                found = self._moved[site, (rows, cols)].find()
                apart = [round(found.rows - own.rows, 2), round(found.cols - own.cols, 2)]
                recovered.append({"site": site, "moved": [rows, cols], "found": apart})
        return {
            "sites": {site: _numbers(shift) for site, shift in sites.items()},
            "plots": self._plots,
            "displaced_sites": recovered,
            "displaced_plots": [
                {
                    "moved": list(d),
                    "median_error_cells": round(statistics.median(errors), 2),
                    "within_1_cell": round(sum(e <= 1 for e in errors) / len(errors), 3),
                }
                for d, errors in self._errors.items()
                if errors
            ],
        }


def _numbers(shift: Shift) -> dict[str, float]:
    return {
        "south": round(shift.rows, 2),
        "east": round(shift.cols, 2),
        "correlation": round(shift.correlation, 3),
        "unmoved": round(shift.unmoved, 3),
    }
