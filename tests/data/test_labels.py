"""Masks of classes: what their numbers mean, and reading them on the image's grid."""

import numpy as np
import pytest
import rasterio.warp
from affine import Affine
from pydantic import ValidationError

from dinov3geo.data.labels import ClassScheme, load_label_pair
from dinov3geo.data.pairs import match_pairs
from dinov3geo.errors import DataError

X, Y = 400_000.0, 3_280_000.0
SCHEME = ClassScheme.model_validate(
    {
        "classes": [{"name": "low", "values": [1, 4]}, {"name": "high", "values": 2, "colour": "#ff8000"}],
        "ignore": [9],
    }
)


def test_numbers_become_positions_and_ignored_ones_say_nothing():
    numbers = np.array([[1, 4, 2], [9, 2, 7]])
    known = np.array([[True, True, True], [True, True, False]])
    found = SCHEME.encode(numbers, known, "m.tif")
    np.testing.assert_array_equal(found.classes, [[0, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(found.valid, [[True, True, True], [False, True, False]])
    assert SCHEME.names == ("low", "high") and SCHEME.colours == (None, (255, 128, 0))


def test_a_number_that_no_class_names_is_told_with_its_pixels():
    with pytest.raises(DataError, match=r"m\.tif holds 3 \(2 pixels\), 8 \(1 pixels\), which no class names"):
        SCHEME.encode(np.array([3, 3, 8, 1]), np.ones(4, bool), "m.tif")
    with pytest.raises(DataError, match="fractions"):
        SCHEME.encode(np.array([1.5]), np.ones(1, bool), "m.tif")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([{"name": "a", "values": 1}, {"name": "b", "values": [2, 1]}], "more than once: 1"),
        ([{"name": "a", "values": 1}, {"name": "a", "values": 2}], "more than once: a"),
        ([{"name": "a", "values": 1}], "at least 2"),
        ([{"name": "a", "values": 1, "colour": "red"}, {"name": "b", "values": 2}], "a colour like"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(classes, message):
    with pytest.raises(ValidationError, match=message):
        ClassScheme.model_validate({"classes": classes})


def test_an_image_takes_the_mask_of_its_own_extent_and_leaves_its_neighbours(write_raster):
    for name, shift in (("a", 0), ("b", 16)):
        write_raster(f"rgb/{name}.tif", shape=(3, 32, 32), pixel_size=1.0, origin=(X + shift, Y))
        mask = np.full((32, 32), 1 if name == "a" else 2, np.uint8)
        path = write_raster(f"mask/{name}.tif", array=mask, pixel_size=1.0, origin=(X + shift, Y))
    match = match_pairs(path.parent.parent / "rgb", path.parent, what="mask")
    assert [(p.image.stem, p.target.stem) for p in match.pairs] == [("a", "a"), ("b", "b")]
    assert len({p.group for p in match.pairs}) == 1


def test_a_mask_in_another_crs_gives_the_nearest_class(write_raster):
    """Against nearest neighbours looked up pixel by pixel with pyproj."""
    image = write_raster("image.tif", shape=(3, 40, 60), pixel_size=1.0, origin=(X, Y))
    left, bottom, right, top = rasterio.warp.transform_bounds("EPSG:32617", "EPSG:4326", X, Y - 40, X + 60, Y)
    classes = np.where(np.arange(80)[None] < 40, 1, 2) * np.ones((60, 1), int)
    transform = Affine((right - left) / 80, 0, left, 0, (bottom - top) / 60, top)
    mask = write_raster("mask.tif", array=classes.astype(np.uint8), crs="EPSG:4326", transform=transform)
    (pair,) = match_pairs(image, mask, what="mask").pairs
    arrays = load_label_pair(pair, SCHEME)
    rows, cols = np.mgrid[0:40, 0:60]
    lon, _ = rasterio.warp.transform(
        "EPSG:32617", "EPSG:4326", (X + cols + 0.5).ravel(), (Y - rows - 0.5).ravel()
    )
    expected = (np.floor((np.array(lon) - left) / (right - left) * 80) >= 40).reshape(40, 60)
    inside = arrays.target_valid
    assert inside.mean() > 0.9
    assert (arrays.target[inside] == expected[inside]).mean() > 0.998


def test_masks_of_several_bands_are_an_error(write_raster):
    image = write_raster("image.tif", shape=(3, 8, 8))
    mask = write_raster("mask.tif", array=np.ones((2, 8, 8), np.uint8))
    with pytest.raises(DataError, match="expected one band of classes"):
        load_label_pair(match_pairs(image, mask).pairs[0], SCHEME)
