"""`dinov3geo landcover` from end to end on a scene whose brightness is its class."""

import json

import numpy as np
import pytest
import rasterio
import torch

from dinov3geo.backbones import zoo
from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.backbones.zoo import save_backbone
from dinov3geo.cli import main
from dinov3geo.config import load_model
from dinov3geo.data.labels import ClassScheme
from dinov3geo.errors import ConfigError
from dinov3geo.evaluation.canopy import CanopyVariants
from dinov3geo.heads.canopy import load_canopy_model
from dinov3geo.heads.landcover import LandcoverSettings, load_landcover_model

X, Y = 400_000.0, 3_280_000.0
CLASSES = """
classes:
  - {name: dark, values: 1, colour: "#102030"}
  - {name: middle, values: [2, 3]}
  - {name: bright, values: 4}
ignore: [0]
"""


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    config = VitConfig(24, 2, 2, "mlp", 48, layer_scale=0.5)
    monkeypatch.setitem(zoo.VARIANTS, "vit_test", config)
    torch.manual_seed(0)
    numbers = (1 / 255,) * 3, (0.0,) * 3, (0.4,) * 3, (0.2,) * 3
    card = BackboneCard("vit-test", "vit_test", 16, Normalization(("red", "green", "blue"), *numbers))
    path = tmp_path / "backbone" / "vit.safetensors"
    save_backbone(path, VisionTransformer(config), card)
    return path


@pytest.fixture
def places(write_raster, tmp_path):
    """Six places of 64 x 64 m, each of four fields of one brightness; the mask's first row is ignored."""
    (tmp_path / "classes.yaml").write_text(CLASSES)
    for number in range(6):
        rng = np.random.default_rng(number)
        kinds = np.array([0, 1, 2, rng.integers(3)])
        fields = np.kron(rng.permutation(kinds).reshape(2, 2), np.ones((32, 32), int))
        image = (40 + 80 * fields + rng.integers(-5, 5, fields.shape))[None].repeat(3, 0)
        mask = np.array([1, 2, 4])[fields]
        mask[0] = 0
        where = {"pixel_size": 1.0, "origin": (X + 200 * number, Y)}
        write_raster(f"rgb/p{number}.tif", array=image.astype(np.uint8), **where)
        write_raster(f"mask/p{number}.tif", array=mask.astype(np.uint8), **where)
    return tmp_path


@pytest.fixture
def command(places, backbone):
    def words(verb, *more, classes=True):
        found = ["landcover", verb, "--images", f"{places}/rgb", "--masks", f"{places}/mask"]
        found += ["--classes", f"{places}/classes.yaml"] if classes else []
        fitting = ["--backbone", str(backbone), "--cache", f"{places}/cache", "--set", "image_scale=2"]
        return [*found, *(fitting if classes else []), *more]

    return words


def only_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_fit_predict_evaluate(command, places, capsys):
    model = places / "model"
    settings = [
        "--set",
        "fit.epochs=40",
        "--set",
        "fit.learning_rate=2e-2",
        "--set",
        "fit.validation_share=0.2",
    ]
    assert main(command("fit", "--out", str(model), *settings)) == 0
    said = capsys.readouterr().out
    assert "dark" in said and "validation  mIoU" in said
    names = {"head.safetensors", "card.json", "learning_curve.png", "backbone.safetensors"}
    assert names <= {p.name for p in model.iterdir()} | {"backbone.safetensors"}
    card = json.loads((model / "card.json").read_text())
    assert card["output"]["class_names"] == ["dark", "middle", "bright"]
    assert sum(card["trained_on"]["pixels"].values()) == 6 * (64 * 64 - 64)

    scene, out = places / "rgb" / "p0.tif", places / "cover.tif"
    words = ["landcover", "predict", str(scene), "-o", str(out), "--model", str(model)]
    assert main([*words, "--uncertainty", "--probabilities", "--polygons", "gpkg"]) == 0
    with rasterio.open(out) as dataset, rasterio.open(places / "mask" / "p0.tif") as truth:
        classes, wanted = dataset.read(1), np.searchsorted([1, 2, 4], truth.read(1))
        assert dataset.colormap(1)[0][:3] == (16, 32, 48) and dataset.nodata == 255
        assert (classes == wanted)[1:].mean() > 0.8
    assert "#102030" in (places / "cover.qml").read_text()
    for name in ("cover_uncertainty.tif", "cover_probabilities.tif", "cover.gpkg", "cover_legend.png"):
        assert (places / name).is_file()
    with rasterio.open(scene) as image:
        coarse = 2 * image.res[0]
    assert main([*words, "--overwrite", "--gsd", str(coarse)]) == 0
    with rasterio.open(out) as dataset:
        assert dataset.res == (coarse, coarse) and dataset.shape == (32, 32)
        assert (dataset.read(1) == wanted[::2, ::2])[1:].mean() > 0.5

    assert main(command("evaluate", "--model", str(model), "--out", f"{places}/r", classes=False)) == 0
    row = json.loads((places / "r" / "results.json").read_text())["rows"][0]
    assert row["method"] == "model" and row["miou"] > 0.6 and row["pixels"] == 6 * (64 * 64 - 64)
    with pytest.raises(ConfigError, match="is a model of land cover, expected canopy height"):
        load_canopy_model(model)
    assert load_landcover_model(model).predict(torch.zeros(1, 3, 50, 70)).shape == (1, 3, 50, 70)


