"""Where chips of a source are drawn: by file, by class and by value of other rasters."""

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from dinov3geo.cli import main
from dinov3geo.data.drawing import DrawSettings
from dinov3geo.data.mixture import (
    DataSettings,
    SourceSettings,
    SuperblockSettings,
    chip_sampler,
    open_sources,
)
from dinov3geo.errors import ConfigError, UserError

BLOCKS = SuperblockSettings(size=64, chips_per_visit=4, shuffled_visits=2, lanes=1)


@pytest.fixture
def ground(write_raster, tmp_path):
    """A scene of which class 2 has 1/16, a smaller one of class 1, numbers above 0 in the east."""
    write_raster("s/a.tif", shape=(3, 256, 256), pixel_size=1.0)
    write_raster("s/b.tif", shape=(3, 64, 64), pixel_size=1.0, origin=(401_000.0, 3_280_000.0))
    labels = np.ones((256, 256), dtype="uint8")
    labels[:64, 128:192] = 2
    write_raster("labels.tif", array=labels, pixel_size=1.0, nodata=0)
    write_raster("labels_b.tif", array=labels[64:128, :64], pixel_size=1.0, origin=(401_000.0, 3_280_000.0))
    values = np.tile(np.repeat([0.0, 1.0], 128), (256, 1)).astype("float32") - np.float32(0.5)
    write_raster("values.tif", array=values, pixel_size=1.0)
    return tmp_path


def settings(root, draw, **more):
    source = SourceSettings(path="s", draw=DrawSettings.model_validate(draw))
    return DataSettings(root=root, sources=(source,), chip_size=32, workers=0, **more)


