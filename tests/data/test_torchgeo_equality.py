"""Pixels are those of torchgeo for real rasters of every folder: plain, mosaics, warped, with labels."""

from functools import cache, partial

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling
from rasterio.windows import Window
from torchgeo.datasets import RasterDataset

from dinov3geo.data.scenes import SceneDataset

# Folder, pattern of names, and whether the files are labels. All rasters of the shared data, by kind.
FOLDERS = {
    "neon_rgb": ("neon/rgb", "*.tif", True),
    "neon_hsi": ("neon/hsi", "*.tif", True),
    "neon_chm": ("neon/chm", "*.tif", False),
    "teak_rgb": ("teak/rgb", "*.tif", True),
    "teak_chm": ("teak/chm", "*.tif", False),
    "plots_harv": ("neon_plots/rgb", "HARV_*.tif", True),
    "naip": ("naip", "*.tif", True),
    "s2_10m": ("sentinel2_l1c", "s2_B0[2348].tif", True),
    "s2_20m": ("sentinel2_l1c", "s2_B[0518][567A12].tif", True),
    "s2_60m": ("sentinel2_l1c", "s2_B[01][190].tif", True),
    "landsat": ("landsat8", "l8_B[1-7].tif", True),
    "landsat_qa": ("landsat8", "l8_BQA.tif", False),
    "landcover": ("sentinel2_landcover/image", "*.tif", True),
    "landcover_mask": ("sentinel2_landcover/mask", "*.tif", False),
    "flair": ("flair/image", "*.tif", True),
    "benv2_s1": ("benv2", "*_s1.tif", True),
    "benv2_s2": ("benv2", "*_s2.tif", True),
    "treesat": ("treesatai", "*.tif", True),
}
WARPED = {
    "plots_harv": "EPSG:32617",
    "landsat_qa": "EPSG:32617",
    "flair": "EPSG:32631",
    "landcover_mask": "EPSG:32653",
    "naip": "EPSG:32614",
}
quick, full = 4, 60


class Bilinear(RasterDataset):
    """torchgeo warps by the nearest pixel, whatever it says of its resampling; this one interpolates."""

    def _load_warp_file(self, filepath, crs=None):
        from torchgeo.datasets import geo

        plain = geo.WarpedVRT
        geo.WarpedVRT = partial(plain, resampling=Resampling.bilinear)
        try:
            return super()._load_warp_file(filepath, crs)
        finally:
            geo.WarpedVRT = plain


@cache
def pair(root, name, crs=None):
    """Ours and torchgeo's data set over the same files."""
    folder, pattern, is_image = FOLDERS[name]
    found = sorted((root / folder).glob(pattern))
    # torchgeo would warp all to the first file's reference system.
    systems = [rasterio.open(path).crs for path in found]
    files = [str(path) for path, own in zip(found, systems, strict=True) if own == systems[0]]
    if crs is not None:
        files = files[:1]  # its pixel size is the first file's, and others would be resampled twice
    # Its labels are whole numbers unless one says otherwise.
    options = {"is_image": is_image, **({"dtype": torch.float32} if is_image or "chm" in name else {})}
    kind = RasterDataset if crs is None or not is_image else Bilinear
    theirs = type("Theirs", (kind,), options)(files, crs=crs)
    how = {"sensor": "treesat_aerial"} if name == "treesat" else {"is_image": False}
    ours = SceneDataset(files, allow_mixed_resolution=True, crs=crs, res=theirs.res, **how)
    ours.is_image = is_image
    return ours, theirs


def draw_query(data, ours, name, smallest=1):
    """A window of whole pixels of one of the files, inside it."""
    row = data.draw(st.integers(0, len(ours) - 1))
    path = ours._catalog.paths[row]
    scene = ours._warped_scene(path) if name in WARPED and ours._crs_forced else None
    info = ours._infos[path].grid
    grid = info if scene is None else scene.grid(0, 0, info.shape_hw)
    height, width = (data.draw(st.integers(smallest, min(size, 200))) for size in info.shape_hw)
    top, left = (
        data.draw(st.integers(0, size - side))
        for size, side in zip(info.shape_hw, (height, width), strict=True)
    )
    x, y = grid.transform @ (left, top)
    right, bottom = grid.transform @ (left + width, top + height)
    query = slice(x, right), slice(bottom, y)
    bounds = (x, bottom, right, y)
    # Where files overlap, torchgeo lays the others' pixels on the grid of the query by their nearest pixel.
    assume(ours._catalog.find(bounds, None, None)[:1] == [row])
    return query


def compare(data, root, name):
    ours, theirs = pair(root, name)
    assert not ours._crs_forced
    query = draw_query(data, ours, name)
    # A pixel of a file finer than the first one can be less than half of the data set's own.
    if theirs[query]["image" if ours.is_image else "mask"].numel() == 0:
        with pytest.raises(IndexError, match="holds no pixel of"):
            ours[query]
        return
    assert_same(ours, ours[query], theirs[query], query)


