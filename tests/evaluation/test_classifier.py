"""Classifiers from folder to table, saved and loaded."""

import csv
import json

import geopandas
import numpy as np
import pytest

from dinov3geo import cli


@pytest.fixture
def chips(tmp_path, write_raster):
    """Dark and light georeferenced chips."""
    generator = np.random.default_rng(0)
    for k, name in enumerate(("dark", "light")):
        for number in range(20):
            pixels = generator.integers(0, 60, (3, 32, 32)) + 160 * k
            place = (400_000.0 + 10 * number, 3_280_000.0 + 10 * k)
            write_raster(f"chips/{name}/{name}{number}.tif", array=pixels.astype(np.uint8), origin=place)
    return tmp_path / "chips"


@pytest.mark.parametrize("kind", ["logistic", "knn", "attention"])
def test_fit_and_predict(kind, chips, tmp_path, capsys):
    model, words = tmp_path / "model", ["--size", "32", "--cache", tmp_path, "--kind", kind]
    words = ["classify", "fit", chips, "--out", model, *words, "--set", "c_count=4"]
    words += ["--set", "attention_rates=[1e-3]", "--set", "attention_epochs=5"]
    assert cli.main([str(w) for w in words]) == 0
    assert "dark, light" in capsys.readouterr().out
    assert json.loads((model / "card.json").read_text())["validation_accuracy"] == 1.0
    for name in ("out.csv", "out.gpkg"):
        words = ["classify", "predict", chips, "--model", model, "-o", tmp_path / name]
        assert cli.main([str(w) for w in words]) == 0
    with (tmp_path / "out.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 40
    assert all(row["class"] in row["file"] and float(row["probability"]) > 0.5 for row in rows)
    table = geopandas.read_file(tmp_path / "out.gpkg")
    assert table.crs.to_epsg() == 32617 and list(table["class"]) == [row["class"] for row in rows]
    assert table.geometry[0].bounds == pytest.approx((400_000, 3_279_996.8, 400_003.2, 3_280_000))
    assert cli.main([str(w) for w in words]) == 2
    assert "exists already" in capsys.readouterr().err


def test_bad_input_is_one_line(chips, tmp_path, capsys, write_raster):
    def error_of(*words):
        code = cli.main([str(w) for w in words])
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert code == 2 and len(lines) == 1
        return lines[0]

    predict = ["classify", "predict", chips, "-o", tmp_path / "o.csv", "--model"]
    assert "valid names: a folder that `classify fit` wrote, eurosat-tiny" in error_of(*predict, "none")
    assert "card" in error_of(*predict, chips)
    fit = ["classify", "fit", chips, "--out", tmp_path / "model", "--size", 32, "--cache", tmp_path]
    assert "valid names: attention, knn, logistic" in error_of(*fit, "--kind", "forest")
    assert cli.main([str(w) for w in [*fit, "--set", "c_count=2"]]) == 0
    capsys.readouterr()
    assert "exists" in error_of(*fit)
    assert "no such image" in error_of(
        "classify", "predict", tmp_path / "x.tif", "--model", tmp_path / "model", "-o", tmp_path / "o.csv"
    )
    nowhere = write_raster("n.tif", shape=(3, 32, 32), crs=None)
    place = ["classify", "predict", nowhere, "--model", tmp_path / "model", "-o"]
    assert "n.tif" in error_of(*place, tmp_path / "o.gpkg")
    assert "valid suffixes" in error_of(*place, tmp_path / "o.shp")
    assert cli.main([str(w) for w in [*place, tmp_path / "o.csv"]]) == 0


def test_chips_that_do_not_suit_the_starter_model(tmp_path, capsys, write_raster):
    def run(path):
        code = cli.main(["classify", "predict", str(path), "-o", str(tmp_path / "o.csv"), "--overwrite"])
        return code, capsys.readouterr().err

    pixels = np.random.default_rng(0).integers(1, 255, (3, 64, 64))
    good = write_raster("good.tif", array=pixels.astype(np.uint8), pixel_size=10.0, nodata=0)
    assert run(good) == (0, "")
    for name, options in {
        "fine.tif": {"array": pixels.astype(np.uint8), "pixel_size": 1.0},
        "large.tif": {"array": np.tile(pixels, (1, 4, 4)).astype(np.uint8), "pixel_size": 10.0},
    }.items():
        code, error = run(write_raster(name, **options))
        assert code == 0 and "was fitted at 10 m" in error and error.count("\n") == 1
    code, error = run(
        write_raster("empty.tif", array=np.zeros((3, 64, 64), np.uint8), pixel_size=10.0, nodata=0)
    )
    assert code == 2 and "empty.tif holds no pixel with data" in error
    code, error = run(write_raster("u16.tif", array=(pixels * 20).astype(np.uint16), pixel_size=10.0))
    assert code == 2 and "u16.tif holds uint16 numbers" in error


def test_bands_are_found_by_the_names_of_the_weights(tmp_path, write_raster, capsys):
    for k, name in enumerate(("reddish", "bluish")):
        for number in range(10):
            pixels = np.full((3, 32, 32), 20 + number, np.uint8)
            # Files hold blue first.
            pixels[2 if k == 0 else 0] += 150
            write_raster(
                f"chips/{name}/{name}{number}.tif", array=pixels, band_names=["blue", "green", "red"]
            )
    model, chips = tmp_path / "model", tmp_path / "chips"
    words = ["classify", "fit", chips, "--out", model, "--size", 32, "--cache", tmp_path]
    words += ["--set", "c_count=4"]
    assert cli.main([str(w) for w in words]) == 0
    assert json.loads((model / "card.json").read_text())["bands"] == ["red", "green", "blue"]
    strange = write_raster("chips/bluish/strange.tif", array=pixels, band_names=["nir", "blue", "red"])
    assert cli.main([str(w) for w in [*words, "--overwrite"]]) == 2
    assert (
        "strange.tif names its bands nir, blue, red; model 'vit-tiny-aerial' needs 3"
        in capsys.readouterr().err
    )
    strange.unlink()
    deep = write_raster("chips/bluish/deep.tif", array=pixels.astype(np.uint16) * 20)
    assert cli.main([str(w) for w in [*words, "--overwrite"]]) == 2
    assert "holds uint16 numbers" in capsys.readouterr().err
    deep.unlink()
    for name, order in (("described", ["red", "green", "blue"]), ("plain", [])):
        pixels = np.full((3, 32, 32), 25, np.uint8)
        pixels[0] += 150
        file = write_raster(f"{name}.tif", array=pixels, band_names=order)
        table = tmp_path / f"{name}.csv"
        assert cli.main(["classify", "predict", str(file), "--model", str(model), "-o", str(table)]) == 0
        with table.open() as opened:
            assert next(csv.DictReader(opened))["class"] == "reddish"
