"""Tests of images with labels or other images of the same ground."""

import numpy as np
import pytest
import torch
from torchgeo.datasets import IntersectionDataset
from torchgeo.samplers import GriddedPatchSampler, RandomPatchSampler

from dinov3geo.data.sampling import ChipSampler
from dinov3geo.data.scene_pairs import ScenePairs
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import DataError
from tests.half_metre import HALF_METRE, ORIGIN, query, read


def test_pairs_of_ten_to_one(write_raster):
    """Image of 0.1 m and labels of 1 m that start elsewhere, found by position and not by name."""
    image = write_raster("images/x.tif", shape=(3, 100, 100), pixel_size=0.125)
    write_raster("images/y.tif", shape=(3, 100, 100), pixel_size=0.125, origin=(ORIGIN[0] + 500, ORIGIN[1]))
    heights = np.arange(400, dtype=np.float32).reshape(1, 20, 20)
    heights[0, 3, 3] = -9999
    origin = (ORIGIN[0] - 2, ORIGIN[1] + 1)
    write_raster("labels/z.tif", array=heights, nodata=-9999, pixel_size=1.25, origin=origin)
    images, labels = SceneDataset(image.parent), SceneDataset(image.parent.parent / "labels", is_image=False)
    before = labels.crs, labels.res
    pairs = images & labels
    assert isinstance(pairs, ScenePairs) and isinstance(pairs, IntersectionDataset) and len(pairs) == 1
    assert isinstance(labels & images, ScenePairs)
    assert (labels.crs, labels.res) == before
    sample = pairs[query(8, 16, 64, 48, pixel=0.125)]
    np.testing.assert_array_equal(sample["image"], read(image)[:, 16:64, 8:72])
    cols = np.floor((2 + (8 + np.arange(64) + 0.5) * 0.125) / 1.25).astype(int)
    rows = np.floor((1 + (16 + np.arange(48) + 0.5) * 0.125) / 1.25).astype(int)
    np.testing.assert_array_equal(sample["mask"], heights[0][rows][:, cols])
    np.testing.assert_array_equal(sample["mask_valid"], (heights[0] != -9999)[rows][:, cols])
    assert sample["mask"].dtype == torch.float32 and sample["valid"].all()
    for sampler in (
        RandomPatchSampler(pairs, size=32, length=4, generator=0),
        GriddedPatchSampler(pairs, size=32),
        ChipSampler(pairs, chip_size=32, chips_per_epoch=4, seed=0),
    ):
        assert all(pairs[place]["mask"].shape == (32, 32) for place in sampler)


def test_pairs_in_three_zones_line_up(three_zones, write_raster):
    """Labels tell the place as the images do, but on pixels ten times as large."""
    for number, epsg in enumerate((32616, 32617, 32618)):
        rows, cols = np.mgrid[:6, :6]
        array = (100 * (number + 1) + 10 * rows + cols).astype(np.float32)
        write_raster(
            f"heights/{epsg}.tif",
            array=array,
            nodata=-1,
            crs=f"EPSG:{epsg}",
            pixel_size=1.0,
            origin=(400_000, 3_280_000 + number),
        )
    pairs = SceneDataset(three_zones) & SceneDataset(three_zones.parent / "heights", is_image=False)
    assert len(pairs) == 3
    for place in ChipSampler(pairs, chip_size=30, chips_per_epoch=20, seed=0):
        sample = pairs[place]
        number, rows, cols = (sample["image"].long() - torch.tensor([0, 1, 1])[:, None, None]).unbind()
        assert sample["mask_valid"].all()
        assert torch.equal(sample["mask"].long(), 100 * number + 10 * (rows // 10) + cols // 10)


def test_pairs_of_two_image_sets(write_raster):
    fine = write_raster("fine.tif", pixel_size=HALF_METRE)
    coarse = write_raster("coarse.tif", shape=(4, 24, 32), pixel_size=1.0)
    sample = (SceneDataset(fine) & SceneDataset(coarse, sensor="aerial_rgbn"))[query(0, 0, 64, 48)]
    assert sample["image"].shape == (7, 48, 64) and sample["valid"].all()
    np.testing.assert_array_equal(sample["image"][:3], read(fine))


def test_pairs_that_cannot_be(write_raster):
    images = SceneDataset(write_raster("image.tif"))
    apart = SceneDataset(write_raster("label.tif", shape=(1, 8, 8), origin=(500_000, 3e6)), is_image=False)
    with pytest.raises(DataError, match=r"no scene in .*image\.tif overlaps one in .*label\.tif"):
        images & apart
    with pytest.raises(DataError, match="two data sets of labels"):
        apart & apart


def test_real_pairs_of_two_sites(data_root):
    images = SceneDataset([data_root / "neon" / "rgb", data_root / "teak" / "rgb"])
    pairs = images & SceneDataset([data_root / "teak" / "chm", data_root / "neon" / "chm"], is_image=False)
    for place in ChipSampler(pairs, chip_size=192, chips_per_epoch=6, seed=0):
        sample = pairs[place]
        assert sample["mask_valid"].float().mean() > 0.9
        assert sample["mask"][sample["mask_valid"]].max() < 80
