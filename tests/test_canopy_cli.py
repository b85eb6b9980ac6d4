"""Canopy height from the command line: fit, evaluate, predict, and what they refuse in one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio

from dinov3geo.commands.canopy import plan_outputs
from dinov3geo.errors import ConfigError
from tests.command_line import error_of, run


def test_outputs_of_scenes(tmp_path):
    a, b, other_a = (tmp_path / name for name in ("a.tif", "b.tif", "x/a.tif"))
    out = tmp_path / "out"
    assert plan_outputs([a], out / "h.tif") == [(a, out / "h.tif")]
    assert plan_outputs([a, b], out) == [
        (a, out / "a_canopy_height.tif"),
        (b, out / "b_canopy_height.tif"),
    ]
    with pytest.raises(ConfigError, match="2 scenes cannot go into one file"):
        plan_outputs([a, b], out / "h.tif")
    with pytest.raises(ConfigError, match="would both be written"):
        plan_outputs([a, other_a], out)


def test_fit_writes_a_model_with_its_card(model_folder):
    card = json.loads((model_folder / "card.json").read_text())
    assert card["command"].startswith("dinov3geo canopy fit --images")
    assert card["settings"]["fit"]["epochs"] == 1
    assert sorted(p.name for p in model_folder.parent.iterdir()) == ["cache", "toy"]


def test_fit_dry_run(capsys, tmp_path, run_folder, pairs):
    words = ["canopy", "fit", "--images", pairs[0], "--heights", pairs[1], "--backbone", run_folder]
    code, out, _ = run(capsys, *words, "--out", tmp_path / "m", "--dry-run", "--epochs", 7)
    assert code == 0 and "epochs: 7" in out and re.search(r"^pairs +3$", out, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_the_fit_would(capsys, tmp_path, run_folder, pairs, model_folder):
    (tmp_path / "classes.yaml").write_text("classes: [{name: low, values: 0}, {name: high, values: 1}]\n")
    (tmp_path / "boxes.csv").write_text(
        f"image_path,xmin,ymin,xmax,ymax,label\n{next(pairs[0].iterdir())},1,1,9,9,tree\n"
    )
    masks = ["--masks", pairs[1], "--classes", tmp_path / "classes.yaml"]
    fits = {
        "canopy": ["canopy", "fit", "--images", pairs[0], "--heights", pairs[1]],
        "land-cover": ["landcover", "fit", "--images", pairs[0], *masks],
        "detection": ["detect", "fit", tmp_path / "boxes.csv"],
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    for what, words in fits.items():
        words = [*words, "--backbone", run_folder, "--out"]
        for ending in ([], ["--dry-run"]):
            assert f"{model_folder} exists" in error_of(capsys, *words, model_folder, *ending)
            message = error_of(capsys, *words, tmp_path / "other", "--overwrite", *ending)
            assert f"is not a {what} model (no card.json)" in message
            message = error_of(capsys, *words, tmp_path / "classes.yaml", "--overwrite", *ending)
            assert "is a file, expected a folder" in message
        assert run(capsys, *words, tmp_path / "new" / "deeper", "--dry-run")[0] == 0
        code, _, err = run(capsys, *words, model_folder, "--overwrite", "--dry-run")
        assert (code == 0) == (what == "canopy")
        assert what == "canopy" or f"is a model of canopy height, not a {what} model" in err
        assert sorted(tmp_path.rglob("*")) == before


def test_fit_errors(capsys, tmp_path, run_folder, pairs, write_raster, model_folder):
    start = ["canopy", "fit", "--backbone", run_folder, "--out", tmp_path / "m"]
    far = write_raster("far/heights.tif", shape=(1, 8, 8), dtype="float32", origin=(7e5, 1e6))
    message = error_of(capsys, *start, "--images", pairs[0], "--heights", far)
    assert "overlap" in message
    message = error_of(capsys, *start, "--images", pairs[0], "--heights", pairs[1], "--set", "fit.epoch=3")
    assert message.startswith(
        "error: --set fit.epoch=3: unknown key 'fit.epoch' (did you mean 'fit.epochs'?)"
    )
    message = error_of(capsys, *start[:4], "--out", model_folder, "--images", pairs[0], "--heights", pairs[1])
    assert "exists" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["far"]


def test_evaluate_a_model(capsys, tmp_path, pairs, model_folder):
    report = tmp_path / "deep" / "report.json"
    words = ["canopy", "evaluate", "--images", pairs[0], "--heights", pairs[1]]
    code, out, _ = run(capsys, *words, "--model", model_folder, "--json", report)
    assert code == 0 and "MAE [m] by true height" in out
    rows = json.loads(report.read_text())["rows"]
    assert f"{rows[0]['mae']:.2f}" in out


def test_evaluate_by_folds(capsys, tmp_path, pairs, run_folder):
    words = ["canopy", "evaluate", "--images", pairs[0], "--heights", pairs[1], "--folds", 3, "--epochs", 1]
    words += ["--backbone", run_folder, "--set", "views=1", "--cache", tmp_path / "cache"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    for method in ("mean", "site mean", "gradient boosting", "frozen features"):
        assert re.search(rf"^{method}.* all ", out, re.MULTILINE)


def test_evaluate_needs_one_way(capsys, pairs):
    words = ["canopy", "evaluate", "--images", pairs[0], "--heights", pairs[1]]
    assert "either --model" in error_of(capsys, *words, "--model", "x", "--folds", 3)
    for option in (["--backbone", "x"], ["--seed", 0], ["--cache", "x"], ["--set", "views=1"]):
        assert "go with --folds" in error_of(capsys, *words, *option)


def test_predict_one_scene(capsys, tmp_path, write_raster, model_folder):
    scene = write_raster(shape=(3, 40, 72), nodata=0)
    target = tmp_path / "new" / "heights.tif"
    words = ["canopy", "predict", scene, "-o", target, "--model", model_folder]
    code, out, _ = run(capsys, *words, "--tile", 32, "--overlap", 8)
    assert code == 0 and str(target) in out
    with rasterio.open(target) as heights, rasterio.open(scene) as image:
        assert (heights.crs, heights.bounds, heights.shape) == (image.crs, image.bounds, image.shape)
        assert heights.tags()["DINOV3GEO_COMMAND"] == " ".join(
            ["dinov3geo", *map(str, words), "--tile", "32", "--overlap", "8"]
        )
    beside = ["heights.png", "heights.qml", "heights.stac.json", "heights.tif", "heights_legend.png"]
    assert sorted(p.name for p in target.parent.iterdir()) == beside
    assert "exists" in error_of(capsys, *words)
    assert run(capsys, *words, "--overwrite", "--no-preview")[0] == 0
    target.unlink()
    assert "heights.stac.json: it exists" in error_of(capsys, *words)
    assert "heights.png: it exists" in error_of(capsys, *words, "--no-sidecars")
    assert not target.exists()
    options = ["--integer", "dm", "--uncertainty", "--no-sidecars", "--overwrite"]
    assert run(capsys, *words, *options)[0] == 0
    with rasterio.open(target) as heights:
        assert (heights.count, heights.dtypes[0], heights.scales) == (2, "uint16", (0.1, 0.1))
    assert "valid names: dm, m" in error_of(capsys, *words, "--overwrite", "--integer", "cm")
    assert "unknown engine 'dask'" in error_of(capsys, *words, "--overwrite", "--engine", "dask")


def test_predict_at_another_pixel_size(capsys, tmp_path, write_raster, model_folder):
    scene, target = write_raster(shape=(3, 60, 90), nodata=0), tmp_path / "heights.tif"
    words = ["canopy", "predict", scene, "-o", target, "--model", model_folder, "--overwrite"]
    low, high = json.loads((model_folder / "card.json").read_text())["gsd_m"]
    for text, metres in (("0.25", 0.25), ("model", min(max(0.1, low), high)), ("0.05", 0.05)):
        code, _, err = run(capsys, *words, "--gsd", text)
        assert code == 0, err
        with rasterio.open(target) as heights, rasterio.open(scene) as image:
            assert heights.res == pytest.approx((metres, metres)) and heights.crs == image.crs
            assert heights.bounds[::3] == pytest.approx(image.bounds[::3])
            assert heights.shape == tuple(np.ceil(np.array([6, 9]) / metres - 1e-6))
        item = json.loads((tmp_path / "heights.stac.json").read_text())
        assert item["properties"]["gsd"] == pytest.approx(metres)
    for text in ("0", "-0.5", "nan", "half"):
        assert "takes metres above 0, or model" in error_of(capsys, *words, "--gsd", text)
    assert "change them 500 times" in error_of(capsys, *words, "--gsd", 50)


def test_predict_several_scenes(capsys, tmp_path, write_raster, model_folder):
    write_raster("in/a.tif")
    write_raster("in/b.tif", seed=1)
    out_folder = tmp_path / "out"
    words = ["canopy", "predict", tmp_path / "in", "-o", out_folder, "--model", model_folder]
    words += ["--no-sidecars", "--no-preview"]
    code, out, _ = run(capsys, *words)
    assert code == 0 and out.count("_canopy_height.tif") == 2
    assert sorted(p.name for p in out_folder.iterdir()) == ["a_canopy_height.tif", "b_canopy_height.tif"]
    assert "one picture" in error_of(capsys, *words[:-1], "--overwrite", "--preview", tmp_path / "p.png")


def test_a_picture_never_replaces_the_scene(capsys, tmp_path, write_raster, run_folder):
    scene = write_raster("plot.tif").rename(tmp_path / "plot.png")
    before = scene.read_bytes()
    words = ["canopy", "predict", scene, "-o", tmp_path / "plot.tif", "--overwrite"]
    assert "plot.png: it is one of the scenes" in error_of(capsys, *words)
    assert "would replace" in error_of(capsys, "show", "heights", scene, "-o", scene)
    words = ["show", "pca", scene, "-o", scene, "--backbone", run_folder]
    assert "would replace" in error_of(capsys, *words)
    assert scene.read_bytes() == before and list(tmp_path.iterdir()) == [scene]


def test_all_targets_are_checked_before_any_work(capsys, tmp_path, write_raster, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("the model was loaded")

    monkeypatch.setattr("dinov3geo.commands.canopy.load_model", fail)
    for name in ("a", "b"):
        write_raster(f"in/{name}.tif")
    words = ["canopy", "predict", tmp_path / "in", "-o"]
    for taken in ("b_canopy_height.tif", "b_canopy_height.png"):
        out = tmp_path / taken.replace(".", "_")
        out.mkdir()
        (out / taken).touch()
        assert f"{taken}: it exists" in error_of(capsys, *words, out)
        assert [path.name for path in out.iterdir()] == [taken]
    write_raster("in/a_canopy_height.tif")
    assert "it is one of the scenes" in error_of(capsys, *words, tmp_path / "in", "--overwrite")


@pytest.fixture
def bad_scene(tmp_path, write_raster):
    """A function that makes the scene of a name, something that prediction must refuse."""

    def make(kind: str) -> Path:
        place = f"in/{kind}.tif"
        if kind == "absent":
            return tmp_path / place
        if kind == "text":
            (tmp_path / "in").mkdir()
            (tmp_path / place).write_text("no raster")
            return tmp_path / place
        if kind == "empty folder":
            (tmp_path / "in").mkdir()
            return tmp_path / "in"
        if kind == "truncated":
            path = write_raster(place, shape=(3, 256, 256))
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            return path
        if kind == "no CRS":
            return write_raster(place, crs=None)
        if kind == "one band":
            return write_raster(place, shape=(1, 64, 64))
        if kind == "all nodata":
            return write_raster(place, array=np.full((3, 64, 64), 255, np.uint8), nodata=255)
        assert kind == "NaN"
        array = np.full((3, 64, 64), 100, np.float32)
        array[:, 10, 10] = np.nan
        return write_raster(place, array=array)

    return make


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", ["no such file"]),
        ("text", ["raster"]),
        ("empty folder", ["no raster found"]),
        ("truncated", ["truncated"]),
        ("no CRS", ["reference system"]),
        ("one band", ["1 band", "red, green, blue"]),
        ("all nodata", ["no valid pixel"]),
        ("NaN", ["NaN"]),
    ],
)
def test_bad_scenes(capsys, tmp_path, bad_scene, model_folder, kind, words):
    scene = bad_scene(kind)
    out = tmp_path / "out"
    message = error_of(capsys, "canopy", "predict", scene, "-o", out, "--model", model_folder)
    assert all(word in message for word in words), message
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != tmp_path / "in"]


def test_bad_names_and_folders(capsys, tmp_path, write_raster, model_folder):
    scene = write_raster()
    message = error_of(capsys, "canopy", "predict", scene, "-o", tmp_path / "o", "--model", "canopy-huge")
    assert "unknown canopy model 'canopy-huge'" in message and "canopy-tiny-aerial" in message
    message = error_of(capsys, "features", scene, "-o", tmp_path / "o.tif", "--backbone", "vit-giant")
    assert "unknown backbone 'vit-giant'" in message and "vit-tiny-aerial" in message
    message = error_of(capsys, "canopy", "predict", scene, "-o", scene / "o", "--model", model_folder)
    assert "is a file, expected a folder" in message
    assert list(tmp_path.iterdir()) == [scene]
