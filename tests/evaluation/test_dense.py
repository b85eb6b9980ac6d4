"""Dense benchmarks: folders, georeferenced pairs, torchgeo, against naive sums; bad input in one line."""

import json

import geopandas
import numpy as np
import pytest
import shapely
import torch
import yaml
from PIL import Image

from dinov3geo import cli
from dinov3geo.config import load_model
from dinov3geo.evaluation.dense import DenseSettings, evaluate_dense, splits_of
from dinov3geo.evaluation.dense_encoders import ColourMaps, Lattice, RandomMaps, make_dense_encoders
from dinov3geo.evaluation.dense_sets import (
    DenseImage,
    DenseSource,
    decode_target,
    load_dense_set,
    read_numbers,
)
from dinov3geo.evaluation.named_encoders import Input
from dinov3geo.evaluation.results import read_rows
from dinov3geo.heads.base import Head, OutputSpec
from dinov3geo.heads.fit import FitSample, FitView

FIT = {"epochs": 3, "warmup_share": 0.0}
CLASSES = {"classes": [{"name": "dark", "values": 1}, {"name": "bright", "values": 7}], "ignore": [0]}


def scene(generator, side=64):
    """A picture of dark and bright blocks of 16 pixels, and which block is bright."""
    bright = generator.random((side // 16, side // 16)) < 0.5
    bright.flat[:2] = (True, False)
    wide = bright.repeat(16, 0).repeat(16, 1)
    picture = generator.integers(0, 60, (side, side, 3)) + 150 * wide[..., None]
    return picture.astype(np.uint8), wide


@pytest.fixture
def folder(tmp_path):
    """Train and test pictures with masks, named in the manner of iSAID."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for sub in ("images", "masks"):
            (tmp_path / "set" / part / sub).mkdir(parents=True)
        for number in range(count):
            picture, wide = scene(generator)
            mask = np.where(wide, 7, 1).astype(np.uint8)
            mask[:2] = 0
            Image.fromarray(picture).save(tmp_path / "set" / part / "images" / f"P{number}.png")
            Image.fromarray(mask).save(tmp_path / "set" / part / "masks" / f"P{number}_mask.png")
    return tmp_path / "set"


def folder_source(root, **changes):
    return {
        "root": str(root),
        "parts": {
            "train": {"images": "train/images/*", "targets": "train/masks/*"},
            "test": {"images": "val/images/*", "targets": "val/masks/*"},
        },
        "target_key": r"(P\d+)_mask",
        "image_key": r"(P\d+)\.png",
        "classes": CLASSES,
    } | changes


def write_config(path, source, **settings):
    task = "segmentation" if "classes" in source else "regression"
    settings = {"class_fit": FIT, "quantity_fit": FIT, "resamples": 20} | settings
    content = {"name": "set", "task": task, "dense": source, "dense_settings": settings}
    path.write_text(yaml.safe_dump(content))
    return path


def run(capsys, *words):
    code = cli.main(["benchmark", *(str(w) for w in words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_folders_of_masks_and_a_second_run_that_goes_on(folder, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", folder_source(folder), heads=["linear", "dpt"], channels=8)
    words = (config, "-o", tmp_path / "out", "--cache", tmp_path / "cache", "--backbone", "colours")
    words = (*words, "--backbone", "vit-tiny-aerial")
    code, out, _ = run(capsys, *words)
    assert code == 0 and "miou" in out and "dpt" in out
    rows = read_rows(tmp_path / "out" / "results.json")
    found = {(r.encoder, r.method): r for r in rows if r.main}
    assert len(found) == 4
    colours = found["colour statistics", "linear"]
    assert colours.value > 0.7 and colours.low <= colours.value <= colours.high
    assert set(colours.details["iou"]) == {"dark", "bright"} and colours.details["places"] == 3
    code, _, err = run(capsys, *words)
    assert code == 0 and "4 parts were finished before" in err
    assert read_rows(tmp_path / "out" / "results.json") == rows
    # A changed picture makes all of it anew.
    Image.fromarray(scene(np.random.default_rng(9))[0]).save(folder / "train" / "images" / "P0.png")
    assert "finished before" not in run(capsys, *words)[2]


def test_georeferenced_masks_with_folds_by_place(tmp_path, write_raster, capsys):
    generator = np.random.default_rng(0)
    for number in range(4):
        picture, wide = scene(generator)
        # The last two overlap, so they are one place.
        origin = (400_000.0 + 1000 * min(number, 2) + number, 3_280_000.0)
        write_raster(f"image/{number}.tif", array=picture.transpose(2, 0, 1), pixel_size=1.0, origin=origin)
        mask = np.where(wide, 7, 1).astype(np.uint8)
        write_raster(f"mask/{number}.tif", array=mask, pixel_size=1.0, origin=origin)
    source = {"root": str(tmp_path), "kind": "pairs", "classes": CLASSES}
    config = write_config(tmp_path / "c.yaml", source, folds=3)
    words = (config, "-o", tmp_path / "out", "--cache", tmp_path, "--backbone", "colours")
    assert run(capsys, *words)[0] == 0
    (row,) = [r for r in read_rows(tmp_path / "out" / "results.json") if r.main]
    assert row.details["places"] == 3 and row.details["images"] == 4 and len(row.details["epochs_kept"]) == 3
    assert row.value > 0.7
    code, _, err = run(capsys, *words, "--set", "dense_settings.folds=4")
    assert code == 2 and "3 separate places" in err


def test_heights_with_a_factor_and_the_parts_of_polygons(tmp_path, write_raster, capsys):
    generator = np.random.default_rng(0)
    boxes, words = [], []
    for number in range(6):
        picture, wide = scene(generator)
        origin = (400_000.0 + 1000 * number, 3_280_000.0)
        write_raster(f"image/{number}.tif", array=picture.transpose(2, 0, 1), pixel_size=1.0, origin=origin)
        decimetres = np.where(wide[::4, ::4], 200, 20).astype(np.int16)
        decimetres[0, 0], decimetres[0, 1] = -999, -3
        write_raster(f"mask/{number}.tif", array=decimetres, pixel_size=4.0, origin=origin)
        boxes.append(shapely.box(origin[0], origin[1] - 64, origin[0] + 64, origin[1]))
        words.append(("train", "train", "train", "val", "test", "elsewhere")[number])
    table = geopandas.GeoDataFrame({"split": words}, geometry=boxes, crs="EPSG:32617")
    table.to_crs(4326).to_file(tmp_path / "split.geojson", driver="GeoJSON")
    source = {
        "root": str(tmp_path),
        "kind": "pairs",
        "regions": {"file": "split.geojson"},
        "quantity": {"scale": 0.1, "maximum": 60, "slack": 1},
    }
    fit = FIT | {"epochs": 40, "learning_rate": 0.2}
    config = write_config(tmp_path / "c.yaml", source, quantity_fit=fit, main="rmse")
    words = (config, "-o", tmp_path / "out", "--cache", tmp_path, "--backbone", "colours")
    assert run(capsys, *words)[0] == 0
    rows = read_rows(tmp_path / "out" / "results.json")
    assert [r.metric for r in rows] == ["rmse", "mae", "r2", "bias"] and rows[0].main
    assert rows[0].details["images"] == 5 and rows[0].details["places"] == 1
    assert rows[2].value > 0.5
    images = load_dense_set(DenseSource(**source), name="x", max_window=512)
    one = images.load(0)
    assert one.factor == 4 and not one.known[0, 0] and one.known[0, 1] and one.target[0, 1] == 0
    assert one.target[one.known].max() == pytest.approx(20)
    code, _, err = run(capsys, *words, "--set", "dense.regions.column=part")
    assert code == 2 and "unknown column of" in err


def test_torchgeo_by_name(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for part, count in (("Train", 4), ("Val", 2)):
        for place in ("Urban", "Rural"):
            folder = tmp_path / part / place
            for sub in ("images_png", "masks_png"):
                (folder / sub).mkdir(parents=True)
            for number in range(count):
                picture, wide = scene(generator)
                Image.fromarray(picture).save(folder / "images_png" / f"{place}{number}.png")
                mask = np.where(wide, 7, 1).astype(np.uint8)
                Image.fromarray(mask).save(folder / "masks_png" / f"{place}{number}.png")
    source = {"root": str(tmp_path), "kind": "torchgeo", "dataset": "LoveDA", "classes": CLASSES}
    source["splits"] = {"train": "train", "test": "val"}
    config = write_config(tmp_path / "c.yaml", source)
    words = (config, "-o", tmp_path / "out", "--cache", tmp_path, "--backbone", "colours")
    assert run(capsys, *words)[0] == 0
    (row,) = [r for r in read_rows(tmp_path / "out" / "results.json") if r.main]
    assert row.value > 0.7 and row.details["places"] == 4
    code, _, err = run(capsys, *words, "--set", "dense.target_name=height")
    assert code == 2 and "unknown key of torchgeo's LoveDA" in err
    code, _, err = run(capsys, *words, "--set", "dense.dataset=LoveDAA")
    assert code == 2 and "did you mean 'LoveDA'" in err


class Constant(Head):
    """Gives the mean of its first map."""

    def __init__(self):
        super().__init__()
        self.output = OutputSpec("quantity", minimum=0.0, maximum=100.0)
        self.own = torch.nn.Parameter(torch.zeros(1))

    def forward(self, feature_maps, size_hw):
        return feature_maps[0].mean((1, 2, 3))[:, None, None, None].expand(-1, 1, *size_hw) + self.own


def test_scores_of_a_quantity_equal_naive_sums(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for value in (1.0, 5.0, 9.0):
        target = torch.rand(8, 8, generator=generator) * 10
        known = torch.rand(8, 8, generator=generator) < 0.7
        view = FitView((torch.full((2, 1, 1), value),), (8, 8), target, known)
        samples.append([FitSample((view,), 1, str(value))])
    images = type(
        "Set", (), {"groups": ("1", "5", "9"), "classes": (), "name": "x", "__len__": lambda s: 3}
    )()
    monkeypatch.setattr(
        "dinov3geo.evaluation.dense._fit", lambda *a, **k: (Constant(), type("R", (), {"best_epoch": 0}))
    )
    source = DenseSource(root=".", quantity={"maximum": 100})
    split = [(np.array([], dtype=np.int64), np.arange(3))]
    found = evaluate_dense(
        samples, images, source, DenseSettings(), "linear", split, device=torch.device("cpu")
    ).scores
    truth = torch.cat([s[0].views[0].target[s[0].views[0].valid] for s in samples]).double().numpy()
    guess = np.concatenate(
        [np.full(int(s[0].views[0].valid.sum()), float(s[0].views[0].maps[0].mean())) for s in samples]
    )
    off = guess - truth
    assert found["mae"].value == pytest.approx(np.abs(off).mean())
    assert found["rmse"].value == pytest.approx(np.sqrt((off**2).mean()))
    assert found["bias"].value == pytest.approx(off.mean())
    assert found["r2"].value == pytest.approx(1 - (off**2).sum() / ((truth - truth.mean()) ** 2).sum())


def test_maps_of_the_baselines_equal_loops():
    numbers = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 40, 56)).astype(np.uint8))
    valid = torch.ones(40, 56, dtype=torch.bool)
    target = torch.zeros(40, 56, dtype=torch.uint8)
    image = DenseImage(numbers, valid, target, valid)
    (colours,) = ColourMaps(Lattice())(image)
    assert colours.shape == (6, 3, 4)
    cell = numbers[:, :16, 16:32].float()
    torch.testing.assert_close(colours[:3, 0, 1], cell.mean((1, 2)))
    torch.testing.assert_close(colours[3:, 0, 1], cell.std((1, 2), correction=0), rtol=1e-4, atol=1e-3)
    encoder = RandomMaps(Lattice(), seed=1)
    images = type("Set", (), {"read": lambda s, i: numbers, "stamp": "x", "bands": ("a", "b", "c")})()
    encoder.prepare(images, np.arange(1))
    (maps,) = encoder(image)
    assert maps.shape == (512, 3, 4)
    # An inner cell sees no rim: the mean of torchgeo's own responses there.
    whole = encoder._filters(numbers[None, :, 14:34, 14:34].float())[0]
    torch.testing.assert_close(maps[:, 1, 1], whole, rtol=1e-4, atol=1e-5)


def test_a_resized_image_is_covered_exactly_and_patches_may_be_finer():
    assert Lattice(short_side=64).grid((100, 150), 16) == ((4, 6), (100, 150))
    assert Lattice(image_scale=4).grid((10, 16), 16) == ((3, 4), (12, 16))
    numbers = torch.zeros(3, 100, 150, dtype=torch.uint8)
    known = torch.ones(100, 150, dtype=torch.bool)
    image = DenseImage(numbers, known, torch.zeros(100, 150, dtype=torch.uint8), known)
    (encoder,) = make_dense_encoders(
        ["vit-tiny-aerial"], Input(bands=("red", "green", "blue")), num_maps=2, lattice=Lattice(short_side=64)
    )
    assert [tuple(m.shape) for m in encoder(image)] == [(192, 4, 6)] * 2


def test_stored_numbers(tmp_path):
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[0, 0] = (1, 2, 3)
    Image.fromarray(colour).save(tmp_path / "c.png")
    assert read_numbers(tmp_path / "c.png")[0, 0] == 1 * 65536 + 2 * 256 + 3
    deep = np.array([[0, 1500], [9000, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "d.png")
    np.testing.assert_array_equal(read_numbers(tmp_path / "d.png"), deep)
    source = DenseSource(root=".", quantity={"scale": 0.001, "nodata": [0], "maximum": 10})
    values, known = decode_target(deep, source, "d")
    assert known.tolist() == [[False, True], [True, False]] and float(values[0, 1]) == pytest.approx(1.5)


def test_splits_keep_places_together(folder):
    images = load_dense_set(
        load_model(DenseSource, None, values=folder_source(folder)), name="x", max_window=99
    )
    ((train, test),) = splits_of(images, DenseSettings())
    assert len(train) == 6 and len(test) == 3
    assert len(images.limit(2)) == 4


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ({"image_key": r"P(\d+)", "target_key": r"P(\d)_mask"}, {}, None),
        ({"target_key": r"(\d+)_mask"}, {}, "have no target of the same name"),
        ({"image_key": "("}, {}, "is not a regular expression"),
        ({"parts": {}}, {}, "needs the key parts"),
        ({"parts": {"train": {"images": "x/*", "targets": "y/*"}}}, {}, "no file of"),
        ({"classes": {"classes": CLASSES["classes"]}}, {}, "which no class names"),
        (
            {"classes": {"classes": [*CLASSES["classes"], {"name": "c", "values": 9}], "ignore": [0]}},
            {},
            None,
        ),
        ({}, {"folds": 3}, "has its own split"),
        ({}, {"heads": ["dpt"], "class_fit": {"optimizer": "lbfgs"}}, "needs a linear problem"),
        ({}, {"short_side": 64, "image_scale": 2}, "give either short_side or image_scale"),
        ({"quantity": {"maximum": 1}}, {}, "give either classes or quantity"),
        ({"bands": ["red"]}, {}, "picture of red, green, blue"),
    ],
)
def test_bad_input_is_one_line(source, settings, message, folder, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", folder_source(folder, **source), **settings)
    code, out, err = run(capsys, config, "-o", tmp_path / "out", "--backbone", "colours", "--cache", tmp_path)
    if message is None:
        assert code == 0, err
        return
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert not (tmp_path / "out" / "results.json").exists()


def test_encoders_that_give_no_maps_or_take_other_bands(folder, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", folder_source(folder))
    words = (config, "-o", tmp_path / "out", "--cache", tmp_path)
    code, _, err = run(capsys, *words, "--backbone", "timm:vit@x")
    assert code == 2 and "feature maps are needed" in err
    code, out, err = run(capsys, *words, "--backbone", "pixels")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: 'pixels' is a baseline of whole images; for maps use 'colours' or 'rcf'")
    config = write_config(
        tmp_path / "q.yaml", folder_source(folder) | {"quantity": {"maximum": 9}, "classes": None}
    )
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(content | {"task": "segmentation"}))
    code, _, err = run(capsys, config, "-o", tmp_path / "out")
    assert code == 2 and "needs the key 'dense.classes'" in err
    size = Image.fromarray(np.zeros((9, 9), np.uint8))
    size.save(folder / "val" / "masks" / "P0_mask.png")
    code, _, err = run(capsys, *words, "--backbone", "colours", "--set", "dense.classes.ignore=[]")
    assert code == 2 and json.dumps(err)
