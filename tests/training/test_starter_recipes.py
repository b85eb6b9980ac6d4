"""The recipes of the bundled weights run from the data folder; cards say what they were trained on."""

import json

import numpy as np
import pytest
import torch

from dinov3geo.backbones.zoo import BUNDLED, load_backbone
from dinov3geo.cli import main
from dinov3geo.data.image_folder import ImageFolder, hash_share
from dinov3geo.evaluation.image_sets import class_folders, split_images

SHORT = ["--set", "steps=5", "--set", "batch_size=8", "--set", "log_every=1"]


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for name, value in line.items() if name.split("/")[-1] == "loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gsd"), [("vit-tiny-aerial", (0.1, 0.2)), ("vit-tiny-satellite", (10.0, 10.0))]
)
def test_five_steps_from_the_data_folder(data_root, project_root, tmp_path, name, gsd):
    config = project_root / "configs" / "pretrain" / f"{name.replace('-', '_')}.yaml"
    data = ["--set", f"data.root={data_root}"]
    assert main(["pretrain", str(config), "--out", str(tmp_path), *data, *SHORT]) == 0
    losses = losses_of(tmp_path)
    assert len(losses) == 5 and np.isfinite(losses).all()
    card = load_backbone(tmp_path).card
    assert card is not None and (card.name, card.gsd_m) == (name, gsd)


@pytest.mark.slow
def test_five_steps_of_the_satellite_weights(data_root, project_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs, data = project_root / "configs", ["--set", f"data.root={data_root}"]
    few = ["--set", "images=600", "--set", "patches=3000"]
    assert main(["filters", str(configs / "filters/satellite_teacher.yaml"), *data, *few]) == 0
    assert main(["distill", str(configs / "distill/vit_mini_satellite.yaml"), *data, *SHORT]) == 0
    losses = losses_of(tmp_path / "outputs/vit-mini")
    assert len(losses) == 5 and np.isfinite(losses).all()
    card = load_backbone(tmp_path / "outputs/vit-mini/satellite").card
    assert card is not None and (card.name, card.gsd_m) == ("vit-mini-satellite", (10.0, 10.0))


@pytest.mark.slow
def test_the_satellite_filters_are_what_their_recipe_gives(data_root, project_root, tmp_path):
    config = project_root / "configs" / "filters" / "satellite.yaml"
    assert main(["filters", str(config), "--out", str(tmp_path), "--set", f"data.root={data_root}"]) == 0
    images = class_folders(data_root / "eurosat")
    numbers = torch.stack([images.read(index).float() for index in split_images(images).test[:8]])
    ours, theirs = (load_backbone(name) for name in ("filters-satellite", tmp_path))
    seen = [backbone(backbone.card.normalization(numbers)).cls for backbone in (ours, theirs)]
    # Directions of nearly equal variance may turn from one machine to the next; distances stay.
    torch.testing.assert_close(*(torch.cdist(each, each) for each in seen), rtol=0.02, atol=0.2)


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
