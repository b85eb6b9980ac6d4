"""The models that come with the package: cards are whole, and commands work without naming one."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio

import dinov3geo
from dinov3geo.backbones.zoo import BUNDLED as BACKBONES
from dinov3geo.cli import main
from dinov3geo.errors import RasterError
from dinov3geo.evaluation import classifier
from dinov3geo.heads import canopy, landcover
from dinov3geo.heads.folders import CARD_FILE, WEIGHTS, check_free, read_card

LOADERS = {
    classifier.DEFAULT_MODEL: classifier.load_classifier,
    landcover.DEFAULT_MODEL: landcover.load_landcover_model,
    canopy.DEFAULT_MODEL: canopy.load_canopy_model,
}


def test_every_folder_of_weights_is_a_starter_model():
    assert sorted(LOADERS) == sorted(path.name for path in WEIGHTS.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", LOADERS)
def test_a_starter_model_loads_and_its_card_says_what_it_is(name):
    LOADERS[name](name)
    card = json.loads((WEIGHTS / name / CARD_FILE).read_text())
    assert card["name"] == name and card["backbone"]["bundled"] in BACKBONES
    assert all(card[key] for key in ("licence", "gsd_m", "trained_on", "scores", "limits", "command"))
    assert not any(word in json.dumps(card) for word in ("/work", "/tmp", "/home"))


@pytest.mark.parametrize("name", LOADERS)
def test_the_folder_of_a_model_is_shown_as_its_name_is(name, tmp_path, capsys):
    shutil.copytree(WEIGHTS / name, tmp_path / "model")
    shown = []
    for word in (name, str(tmp_path / "model")):
        assert main(["models", word]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0].pop("file_size").endswith(" MB")
    assert shown[0] == shown[1]


def test_a_fit_does_not_overwrite_a_model_of_another_kind(tmp_path):
    shutil.copytree(WEIGHTS / landcover.DEFAULT_MODEL, tmp_path / "model")
    check_free(tmp_path / "model", what="land-cover", overwrite=True)
    for what in ("canopy", "detection", "classification"):
        with pytest.raises(RasterError, match=f"is a model of land cover, not a {what} model"):
            check_free(tmp_path / "model", what=what, overwrite=True)


def test_weights_in_the_package_stay_small():
    files = Path(dinov3geo.__file__).parent.rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) < 30e6


def test_land_cover_without_a_model_named(data_root, tmp_path, capsys):
    tile = sorted((data_root / "sentinel2_landcover" / "image").glob("*.tif"))[0]
    out = tmp_path / "map.tif"
    assert main(["landcover", "predict", str(tile), "-o", str(out), "--no-sidecars"]) == 0
    assert "warning" not in capsys.readouterr().err
    with rasterio.open(out) as found, rasterio.open(tile.parents[1] / "mask" / tile.name) as true:
        classes, labels = found.read(1), true.read(1)
        assert found.crs == true.crs and found.transform == true.transform
    values = read_card(WEIGHTS / landcover.DEFAULT_MODEL / CARD_FILE, product="land_cover")["classes"]
    stored = np.array([scheme["values"][0] for scheme in values["classes"]])
    # The tile was fitted on: this says that bands, classes and places are right, not how good the model is.
    assert np.mean(stored[classes] == labels) > 0.75


def test_scene_classes_without_a_model_named(data_root, tmp_path):
    images = [
        sorted(folder.glob("*.jpg"))[k] for folder in (data_root / "eurosat").iterdir() for k in range(20)
    ]
    out = tmp_path / "classes.csv"
    assert main(["classify", "predict", *map(str, images), "-o", str(out)]) == 0
    with out.open() as opened:
        rows = list(csv.DictReader(opened))
    right = [Path(row["file"]).parent.name == row["class"] for row in rows]
    assert len(right) == len(images) and np.mean(right) > 0.7


@pytest.mark.parametrize("product", ["landcover", "classify"])
def test_an_empty_name_is_not_the_starter_model(product, tmp_path, write_raster, capsys):
    scene, out = write_raster(), tmp_path / ("a.csv" if product == "classify" else "a.tif")
    assert main([product, "predict", str(scene), "-o", str(out), "--model", ""]) == 2
    assert "model" in capsys.readouterr().err and not out.exists()


def test_scene_classes_find_their_bands_by_name(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8)
    files = {"straight": (picture, ("B04", "B03", "B02")), "turned": (picture[::-1], ("B02", "B03", "B04"))}
    for name, (numbers, bands) in files.items():
        with rasterio.open(
            tmp_path / f"{name}.tif",
            "w",
            driver="GTiff",
            height=64,
            width=64,
            count=3,
            dtype="uint8",
            crs="EPSG:32652",
            transform=rasterio.Affine(10, 0, 342170, 0, -10, 3836350),
        ) as written:
            written.write(numbers)
            written.descriptions = bands
    paths = [tmp_path / f"{name}.tif" for name in files]
    table = classifier.classify_files(classifier.load_classifier(), paths, tmp_path / "classes.csv")
    assert table["class"].nunique() == table["probability"].nunique() == 1
