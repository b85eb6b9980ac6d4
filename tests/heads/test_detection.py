"""Boxes: annotations of three kinds, turns, the detector on made squares and on real tree crowns."""

import csv
import importlib.metadata
import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import torch
from PIL import Image

from dinov3geo.data.boxes import clip_boxes, load_boxes
from dinov3geo.features.extract import apply_view
from dinov3geo.heads.box_scores import score_boxes
from dinov3geo.heads.detection import Boxes, DetectionHead, DetectionSettings, object_classes, turn_boxes
from dinov3geo.heads.detection_fit import BoxSample, BoxView, fit_boxes, windows
from dinov3geo.heads.scene_boxes import _placed, _starts
from tests.command_line import run

HEADER = "image_path,xmin,ymin,xmax,ymax,label\n"
QUICK = ("fit.epochs=3", "views=1", "num_maps=1", "head.convs=1", "head.channels=32", "max_window=256")


def sets(values):
    return [word for value in values for word in ("--set", value)]


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3)).astype(np.uint8)).save(
        tmp_path / "a.png"
    )
    return tmp_path / "a.png"


def test_three_kinds_of_annotations_say_the_same(picture):
    folder = picture.parent
    (folder / "b.csv").write_text(HEADER + "a.png,1,2,30,40,tree\na.png,50,5,60,25,car\n")
    coco = {
        "images": [{"id": 7, "file_name": "a.png"}],
        "categories": [{"id": 2, "name": "tree"}, {"id": 1, "name": "car"}],
        "annotations": [
            {"image_id": 7, "category_id": 2, "bbox": [1, 2, 29, 38]},
            {"image_id": 7, "category_id": 1, "bbox": [50, 5, 10, 20]},
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 90, 90], "iscrowd": 1},
        ],
    }
    (folder / "b.json").write_text(json.dumps(coco))
    (folder / "xml").mkdir()
    objects = "".join(
        f"<object><name>{n}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
        "</bndbox></object>"
        for n, a, b, c, d in (("tree", 1, 2, 30, 40), ("car", 50, 5, 60, 25))
    )
    (folder / "xml" / "a.xml").write_text(f"<annotation><filename>a.png</filename>{objects}</annotation>")
    found = [load_boxes(folder / "b.csv"), load_boxes(folder / "b.json"), load_boxes(folder / "xml", folder)]
    for one in found:
        assert one.classes == ("car", "tree") and one.count == 2
        np.testing.assert_array_equal(one.images[0].boxes, [[1, 2, 30, 40], [50, 5, 60, 25]])
        np.testing.assert_array_equal(one.images[0].labels, [1, 0])
    (folder / "e.csv").write_text(HEADER + "a.png,0,0,0,0,tree\n")
    with pytest.raises(ValueError, match="holds no box of 1 images"):
        load_boxes(folder / "e.csv")


@pytest.mark.parametrize("view", range(8))
def test_boxes_turn_with_their_image(view):
    image = torch.zeros(20, 30)
    image[4:9, 10:23] = 1
    turned = apply_view(image, view)
    (box,) = turn_boxes(torch.tensor([[10.0, 4, 23, 9]]), view, (20, 30)).int().tolist()
    rows, cols = torch.nonzero(turned, as_tuple=True)
    assert box == [int(cols.min()), int(rows.min()), int(cols.max()) + 1, int(rows.max()) + 1]


def test_windows_and_what_they_show_of_boxes():
    assert windows((100, 50), 64) == [(0, 0, 50, 50), (0, 50, 50, 100)]
    boxes = np.array([[10, 10, 20, 20], [40, 10, 60, 20], [49, 10, 69, 20]], np.float32)
    inside, kept = clip_boxes(boxes, (0, 0, 50, 50))
    assert kept.tolist() == [True, True, False] and inside[1].tolist() == [40, 10, 50, 20]
    assert _starts(100, 40, 10) == [0, 30, 60] and _starts(30, 40, 10) == [0]


