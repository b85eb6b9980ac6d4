"""Neighbours of given images in a pool of embeddings."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dinov3geo.curation.kmeans import Vectors
from dinov3geo.curation.vectors import Floats, Numbers

# Queries compared with a block of the pool at a time.
_QUERIES = 1024


def nearest_rows(
    vectors: Vectors, queries: Floats, count: int, *, usable: NDArray[np.bool_]
) -> tuple[Numbers, Floats]:
    """The vectors that resemble each query most, by exact search block by block.

    Args:
        vectors: the pool, of unit length.
        queries: [Q, D] of unit length.
        count: per query; fewer if the pool holds fewer.
        usable: [N], which may be found.

    Returns:
        Rows [Q, count] and cosines [Q, count], the most similar first.
    """
    count = min(count, int(usable.sum()))
    best = np.full((len(queries), count), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), count), -1, dtype=np.int64)
    for start, block in vectors.blocks():
        inside = np.flatnonzero(usable[start : start + len(block)])
        candidates = torch.from_numpy(block[inside])
        for low in range(0, len(queries), _QUERIES):
            part = slice(low, low + _QUERIES)
            scores = torch.from_numpy(queries[part]) @ candidates.T
            found, where = scores.topk(min(count, scores.shape[1]), dim=1)
            both = np.concatenate([best[part], found.numpy()], axis=1)
            numbers = np.concatenate([rows[part], start + inside[where.numpy()]], axis=1)
            order = np.argsort(-both, axis=1, kind="stable")[:, :count]
            best[part] = np.take_along_axis(both, order, axis=1)
            rows[part] = np.take_along_axis(numbers, order, axis=1)
    return rows, best


def union_of_neighbours(rows: Numbers, cosines: Floats, least: float) -> Numbers:
    """Ascending rows that any query found with at least this cosine."""
    return np.unique(rows[(rows >= 0) & (cosines >= least)])
