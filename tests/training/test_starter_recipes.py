"""The recipes of the bundled weights run from the data folder; cards say what they were trained on."""

import json

import numpy as np
import pytest

from dinov3geo.backbones.zoo import BUNDLED, load_backbone
from dinov3geo.cli import main
from dinov3geo.data.image_folder import ImageFolder, hash_share
from dinov3geo.evaluation.image_sets import class_folders, split_images

RECIPES = {"vit-tiny-aerial": "vit_tiny_aerial.yaml", "vit-tiny-satellite": "vit_tiny_satellite.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_five_steps_from_the_data_folder(data_root, project_root, tmp_path, name):
    config = project_root / "configs" / "pretrain" / RECIPES[name]
    words = ["pretrain", str(config), "--out", str(tmp_path), "--set", f"data.root={data_root}"]
    assert main([*words, "--set", "steps=5", "--set", "batch_size=8", "--set", "log_every=1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5 and np.isfinite(losses).all()
    card = load_backbone(tmp_path).card
    assert card is not None and card.name == name
    assert card.gsd_m == {"vit-tiny-aerial": (0.1, 0.2), "vit-tiny-satellite": (10.0, 10.0)}[name]


def test_satellite_recipe_never_sees_the_test_part(data_root):
    trained_on = {path.name for path in ImageFolder(data_root / "eurosat", chip_size=64, hold_out=0.2).files}
    images = class_folders(data_root / "eurosat")
    tested = {images.names[index] for index in split_images(images).test}
    assert not trained_on & tested and len(trained_on | tested) == len(images.names)
    assert all(hash_share(name) < 0.2 for name in tested)


@pytest.mark.parametrize("name", BUNDLED)
def test_cards_state_data_and_licence(name):
    card = load_backbone(name).card
    assert card is not None and card.licence == "Apache-2.0" and card.trained_on
    assert card.name == name
