"""Near-duplicates among embeddings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dinov3geo.curation.kmeans import Vectors
from dinov3geo.curation.vectors import Floats

#: Members of a cluster that are compared with each other at a time.
TOGETHER = 65_536
_BLOCK = 1024


def find_duplicates(vectors: Vectors, labels: NDArray[np.int32], similarity: float) -> NDArray[np.bool_]:
    """Marks vectors that resemble an earlier one that is kept.

    Only members of one cluster are compared (as SemDeDup does, Abbas et al. 2023, arXiv 2303.09540), of very
    large clusters 65,536 at a time: pairs that a border parts are not found.

    Args:
        vectors: of unit length.
        labels: [N] cluster of each; members of negative ones are not looked at.
        similarity: cosine from which on two vectors count as one.

    Returns:
        [N] True for the later of two.
    """
    found = np.zeros(len(labels), dtype=np.bool_)
    order = np.argsort(labels, kind="stable").astype(np.int32 if len(labels) < 2**31 else np.int64)
    first = int(np.searchsorted(labels[order], 0))
    bounds = np.flatnonzero(np.diff(labels[order[first:]], prepend=-1, append=-1)) + first
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for low in range(start, stop, TOGETHER):
            # Ascending, since the sort was stable: the earlier of two is kept.
            rows = order[low : min(low + TOGETHER, stop)]
            found[rows] = _later_ones(vectors.gather(rows), similarity)
    return found


def _later_ones(members: Floats, similarity: float) -> NDArray[np.bool_]:
    """[m] True for members that resemble an earlier one that is not dropped itself."""
    dropped = np.zeros(len(members), dtype=np.bool_)
    for start in range(0, len(members), _BLOCK):
        block = members[start : start + _BLOCK]
        own = dropped[start : start + _BLOCK]
        for low in range(0, start, _BLOCK):
            kept = members[low : low + _BLOCK][~dropped[low : low + _BLOCK]]
            own |= (block @ kept.T >= similarity).any(axis=1)
        alike = block @ block.T >= similarity
        for row in np.flatnonzero(alike.sum(axis=1) > 1).tolist():
            if not own[row]:
                own[row + 1 :] |= alike[row, row + 1 :]
    return dropped
