"""Tests of scenes as torchgeo data sets."""

import copy
import pickle
import weakref

import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
import torch
from affine import Affine
from rasterio.crs import CRS
from rasterio.warp import transform
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset, UnionDataset, random_bbox_assignment
from torchgeo.samplers import GriddedPatchSampler, RandomPatchSampler

from dinov3geo.data import catalog
from dinov3geo.data.sampling import ChipSampler
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import DataError, GeoreferenceError, RasterError, UnknownNameError
from dinov3geo.rasters.sensors import Band, Sensor
from tests.half_metre import HALF_METRE, ORIGIN, query, read


class TorchgeoRgb(RasterDataset):
    """The same files through torchgeo's own reading."""

    all_bands = ("red", "green", "blue")


@pytest.fixture
def folder(write_raster):
    """Two scenes side by side and a third over both, of 64 x 48 pixels each; the third has nodata."""
    array = np.random.default_rng(5).integers(1, 255, (3, 48, 64)).astype(np.uint8)
    array[:, 10:20, 10:20] = 0
    write_raster("a.tif", seed=1, pixel_size=HALF_METRE)
    write_raster("b.tif", seed=2, pixel_size=HALF_METRE, origin=(ORIGIN[0] + 32, ORIGIN[1]))
    third = write_raster(
        "0.tif", array=array, nodata=0, pixel_size=HALF_METRE, origin=(ORIGIN[0] + 16, ORIGIN[1] - 8)
    )
    return third.parent


@pytest.mark.parametrize("name", ["a.tif", "b.tif"])
def test_pixels_are_those_of_torchgeo(folder, name):
    ours = SceneDataset(folder / name)
    theirs = TorchgeoRgb(str(folder / name), bands=TorchgeoRgb.all_bands)
    assert ours.crs == theirs.crs and ours.res == theirs.res
    assert ours.index.geometry.iloc[0].equals(theirs.index.geometry.iloc[0])
    queries = [
        *RandomPatchSampler(ours, size=16, length=20, generator=0),
        *GriddedPatchSampler(ours, size=(17, 23), stride=11),
    ]
    for place in queries:
        mine, reference = ours[place], theirs[place]
        assert mine["image"].dtype == torch.uint8
        inside = mine["valid"]
        assert torch.equal(mine["image"][:, inside].float(), reference["image"][:, inside])
        assert torch.equal(mine["bounds"].float(), reference["bounds"].float())
        assert torch.equal(mine["transform"].float(), reference["transform"].float())


def test_mosaic_is_that_of_torchgeo(folder):
    """The first file wins, and where it has no data the next one fills in."""
    ours, theirs = SceneDataset(folder), TorchgeoRgb(str(folder), bands=TorchgeoRgb.all_bands)
    for place in RandomPatchSampler(ours, size=24, length=40, generator=0):
        mine = ours[place]
        assert torch.equal(mine["image"].float() * mine["valid"], theirs[place]["image"] * mine["valid"])
    filled = ours[query(32, 16, 64, 30)]
    hole = read(folder / "0.tif")[:, 10:20, 10:20]
    assert hole.max() == 0 and filled["valid"][:30].all()
    np.testing.assert_array_equal(filled["image"][:, 10:20, 10:20], read(folder / "a.tif")[:, 26:36, 42:52])


def test_sample_keeps_size_and_marks_what_is_missing(folder):
    sample = SceneDataset(folder / "a.tif")[query(-10, 40, 100, 30)]
    assert sample["image"].shape == (3, 30, 100) and sample["valid"].shape == (30, 100)
    expected = np.zeros((30, 100), dtype=bool)
    expected[:8, 10:74] = True
    np.testing.assert_array_equal(sample["valid"], expected)
    np.testing.assert_array_equal(sample["image"][:, :8, 10:74], read(folder / "a.tif")[:, 40:])


def test_query_between_pixels_moves_to_the_nearest(folder):
    dataset = SceneDataset(folder / "a.tif")
    x, y = query(4, 6, 10)
    nudged = slice(x.start + 0.2, x.stop + 0.2), slice(y.start - 0.2, y.stop - 0.2)
    assert torch.equal(dataset[nudged]["image"], dataset[x, y]["image"])
    assert dataset[nudged]["transform"].tolist()[2::3][:2] == [x.start, y.stop]