def assert_same(ours, mine, reference, query):
    key = "image" if ours.is_image else "mask"
    assert mine[key].shape == reference[key].shape
    bounds = (query[0].start, query[1].start, query[0].stop, query[1].stop)
    path = ours._catalog.paths[ours._catalog.find(bounds, None, None)[0]]
    # Where files overlap torchgeo moves the others' pixels to the leading one's, and fills every number that
    # equals nodata (0, if none is declared) from them band by band; ours only where all bands lack data.
    reader, size = ours._readers.get(path), tuple(mine["valid"].shape)
    line, col, _ = ours._catalog.window(ours._catalog.paths.index(path), query[0].start, query[1].stop)
    numbers, valid = reader.read_at(line, col, size)
    nodata = reader.info.nodata[0]
    same = torch.from_numpy(numbers != (0 if nodata is None else nodata)).reshape(mine[key].shape)
    if valid is not None:
        same &= torch.from_numpy(valid)
    # A fourth band that is tagged as alpha but holds near infrared hides its zeros from torchgeo.
    with rasterio.open(path) as source:
        window = Window(col, line, size[1], size[0])
        seen = torch.from_numpy(source.dataset_mask(window=window) != 0)
    same &= seen
    assert torch.equal(mine[key][same].double(), reference[key][same].double())
    lone = len(ours._catalog.find(bounds, None, None)) == 1
    if lone and nodata is None:
        assert torch.equal(mine[key][..., seen].double(), reference[key][..., seen].double())


def case(number):
    return settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
    )


def test_a_query_below_half_a_pixel_is_refused(data_root):
    ours, theirs = pair(data_root, "s2_20m")
    x, y = ours.bounds[0].start, ours.bounds[1].stop
    query = slice(x, x + 10), slice(y - 10, y)
    assert ours.res == (60, 60) and theirs[query]["image"].shape == (1, 0, 0)
    with pytest.raises(IndexError, match="holds no pixel of 60 x 60; ask for a wider one"):
        ours[query]


@pytest.mark.parametrize("name", sorted(FOLDERS))
@given(data=st.data())
@case(quick)
def test_pixels_are_those_of_torchgeo(data, data_root, name):
    compare(data, data_root, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FOLDERS))
@given(data=st.data())
@case(full)
def test_pixels_are_those_of_torchgeo_in_a_thousand_queries(data, data_root, name):
    compare(data, data_root, name)


def compare_warped(data, root, name):
    """GDAL's virtual rasters approximate coordinates to an eighth of a pixel, and we to a hundredth."""
    ours, theirs = pair(root, name, WARPED[name])
    assert ours._crs_forced
    query = draw_query(data, ours, name, smallest=16)
    mine, reference = ours[query], theirs[query]
    key = "image" if ours.is_image else "mask"
    a, b = mine[key].double().reshape(-1, *mine["valid"].shape), reference[key].double()
    b = b.reshape(a.shape)
    # Away from rims, where ours leaves out what is not covered.
    inner = torch.nn.functional.max_pool2d((~mine["valid"]).float()[None], 9, 1, 4)[0] == 0
    assume(int(inner.sum()) > 100)
    difference = (a - b).abs()[:, inner]
    if ours.is_image:
        # An eighth of a pixel's gradient, of the sharpest edges, and rounding.
        rise = torch.nn.functional.max_pool2d(a[None], 3, 1, 1) + torch.nn.functional.max_pool2d(
            -a[None], 3, 1, 1
        )
        limit = 0.3 * rise[0][:, inner] + 1.0
        assert (difference <= limit).double().mean() > 0.9
        assert np.median(difference) <= 1.0
    else:
        # A label whose pixel's edge lies within an eighth of a pixel may be the neighbour's.
        assert (difference == 0).double().mean() > 0.9


@pytest.mark.parametrize("name", sorted(WARPED))
@given(data=st.data())
@case(quick)
def test_warped_pixels_are_those_of_torchgeo(data, data_root, name):
    compare_warped(data, data_root, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WARPED))
@given(data=st.data())
@case(full)
def test_warped_pixels_are_those_of_torchgeo_in_many_queries(data, data_root, name):
    compare_warped(data, data_root, name)


@given(data=st.data())
@case(8)
def test_pixels_with_labels_are_those_of_torchgeo(data, data_root):
    """Under `&`: the same image and the same nearest labels."""
    name, labels = "landcover", "landcover_mask"
    ours, theirs = (a & b for a, b in zip(pair(data_root, name), pair(data_root, labels), strict=True))
    query = draw_query(data, ours.datasets[0], name)
    mine, reference = ours[query], theirs[query]
    assert_same(ours.datasets[0], mine, reference, query)
    known = mine["mask_valid"] & (mine["mask"] != 0)
    assert torch.equal(mine["mask"][known].double(), reference["mask"][known].double())
