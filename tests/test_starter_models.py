"""The models that come with the package: cards are whole, and commands work without naming one."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

import dinov3geo
from dinov3geo.backbones.zoo import BUNDLED as BACKBONES
from dinov3geo.cli import main
from dinov3geo.evaluation import classifier
from dinov3geo.heads import canopy, landcover
from dinov3geo.heads.folders import CARD_FILE, WEIGHTS, read_card

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
