"""Exact counts and block shape of the iBOT masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov3geo.data.masking import MaskSettings, batch_masks, block_mask, masked_counts


def test_counts_are_stratified() -> None:
    # Eight crops of 256 patches: the figures of the official training code.
    assert masked_counts(8, 256, MaskSettings()) == [51, 76, 102, 128, 0, 0, 0, 0]


@given(
    height=st.integers(2, 16),
    width=st.integers(2, 16),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_block_masks_have_the_exact_count(height: int, width: int, share: float, seed: int) -> None:
    count = int(height * width * share)
    mask = block_mask(
        (height, width), count, largest_block=height * width / 2, rng=np.random.default_rng(seed)
    )
    assert mask.shape == (height, width)
    assert int(mask.sum()) == count


def test_masks_come_in_blocks() -> None:
    rng = np.random.default_rng(0)
    blocks = [block_mask((16, 16), 100, largest_block=128, rng=rng) for _ in range(20)]
    scattered = [rng.permutation(np.arange(256) < 100).reshape(16, 16) for _ in range(20)]

    def borders(masks: list[np.ndarray]) -> float:
        return float(np.mean([np.abs(np.diff(m.astype(int), axis=a)).sum() for m in masks for a in (0, 1)]))

    assert borders(blocks) < 0.6 * borders(scattered)


def test_patches_without_data_are_never_masked() -> None:
    valid = np.ones((16, 64), dtype=bool)
    valid[:, :20] = False
    masks = batch_masks(valid, (8, 8), MaskSettings(probability=1.0, ratio=(0.5, 0.9)), seed=0)
    assert masks.any() and not (masks & ~valid).any()


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_share_of_masked_images(probability: float) -> None:
    masks = batch_masks(np.ones((10, 49), dtype=bool), (7, 7), MaskSettings(probability=probability), seed=1)
    assert int(masks.any(1).sum()) == int(10 * probability)