def test_a_box_cut_by_an_inner_edge_is_left_to_the_window_beside():
    boxes = torch.tensor([[0.0, 5, 10, 15], [20, 5, 40, 15], [12, 5, 20, 15]])
    one = Boxes(boxes, torch.ones(3), torch.zeros(3, dtype=torch.long))
    found = _placed(one, 0, 30, (40, 40), (40, 100), True)
    assert found.boxes.tolist() == [[42, 5, 50, 15]]
    # At the scene's own edges nothing is cut.
    assert len(_placed(one, 0, 0, (40, 40), (40, 40), True).boxes) == 3


def squares(count, generator):
    """Maps of 16 x 12 patches whose first channel is 1 under a square object."""
    views = []
    for _ in range(count):
        maps = torch.zeros(4, 12, 16)
        maps[1:] = torch.randn(3, 12, 16, generator=generator) * 0.1
        row, col = (int(torch.randint(0, n - 4, (1,), generator=generator)) for n in (12, 16))
        maps[0, row : row + 4, col : col + 4] = 1
        box = torch.tensor([[col * 16.0, row * 16.0, col * 16.0 + 64, row * 16.0 + 64]])
        views.append(BoxView((maps,), box, torch.zeros(1, dtype=torch.long), (192, 256)))
    return views


def test_a_detector_finds_made_squares_and_equal_seeds_give_equal_weights():
    generator = torch.Generator().manual_seed(0)
    train, test = squares(12, generator), squares(4, generator)
    settings = DetectionSettings.model_validate(
        {"head": {"channels": 32, "convs": 1}, "fit": {"epochs": 50, "learning_rate": 2e-3}}
    )
    heads = []
    for _ in range(2):
        torch.manual_seed(0)
        head = DetectionHead([4], output=object_classes(["square"]), patch=16, settings=settings)
        epochs = settings.fit if not heads else settings.fit.model_copy(update={"epochs": 1})
        if heads:
            once = DetectionHead([4], output=object_classes(["square"]), patch=16, settings=settings)
            once.load_state_dict(head.state_dict())
            fit_boxes(once, [BoxSample((v,), "") for v in train], epochs)
            fit_boxes(head, [BoxSample((v,), "") for v in train], epochs)
            for name, value in head.state_dict().items():
                torch.testing.assert_close(value, once.state_dict()[name], rtol=0, atol=0)
            break
        result = fit_boxes(head, [BoxSample((v,), "") for v in train], epochs)
        assert result.losses[-1] < 0.7 * result.losses[0]
        heads.append(head)
    with torch.no_grad():
        found = [heads[0]([v.maps[0][None]], (192, 256))[0] for v in test]
    scores = score_boxes(found, [(v.boxes, v.labels) for v in test], ["square"])
    assert scores.map_50 > 0.8 and scores.images == 4 and scores.boxes == 4


def test_average_precision_of_known_boxes():
    truth = [(torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]), torch.tensor([0, 0]))]
    right = Boxes(truth[0][0], torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))
    assert score_boxes([right], truth, ["a", "b"]).map == pytest.approx(1)
    half = Boxes(truth[0][0][:1], torch.tensor([0.9]), torch.tensor([0]))
    found = score_boxes([half], truth, ["a", "b"])
    assert found.map == pytest.approx(51 / 101, abs=1e-3) and found.recall == pytest.approx(0.5)
    assert np.isnan(found.per_class["b"])
    none = Boxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert score_boxes([none], truth, ["a"]).map == 0


@pytest.fixture(scope="module")
def crowns(tmp_path_factory):
    """The wheel's tree crowns: OSBS_029.tif with OSBS_029.csv."""
    try:
        files = {f.name: Path(str(f.locate())) for f in importlib.metadata.files("deepforest") or []}
    except importlib.metadata.PackageNotFoundError:
        files = {}
    if "OSBS_029.csv" not in files:
        pytest.skip("no OSBS_029.csv: pip install --no-deps deepforest")
    return files["OSBS_029.csv"]


