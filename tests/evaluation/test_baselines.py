from pathlib import Path

import numpy as np
import pytest

from dinov3geo.errors import ConfigError
from dinov3geo.evaluation.baselines import (
    color_statistics,
    fit_gradient_boosting,
    group_means,
    site_name,
)


def naive_statistics(image, valid, factor, sides):
    height, width = valid.shape[0] // factor, valid.shape[1] // factor
    result = np.full((height, width, 2 * len(image) * len(sides)), np.nan)
    for row in range(height):
        for col in range(width):
            column = 0
            for side in sides:
                reach = side // 2
                top, left = max(row - reach, 0) * factor, max(col - reach, 0) * factor
                bottom, right = min(row + reach + 1, height) * factor, min(col + reach + 1, width) * factor
                known = valid[top:bottom, left:right]
                for band in image:
                    pixels = band[top:bottom, left:right][known].astype(float)
                    if pixels.size:
                        result[row, col, column : column + 2] = pixels.mean(), pixels.std()
                    column += 2
    return result


def test_colour_statistics_equal_a_naive_loop():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (3, 24, 33), dtype=np.uint8)
    valid = generator.random((24, 33)) > 0.3
    valid[:9, :9] = False
    found = color_statistics(image, valid, 3)
    assert found.shape == (8, 11, 24) and found.dtype == np.float32
    np.testing.assert_allclose(found, naive_statistics(image, valid, 3, (1, 3, 7, 15)), rtol=1e-4, atol=1e-3)
    assert np.isnan(found[0, 0, 0])


def test_sites_are_the_letters_before_number_or_underscore():
    assert site_name(Path("/a/OSBS_029.tif")) == "OSBS"
    assert site_name(Path("TEAK12.tif")) == "TEAK"
    assert site_name(Path("2018_x.tif")) == "all"
    assert site_name(Path("2018_x.tif"), r"_([a-z])") == "x"
    with pytest.raises(ConfigError, match="regular expression"):
        site_name(Path("a.tif"), "(")


def test_group_means_pool_cells_and_fall_back_to_all():
    values = [np.array([1.0, 2.0, 3.0]), np.array([7.0]), np.array([[10.0, 20.0]])]
    means = group_means(values, ["a", "a", "b"], ["b", "a", "c"])
    assert means == pytest.approx([15.0, 13 / 4, 43 / 6])


@pytest.mark.parametrize("loss", ["squared_error", "absolute_error"])
def test_boosting_finds_a_step_and_takes_missing_values(loss):
    features = np.random.default_rng(0).random((400, 2)).astype(np.float32)
    heights = np.where(features[:, 0] > 0.5, 20.0, 1.0)
    features[:50, 1] = np.nan
    model = fit_gradient_boosting(features, heights, loss=loss, seed=0)
    np.testing.assert_allclose(model.predict(np.array([[0.1, np.nan], [0.9, 0.2]])), [1, 20], atol=0.5)
