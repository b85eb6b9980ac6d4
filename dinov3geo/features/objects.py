"""Objects found without labels: the patches of an image are cut in two where they are least alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Weight of an edge between unlike patches: not 0, or the graph would fall apart.
_UNLIKE = 1e-5


@dataclass(frozen=True, slots=True)
class FoundObject:
    """One object.

    Attributes:
        mask: [h, w] bool, its patches.
        box: first row, first column, and the row and column behind the last, in patches.
        eigenvalue: of the cut, 0 to 2; the smaller, the cleaner the cut.
    """

    mask: Tensor
    box: tuple[int, int, int, int]
    eigenvalue: float


def affinity(features: Tensor, *, threshold: float, centre: bool = True) -> Tensor:
    """Which patches are alike, [N, N] float64: 1 where the cosine reaches the threshold, else almost 0.

    Args:
        features: [N, D].
        threshold: of the cosine.
        centre: subtract the mean of the patches first. Tokens behind the last norm share a large constant
            part, which makes all cosines large; the keys of TokenCut's backbone do not.
    """
    rows = features.double()
    if centre:
        rows = rows - rows.mean(0)
    rows = F.normalize(rows, dim=1)
    return torch.where(rows @ rows.T >= threshold, 1.0, _UNLIKE).double()


def second_eigenvector(weights: Tensor) -> tuple[Tensor, float]:
    """Solution of (D - W) y = e D y with the second smallest e.

    Args:
        weights: W, [N, N] symmetric and positive; D is the diagonal of its row sums.

    Returns:
        y [N], and e.
    """
    root = weights.sum(1).rsqrt()
    identity = torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
    values, vectors = torch.linalg.eigh(identity - root[:, None] * weights * root)
    return vectors[:, 1] * root, float(values[1])


def find_objects(
    features: Tensor, *, count: int = 1, threshold: float = 0.2, centre: bool = True
) -> list[FoundObject]:
    """The objects of an image, the clearest first.

    The patches are split at the mean of the second eigenvector of their normalised graph. The side that holds
    the entry of largest size is the foreground, and of it the connected part around that entry is the object.
    For further objects the patches found so far are cut off from the graph.

    Source: Wang et al. 2022 (TokenCut, CVPR), after Shi and Malik 2000; further objects as in Wang et al.
    2023 (MaskCut of CutLER).

    Args:
        features: [h, w, D].
        count: objects to look for at most.
        threshold: see `affinity`; 0.2 is TokenCut's.
        centre: see `affinity`.

    Returns:
        At most `count` objects; fewer where nothing is left to cut.

    Raises:
        ValueError: fewer than 3 patches.
    """
    height, width, _ = features.shape
    if height * width < 3:
        raise ValueError(f"an object needs at least 3 patches to be cut from, got {height} x {width}")
    weights = affinity(features.flatten(0, 1), threshold=threshold, centre=centre)
    free = torch.ones(height * width, dtype=torch.bool, device=features.device)
    found: list[FoundObject] = []
    for _ in range(count):
        if int(free.sum()) < 3:
            break
        places = free.nonzero()[:, 0]
        vector, eigenvalue = second_eigenvector(weights[places][:, places])
        seed = int(vector.abs().argmax())
        side = vector > vector.mean()
        side = side if bool(side[seed]) else ~side
        foreground = torch.zeros_like(free)
        foreground[places] = side
        mask = connected(foreground.unflatten(0, (height, width)), divmod(int(places[seed]), width))
        rows, cols = torch.nonzero(mask, as_tuple=True)
        box = int(rows.min()), int(cols.min()), int(rows.max()) + 1, int(cols.max()) + 1
        found.append(FoundObject(mask, box, eigenvalue))
        free &= ~mask.flatten()
    return found


def connected(mask: Tensor, seed: tuple[int, int]) -> Tensor:
    """The part of a mask that hangs together with a place, by sides, [h, w] bool.

    Args:
        mask: [h, w] bool, true at the seed.
        seed: row and column.
    """
    cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]], device=mask.device)[None, None]
    part = torch.zeros_like(mask)
    part[seed] = True
    while True:
        grown = (F.conv2d(part[None, None].float(), cross, padding=1)[0, 0] > 0) & mask
        if bool((grown == part).all()):
            return part
        part = grown
