"""Splits by place: who owns which ground, and that no pixel crosses over."""

import json

import geopandas
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3geo.cli import main
from dinov3geo.data import splits
from dinov3geo.data.areas import Area, read_area
from dinov3geo.data.mixture import DataSettings, SourceSettings, chip_loader, open_sources
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import ConfigError, DataError, RasterError, UnknownNameError
from dinov3geo.rasters.reader import find_rasters, inspect_scene


@pytest.fixture
def scenes(write_raster, tmp_path):
    """Three scenes of 100 m: two that overlap, one apart; each pixel of 1 m holds its own column and row."""
    rows, cols = np.mgrid[:100, :100]
    array = np.stack([rows, cols, np.full((100, 100), 7)]).astype("uint8")
    for name, x in (("a", 0), ("b", 60), ("c", 400)):
        write_raster(f"s/{name}.tif", array=array, pixel_size=1.0, origin=(500_000 + x, 4_000_000))
    return tmp_path / "s"


def split(scenes, output, *more):
    return main(["split", str(scenes), "-o", str(output), *map(str, more)])


def areas(path):
    frame = geopandas.read_file(path)
    return {name: shapely.union_all(part.geometry.to_numpy()) for name, part in frame.groupby("split")}


def test_blocks_keep_their_distance_and_shares(scenes, tmp_path, capsys):
    output = tmp_path / "o" / "s.gpkg"
    assert split(scenes, output, "--block", 20, "--buffer", 5, "--shares", "train=0.6,val=0.2,test=0.2") == 0
    assert "scenes touched" in capsys.readouterr().out
    frame = geopandas.read_file(output, layer="splits")
    assert frame.crs.to_epsg() == 32617 and list(output.parent.iterdir()) == [output]
    found = areas(output)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert found[one].distance(found[other]) >= 5 - 1e-9
    ground = splits.find_ground([str(scenes)]).union
    share = found["test"].intersection(ground).area / ground.area
    # The one named last loses nothing to the buffer.
    assert share == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("superblocks", [None, {"size": 64}])
def test_no_chip_shows_another_splits_ground(scenes, tmp_path, superblocks):
    output = tmp_path / "s.gpkg"
    assert split(scenes, output, "--block", 25, "--buffer", 4, "--shares", "train=0.5,test=0.5") == 0
    seen, found = {"train": 0, "test": 0}, areas(output)
    for name in ("train", "test"):
        config = DataSettings(
            root=scenes,
            chip_size=16,
            workers=0,
            superblocks=superblocks,
            sources=(SourceSettings(split=f"{output}#{name}"),),
        )
        (dataset,) = open_sources(config)
        sampler = chip_loader([dataset], config, batch_size=50, seed=0)
        assert next(sampler)["valid"].any()
        for query in _queries(dataset, 100):
            _, valid, grid = dataset.read_query(query)
            rows, cols = np.nonzero(valid)
            x, y = grid.transform @ (cols + 0.5, rows + 0.5)
            assert shapely.contains_xy(found[name], x, y).all()
            seen[name] += len(x)
    assert found["train"].distance(found["test"]) >= 4 and min(seen.values()) > 1000


def _queries(dataset, count):
    from itertools import islice

    from dinov3geo.data.sampling import ChipSampler

    sampler = ChipSampler(dataset, chip_size=16, chips_per_epoch=count, seed=1)
    return islice(sampler.stream(), count)


def test_files_that_overlap_stay_together(scenes, tmp_path):
    output = tmp_path / "s.gpkg"
    assert split(scenes, output, "--by", "files", "--shares", "train=0.5,test=0.5") == 0
    frame = geopandas.read_file(output)
    owner = {path.rsplit("/", 1)[-1]: name for path, name in zip(frame.path, frame.split, strict=True)}
    assert owner["a.tif"] == owner["b.tif"] != owner["c.tif"]
    # Wherever scenes are asked for, the split stands for its files.
    listed = find_rasters(f"{output}#{owner['c.tif']}")
    assert [path.name for path in listed] == ["c.tif"]
    assert len(SceneDataset(f"{output}#{owner['a.tif']}").files) == 2
    # A buffer as wide as the gap joins all three.
    assert split(scenes, output, "--by", "files", "--buffer", 250, "--overwrite") == 2