def test_query_outside_and_empty(folder):
    dataset = SceneDataset(folder)
    with pytest.raises(IndexError, match="no scene at"):
        dataset[query(10_000, 0, 16)]
    with pytest.raises(IndexError, match="no scene at"):
        dataset[query(-16, 0, 16)]  # only touches
    with pytest.raises(IndexError, match="empty query"):
        dataset[query(0, 0, 0)]


def test_partial_queries_are_filled_in(folder):
    dataset = SceneDataset(folder / "a.tif")
    assert dataset[:]["image"].shape == dataset[:, :]["image"].shape == (3, 48, 64)
    assert dataset[query(0, 0, 10)[0]]["image"].shape == (3, 48, 10)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("count", [1, 3, 13])
def test_dtype_and_bands_are_those_of_the_file(write_raster, dtype, count):
    bands = tuple(Band(f"b{i}", None, None, 1.0, 0.0, 0.0, 1.0) for i in range(count))
    sensor = Sensor("test", bands, 0.5, dtype, None, "*", ".*", ("b0",), True, "test")
    path = write_raster(shape=(count, 20, 20), dtype=dtype)
    sample = SceneDataset(path, sensor=sensor)[:]
    assert str(sample["image"].dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(sample["image"], read(path))
    backwards = SceneDataset(path, sensor=sensor, bands=[band.name for band in bands[::-1]])[:]
    np.testing.assert_array_equal(backwards["image"], read(path)[::-1])
    batch = next(
        iter(DataLoader(SceneDataset(path, sensor=sensor), sampler=[(slice(None),)] * 2, batch_size=2))
    )
    assert batch["image"].dtype == sample["image"].dtype


def test_masks_have_no_sensor(write_raster):
    one = SceneDataset(write_raster("one.tif", shape=(1, 8, 8), dtype="int16"), is_image=False)[:]
    assert "image" not in one and one["mask"].shape == (8, 8) and one["mask"].dtype == torch.int16
    two = SceneDataset(write_raster("two.tif", shape=(2, 8, 8)), is_image=False)[:]
    assert two["mask"].shape == (2, 8, 8)


@pytest.mark.parametrize("e", [0.5, -0.25, 0.25])
def test_rows_run_southwards_and_pixels_may_be_oblong(write_raster, e):
    path = write_raster(transform=Affine(0.5, 0, ORIGIN[0], 0, e, ORIGIN[1]))
    dataset = SceneDataset(path)
    assert dataset.res == (0.5, abs(e))
    sample = dataset[:]
    np.testing.assert_array_equal(sample["image"], read(path)[:, :: -1 if e > 0 else 1])
    assert sample["valid"].all() and sample["transform"][4] == -abs(e)
    for place in RandomPatchSampler(dataset, size=8, length=5, generator=0):
        part = dataset[place]
        column, row = ~Affine(*sample["transform"][:6].tolist()) @ part["transform"][[2, 5]].tolist()
        assert (round(column), round(row)) == pytest.approx((column, row), abs=1e-6)
        window = slice(round(row), round(row) + 8), slice(round(column), round(column) + 8)
        assert torch.equal(part["image"], sample["image"][:, *window])


def test_scenes_of_three_zones_are_read_in_their_own_grids(three_zones):
    dataset = SceneDataset(three_zones)
    assert dataset.crs.to_epsg() == 6933 and len(dataset) == 3
    assert dataset.res == pytest.approx((0.1, 0.1))
    seen = set()
    for place in ChipSampler(dataset, chip_size=24, chips_per_epoch=60, seed=0):
        sample = dataset[place]
        number, rows, cols = sample["image"].long()
        assert sample["valid"].all() and number.unique().numel() == 1
        seen.add(int(number[0, 0]))
        # Neighbouring pixels of the chip are neighbouring pixels of the file: nothing was resampled.
        assert (rows == rows[:1, :1] + torch.arange(24)[:, None]).all()
        assert (cols == cols[:1, :1] + torch.arange(24)).all()
        # The transform says where they lie, and that is where the query's centre is.
        own = CRS.from_epsg(32615 + int(number[0, 0]))
        affine = Affine(*sample["transform"][:6].tolist())
        column, row = int(cols[0, 0]) - 1, int(rows[0, 0]) - 1
        first = rasterio.open(three_zones / f"{own.to_epsg()}.tif").transform
        assert affine @ (0, 0) == pytest.approx(first @ (column, row), abs=1e-6)
        centre = [(axis.start + axis.stop) / 2 for axis in place[:2]]
        x, y = (values[0] for values in transform(CRS.from_epsg(6933), own, *[[value] for value in centre]))
        assert np.hypot(*np.subtract(affine @ (12, 12), (x, y))) < 0.9
    assert seen == {1, 2, 3}


def test_window_in_another_zone_is_moved_inside(three_zones):
    dataset = SceneDataset(three_zones)
    xmin, ymin, xmax, ymax = dataset.index.geometry.iloc[1].bounds
    corner = dataset[slice(xmin - 2, xmin + 3), slice(ymin - 2, ymin + 3)]
    assert corner["image"].shape == (3, 50, 50) and corner["valid"].all()
    larger = dataset[slice(xmin - 1, xmin + 7), slice(ymin - 1, ymin + 7)]
    assert larger["image"].shape == (3, 80, 80) and int(larger["valid"].sum()) == 3600


def test_resolution_asked_for_is_resampled(folder):
    native = SceneDataset(folder / "a.tif")
    coarse = SceneDataset(folder / "a.tif", res=1.0)
    assert coarse.res == (1.0, 1.0)
    expected = read(folder / "a.tif").reshape(3, 24, 2, 32, 2).mean(axis=(2, 4))
    assert np.abs(coarse[:]["image"].numpy() - expected).max() <= 0.5
    assert torch.equal(native[query(0, 0, 64, 48)[0], query(0, 0, 64, 48)[1]]["image"], native[:]["image"])
    x, y = query(0, 0, 64, 48)
    stepped = native[slice(x.start, x.stop, 1.0), slice(y.start, y.stop, 1.0)]
    assert torch.equal(stepped["image"], coarse[:]["image"])


def test_crs_asked_for_is_warped_to(folder):
    warped = SceneDataset(folder / "a.tif", crs="EPSG:32616")
    assert warped.crs.to_epsg() == 32616
    sample = warped[:]
    assert 0.5 < sample["valid"].float().mean() < 1
    later = SceneDataset(folder / "a.tif")
    later.crs = warped.crs
    assert torch.equal(later[:]["image"], sample["image"])


def test_mixed_pixel_sizes_must_be_allowed(write_raster):
    fine = write_raster("fine.tif", pixel_size=0.1)
    coarse = write_raster("later/coarse.tif", pixel_size=0.2, origin=(500_000, ORIGIN[1]))
    with pytest.raises(
        DataError,
        match=r"fine\.tif has 0.1 x 0.1.*coarse\.tif has 0.2.*allow_mixed_resolution.*mixed_resolution: true",
    ):
        SceneDataset(fine.parent)
    dataset = SceneDataset(fine.parent, allow_mixed_resolution=True)
    assert dataset.res == (0.1, 0.1)
    x, y = 500_005.0, ORIGIN[1] - 4.0
    sample = dataset[slice(x - 1, x + 1), slice(y - 1, y + 1)]
    np.testing.assert_array_equal(sample["image"], read(coarse)[:, 10:30, 15:35])
    assert SceneDataset(fine.parent, res=0.2)[slice(x - 1, x + 1), slice(y - 1, y + 1)]["image"].shape == (
        3,
        10,
        10,
    )


def test_slightly_different_pixel_sizes_are_one(write_raster):
    write_raster("a.tif", pixel_size=0.2)
    path = write_raster("b.tif", pixel_size=0.2000001, origin=(500_000, ORIGIN[1]))
    dataset = SceneDataset(path.parent)
    np.testing.assert_array_equal(
        dataset[query(0, 0, 64, 48, 0.2, (500_000, ORIGIN[1]))]["image"], read(path)
    )


def test_too_few_bands(write_raster):
    path = write_raster(shape=(1, 8, 8))
    message = r"has 1 band; sensor 'aerial_rgb' needs 3 \(red, green, blue\)"
    with pytest.raises(DataError, match=message):
        SceneDataset(path)
    assert SceneDataset(path, bands=["red"])[:]["image"].shape == (1, 8, 8)


def test_labels_of_different_band_counts(write_raster):
    path = write_raster("a.tif", shape=(1, 8, 8))
    write_raster("b.tif", shape=(2, 8, 8))
    with pytest.raises(DataError, match="expected the same number"):
        SceneDataset(path.parent, is_image=False)


def test_statistics_for_another_dtype_are_doubted(write_raster):
    with pytest.warns(UserWarning, match="hold uint16.*'aerial_rgb' are for uint8"):
        SceneDataset(write_raster(dtype="uint16"))


def test_bad_input_is_named(write_raster, tmp_path):
    with pytest.raises(DataError, match="no raster found"):
        SceneDataset(tmp_path)
    with pytest.raises(RasterError, match="no such file"):
        SceneDataset(tmp_path / "absent.tif")
    path = write_raster()
    with pytest.raises(UnknownNameError, match="unknown sensor"):
        SceneDataset(path, sensor="landsat")
    with pytest.raises(UnknownNameError, match="unknown band"):
        SceneDataset(path, bands=["red", "swir"])
    with pytest.raises(GeoreferenceError, match="no coordinate reference system"):
        SceneDataset([path, write_raster("other.tif", crs=None)])


def test_dates_in_names_choose_scenes(write_raster):
    names = [f"m_1_se_14_1_{date}.tif" for date in ("20090818", "20150926")]
    paths = [
        write_raster(name, shape=(4, 16, 16), seed=i, pixel_size=HALF_METRE) for i, name in enumerate(names)
    ]
    dataset = SceneDataset(paths[0].parent, sensor="naip")
    place = query(0, 0, 16)
    for path, year in zip(paths, (2009, 2015), strict=True):
        times = slice(pd.Timestamp(year, 1, 1), pd.Timestamp(year, 12, 31))
        np.testing.assert_array_equal(dataset[(*place, times)]["image"], read(path))
    np.testing.assert_array_equal(dataset[place]["image"], read(paths[0]))
    with pytest.raises(IndexError):
        dataset[(*place, slice(pd.Timestamp(2010, 1, 1), pd.Timestamp(2011, 1, 1)))]
    drawn = {
        int(dataset[q]["image"][0, 0, 0])
        for q in ChipSampler(dataset, chip_size=16, chips_per_epoch=20, seed=0)
    }
    assert drawn == {int(read(path)[0, 0, 0]) for path in paths}


def test_impossible_date(write_raster):
    path = write_raster("m_1_se_14_1_20091399.tif", shape=(4, 8, 8))
    with pytest.raises(DataError, match="holds no date"):
        SceneDataset(path, sensor="naip")


def test_union_of_scenes_is_one_data_set(folder, three_zones):
    joined = SceneDataset(folder / "a.tif") | SceneDataset(folder / "b.tif")
    assert isinstance(joined, SceneDataset) and len(joined) == 2
    np.testing.assert_array_equal(joined[query(64, 0, 64, 48)]["image"], read(folder / "b.tif"))
    zones = SceneDataset(three_zones / "32616.tif") | SceneDataset(three_zones / "32617.tif")
    assert zones.crs.to_epsg() == 6933
    assert {
        int(zones[q]["image"][0, 0, 0]) for q in ChipSampler(zones, chip_size=8, chips_per_epoch=9, seed=0)
    } == {1, 2}


def test_union_and_intersection_with_others_data_sets(folder):
    ours = SceneDataset(folder / "a.tif")
    theirs = TorchgeoRgb(str(folder / "b.tif"), bands=TorchgeoRgb.all_bands)
    assert isinstance(ours | theirs, UnionDataset)
    over = TorchgeoRgb(str(folder / "a.tif"), bands=TorchgeoRgb.all_bands)
    sample = (over & ours)[query(4, 4, 16)]
    assert torch.equal(sample["image"][:3], sample["image"][3:])


def test_splits_of_torchgeo_work(folder):
    first, second = random_bbox_assignment(
        SceneDataset(folder), [0.5, 0.5], generator=torch.Generator().manual_seed(0)
    )
    assert len(first) + len(second) == 3
    for part in (first, second):
        for place in ChipSampler(part, chip_size=16, chips_per_epoch=4, seed=0):
            assert part[place]["valid"].any()


def test_copies_and_pickles_read_the_same(folder):
    dataset = SceneDataset(folder, transforms=None)
    place = query(4, 4, 16)
    expected = dataset[place]["image"]
    for other in (pickle.loads(pickle.dumps(dataset)), copy.copy(dataset), copy.deepcopy(dataset)):
        assert torch.equal(other[place]["image"], expected)
        assert other.crs == dataset.crs and other.dtype == torch.uint8


# A spawned worker imports everything anew, which takes it some seconds.
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_two_workers_read_what_one_process_reads(folder, context):
    dataset = SceneDataset(folder)
    chips = ChipSampler(dataset, chip_size=16, chips_per_epoch=8, seed=0)
    expected = torch.stack([dataset[place]["image"] for place in chips])  # opens files before the fork
    loader = DataLoader(dataset, batch_size=2, sampler=chips, num_workers=2, multiprocessing_context=context)
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), expected)


