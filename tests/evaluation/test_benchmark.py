"""Benchmarks from YAML alone: folders, tables of several bands and labels, torchgeo, views of a wall."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dinov3geo import cli
from dinov3geo.config import load_model
from dinov3geo.errors import ConfigError
from dinov3geo.evaluation.benchmark import BenchmarkConfig, replace_between_marks
from dinov3geo.evaluation.correspondence import match_views, project
from dinov3geo.evaluation.frames import pixel_encoder
from dinov3geo.evaluation.results import Row, markdown, read_rows, results_text
from dinov3geo.evaluation.sources import Source, TableSource, load_source, measure

FAST = {"ks": [3], "c_count": 3, "resamples": 10, "methods": ["knn", "logistic"]}


@pytest.fixture
def table(tmp_path, write_raster):
    """30 chips of 12 bands whose brightness tells their classes."""
    rows = []
    generator = np.random.default_rng(0)
    for number in range(30):
        bright = generator.random(3) < 0.5
        pixels = generator.integers(200, 400, (12, 16, 16)) + (1500 * bright).repeat(4)[:, None, None]
        write_raster(f"chips/{number}.tif", array=pixels.astype(np.uint16))
        names = [name for name, yes in zip("abc", bright, strict=True) if yes] or ["none"]
        part = ("train", "train", "validation", "test", "train")[number % 5]
        rows.append({"file": f"{number}.tif", "labels": names, "part": part, "kind": "s2"})
    rows.append({"file": "absent.tif", "labels": ["a"], "part": "train", "kind": "s1"})
    (tmp_path / "chips" / "meta.json").write_text(json.dumps(rows))
    return tmp_path / "chips"


def write_config(path, **content):
    path.write_text(yaml.safe_dump(content))
    return path


def table_config(path, root, **changes):
    source = {
        "root": str(root),
        "kind": "table",
        "sensor": "bigearthnet_s2",
        "table": {
            "file": "meta.json",
            "label": "labels",
            "split": "part",
            "where": {"kind": "s2"},
            "several": True,
        },
    }
    source |= changes
    return write_config(path, name="chips", source=source, stem="mean", size=16, settings=FAST)


def test_several_bands_and_labels_and_a_second_run_that_goes_on(table, tmp_path, capsys):
    config = table_config(tmp_path / "c.yaml", table)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark chips -->\nold\n<!-- /benchmark -->\nafter\n")
    words = ["benchmark", config, "-o", tmp_path / "out", "--cache", tmp_path, "--readme", readme]
    assert cli.main([str(w) for w in words]) == 0
    out = capsys.readouterr().out
    assert "micro map" in out and "colour statistics" in out
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| RCF" in text and "old" not in text
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert yaml.safe_load(report["configurations"]["chips"])["stem"] == "mean"
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 4
    rows = read_rows(tmp_path / "out" / "results.json")
    colours = {r.method: r.value for r in rows if r.encoder == "colour statistics" and r.main}
    assert colours["kNN k=5, plain"] > 0.7
    assert cli.main([str(w) for w in words]) == 0
    assert "4 parts were finished before" in capsys.readouterr().err
    assert read_rows(tmp_path / "out" / "results.json") == rows


def test_some_bands_of_a_sensor_in_another_order(table):
    source = Source(
        root=table,
        kind="table",
        sensor="bigearthnet_s2",
        bands=("red", "green", "blue"),
        table=TableSource(file="meta.json", label="labels", where={"kind": "s2"}, several=True),
    )
    images = load_source(source, name="x")
    every = load_source(source.model_copy(update={"bands": None}), name="x")
    assert every.bands is not None and len(every.bands) == 12 and images.stamp != every.stamp
    torch.testing.assert_close(images.read(0), every.read(0)[[3, 2, 1]])
    statistics = measure(images, np.arange(len(images)), images.bands)
    pixels = torch.stack([images.read(i) for i in range(len(images))]).double()
    np.testing.assert_allclose(statistics.mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(statistics.std, pixels.std((0, 2, 3), correction=0), rtol=1e-6)


def test_a_sensor_without_the_band_is_told(table):
    with pytest.raises(ValueError, match="unknown band"):
        load_source(Source(root=table, sensor="naip", bands=("swir1",)), name="x")


def test_torchgeo_by_name(tmp_path, capsys):
    folder = tmp_path / "UCMerced_LandUse" / "Images"
    classes = ("agricultural", "beach")
    generator = np.random.default_rng(0)
    lists = {"train": [], "val": [], "test": []}
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 100, (16, 16, 3)) + 120 * k
            file = f"{name}{number:02d}.tif"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / file)
            lists["train" if number < 6 else "val" if number < 8 else "test"].append(file)
    for part, files in lists.items():
        (tmp_path / f"uc_merced-{part}.txt").write_text("\n".join(files) + "\n")
    source = {"root": str(tmp_path), "kind": "torchgeo", "dataset": "UCMerced"}
    source["classes"] = list(classes)
    config = write_config(tmp_path / "c.yaml", name="uc", source=source, size=16, settings=FAST)
    words = ["benchmark", config, "-o", tmp_path / "out", "--cache", tmp_path, "--backbone", "colours"]
    assert cli.main([str(w) for w in words]) == 0
    rows = read_rows(tmp_path / "out" / "results.json")
    assert next(r for r in rows if r.method == "kNN k=3").value == 1.0
    capsys.readouterr()
    assert cli.main([str(w) for w in [*words, "--set", "source.dataset=UCMercedd"]]) == 2
    assert "did you mean 'UCMerced'" in capsys.readouterr().err


def test_a_view_matches_itself_and_a_shifted_one():
    view = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 96, 128)).astype(np.uint8))
    encode = pixel_encoder(patch=16, short_side=None)
    same = match_views(view, view, np.eye(3), encode)
    assert len(same.errors) == 48 and same.shares() == [1.0, 1.0, 1.0]
    moved = torch.roll(view, 32, dims=2)
    shift = np.array([[1.0, 0, 32], [0, 1, 0], [0, 0, 1]])
    found = match_views(view, moved, shift, encode)
    assert len(found.errors) == 36 and found.errors.max() == 0
    wrong = match_views(view, moved, np.eye(3), encode)
    assert wrong.shares([1.9, 2.0])[0] < 0.3 < wrong.shares([1.9, 2.0])[1]


def test_homographies_divide_by_the_third_number():
    homography = np.array([[2.0, 0, 1], [0, 2, 0], [0.1, 0, 1]])
    np.testing.assert_allclose(project(homography, np.array([[10.0, 5.0]])), [[10.5, 5.0]])


def test_views_from_yaml(tmp_path, capsys):
    view = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(view).save(tmp_path / name)
    (tmp_path / "H").write_text("1 0 0\n0 1 0\n0 0 1\n")
    views = {"root": str(tmp_path), "first": "a.png", "others": ["b.png"], "homographies": ["H"]}
    config = write_config(tmp_path / "c.yaml", name="wall", task="correspondence", views=views)
    words = ["benchmark", config, "-o", tmp_path / "out", "--backbone", "vit-tiny-aerial"]
    assert cli.main([str(w) for w in words]) == 0
    rows = read_rows(tmp_path / "out" / "results.json")
    assert {r.encoder for r in rows} == {"vit-tiny-aerial", "raw pixels of the patches"}
    assert all(r.value == 1.0 for r in rows)
    (tmp_path / "H").write_text("1 0 0 x")
    capsys.readouterr()
    assert cli.main([str(w) for w in words]) == 2
    assert "expected 9 numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sensor": "bigearthnet"}, "unknown sensor"),
        ({"classes": ["a", "b"]}, "unknown class in"),
        ({"table": {"file": "none.json"}}, "cannot read the table"),
        ({"table": {"file": "meta.json", "label": "label"}}, "unknown column"),
        ({"table": {"file": "meta.json", "label": "labels", "several": True}}, "do not exist"),
        ({"table": {"file": "meta.json", "label": "labels", "where": {"kind": "s3"}}}, "has no row where"),
        ({"statistic": "train"}, "statistic"),
    ],
)
def test_bad_input_is_one_line(changes, message, table, tmp_path, capsys):
    config = table_config(tmp_path / "c.yaml", table, **changes)
    assert cli.main(["benchmark", str(config), "-o", str(tmp_path / "out"), "--cache", str(tmp_path)]) == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_every_configuration_can_be_read(project_root):
    files = sorted((project_root / "configs" / "benchmark").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        load_model(BenchmarkConfig, file).needs()
    with pytest.raises(ConfigError, match="needs the key 'views'"):
        BenchmarkConfig(name="x", task="correspondence").needs()


def test_rows_come_back_as_they_were(tmp_path):
    rows = [Row("d", "e", "m", "accuracy", 0.5, 0.4, float("nan"), True, {"c": 1.0})]
    (tmp_path / "r.json").write_text(results_text(rows, {"command": "x"}))
    (found,) = read_rows(tmp_path / "r.json")
    assert found.value == 0.5 and np.isnan(found.high) and found.details == {"c": 1.0}
    assert "| e | 0.500 [0.400, nan] |" in markdown(rows)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="no table of scores"):
        read_rows(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="no marks"):
        replace_between_marks("text", "d", "table")
