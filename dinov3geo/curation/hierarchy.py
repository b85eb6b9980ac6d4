"""Hierarchical k-means and balanced sampling (Vo et al. 2024, arXiv 2405.15613; DINOv3 paper, section 3.1).

K-means puts most of its centroids where most vectors are. K-means on those centroids is less drawn to them,
and after a few levels clusters are spread about evenly over what the pool shows. Drawing equally often from
the clusters of each level then gives a choice that is even in content, though nobody has labelled anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinov3geo.curation.kmeans import Assign, InMemory, Tell, Vectors, assign_with_torch, kmeans, label
from dinov3geo.curation.vectors import Floats, Numbers
from dinov3geo.errors import DataError

# Vectors per cluster of the lowest level, and clusters per cluster of the next one.
_PER_LEAF, _PER_CLUSTER = 20, 8
_TOP = 12
# Rounds in which a level is clustered again from the members nearest to its centroids, and how many of each.
_RESAMPLINGS, _RESAMPLED = 3, 4


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Clusters of clusters.

    Attributes:
        labels: [N] int32, cluster of the lowest level for each vector; -1 for those left out.
        parents: per level but the highest, [K] int32: the cluster of the next level.
        sizes: clusters per level, the lowest first.
    """

    labels: NDArray[np.int32]
    parents: tuple[NDArray[np.int32], ...]
    sizes: tuple[int, ...]

    def paths(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """[n, levels] clusters of vectors, from the highest level to the lowest."""
        columns = [self.labels[rows]]
        for parents in self.parents:
            columns.append(parents[columns[-1]])
        return np.stack(columns[::-1], axis=1)


def default_levels(count: int) -> tuple[int, ...]:
    """Clusters per level for a pool of so many vectors, the lowest level first."""
    levels = [max(1, min(count // _PER_LEAF, 1_000_000))]
    while levels[-1] > _TOP * _PER_CLUSTER // 2:
        levels.append(max(_TOP, levels[-1] // _PER_CLUSTER))
    return tuple(levels)


def check_levels(levels: Sequence[int]) -> None:
    """Refuses levels that do not shrink.

    Raises:
        DataError: they do not, or there is none.
    """
    falling = all(above < below for below, above in zip(levels, levels[1:], strict=False))
    if not levels or not falling or min(levels) < 1:
        listed = ",".join(map(str, levels))
        raise DataError(
            f"levels must be falling numbers of clusters, the lowest level first, e.g. 1000,100,12; "
            f"got {listed}"
        )


def build_hierarchy(
    vectors: Vectors,
    levels: Sequence[int],
    *,
    seed: int,
    rounds: int = 20,
    assign: Assign | None = None,
    tell: Tell | None = None,
) -> Hierarchy:
    """Clusters vectors, then the centroids of each level.

    Args:
        vectors: of unit length; zeros are left out.
        levels: clusters per level, falling.
        seed: of all k-means.
        rounds: at most, of the lowest level.
        assign: finds nearest centroids; torch on the CPU if None.
        tell: called with rounds done and in all, of the lowest level.

    Raises:
        DataError: levels that do not fall, or fewer vectors than clusters.
    """
    check_levels(levels)
    assign = assign or assign_with_torch()
    lowest = kmeans(vectors, levels[0], seed=seed, rounds=rounds, assign=assign, tell=tell)
    centroids, labels = lowest.centroids, lowest.labels
    parents: list[NDArray[np.int32]] = []
    for level, count in enumerate(levels[1:], start=1):
        below = centroids
        centroids = _resampled(below, count, seed=seed + level, assign=assign)
        up, _ = label(InMemory(below), centroids, assign)
        parents.append(up)
    return Hierarchy(labels, tuple(parents), tuple(levels))


def _resampled(below: Floats, count: int, *, seed: int, assign: Assign) -> Floats:
    """Centroids of a level, clustered again and again from the members nearest to each: flatter still."""
    points = InMemory(below)
    centroids = kmeans(points, count, seed=seed, assign=assign).centroids
    for number in range(_RESAMPLINGS):
        labels, distances = assign(below, centroids)
        order = np.lexsort((distances, labels))
        ranks = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
        nearest = np.sort(order[ranks < _RESAMPLED])
        if len(nearest) < count:
            break
        centroids = kmeans(
            InMemory(below[nearest]), count, seed=seed + 1000 * (number + 1), assign=assign
        ).centroids
    return centroids


def balanced_rows(
    hierarchy: Hierarchy, count: int, *, usable: NDArray[np.bool_], generator: np.random.Generator
) -> Numbers:
    """Draws vectors so that each cluster gives about as many as its neighbours under the same parent.

    A cluster that holds fewer than its share gives all it has; the others divide what is left.

    Args:
        hierarchy: of the pool.
        count: of vectors to draw; all that are usable if there are no more.
        usable: [N], which may be drawn.
        generator: of the random choice within the lowest clusters.

    Returns:
        Ascending rows.
    """
    members = np.flatnonzero(usable & (hierarchy.labels >= 0))
    # Random order within each cluster, then the first so many of each.
    members = generator.permutation(members)
    members = members[np.argsort(hierarchy.labels[members], kind="stable")]
    sizes = np.bincount(hierarchy.labels[members], minlength=hierarchy.sizes[0])
    quotas = _leaf_quotas(hierarchy, sizes, count, generator)
    starts = np.cumsum(sizes) - sizes
    ranks = np.arange(len(members)) - np.repeat(starts, sizes)
    return np.sort(members[ranks < np.repeat(quotas, sizes)])


def _leaf_quotas(hierarchy: Hierarchy, sizes: Numbers, count: int, generator: np.random.Generator) -> Numbers:
    """How many each cluster of the lowest level gives."""
    held = [sizes]
    for parents, above in zip(hierarchy.parents, hierarchy.sizes[1:], strict=True):
        held.append(np.bincount(parents, weights=held[-1], minlength=above).astype(np.int64))
    quotas = share_evenly(held[-1], count, generator)
    for level in range(len(hierarchy.parents) - 1, -1, -1):
        parents = hierarchy.parents[level]
        order = np.argsort(parents, kind="stable")
        bounds = np.searchsorted(parents[order], np.arange(hierarchy.sizes[level + 1] + 1))
        below = np.zeros(hierarchy.sizes[level], dtype=np.int64)
        for parent, quota in enumerate(quotas.tolist()):
            children = order[bounds[parent] : bounds[parent + 1]]
            if quota:
                below[children] = share_evenly(held[level][children], quota, generator)
        quotas = below
    return quotas


def share_evenly(held: Numbers, count: int, generator: np.random.Generator) -> Numbers:
    """Divides a number among holders as evenly as what they hold allows.

    Args:
        held: [K] what each can give at most.
        count: to divide.
        generator: decides who gives one more where it does not divide.

    Returns:
        [K], at most `held`, with the sum min(count, sum of held).
    """
    if count >= held.sum():
        return held.copy()
    ordered = np.sort(held)
    # With the level t everyone gives min(held, t): the highest whole level that does not give too much.
    below = np.concatenate([[0], np.cumsum(ordered)])
    given = below[:-1] + ordered * np.arange(len(ordered), 0, -1)
    first = int(np.searchsorted(given, count, side="right"))
    level = (count - int(below[first])) // (len(ordered) - first)
    quotas = np.minimum(held, level)
    more = np.flatnonzero(held > level)
    rest = count - int(quotas.sum())
    quotas[generator.choice(more, rest, replace=False)] += 1
    return quotas
