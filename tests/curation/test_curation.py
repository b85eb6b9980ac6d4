"""Clusters, balanced draws, near-duplicates and neighbours, against loops and known mixtures."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov3geo.curation import duplicates as duplicates_module
from dinov3geo.curation import kmeans as kmeans_module
from dinov3geo.curation.duplicates import find_duplicates
from dinov3geo.curation.hierarchy import (
    Hierarchy,
    balanced_rows,
    build_hierarchy,
    default_levels,
    share_evenly,
)
from dinov3geo.curation.kmeans import InMemory, assign_with_faiss, assign_with_torch, kmeans
from dinov3geo.curation.retrieval import nearest_rows, union_of_neighbours
from dinov3geo.curation.vectors import VectorFile
from dinov3geo.errors import DataError


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def long_tail(classes=10, most=800, least=10, noise=0.1, width=24):
    """Vectors around one direction per class, and their classes."""
    rng = np.random.default_rng(0)
    sizes = np.rint(most * (least / most) ** (np.arange(classes) / (classes - 1))).astype(int)
    labels = rng.permutation(np.repeat(np.arange(classes), sizes))
    centres = np.eye(classes, width)
    return unit(centres[labels] + noise * rng.standard_normal((len(labels), width))), labels


def entropy_share(labels):
    """Entropy of the classes as a share of that of equal ones."""
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum() / np.log(10))


def everything(vectors):
    return np.ones(len(vectors), dtype=np.bool_)


def test_a_file_gives_back_its_vectors_and_drops_half_a_row(tmp_path):
    vectors = unit(np.random.default_rng(0).standard_normal((50, 6)))
    vectors[7] = 0
    file = VectorFile(tmp_path / "v.f16", 6)
    file.append(vectors[:20])
    with file.path.open("ab") as opened:
        opened.write(b"12345")
    assert len(file) == 20
    file.append(vectors[20:])
    np.testing.assert_allclose(file.read(0, 50), vectors, atol=1e-3)
    rows = np.array([40, 3, 4, 5, 41, 3])
    np.testing.assert_array_equal(file.gather(rows), file.read(0, 50)[rows])
    assert [start for start, _ in file.blocks(16)] == [0, 16, 32, 48]


def test_kmeans_ends_where_lloyd_ends(monkeypatch):
    monkeypatch.setattr(kmeans_module, "_SETTLED", 0)
    vectors, _ = long_tail()
    found = kmeans(InMemory(vectors), 10, seed=0, rounds=200)
    # Every centroid is the mean of its members, every label the nearest centroid.
    for number, centroid in enumerate(found.centroids):
        np.testing.assert_allclose(vectors[found.labels == number].mean(0), centroid, atol=1e-3)
    distances = ((vectors[:, None] - found.centroids) ** 2).sum(2)
    np.testing.assert_array_equal(found.labels, distances.argmin(1))
    assert found.mean_distance == pytest.approx(distances.min(1).mean(), rel=1e-4)


def test_blocks_on_disk_give_what_memory_gives(tmp_path):
    vectors, _ = long_tail()
    vectors[5] = 0
    file = VectorFile(tmp_path / "v.f16", vectors.shape[1])
    file.append(vectors)
    exact = InMemory(file.read(0, len(file)))
    one, other = kmeans(file, 12, seed=3), kmeans(exact, 12, seed=3)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.labels[5] == -1 and (np.delete(one.labels, 5) >= 0).all()


def test_faiss_finds_what_torch_finds():
    pytest.importorskip("faiss")
    vectors, _ = long_tail()
    assign = assign_with_faiss()
    assert assign is not None
    for one, other in zip(
        assign(vectors, vectors[:40]), assign_with_torch()(vectors, vectors[:40]), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_too_many_clusters_are_refused():
    with pytest.raises(DataError, match="3 embeddings do not suffice for 5 clusters"):
        kmeans(InMemory(np.eye(3, dtype=np.float32)), 5, seed=0)


def test_a_lost_centroid_finds_members_again():
    # Two far groups and as many centroids as distinct points: none may stay empty.
    points = unit(np.array([[1, 0, 0.01 * k] for k in range(5)] + [[0, 1, 0.01 * k] for k in range(5)]))
    found = kmeans(InMemory(np.repeat(points, 3, axis=0)), 10, seed=1, rounds=50)
    assert len(np.unique(found.labels)) == 10


def test_a_long_tail_of_separate_classes_is_evened_out():
    vectors, labels = long_tail(most=1600, least=20)
    hierarchy = build_hierarchy(InMemory(vectors), (200, 40, 10), seed=0)
    rows = balanced_rows(hierarchy, 300, usable=everything(vectors), generator=np.random.default_rng(0))
    assert len(rows) == len(set(rows.tolist())) == 300
    assert entropy_share(labels) < 0.75
    assert entropy_share(labels[rows]) > 0.95


def test_paths_lead_from_the_top_to_the_label():
    vectors, _ = long_tail()
    hierarchy = build_hierarchy(InMemory(vectors), (60, 12, 3), seed=0)
    rows = np.arange(100)
    paths = hierarchy.paths(rows)
    assert paths.shape == (100, 3)
    np.testing.assert_array_equal(paths[:, 2], hierarchy.labels[rows])
    np.testing.assert_array_equal(paths[:, 1], hierarchy.parents[0][paths[:, 2]])
    np.testing.assert_array_equal(paths[:, 0], hierarchy.parents[1][paths[:, 1]])
    again = build_hierarchy(InMemory(vectors), (60, 12, 3), seed=0)
    np.testing.assert_array_equal(again.labels, hierarchy.labels)


@given(
    held=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    count=st.integers(0, 400),
    seed=st.integers(0, 5),
)
def test_shares_are_as_even_as_what_is_held_allows(held, count, seed):
    holders = np.array(held)
    quotas = share_evenly(holders, count, np.random.default_rng(seed))
    assert quotas.sum() == min(count, holders.sum())
    assert (quotas <= holders).all() and (quotas >= 0).all()
    # Whoever gives less than another by more than one gives all it has.
    assert all(q == h or q >= quotas.max() - 1 for q, h in zip(quotas, holders, strict=True))


@pytest.mark.parametrize("count", [0, 1, 7, 20, 100])
def test_draws_take_usable_members_only(count):
    labels = np.array([0] * 10 + [1] * 5 + [2] * 5 + [-1] * 4, dtype=np.int32)
    hierarchy = Hierarchy(labels, (np.array([0, 1, 1], dtype=np.int32),), (3, 2))
    usable = np.arange(24) % 5 != 0
    rows = balanced_rows(hierarchy, count, usable=usable, generator=np.random.default_rng(0))
    assert len(rows) == min(count, 16) and usable[rows].all() and (labels[rows] >= 0).all()
    if count == 7:
        assert sorted(np.bincount(labels[rows]).tolist()) in ([1, 2, 4], [2, 2, 3])


def test_default_levels_fall():
    for count in (1, 30, 1000, 10_000_000):
        levels = default_levels(count)
        assert all(a > b for a, b in zip(levels, levels[1:], strict=False)) and levels[-1] >= 1


@pytest.mark.parametrize("levels", [(), (10, 20), (5, 5), (0,)])
def test_levels_that_do_not_fall_are_refused(levels):
    with pytest.raises(DataError, match="levels must be falling"):
        build_hierarchy(InMemory(np.eye(4, dtype=np.float32)), levels, seed=0)


def naive_duplicates(vectors, labels, similarity):
    kept, dropped = [], np.zeros(len(vectors), dtype=bool)
    for row in range(len(vectors)):
        if labels[row] < 0:
            continue
        if any(labels[k] == labels[row] and vectors[k] @ vectors[row] >= similarity for k in kept):
            dropped[row] = True
        else:
            kept.append(row)
    return dropped


@pytest.mark.parametrize("block", [7, 1024])
def test_duplicates_are_those_of_a_loop(block, monkeypatch):
    monkeypatch.setattr(duplicates_module, "_BLOCK", block)
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((120, 3)))
    vectors[60:80] = vectors[:20]
    labels = rng.integers(-1, 3, 120).astype(np.int32)
    labels[60:80] = labels[:20]
    for similarity in (0.9, 0.999):
        expected = naive_duplicates(vectors, labels, similarity)
        np.testing.assert_array_equal(find_duplicates(InMemory(vectors), labels, similarity), expected)
        assert expected[60:80][labels[:20] >= 0].all()


def test_neighbours_are_those_of_a_full_search(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng.standard_normal((400, 5))), unit(rng.standard_normal((7, 5)))
    usable = rng.random(400) < 0.7
    file = VectorFile(tmp_path / "v.f16", 5)
    file.append(vectors)
    file.blocks = lambda size=64: VectorFile.blocks(file, size)
    rows, cosines = nearest_rows(file, queries, 6, usable=usable)
    scores = queries @ file.read(0, 400).T
    scores[:, ~usable] = -2
    np.testing.assert_array_equal(rows, np.argsort(-scores, axis=1, kind="stable")[:, :6])
    np.testing.assert_allclose(cosines, np.sort(scores, axis=1)[:, ::-1][:, :6], rtol=1e-5)
    chosen = union_of_neighbours(rows, cosines, 0.8)
    assert set(chosen) == {r for q, r in zip(*np.nonzero(scores >= 0.8), strict=True) if r in rows[q]}


def test_fewer_vectors_than_neighbours(tmp_path: Path):
    rows, _ = nearest_rows(
        InMemory(np.eye(3, dtype=np.float32)),
        np.eye(3, dtype=np.float32),
        9,
        usable=np.array([1, 0, 1], bool),
    )
    assert rows.shape == (3, 2) and 1 not in rows
