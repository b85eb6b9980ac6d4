"""Tests of the orders in which chips are drawn."""

from itertools import islice

import numpy as np
import pytest
from rasterio.windows import Window
from torch.utils.data import DataLoader
from torchgeo.samplers import GeoSampler, RandomPatchSampler

from dinov3geo.data.sampling import ChipSampler, IndexSampler, SuperblockSampler
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import DataError
from dinov3geo.rasters.reader import aligned_window, inspect_scene


@pytest.fixture
def scenes(write_raster):
    """One large scene, one of a quarter of its area and one smaller than a chip of 16."""
    large = write_raster("a.tif", shape=(3, 64, 80), pixel_size=0.5)
    write_raster("b.tif", shape=(3, 32, 40), pixel_size=0.5, origin=(400_100, 3_280_000))
    write_raster("c.tif", shape=(3, 10, 64), pixel_size=0.5, origin=(400_300, 3_280_000))
    return SceneDataset(large.parent)


def take(sampler, count, start=0):
    return list(islice(sampler.stream(start), count))


def chips(dataset, **changes):
    return ChipSampler(dataset, **{"chip_size": 16, "chips_per_epoch": 12, "seed": 3, **changes})


def windows(dataset, queries):
    """For each query the scene's number and the window in its pixels."""
    infos = [inspect_scene(path) for path in dataset.files]
    for query in queries:
        grid = dataset.read_query(query)[2]
        for number, info in enumerate(infos):
            window = aligned_window(info.grid, grid)
            overlaps = (
                window is not None
                and -window.width < window.col_off < info.grid.width
                and -window.height < window.row_off < info.grid.height
            )
            if overlaps:
                yield number, window


def test_every_place_and_scene_gets_its_share(scenes):
    drawn = list(windows(scenes, take(chips(scenes, chips_per_epoch=4000), 4000)))
    assert len(drawn) == 4000
    share = np.bincount([number for number, _ in drawn]) / 4000
    area = np.array([64 * 80, 32 * 40, 10 * 64])
    np.testing.assert_allclose(share, area / area.sum(), atol=0.03)
    rows, cols = np.array([(w.row_off, w.col_off) for number, w in drawn if number == 0]).T
    assert (rows.min(), rows.max()) == (0, 48) and (cols.min(), cols.max()) == (0, 64)
    assert np.bincount(rows).min() > 25 and np.bincount(cols).min() > 15
    small = {(w.row_off, w.col_off) for number, w in drawn if number == 2}
    assert {row for row, _ in small} == {-3} and len({col for _, col in small}) == 49


def test_scene_smaller_than_the_chip_is_padded(write_raster):
    dataset = SceneDataset(write_raster(shape=(3, 10, 12), pixel_size=0.5))
    query = next(chips(dataset, chips_per_epoch=1).stream())
    sample = dataset[query]
    assert sample["image"].shape == (3, 16, 16) and int(sample["valid"].sum()) == 120
    assert list(windows(dataset, [query])) == [(0, Window(-2, -3, 16, 16))]


def test_far_scenes_cost_no_time(write_raster):
    """A search by rejection would need some 10^9 points for each chip."""
    write_raster("a.tif", pixel_size=0.1)
    path = write_raster("b.tif", pixel_size=0.1, crs="EPSG:32610")
    dataset = SceneDataset(path.parent)
    sampler = chips(dataset, chips_per_epoch=64)
    assert all(dataset[query]["valid"].all() for query in take(sampler, 64))


def test_stream_can_be_resumed_anywhere(scenes):
    sampler = chips(scenes)
    whole = take(sampler, 40)
    for start in (0, 1, 11, 12, 13, 30):
        assert take(chips(scenes), 40 - start, start) == whole[start:]
    assert whole[:12] != whole[12:24]
    assert take(chips(scenes, seed=4), 12) != whole[:12]


def test_ranks_share_one_sequence(scenes):
    whole = take(chips(scenes), 42)
    for world_size in (2, 3, 5):
        shares = [
            take(chips(scenes, rank=rank, world_size=world_size), 42 // world_size)
            for rank in range(world_size)
        ]
        interleaved = [query for group in zip(*shares, strict=True) for query in group]
        assert interleaved == whole[: len(interleaved)]


def test_epochs_are_parts_of_the_stream(scenes):
    sampler = chips(scenes, rank=1, world_size=3)
    assert isinstance(sampler, GeoSampler) and len(sampler) == 4
    stream = take(sampler, 8)
    assert list(sampler) == stream[:4] == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == stream[4:]


def test_torchgeos_sampler_never_sees_the_rim(scenes):
    """Why we do not use it; if this fails, torchgeo has changed and we may."""
    drawn = windows(scenes, RandomPatchSampler(scenes, size=16, length=500, generator=0))
    rows = [window.row_off for number, window in drawn if number == 0]
    assert min(rows) > 0 and max(rows) < 48


def test_any_torchgeo_data_set_will_do(scenes):
    class Bare:
        index, crs, res = scenes.index, scenes.crs, scenes.res

    assert take(chips(Bare()), 5) == take(chips(scenes), 5)


def test_indexes_are_permutations(scenes):
    sampler = IndexSampler(range(10), seed=1)
    stream = take(sampler, 30)
    for epoch in range(3):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]
    assert take(sampler, 13, start=17) == stream[17:]
    halves = [take(IndexSampler(range(10), seed=1, rank=rank, world_size=2), 15) for rank in (0, 1)]
    assert [index for pair in zip(*halves, strict=True) for index in pair] == stream