def test_folds_beside_baselines_go_on_where_they_were(command, places, capsys):
    words = command(
        "evaluate", "--folds", "2", "--methods", "linear,dpt,forest,unet", "--unet-seconds", "0.2",
        "--out", f"{places}/r", "--epochs", "2", "--set", "head.channels=8",
    )  # fmt: skip
    assert main(words) == 0
    report = json.loads((places / "r" / "results.json").read_text())
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == ["linear", "dpt", "forest", "unet"] and report["places"] == 6
    assert {row["pixels"] for row in rows.values()} == {6 * (64 * 64 - 64)}
    assert rows["forest"]["miou"] > 0.95
    assert sorted(sum(report["images_per_fold"], [])) == [f"p{k}.tif" for k in range(6)]
    for name in ("results.md", "iou.png", "confusion.png", "maps.png"):
        assert (places / "r" / name).stat().st_size > 100
    kept = {p: p.stat().st_mtime_ns for p in (places / "r" / "parts").iterdir()}
    assert len(kept) == 8
    next(p for p in kept if p.name.startswith("forest_fold2")).unlink()
    assert main(words) == 0
    again = json.loads((places / "r" / "results.json").read_text())
    changed = [p.name.split("_")[0] for p in kept if p.stat().st_mtime_ns != kept[p]]
    assert changed == ["forest"]
    assert [r["confusion"] for r in again["rows"]] == [r["confusion"] for r in report["rows"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unnamed", "holds 7 (1 pixels), which no class names"),
        ("ignored", "all is ignored or nodata"),
        ("empty", "no mask holds a pixel of bright"),
        ("elsewhere", "none of 6 masks overlaps one of 6 images"),
    ],
)
def test_masks_that_cannot_be_used_end_in_one_line(command, places, capsys, change, message):
    for path in sorted((places / "mask").iterdir()):
        with rasterio.open(path, "r+") as dataset:
            mask = dataset.read(1)
            if change == "unnamed":
                mask[3, 3] = 7
            elif change == "ignored":
                mask[:] = 0
            elif change == "empty":
                mask[mask == 4] = 2
            else:
                dataset.crs = "EPSG:32601"
            dataset.write(mask, 1)
    assert main(command("fit", "--out", f"{places}/m")) == 2
    assert message in only_line(capsys)
    assert not (places / "m").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folds", "7", "--methods", "linear"], "7 folds were asked for, but 6 separate places"),
        (["--folds", "2", "--methods", "lineer"], "did you mean 'linear'"),
        (["--folds", "2", "--methods", "unet"], "add one to the methods, or --unet-seconds"),
        (["--folds", "2", "--set", "fit.optimizer=lbfgs", "--methods", "dpt"], "needs a linear problem"),
        ([], "give either --model, to score it, or --folds"),
    ],
)
def test_evaluations_that_make_no_sense_end_in_one_line(command, capsys, words, message):
    assert main(command("evaluate", *words)) == 2
    assert message in only_line(capsys)


def test_images_without_a_mask_and_masks_without_an_image_are_counted(command, places, capsys):
    (places / "mask" / "p0.tif").unlink()
    (places / "rgb" / "p1.tif").unlink()
    assert main(command("fit", "--out", f"{places}/m", "--epochs", "1")) == 0
    assert "1 images have no mask and 1 masks no image" in capsys.readouterr().err


def test_a_plan_fits_nothing(command, places, capsys):
    assert main(command("fit", "--out", f"{places}/m", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "kind: linear" in said and "dark (1), middle (2, 3), bright (4); ignored: 0" in said
    assert not (places / "m").exists() and not (places / "cache").exists()


def test_every_file_of_classes_and_heads_can_be_read(project_root):
    for path in (project_root / "configs" / "classes").glob("*.yaml"):
        assert len(load_model(ClassScheme, path).classes) >= 2
    for path in (project_root / "configs" / "heads").glob("*.yaml"):
        kind = CanopyVariants if path.name.startswith("canopy") else LandcoverSettings
        assert load_model(kind, path)