def test_open_files_are_limited_over_all_pools_of_a_process(monkeypatch):
    monkeypatch.setattr(catalog, "MAX_OPEN_SCENES", 2)
    monkeypatch.setattr(catalog.ReaderPool, "_pools", weakref.WeakSet())
    opened = []

    class Reader:
        def __init__(self, path):
            self.path, self.closed, self.open_bytes = path, False, 10
            opened.append(self)

        def close(self):
            self.closed = True

    pool, other = catalog.ReaderPool(Reader), catalog.ReaderPool(Reader)
    first = pool.get("a")
    other.get("b")
    assert pool.get("a") is first
    pool.get("c")  # b was used longest ago
    assert [(reader.path, reader.closed) for reader in opened] == [("a", False), ("b", True), ("c", False)]
    del other
    pool.get("d")
    assert [reader.closed for reader in opened] == [True, True, False, False]
    monkeypatch.setattr(catalog, "MAX_OPEN_BYTES", 15)
    pool.get("e")
    assert [reader.closed for reader in opened] == [True, True, True, True, False]


def test_transforms_are_applied(folder):
    dataset = SceneDataset(folder / "a.tif", transforms=lambda sample: {"sum": sample["image"].sum()})
    assert dataset[:]["sum"] == int(read(folder / "a.tif").sum())


