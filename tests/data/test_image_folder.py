"""Tests of image folders."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dinov3geo.data.image_folder import ImageFolder, hash_share
from dinov3geo.errors import DataError, RasterError


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)

    def save(name, *shape):
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)

    for name in ("river/a", "forest/c", "forest/deep/lake/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    save("river/a.png", 20, 20, 3)
    save("river/gray.PNG", 40, 60)
    save("forest/c.jpg", 30, 45, 3)
    save("forest/deep/lake/d.png", 12, 9, 3)
    (tmp_path / "forest" / "notes.txt").write_text("no image")
    save(".hidden.png", 8, 8, 3)
    return tmp_path


def test_every_image_becomes_a_chip(folder):
    dataset = ImageFolder(folder, chip_size=20)
    assert [path.name for path in dataset.files] == ["c.jpg", "d.png", "a.png", "gray.PNG"]
    for sample in dataset:
        assert sample["image"].shape == (3, 20, 20) and sample["image"].dtype == torch.uint8
        assert sample["valid"].shape == (20, 20) and sample["valid"].all()
    assert next(iter(DataLoader(dataset, batch_size=4)))["image"].shape == (4, 3, 20, 20)


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_image_of_the_right_size_is_untouched(folder):
    sample = ImageFolder(folder, chip_size=20)[2]
    assert torch.equal(sample["image"], pixels(folder / "river" / "a.png"))


def test_longer_side_is_cut_about_the_centre(folder):
    image = pixels(folder / "river" / "gray.PNG")
    assert torch.equal(ImageFolder(folder, chip_size=40)[3]["image"], image[:, :, 10:50])


def test_shorter_side_is_resized_with_antialias(folder):
    stripes = np.zeros((40, 40), dtype=np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(folder / "river" / "gray.PNG")
    assert (ImageFolder(folder, chip_size=10)[3]["image"].float() - 100).abs().max() < 20


def test_sixteen_bit_images_are_scaled(folder):
    Image.fromarray(np.full((20, 20), 0x8000, dtype=np.uint16)).save(folder / "river" / "a.png")
    assert (ImageFolder(folder, chip_size=20)[2]["image"] == 0x80).all()


def test_labels_come_from_the_folder_names(folder):
    dataset = ImageFolder(folder, chip_size=8, labels=True)
    assert dataset.classes == ["forest", "lake", "river"]
    assert [int(sample["label"]) for sample in dataset] == [0, 1, 2, 2]
    assert "label" not in ImageFolder(folder, chip_size=8)[0]


def test_the_test_part_of_evaluations_can_be_left_out(folder):
    everything = ImageFolder(folder, chip_size=8)
    kept = ImageFolder(folder, chip_size=8, hold_out=0.5)
    assert 0 < len(kept) < len(everything)
    assert kept.files == [path for path in everything.files if hash_share(path.name) >= 0.5]


def test_holding_everything_out_is_refused(folder):
    with pytest.raises(DataError, match="leaves no image"):
        ImageFolder(folder, chip_size=8, hold_out=0.999)


def test_bad_input_is_named(folder):
    with pytest.raises(RasterError, match="no such folder"):
        ImageFolder(folder / "absent", chip_size=8)
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"no image found.*\.jpg"):
        ImageFolder(folder / "empty", chip_size=8)
    with pytest.raises(DataError, match="at least 1 pixel"):
        ImageFolder(folder, chip_size=0)
    (folder / "river" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    dataset = ImageFolder(folder, chip_size=8)
    with pytest.raises(DataError, match=r"broken\.jpg cannot be decoded"):
        dataset[[path.name for path in dataset.files].index("broken.jpg")]
