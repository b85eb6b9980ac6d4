"""Neighbours against loops that are written out."""

import numpy as np
import pytest
import torch

from dinov3geo.evaluation import knn
from dinov3geo.evaluation.knn import majority_votes, weighted_votes


def data(count=60, queries=17, width=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    train = torch.randn(count, width, generator=generator) + labels[:, None]
    return train, labels, torch.randn(queries, width, generator=generator) * 2, classes


@pytest.mark.parametrize("chunk", [1 << 24, 100])
def test_weighted_vote_equals_a_loop(chunk, monkeypatch):
    monkeypatch.setattr(knn, "_CHUNK", chunk)
    train, labels, queries, classes = data()
    found = weighted_votes(train, labels, queries, num_classes=classes, ks=(3, 10), temperature=0.07)
    for q, query in enumerate(queries):
        cosines = [float(query @ t / (query.norm() * t.norm())) for t in train]
        order = sorted(range(len(train)), key=lambda i: -cosines[i])[:10]
        weights = np.exp(np.array([cosines[i] for i in order]) / 0.07)
        weights /= weights.sum()  # over the largest k, whatever k is asked for
        for k in (3, 10):
            votes = np.zeros(classes)
            for weight, i in zip(weights[:k], order[:k], strict=True):
                votes[labels[i]] += weight
            np.testing.assert_allclose(found[k][q], votes, rtol=1e-4, atol=1e-6)


def test_plain_vote_equals_a_loop_and_takes_the_first_of_equals():
    train, labels, queries, classes = data(seed=1)
    found = majority_votes(train, labels, queries, num_classes=classes, k=5)
    for q, query in enumerate(queries):
        order = sorted(range(len(train)), key=lambda i: float((query - train[i]).norm()))[:5]
        votes = [sum(int(labels[i]) == k for i in order) for k in range(classes)]
        np.testing.assert_allclose(found[q], np.array(votes) / 5, atol=1e-6)
        assert int(found[q].argmax()) == votes.index(max(votes))


def test_plain_vote_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, labels, queries, classes = data(count=200, queries=80, seed=2)
    theirs = neighbors.KNeighborsClassifier(5).fit(train, labels).predict_proba(queries)
    np.testing.assert_allclose(
        majority_votes(train, labels, queries, num_classes=classes, k=5), theirs, atol=1e-6
    )


def test_distances_far_from_the_origin_are_not_lost():
    train = torch.tensor([[0.0], [0.1], [5.0]]) + 1e4
    votes = majority_votes(train, torch.tensor([0, 1, 2]), torch.tensor([[1e4 + 0.09]]), num_classes=3, k=1)
    assert votes.argmax() == 1


def test_memberships_are_shared_votes():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([[True, True], [True, False], [False, True]])
    votes = majority_votes(train, labels, torch.tensor([[1.0, 0.05]]), num_classes=2, k=2)
    np.testing.assert_allclose(votes, [[1.0, 0.5]])


def test_more_neighbours_than_images_are_all_of_them():
    train, labels, queries, classes = data(count=4)
    votes = weighted_votes(train, labels, queries, num_classes=classes, ks=(20,))
    np.testing.assert_allclose(votes[20].sum(1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="k >= 1"):
        weighted_votes(train, labels, queries, num_classes=classes, ks=(0,))
    with pytest.raises(ValueError, match="training images"):
        majority_votes(train[:0], labels[:0], queries, num_classes=classes)