def test_lookup_among_many_files(write_raster):
    dataset = SceneDataset(write_raster(shape=(3, 8, 8), pixel_size=1.0))
    (xmin, xmax), (ymin, ymax), _ = dataset._catalog.bounds
    many = pd.concat([dataset.index] * 2000)
    offsets = 8.0 * np.arange(2000)
    dataset.index = many.set_geometry(shapely.box(xmin + offsets, ymin, xmax + offsets, ymax), crs=many.crs)
    assert dataset._catalog.find((xmin + 801, ymin + 1, xmin + 805, ymin + 4), None, None) == [100]
    assert dataset._catalog.find((xmin + 806, ymin + 1, xmin + 813, ymin + 4), None, None) == [100, 101]
    assert dataset._catalog.nearest([99, 101, 105], xmin + 807, ymin) == 101


def test_real_plots_of_three_zones(data_root):
    dataset = SceneDataset(data_root / "neon_plots")
    assert len(dataset) == 115 and dataset.crs.to_epsg() == 6933
    for place in ChipSampler(dataset, chip_size=224, chips_per_epoch=6, seed=0):
        sample = dataset[place]
        assert sample["image"].shape == (3, 224, 224) and sample["valid"].float().mean() > 0.3


def test_real_flair_masks_of_a_local_crs(data_root):
    images = SceneDataset(data_root / "flair" / "image", sensor="flair")
    pairs = images & SceneDataset(data_root / "flair" / "mask", is_image=False)
    assert len(pairs) == len(images)
