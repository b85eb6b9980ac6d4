"""Tests of the sensor table."""

import re

import numpy as np
import pytest
import rasterio

from dinov3geo.errors import UnknownNameError
from dinov3geo.rasters.sensors import SENSORS, get_sensor


@pytest.mark.parametrize("name", sorted(SENSORS))
def test_record_is_consistent(name):
    sensor = SENSORS[name]
    assert sensor.name == name
    assert len(set(sensor.band_names)) == len(sensor.bands)
    assert sensor.select(sensor.rgb_bands)
    assert np.dtype(sensor.dtype)
    assert sensor.gsd_m > 0
    assert sensor.source
    assert all(band.std > 0 for band in sensor.bands)
    re.compile(sensor.filename_regex, re.VERBOSE)


def test_bands_are_selected_in_the_order_asked_for():
    sensor = get_sensor("treesat_aerial")
    assert sensor.band_indexes(("red", "nir")) == (4, 1)
    assert [band.name for band in sensor.select(("red", "nir"))] == ["red", "nir"]
    assert sensor.band_indexes() == (1, 2, 3, 4)


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(UnknownNameError, match=r"did you mean 'aerial_rgb'.*photo_rgb"):
        get_sensor("aerial_rgg")
    with pytest.raises(UnknownNameError, match="valid names: blue, green, red"):
        get_sensor("aerial_rgb").select(("red", "nir"))


def test_aerial_statistics_are_those_of_the_plots(data_root):
    paths = sorted((data_root / "neon_plots" / "rgb").glob("*.tif"))
    if not paths:
        pytest.skip("no neon_plots/rgb in the data folder")
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for path in paths:
        with rasterio.open(path) as dataset:
            pixels = dataset.read().reshape(3, -1).astype(np.float64)
            pixels = pixels[:, ~(pixels == dataset.nodata).all(axis=0)] / 255
        count += pixels.shape[1]
        total += pixels.sum(axis=1)
        squares += (pixels**2).sum(axis=1)
    mean = total / count
    std = np.sqrt(squares / count - mean**2)
    bands = get_sensor("aerial_rgb").bands
    np.testing.assert_allclose([band.mean for band in bands], mean, atol=1e-4)
    np.testing.assert_allclose([band.std for band in bands], std, atol=1e-4)