def test_polygons_of_a_user(scenes, tmp_path, capsys):
    aoi, output = tmp_path / "aoi.gpkg", tmp_path / "s.gpkg"
    triangle = shapely.Polygon([(500_010, 3_999_990), (500_050, 3_999_990), (500_010, 3_999_950)])
    frame = geopandas.GeoDataFrame({"use": ["hold"]}, geometry=[triangle], crs="EPSG:32617").to_crs(4326)
    frame.to_file(aoi)
    assert split(scenes, output, "--by", "polygons", "--polygons", aoi, "--buffer", 3) == 0
    found = areas(output)
    assert found["test"].area == pytest.approx(triangle.area, rel=1e-3)
    assert found["train"].distance(found["test"]) == pytest.approx(3, abs=0.01)
    test = SceneDataset(scenes, area=read_area(f"{output}#test"))
    valid = np.zeros((40, 40), dtype=bool)
    _, valid, _ = test.read_query((slice(500_010, 500_050), slice(3_999_950, 3_999_990)))
    assert valid.sum() == pytest.approx(triangle.area, rel=0.05) and valid[0, 0] and not valid[-1, -1]
    assert split(scenes, output, "--by", "polygons", "--polygons", aoi, "--column", "use", "--overwrite") == 0
    assert set(areas(output)) == {"hold"}
    assert (
        split(scenes, output, "--by", "polygons", "--polygons", aoi, "--column", "usage", "--overwrite") == 2
    )
    assert "no column 'usage'; it has use" in capsys.readouterr().err


def test_an_area_in_another_zone_masks_the_same_ground(write_raster, tmp_path):
    for name, crs, origin in (
        ("a", "EPSG:32617", (500_000, 4_000_000)),
        ("b", "EPSG:32616", (500_000, 4_000_000)),
    ):
        write_raster(f"z/{name}.tif", shape=(3, 60, 60), pixel_size=10.0, crs=crs, origin=origin)
    box = shapely.box(500_100, 3_999_700, 500_300, 3_999_900)
    area = Area([box], "EPSG:32617", "box")
    dataset = SceneDataset(tmp_path / "z", area=area)
    assert [path.rsplit("/", 1)[-1] for path in dataset.index.filepath] == ["a.tif"]
    info = inspect_scene(tmp_path / "z" / "a.tif")
    _, valid = dataset.read_window(info.path, 0, 0, (60, 60))
    expected = np.zeros((60, 60), dtype=bool)
    expected[10:30, 10:30] = True
    np.testing.assert_array_equal(valid, expected)


@settings(max_examples=30)
@given(
    sizes=st.lists(st.floats(0.5, 2), min_size=3, max_size=60),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (0.34, 0.33, 0.33)]),
    seed=st.integers(0, 9),
)
def test_every_part_has_one_owner_and_every_split_a_part(sizes, shares, seed):
    owner = splits._deal(np.array(sizes), np.array(shares), np.random.default_rng(seed))
    assert set(owner.tolist()) == set(range(len(shares)))
    given_out = np.bincount(owner, weights=sizes, minlength=len(shares)) / np.sum(sizes)
    assert np.abs(given_out - shares).max() <= 2 * max(sizes) / np.sum(sizes) + 1e-9


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--by", "blox"), "unknown way to split"),
        (("--shares", "train=0.9"), "add up to 1"),
        (("--shares", "train"), "must look like"),
        (("--shares", "a=0.5,a=0.5"), "a name of its own"),
        (("--block", "1000"), "do not suffice"),
        (("--block", "30", "--buffer", "500"), "nothing is left"),
        (("--block", "0.001"), "over a million"),
        (("--by", "polygons"), "needs --polygons"),
        (("--polygons", "x.gpkg"), "no other way takes it"),
        (("--by", "polygons", "--polygons", "x.gpkg"), "no such file: x.gpkg"),
    ],
)
def test_bad_input_is_one_line(more, message, scenes, tmp_path, capsys):
    output = tmp_path / "s.gpkg"
    assert split(scenes, output, *more) == 2
    assert message in capsys.readouterr().err and not output.exists()


def test_splits_that_are_not_there(scenes, tmp_path):
    output = tmp_path / "s.gpkg"
    assert split(scenes, output, "--block", 40, "--shares", "train=0.5,test=0.5") == 0
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        read_area(f"{output}#trian")
    with pytest.raises(DataError, match="not made with --by files"):
        find_rasters(f"{output}#train")
    with pytest.raises(RasterError, match="no such file"):
        find_rasters(f"{tmp_path}/none.gpkg#train")
    text = tmp_path / "text.gpkg"
    text.write_text(json.dumps({}))
    with pytest.raises(DataError, match="cannot be read"):
        read_area(f"{text}#a")
    config = DataSettings(root=scenes, sources=(SourceSettings(kind="images", split=f"{output}#train"),))
    with pytest.raises(ConfigError, match="split is for scenes"):
        open_sources(config)
    far = Area([shapely.box(0, 0, 1, 1)], "EPSG:32617", "far")
    with pytest.raises(DataError, match="no scene reaches into far"):
        SceneDataset(scenes, area=far)


def test_lists_of_files(scenes, tmp_path):
    listed = scenes / "few.txt"
    listed.write_text("# two of them\na.tif\n\nc.tif\n")
    assert [p.name for p in find_rasters(listed)] == ["a.tif", "c.tif"]
    listed.write_text("a.tif\nz.tif\n")
    with pytest.raises(RasterError, match=r"few.txt names .*z.tif, which does not exist"):
        find_rasters(listed)
    listed.write_text("\n")
    with pytest.raises(DataError, match="names no raster"):
        find_rasters(listed)