def test_tree_crowns_from_fit_to_geopackage(crowns, tmp_path, capsys):
    model = tmp_path / "crowns"
    words = ("detect", "fit", crowns, "--out", model, "--cache", tmp_path / "cache", *sets(QUICK))
    code, out, err = run(capsys, *words, "--dry-run")
    assert code == 0 and "epochs: 3" in out and not model.exists(), err
    assert "boxes of Tree" in out
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "Tree 61" in out and (model / "learning_curve.png").is_file()
    card = json.loads((model / "card.json").read_text())
    assert card["trained_on"] == {"images": 1, "windows": 4, "boxes": {"Tree": 61}}
    scene = crowns.with_name("OSBS_029.tif")
    words = ("detect", "predict", scene, "--model", model, "--min-score", 0.0)
    code, out, err = run(capsys, *words, "-o", tmp_path / "trees.gpkg")
    assert code == 0, err
    table = geopandas.read_file(tmp_path / "trees.gpkg", layer="objects")
    assert table.crs.to_epsg() == 32617 and len(table) > 0
    left, bottom, right, top = table.total_bounds
    assert 404211 < left < right < 404252 and 3285102 - 41 < bottom < top < 3285143
    first = table.iloc[0]
    assert first.geometry.area == pytest.approx(
        (first.xmax - first.xmin) * (first.ymax - first.ymin) / 100, rel=1e-2
    )
    assert run(capsys, *words, "-o", tmp_path / "trees.csv")[0] == 0
    rows = list(csv.DictReader((tmp_path / "trees.csv").read_text().splitlines()))
    assert len(rows) == len(table) and rows[0]["image_path"] == "OSBS_029.tif"
    code, out, err = run(capsys, "detect", "evaluate", crowns, "--model", model, "-o", tmp_path / "r.json")
    assert code == 0 and "mAP 50" in out
    assert json.loads((tmp_path / "r.json").read_text())["boxes"] == 61
    code, _, err = run(capsys, *words, "-o", tmp_path / "trees.gpkg")
    assert code == 2 and "exists" in err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "expected a .csv, a COCO .json"),
        ("a.csv", "image,x\n", "has no column image_path"),
        ("a.csv", HEADER + "a.png,1,2,x,4,tree\n", "line 2: a side is no number"),
        ("a.csv", HEADER + "a.png,30,2,3,40,tree\n", "expected xmin < xmax"),
        ("a.csv", HEADER + "b.png,1,2,30,40,tree\n", "names 1 images that are not in"),
        ("a.csv", HEADER + "a.png,1,2,300,40,tree\n", "are the annotations of another size?"),
        ("a.json", "{}", "is no COCO file"),
        ("xml/a.xml", "<annotation/>", "names no image"),
        ("xml/a.xml", "<annotation>", "is no annotation in Pascal VOC's form"),
    ],
)
def test_bad_annotations_are_one_line(name, text, message, picture, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    source = tmp_path / name if name.count("/") == 0 else (tmp_path / name).parent
    code, out, err = run(capsys, "detect", "fit", source, "--out", tmp_path / "m", *sets(QUICK))
    assert code == 2 and out == "" and message in err and err.count("error: ") == 1
    assert not (tmp_path / "m").exists()


def test_a_folder_that_is_no_model_and_a_picture_without_a_place(picture, tmp_path, capsys):
    code, _, err = run(capsys, "detect", "predict", picture, "--model", tmp_path, "-o", tmp_path / "x.gpkg")
    assert code == 2 and "card.json" in err
    missing = tmp_path / "none"
    code, _, err = run(capsys, "detect", "predict", picture, "--model", missing, "-o", tmp_path / "x.gpkg")
    assert code == 2 and "unknown detection model" in err and "`detect fit` wrote" in err
    code, _, err = run(capsys, "detect", "predict", picture, "--model", tmp_path, "-o", tmp_path / "x.shp")
    assert code == 2 and "unknown form of table" in err
    (tmp_path / "b.csv").write_text(HEADER + "a.png,1,2,30,40,tree\n")
    model = tmp_path / "m"
    words = ("detect", "fit", tmp_path / "b.csv", "--out", model, "--cache", tmp_path, *sets(QUICK))
    assert run(capsys, *words)[0] == 0
    code, _, err = run(capsys, "detect", "predict", picture, "--model", model, "-o", tmp_path / "x.gpkg")
    assert code == 2 and "write a .csv instead" in err and not (tmp_path / "x.gpkg").exists()
    (tmp_path / "c.csv").write_text(HEADER + "a.png,1,2,30,40,bush\n")
    code, _, err = run(capsys, "detect", "evaluate", tmp_path / "c.csv", "--model", model)
    assert code == 2 and "the model tree" in err
