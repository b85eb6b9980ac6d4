"""PCA colours and similarities against scikit-learn and naive loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from dinov3geo.errors import DataError
from dinov3geo.features.visualize import cosine_similarity_map, fit_pca


def make_features(count: int = 200, width: int = 12, seed: int = 0) -> np.ndarray:
    """Features with a few directions that hold most of the variance."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.geomspace(8, 0.1, width)[:, None]
    return (rng.normal(size=(count, width)) @ mixing + 3).astype(np.float32)


def test_components_equal_scikit_learn_up_to_sign() -> None:
    """An independent implementation finds the same directions and the same shares of variance."""
    features = make_features()
    basis = fit_pca(features, components=4)
    oracle = PCA(n_components=4).fit(features)
    signs = np.sign((basis.components * oracle.components_).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(basis.components, oracle.components_ * signs, atol=1e-4)
    np.testing.assert_allclose(basis.explained, oracle.explained_variance_ratio_, atol=1e-5)
    np.testing.assert_allclose(basis.project(features), oracle.transform(features) * signs.T, atol=1e-3)


def test_colours_are_between_0_and_1_and_robust_to_one_odd_patch() -> None:
    """One patch far away leaves the contrast of the others alone."""
    features = make_features(500)
    features[0] *= 1000
    basis = fit_pca(features)
    rgb = basis.scale(basis.project(features.reshape(25, 20, 12)))
    assert rgb.shape == (25, 20, 3)
    assert rgb.min() == 0
    assert rgb.max() == 1
    assert rgb.reshape(-1, 3)[1:].std(axis=0).min() > 0.1


def test_the_order_of_patches_does_not_flip_colours() -> None:
    """The sign of a component is fixed."""
    features = make_features()
    shuffled = features[np.random.default_rng(1).permutation(len(features))]
    np.testing.assert_allclose(fit_pca(features).components, fit_pca(shuffled).components, atol=1e-4)


@pytest.mark.parametrize(("count", "components"), [(3, 3), (20, 0), (20, 13)])
def test_impossible_pca_is_refused(count: int, components: int) -> None:
    """Too few patches or a senseless number of components."""
    with pytest.raises(DataError, match="PCA"):
        fit_pca(make_features(count), components=components)


def test_constant_features_are_refused() -> None:
    """No direction exists."""
    with pytest.raises(DataError, match="all the same"):
        fit_pca(np.ones((10, 4), dtype=np.float32))


def test_cosine_similarity_by_hand() -> None:
    """Same, opposite, right angle, without length."""
    patches = np.array([[[2, 0], [-3, 0]], [[0, 5], [0, 0]]], dtype=np.float32)
    similarity = cosine_similarity_map(patches, np.array([7, 0], dtype=np.float32))
    np.testing.assert_allclose(similarity, [[1, -1], [0, 0]])
