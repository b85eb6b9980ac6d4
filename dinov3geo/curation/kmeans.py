"""K-means over vectors that pass by in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dinov3geo.curation.vectors import BLOCK, Floats, Numbers
from dinov3geo.errors import DataError

#: Gives for vectors [n, D] and centroids [K, D] the nearest centroid of each and the squared distance to it.
Assign = Callable[[Floats, Floats], tuple[Numbers, Floats]]
Tell = Callable[[int, int], None]

# Distances held at once: 64 MiB.
_DISTANCES = 2**24
# Vectors per centroid among which the first centroids are sought.
_SEEDING = 32
# Above so many centroids, spreading the first ones would take longer than the rounds after it.
_SPREAD_UP_TO = 2048
# A round that moves the mean distance by less is the last.
_SETTLED = 1e-4


class Vectors(Protocol):
    """What is clustered: on disk, or in memory."""

    def __len__(self) -> int:
        """Number of vectors."""

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """First row and vectors of each block."""

    def gather(self, rows: NDArray[Any]) -> Floats:
        """The named rows."""


class InMemory:
    """An array as `Vectors`."""

    def __init__(self, array: Floats) -> None:
        """Keeps the array [N, D]."""
        self.array = array

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self.array)

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """First row and vectors of each block."""
        for start in range(0, len(self.array), BLOCK):
            yield start, self.array[start : start + BLOCK]

    def gather(self, rows: NDArray[Any]) -> Floats:
        """The named rows."""
        return cast(Floats, self.array[rows])


@dataclass(frozen=True, slots=True)
class Clustering:
    """Result of one k-means.

    Attributes:
        centroids: [K, D].
        labels: [N] int32, the nearest centroid of each vector; -1 for vectors of zeros.
        mean_distance: squared, over all vectors.
    """

    centroids: Floats
    labels: NDArray[np.int32]
    mean_distance: float


def assign_with_torch(device: str = "cpu") -> Assign:
    """Nearest centroids by blocks of a distance matrix.

    Args:
        device: where it is computed.
    """

    def assign(vectors: Floats, centroids: Floats) -> tuple[Numbers, Floats]:
        ours = torch.from_numpy(np.ascontiguousarray(centroids)).to(device)
        halves = ours.square().sum(1) / 2
        rows = max(1, _DISTANCES // len(centroids))
        labels = np.empty(len(vectors), dtype=np.int64)
        distances = np.empty(len(vectors), dtype=np.float32)
        for start in range(0, len(vectors), rows):
            part = torch.from_numpy(np.ascontiguousarray(vectors[start : start + rows])).to(device)
            least, nearest = torch.addmm(halves, part, ours.T, alpha=-1.0).min(1)
            labels[start : start + rows] = nearest.cpu().numpy()
            distances[start : start + rows] = (2 * least + part.square().sum(1)).clamp_(min=0).cpu().numpy()
        return labels, distances

    return assign


def assign_with_faiss() -> Assign | None:
    """Nearest centroids by faiss, exact; None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None

    def assign(vectors: Floats, centroids: Floats) -> tuple[Numbers, Floats]:
        index = faiss.IndexFlatL2(centroids.shape[1])
        index.add(np.ascontiguousarray(centroids))
        distances, labels = index.search(np.ascontiguousarray(vectors), 1)
        return labels[:, 0], distances[:, 0]

    return assign


