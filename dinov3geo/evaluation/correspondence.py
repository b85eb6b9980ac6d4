"""The same place in two views: nearest patches against a known homography."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinov3geo.errors import DataError, RasterError

THRESHOLDS = (1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Matches:
    """Errors of the patches of one view that the other view shows.

    Attributes:
        errors: [N] distance from where the patch should be to the nearest patch's centre, in patches.
    """

    errors: NDArray[np.float64]

    def shares(self, thresholds: Sequence[float] = THRESHOLDS) -> list[float]:
        """Share of the patches within each distance."""
        return [float((self.errors <= limit).mean()) for limit in thresholds]


def read_homography(path: Path) -> NDArray[np.float64]:
    """[3, 3] numbers of a text file.

    Raises:
        RasterError: no such file.
        DataError: not nine numbers.
    """
    try:
        numbers = np.array(path.read_text(encoding="utf-8").split(), dtype=np.float64)
    except OSError as error:
        raise RasterError(f"cannot read the homography {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: expected 9 numbers of a homography ({error})") from error
    if numbers.size != 9:
        raise DataError(f"{path}: expected 9 numbers of a homography, got {numbers.size}")
    return numbers.reshape(3, 3)


def project(homography: NDArray[np.float64], xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where points [N, 2] lie in the other view."""
    homogeneous = np.concatenate([xy, np.ones((len(xy), 1))], axis=1) @ homography.T
    moved: NDArray[np.float64] = homogeneous[:, :2] / homogeneous[:, 2:]
    return moved


def match_views(
    first: Tensor,
    second: Tensor,
    homography: NDArray[np.float64],
    encode: Callable[[Tensor], Tensor],
) -> Matches:
    """Matches every patch of the first view to the most similar one of the second.

    Args:
        first: [C, H, W] numbers.
        second: likewise.
        homography: from pixels (x, y) of the first view to those of the second.
        encode: features [D, h, w] of a view.

    Raises:
        DataError: no patch of the first view lies in the second.
    """
    maps = [F.normalize(encode(view).float(), dim=0) for view in (first, second)]
    sizes = [np.array(view.shape[-2:][::-1], dtype=np.float64) for view in (first, second)]
    centres = [_centres(found, size) for found, size in zip(maps, sizes, strict=True)]
    wanted = project(homography, centres[0])
    seen = ((wanted >= 0) & (wanted < sizes[1])).all(1)
    if not seen.any():
        raise DataError("the homography takes no patch of the first view into the second")
    queries = maps[0].flatten(1).T[torch.from_numpy(seen)]
    nearest = (queries @ maps[1].flatten(1)).argmax(1).cpu().numpy()
    side = sizes[1] / np.array(maps[1].shape[-2:][::-1])
    return Matches(np.linalg.norm((centres[1][nearest] - wanted[seen]) / side, axis=1))


def _centres(features: Tensor, size_xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, 2] pixels (x, y) of the patches' centres, row by row; pixel centres are whole numbers."""
    rows, cols = np.indices(features.shape[-2:])
    grid_xy = np.array(features.shape[-2:][::-1], dtype=np.float64)
    places = np.stack([cols.ravel(), rows.ravel()], axis=1) + 0.5
    centres: NDArray[np.float64] = places / grid_xy * size_xy - 0.5
    return centres