def test_impossible_samplers(scenes):
    with pytest.raises(DataError, match="rank must lie in 0..1"):
        IndexSampler(range(10), seed=0, rank=2, world_size=2)
    with pytest.raises(DataError, match="do not suffice for 4 processes"):
        IndexSampler(range(3), seed=0, world_size=4)
    with pytest.raises(DataError, match="at least 1 pixel"):
        chips(scenes, chip_size=0)


def blocks(dataset, **changes):
    small = {"superblock": 20, "chips_per_visit": 4, "shuffled_visits": 3}
    return SuperblockSampler(
        dataset, **{"chip_size": 16, "chips_per_epoch": 48, "seed": 3, **small, **changes}
    )


def test_superblocks_give_every_place_and_scene_its_share(scenes):
    drawn = list(windows(scenes, take(blocks(scenes, chips_per_epoch=12_000), 12_000)))
    share = np.bincount([number for number, _ in drawn]) / 12_000
    area = np.array([64 * 80, 32 * 40, 10 * 64])
    np.testing.assert_allclose(share, area / area.sum(), atol=0.03)
    rows, cols = np.array([(w.row_off, w.col_off) for number, w in drawn if number == 0]).T
    assert (rows.min(), rows.max()) == (0, 48) and (cols.min(), cols.max()) == (0, 64)
    per_row = np.bincount(rows) / len(rows) * 49
    assert 0.6 < per_row.min() and per_row.max() < 1.5


def test_chips_of_a_visit_lie_in_one_superblock_and_are_mixed_with_others(scenes):
    """Each lane's groups of 3 visits hold 4 chips each of at most 3 superblocks."""
    lanes, batch = 2, 4
    drawn = list(windows(scenes, take(blocks(scenes, lanes=lanes, batch_size=batch, seed=1), 48)))
    cells = [(number, max(w.row_off, 0) // 20, max(w.col_off, 0) // 20) for number, w in drawn]
    of_lane = [[cells[i] for i in range(48) if i // batch % lanes == lane] for lane in range(lanes)]
    for lane in of_lane:
        for start in range(0, len(lane), 12):
            assert len(set(lane[start : start + 12])) <= 3
    assert len(set(cells[:4])) > 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_workers_and_resume_of_superblocks(scenes, world_size):
    whole = take(blocks(scenes), 96)
    assert len({repr(query) for query in whole[:48]}) > 40
    options = {"world_size": world_size, "lanes": 2, "batch_size": 3}
    ranks = [blocks(scenes, rank=rank, **options) for rank in range(world_size)]
    streams = [take(sampler, 96 // world_size) for sampler in ranks]
    assert len({repr(query) for stream in streams for query in stream}) > 80
    for sampler, stream in zip(ranks, streams, strict=True):
        assert take(sampler, 10, start=31) == stream[31:41]
        sampler.set_epoch(1)
        assert list(sampler) == stream[len(sampler) :][: len(sampler)]


def test_two_ranks_of_two_workers_read_disjoint_chips_that_cover_the_epoch(scenes):
    """Through the DataLoader: together they read every position of the epoch once."""
    everything = []
    for rank in range(2):
        sampler = blocks(scenes, rank=rank, world_size=2, lanes=2, batch_size=3)
        loader = DataLoader(scenes, batch_size=3, sampler=sampler, num_workers=2)
        everything += [tuple(bounds.tolist()) for batch in loader for bounds in batch["bounds"]]
    sampler = blocks(scenes, rank=0, world_size=2, lanes=2, batch_size=3)
    epoch = sampler._draw(np.random.default_rng([3, 0]))
    expected = [tuple(scenes[epoch[i]]["bounds"].tolist()) for i in range(48)]
    assert sorted(everything) == sorted(expected)


def test_weights_of_scenes(scenes):
    def share(weights):
        drawn = windows(scenes, take(chips(scenes, chips_per_epoch=900, weights=weights), 900))
        return np.bincount([number for number, _ in drawn], minlength=3) / 900

    np.testing.assert_allclose(share("file"), [1 / 3] * 3, atol=0.06)
    np.testing.assert_allclose(share([0, 3, 1]), [0, 0.75, 0.25], atol=0.06)
    for weights, message in (
        ([1, 2], "2 weights for 3 scenes"),
        ([0, 0, 0], "not all 0"),
        ("size", "'area'"),
    ):
        with pytest.raises(DataError, match=message):
            chips(scenes, weights=weights)
    with pytest.raises(DataError, match="lanes must be at least 1"):
        blocks(scenes, lanes=0)
