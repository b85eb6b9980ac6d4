"""Features as colours and similarities: pure functions on arrays of patch features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinov3geo.errors import DataError

Floats = NDArray[np.float32]

LOW_HIGH_PERCENT = (1.0, 99.0)
"""Percentiles of a component that become 0 and 1: a few odd patches must not flatten all others."""


@dataclass(frozen=True, slots=True)
class PcaBasis:
    """Principal components of patch features, fitted once so that colours agree between tiles and scenes.

    Attributes:
        mean: [D], of the features it was fitted on.
        components: [k, D], orthonormal rows, the largest variance first.
        explained: [k], share of the variance each component holds.
        low: [k], projection that becomes 0.
        high: [k], projection that becomes 1.
    """

    mean: Floats
    components: Floats
    explained: Floats
    low: Floats
    high: Floats

    def project(self, features: Floats) -> Floats:
        """Features [..., D] to components [..., k] in the features' unit."""
        return np.asarray((features - self.mean) @ self.components.T, dtype=np.float32)

    def scale(self, projected: Floats) -> Floats:
        """Components [..., k] to [..., k] between 0 and 1."""
        return np.clip((projected - self.low) / (self.high - self.low), 0, 1)


def fit_pca(features: Floats, *, components: int = 3) -> PcaBasis:
    """Fits principal components.

    The sign of a component is free; its largest entry is made positive, so equal features give equal colours.

    Args:
        features: [N, D].
        components: k.

    Raises:
        DataError: fewer than k + 1 features, more components than D, or all features are the same.
    """
    count, width = features.shape
    if not 1 <= components <= width:
        raise DataError(f"PCA components must be 1 to {width} (the width of the features), got {components}")
    if count <= components:
        raise DataError(
            f"PCA with {components} components needs at least {components + 1} valid patches, got {count}; "
            "use a larger scene or fewer components"
        )
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    # The D x D covariance costs the same however many patches there are.
    variances, vectors = np.linalg.eigh(centred.T @ centred / (count - 1))
    total = variances.sum()
    if total <= 0:
        raise DataError(f"PCA of {count} patches that are all the same; expected an image with some contrast")
    basis = vectors[:, ::-1][:, :components].T
    peaks = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
    basis = basis * np.where(peaks < 0, -1.0, 1.0)
    low, high = np.percentile(centred @ basis.T, LOW_HIGH_PERCENT, axis=0)
    return PcaBasis(
        mean=mean.astype(np.float32),
        components=basis.astype(np.float32),
        explained=(variances[::-1][:components].clip(min=0) / total).astype(np.float32),
        low=low.astype(np.float32),
        high=np.maximum(high, low + 1e-6).astype(np.float32),
    )


def cosine_similarity_map(patches: Floats, query: Floats) -> Floats:
    """Cosine similarity of every patch to one feature.

    Args:
        patches: [..., D].
        query: [D].

    Returns:
        [...], -1 to 1; 0 where a feature has no length.
    """
    return np.asarray(_unit(patches) @ _unit(query), dtype=np.float32)


def _unit(features: Floats) -> Floats:
    """Features [..., D] scaled to length 1; a feature without length stays 0."""
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    return np.asarray(features / np.where(lengths > 0, lengths, 1), dtype=np.float32)
