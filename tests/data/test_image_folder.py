"""Tests of image folders."""

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.io import write_jpeg, write_png
from torchvision.transforms.v2 import functional

from dinov3geo.data.image_folder import ImageFolder
from dinov3geo.errors import DataError, RasterError


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    for name in ("river/a", "forest/c", "forest/deep/lake/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_png(noise(3, 20, 20), str(tmp_path / "river" / "a.png"))
    write_png(noise(1, 40, 60), str(tmp_path / "river" / "gray.PNG"))
    write_jpeg(noise(3, 30, 45), str(tmp_path / "forest" / "c.jpg"))
    write_png(noise(3, 12, 9), str(tmp_path / "forest" / "deep" / "lake" / "d.png"))
    (tmp_path / "forest" / "notes.txt").write_text("no image")
    write_png(noise(3, 8, 8), str(tmp_path / ".hidden.png"))
    return tmp_path


def test_every_image_becomes_a_chip(folder):
    dataset = ImageFolder(folder, chip_size=20)
    assert [path.name for path in dataset.files] == ["c.jpg", "d.png", "a.png", "gray.PNG"]
    for sample in dataset:
        assert sample["image"].shape == (3, 20, 20) and sample["image"].dtype == torch.uint8
        assert sample["valid"].shape == (20, 20) and sample["valid"].all()
    assert next(iter(DataLoader(dataset, batch_size=4)))["image"].shape == (4, 3, 20, 20)


def test_image_of_the_right_size_is_untouched(folder):
    from torchvision.io import decode_image

    sample = ImageFolder(folder, chip_size=20)[2]
    assert torch.equal(sample["image"], decode_image(str(folder / "river" / "a.png")))


def test_shorter_side_is_resized_and_the_longer_cut(folder):
    from torchvision.io import ImageReadMode, decode_image

    image = decode_image(str(folder / "river" / "gray.PNG"), mode=ImageReadMode.RGB)
    expected = functional.resize(image, [20, 30], antialias=True)[:, :, 5:25]
    assert torch.equal(ImageFolder(folder, chip_size=20)[3]["image"], expected)


def test_labels_come_from_the_folder_names(folder):
    dataset = ImageFolder(folder, chip_size=8, labels=True)
    assert dataset.classes == ["forest", "lake", "river"]
    assert [int(sample["label"]) for sample in dataset] == [0, 1, 2, 2]
    assert "label" not in ImageFolder(folder, chip_size=8)[0]


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
