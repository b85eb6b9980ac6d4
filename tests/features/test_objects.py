"""Objects without labels: the cut against scipy, a made object, several of them, the command line."""

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from PIL import Image

from dinov3geo import cli
from dinov3geo.evaluation.discovery import box_iou, object_boxes, true_boxes
from dinov3geo.evaluation.frames import pixel_encoder
from dinov3geo.evaluation.results import read_rows
from dinov3geo.features.objects import affinity, connected, find_objects, second_eigenvector


def made(boxes, hw=(10, 14), seed=0):
    """Features of a ground and of objects, each with a direction of its own and some noise."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.zeros(*hw, 8)
    features[..., 0] = 1
    for number, (top, left, bottom, right) in enumerate(boxes, start=1):
        features[top:bottom, left:right] = 0
        features[top:bottom, left:right, number] = 1
    return features + 0.02 * torch.randn(features.shape, generator=generator)


def test_the_eigenvector_is_scipys():
    weights = affinity(made([(2, 3, 6, 8)]).flatten(0, 1), threshold=0.2)
    ours, value = second_eigenvector(weights)
    degree = np.diag(weights.sum(1).numpy())
    values, vectors = scipy.linalg.eigh(degree - weights.numpy(), degree, subset_by_index=[1, 1])
    assert value == pytest.approx(values[0], abs=1e-9)
    theirs = vectors[:, 0] / np.linalg.norm(vectors[:, 0])
    own = ours.numpy() / np.linalg.norm(ours.numpy())
    assert abs(own @ theirs) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("box", [(2, 3, 6, 8), (0, 0, 3, 4), (7, 10, 10, 14)])
def test_a_made_object_is_found_to_the_patch(box):
    (found,) = find_objects(made([box]))
    assert found.box == box and int(found.mask.sum()) == (box[2] - box[0]) * (box[3] - box[1])
    assert 0 <= found.eigenvalue < 0.01


def test_several_objects_one_after_the_other():
    boxes = [(1, 1, 4, 5), (5, 8, 9, 13)]
    found = find_objects(made(boxes), count=2)
    assert sorted(one.box for one in found) == boxes
    with pytest.raises(ValueError, match="at least 3 patches"):
        find_objects(torch.zeros(1, 2, 4))


def test_connected_by_sides_only():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]]).bool()
    assert connected(mask, (0, 0)).int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_boxes_of_masks_and_their_overlap():
    mask = np.zeros((6, 8), np.uint8)
    mask[1:3, 2:5], mask[4:, 6:] = 1, 7
    assert true_boxes(mask) == [(2, 1, 5, 3), (6, 4, 8, 6)]
    assert box_iou((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0


@pytest.fixture
def folder(tmp_path):
    """Pictures of grey ground with one red object each, and their masks."""
    generator = np.random.default_rng(0)
    for number in range(3):
        picture = generator.integers(90, 110, (96, 128, 3))
        mask = np.zeros((96, 128), np.uint8)
        top, left = 16 * generator.integers(0, 4), 16 * generator.integers(0, 5)
        picture[top : top + 32, left : left + 48] = (220, 30, 30)
        mask[top : top + 32, left : left + 48] = 1
        (tmp_path / "m").mkdir(exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "m" / f"{number}.png")
    return tmp_path


def test_objects_of_pixels_lie_where_the_masks_say(folder):
    for number in range(3):
        numbers = torch.from_numpy(np.array(Image.open(folder / f"{number}.png"))).permute(2, 0, 1)
        ((box, mask),) = object_boxes(numbers, pixel_encoder(patch=16, short_side=None))
        truth = np.array(Image.open(folder / "m" / f"{number}.png"))
        assert box_iou(box, true_boxes(truth)[0]) == 1 and (mask == truth).all()


def test_correct_localisation_from_yaml(folder, capsys):
    objects = {"root": str(folder), "images": "*.png", "masks": "m/*.png", "short_side": 96}
    (folder / "c.yaml").write_text(yaml.safe_dump({"name": "o", "task": "discovery", "objects": objects}))
    words = ["benchmark", folder / "c.yaml", "-o", folder / "out", "--backbone", "vit-tiny-aerial"]
    assert cli.main([str(w) for w in words]) == 0
    rows = {row.encoder: row for row in read_rows(folder / "out" / "results.json")}
    assert rows["raw pixels of the patches"].value == 1 and rows["the whole picture"].value == 0
    assert rows["vit-tiny-aerial"].details["images"] == 3
    capsys.readouterr()
    assert cli.main([*(str(w) for w in words), "--set", "objects.masks=none/*.png"]) == 2
    assert "no file of" in capsys.readouterr().err


def test_show_objects(folder, capsys):
    words = ["show", "objects", str(folder / "0.png"), "-o", str(folder / "o.png"), "--count", "2"]
    assert cli.main(words) == 0
    assert "xmin" in capsys.readouterr().out and Image.open(folder / "o.png").size == (128, 96)
    assert cli.main(["show", "objects", str(folder / "none.png"), "-o", str(folder / "p.png")]) == 2
    assert capsys.readouterr().err.count("error: ") == 1 and not (folder / "p.png").exists()