def kmeans(
    vectors: Vectors,
    count: int,
    *,
    seed: int,
    rounds: int = 20,
    assign: Assign | None = None,
    tell: Tell | None = None,
) -> Clustering:
    """Lloyd's algorithm on all vectors, block by block; memory grows with 8 bytes per vector.

    The first centroids are spread by k-means++ (Arthur and Vassilvitskii 2007) over a part of the vectors.
    A centroid that loses its last vector moves to the vector that was farthest from its own.

    Args:
        vectors: of unit length or zero; those are left out.
        count: of clusters.
        seed: of the first centroids.
        rounds: at most.
        assign: finds nearest centroids; torch on the CPU if None.
        tell: called with rounds done and in all.

    Raises:
        DataError: fewer vectors than clusters.
    """
    assign = assign or assign_with_torch()
    centroids = _first_centroids(vectors, count, np.random.default_rng(seed))
    before = np.inf
    for number in range(rounds):
        sums, sizes, mean, far = _one_round(vectors, centroids, assign)
        empty = np.flatnonzero(sizes == 0)
        centroids = (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
        centroids[empty[: len(far)]] = far[: len(empty)]
        if tell is not None:
            tell(number + 1, rounds)
        if len(empty) == 0 and before - mean <= _SETTLED * before:
            break
        before = mean
    labels, mean = label(vectors, centroids, assign)
    return Clustering(centroids, labels, mean)


def label(vectors: Vectors, centroids: Floats, assign: Assign) -> tuple[NDArray[np.int32], float]:
    """Nearest centroid of every vector (-1 for zeros), and the mean squared distance."""
    labels = np.full(len(vectors), -1, dtype=np.int32)
    total, seen = 0.0, 0
    for start, block in vectors.blocks():
        used = np.flatnonzero(block.any(axis=1))
        nearest, distances = assign(block[used], centroids)
        labels[start + used] = nearest
        total, seen = total + float(distances.sum(dtype=np.float64)), seen + len(used)
    return labels, total / max(seen, 1)


def _one_round(
    vectors: Vectors, centroids: Floats, assign: Assign
) -> tuple[NDArray[np.float64], Numbers, float, Floats]:
    """Sums and sizes of the clusters, the mean distance, and vectors far from their centroids."""
    sums = np.zeros(centroids.shape, dtype=np.float64)
    sizes = np.zeros(len(centroids), dtype=np.int64)
    total = 0.0
    far, far_distances = np.empty((0, centroids.shape[1]), dtype=np.float32), np.empty(0, dtype=np.float32)
    keep = min(len(centroids), 1024)
    for _, block in vectors.blocks():
        used = block[block.any(axis=1)]
        nearest, distances = assign(used, centroids)
        order = np.argsort(nearest, kind="stable")
        clusters, starts = np.unique(nearest[order], return_index=True)
        if len(clusters):
            sums[clusters] += np.add.reduceat(used[order].astype(np.float64), starts, axis=0)
        sizes += np.bincount(nearest, minlength=len(centroids))
        total += float(distances.sum(dtype=np.float64))
        far, far_distances = np.concatenate([far, used]), np.concatenate([far_distances, distances])
        best = np.argsort(-far_distances, kind="stable")[:keep]
        far, far_distances = far[best], far_distances[best]
    return sums, sizes, total / max(int(sizes.sum()), 1), far


def _first_centroids(vectors: Vectors, count: int, generator: np.random.Generator) -> Floats:
    spread = count <= _SPREAD_UP_TO
    # Some of the vectors may be zeros, so a few more are drawn than centroids are wanted.
    sample = _sample(vectors, max(count * (_SEEDING if spread else 2), BLOCK), generator)
    if len(sample) < count:
        raise DataError(f"{len(sample)} embeddings do not suffice for {count} clusters; ask for fewer")
    if not spread:
        return sample[generator.choice(len(sample), count, replace=False)].copy()
    chosen = [int(generator.integers(len(sample)))]
    nearest = _squared(sample, sample[chosen[0]])
    for _ in range(count - 1):
        total = float(nearest.sum(dtype=np.float64))
        if total > 0:
            row = int(np.searchsorted(nearest.cumsum(dtype=np.float64), generator.random() * total))
            row = min(row, len(sample) - 1)
        else:
            row = int(generator.integers(len(sample)))
        chosen.append(row)
        nearest = np.minimum(nearest, _squared(sample, sample[row]))
    return sample[chosen]


def _squared(sample: Floats, point: Floats) -> Floats:
    """Squared distances, from products: no copy of the sample is made."""
    lengths = np.einsum("nd,nd->n", sample, sample)
    return cast(Floats, np.maximum(lengths - 2 * (sample @ point) + point @ point, 0))


def _sample(vectors: Vectors, size: int, generator: np.random.Generator) -> Floats:
    """At most `size` vectors that are not zero, drawn without replacement."""
    rows: Sequence[int] | Numbers = np.arange(len(vectors))
    if len(vectors) > size:
        rows = np.sort(generator.choice(len(vectors), size, replace=False))
    drawn = vectors.gather(np.asarray(rows))
    return drawn[drawn.any(axis=1)]