def corners(config, count=4096):
    """[n, 2] columns and rows of the chips' middles in the larger scene; NaN in the other one."""
    sampler = chip_sampler(open_sources(config), config, 8, seed=0, start=0, rank=0, world_size=1)
    keys = (key for _, keys in itertools.islice(sampler, count // 4) for key in keys)
    found = np.array(
        [((x.start + x.stop) / 2 - 400_000, 3_280_000 - (y.start + y.stop) / 2) for x, y in keys]
    )
    found[found[:, 0] > 500] = np.nan
    return found


@pytest.mark.parametrize("superblocks", [None, BLOCKS])
def test_every_class_is_drawn_as_often_as_asked(ground, superblocks):
    labels = {"by": "class", "rasters": "labels*.tif"}
    for shares, expected in ((None, 0.5), ({2: 9, 1: 1}, 0.9), ({2: 1}, 1.0)):
        x, y = corners(settings(ground, labels | {"shares": shares}, superblocks=superblocks)).T
        # Chips of 32 pixels whose middle lies 32 beside the square of 64: half a chip, half a cell.
        near = (x >= 128 - 32) & (x <= 192 + 32) & (y <= 64 + 32)
        assert near.mean() == pytest.approx(expected, abs=0.07)
        assert near.all() == (expected == 1.0)
    x, y = corners(settings(ground, {}, superblocks=superblocks)).T
    # The same ground by area: 128 of 224 columns and 80 of 224 rows of places.
    assert ((x >= 96) & (x <= 224) & (y <= 96)).mean() == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("superblocks", [None, BLOCKS])
def test_places_are_drawn_in_proportion_to_numbers(ground, superblocks):
    x, _ = corners(settings(ground, {"by": "value", "rasters": "values.tif"}, superblocks=superblocks)).T
    assert np.isfinite(x).all() and x.min() >= 128 - 32
    # Where chip and cell lie whole on the eastern half, every place is alike.
    assert x[x > 160].mean() == pytest.approx((160 + 240) / 2, abs=6)


@pytest.mark.parametrize("superblocks", [None, BLOCKS])
def test_files_alike(ground, superblocks):
    x, _ = corners(settings(ground, {"by": "file"}, superblocks=superblocks)).T
    assert np.isnan(x).mean() == pytest.approx(0.5, abs=0.07)


def test_the_order_can_be_resumed_and_shared(ground):
    config = settings(ground, {"by": "class", "rasters": "labels*.tif"}, superblocks=BLOCKS)
    data = open_sources(config)

    def take(start, count, rank=0, world_size=1):
        sampler = chip_sampler(data, config, 4, seed=3, start=start, rank=rank, world_size=world_size)
        return [repr(each) for each in itertools.islice(sampler, count)]

    whole = take(0, 300)
    assert take(131, 100) == whole[131:231] and len(set(whole)) > 290
    assert not set(take(0, 200, 0, 2)) & set(take(0, 200, 1, 2))


def test_scenes_of_several_reference_systems(write_raster, tmp_path):
    """In the equal-area plane positions run northwards; classes are found all the same."""
    for number, zone in enumerate((32617, 32611)):
        labels = np.ones((96, 96), dtype="uint8")
        labels[:32, :32] = 2 + number
        write_raster(f"s/{zone}.tif", shape=(3, 96, 96), pixel_size=1.0, crs=f"EPSG:{zone}")
        write_raster(f"l/{zone}.tif", array=labels, pixel_size=1.0, crs=f"EPSG:{zone}")
    config = settings(tmp_path, {"by": "class", "rasters": "l", "shares": {2: 1, 3: 1}})
    (data,) = open_sources(config)
    sampler = chip_sampler([data], config, 8, seed=0, start=0, rank=0, world_size=1)
    files = []
    for _, keys in itertools.islice(sampler, 100):
        _, _, grid = data.read_query(keys[0])
        west, _, _, north = grid.bounds
        # The whole chip or a part of it shows the square of 32 in the upper left corner, give or take a cell.
        assert west < 400_000 + 48 and north > 3_280_000 - 48
        files += data.paths_at(keys[0])
    assert 0.3 < sum("32617" in name for name in files) / 100 < 0.7


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ({"by": "class"}, "draw by class needs `rasters`"),
        ({"by": "value"}, "draw by value needs `rasters`"),
        ({"by": "file", "rasters": "x"}, "`rasters` is for draw by class or value, not by file"),
        ({"by": "value", "rasters": "x", "shares": {1: 1}}, "`shares` is for draw by class, not by value"),
        ({"by": "class", "rasters": "x", "shares": {1: 0}}, "at least 0 and not all 0"),
        ({"by": "class", "rasters": "x", "shares": {}}, "at least 0 and not all 0"),
        ({"by": "class", "rasters": "x", "shares": {1: float("inf")}}, "must be finite"),
        ({"by": "size"}, "'area', 'file', 'class' or 'value'"),
    ],
)
def test_keys_that_do_not_go_together(draw, message):
    with pytest.raises(ValidationError, match=message):
        DrawSettings.model_validate(draw)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ({"by": "class", "rasters": "absent.tif"}, r"no such file or folder: .*absent\.tif"),
        ({"by": "class", "rasters": "s"}, "needs rasters of one band"),
        ({"by": "class", "rasters": "values.tif"}, r"needs whole numbers; values\.tif"),
        (
            {"by": "class", "rasters": "labels*.tif", "shares": {7: 1}},
            "holds no 7 on these scenes, only 1, 2",
        ),
        ({"by": "class", "rasters": "far.tif"}, r"far\.tif lies nowhere on the scenes"),
        ({"by": "value", "rasters": "none.tif"}, "holds no number above 0"),
    ],
)
def test_rasters_that_cannot_weigh(ground, write_raster, draw, message):
    write_raster("far.tif", shape=(1, 8, 8), origin=(100_000.0, 3_280_000.0))
    write_raster("none.tif", array=np.zeros((256, 256), dtype="int16"), pixel_size=1.0)
    with pytest.raises(UserError, match=message) as caught:
        open_sources(settings(ground, draw))
    assert "\n" not in str(caught.value)


def test_draw_is_for_scenes_that_no_table_weighs(ground, tmp_path):
    source = SourceSettings(path="s", kind="images", draw=DrawSettings(by="file"))
    with pytest.raises(ConfigError, match="draw is for scenes, not for kind: images"):
        open_sources(DataSettings(root=ground, sources=(source,)))


def test_pretraining_from_yaml(ground, tmp_path, capsys):
    head = "{prototypes: 32, hidden: 16, bottleneck: 8}"
    text = (
        f"steps: 2\nbatch_size: 2\nthreads: 1\nmodel: {{variant: vit_tiny}}\n"
        f"data:\n  root: {ground}\n  chip_size: 48\n  workers: 0\n  sources:\n"
        "  - path: s\n    draw: {by: class, rasters: labels.tif, shares: {1: 1, 2: 3}}\n"
        "crops: {global_size: 32, local_size: 16, local_count: 1}\n"
        f"losses: {{dino_head: {head}, ibot_head: {head}}}\n"
    )
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert main(["pretrain", str(config), "--out", str(tmp_path / "run")]) == 0
    config.write_text(text.replace("by: class", "by: klass"))
    assert main(["pretrain", str(config), "--out", str(tmp_path / "other")]) == 2
    assert "klass" in capsys.readouterr().err and not (tmp_path / "other").exists()
    config.write_text(text.replace("{1: 1, 2: 3}", "{4: 1}"))
    assert main(["pretrain", str(config), "--out", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "holds no 4 on these scenes" in error and "Traceback" not in error
    assert not (tmp_path / "other").exists()
