"""Heads fitted on stored features, from the command line to heights of a scene."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from dinov3geo import cli
from dinov3geo.backbones import zoo
from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.backbones.zoo import save_backbone
from dinov3geo.errors import ConfigError, DataError, RasterError
from dinov3geo.features.extract import FeatureCache
from dinov3geo.features.opened import open_features
from dinov3geo.heads import samples as image_samples
from dinov3geo.heads.stored import match_stored, open_scenes, shared_facts, stored_samples, stored_settings

pytest.importorskip("zarr")
pytest.importorskip("pyarrow")

KINDS = ("zarr", "parquet", "tif")
SETTINGS = ("head.components=8", "head.hidden=8", "head.dropout=0", "fit.learning_rate=0.03")
FIT = ["--epochs", 60, *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture
def backbone_file(tmp_path, monkeypatch) -> Path:
    """Weights of two untrained blocks, 24 wide."""
    config = VitConfig(24, 2, 2, "mlp", 48, layer_scale=0.5)
    monkeypatch.setitem(zoo.VARIANTS, "vit_test", config)
    torch.manual_seed(0)
    normalization = Normalization.of_rgb8((0.4, 0.5, 0.3), (0.2, 0.2, 0.2))
    path = tmp_path / "weights" / "vit.safetensors"
    save_backbone(path, VisionTransformer(config), BackboneCard("vit-test", "vit_test", 16, normalization))
    return path


@pytest.fixture
def heights(osbs_scene, tmp_path, write_raster) -> Path:
    """Made heights of 1 m cells over the real scene: ten pixels each, which patches of 16 do not divide."""
    with rasterio.open(osbs_scene) as scene:
        cells = scene.read().astype(np.float32).mean(0).reshape(40, 10, 40, 10).mean((1, 3))
        corner = scene.transform.c, scene.transform.f
    return write_raster("chm/h.tif", array=(255 - cells) / 10, pixel_size=1.0, origin=corner)


def run(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def store(scene: Path, output: Path, backbone: Path, *more: object) -> Path:
    run("features", scene, "-o", output, "--backbone", backbone, *more)
    return output


def heights_of(scene: Path, model: Path, output: Path, *more: object) -> np.ndarray:
    run("canopy", "predict", scene, "-o", output, "--model", model, "--no-preview", "--no-sidecars", *more)
    with rasterio.open(output) as dataset:
        return dataset.read(1, masked=True).filled(np.nan)


@pytest.mark.parametrize("kind", KINDS)
def test_heights_are_those_of_a_head_fitted_from_the_images(
    osbs_scene, heights, tmp_path, backbone_file, kind
):
    dtype = "float32" if kind == "tif" else "float16"
    features = store(osbs_scene, tmp_path / f"f.{kind}", backbone_file, "--dtype", dtype)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    # Weights that are not there cannot be opened.
    away = backbone_file.parent.rename(tmp_path / "away")
    run("canopy", "fit", "--features", features, "--heights", heights, "--out", ours, *FIT)
    away.rename(backbone_file.parent)
    assert sorted(file.name for file in ours.iterdir()) == ["card.json", "head.safetensors"]
    words = ["--images", osbs_scene, "--heights", heights, "--out", theirs, "--backbone", backbone_file]
    run("canopy", "fit", *words, "--cache", tmp_path / "cache", "--set", "num_maps=1", *FIT)
    found, expected = (heights_of(osbs_scene, m, tmp_path / f"{m.name}.tif") for m in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert np.nanstd(expected) > 0.5
    cards = [json.loads((folder / "card.json").read_text()) for folder in (ours, theirs)]
    for key in ("gsd_m", "trained_on", "settings", "blocks", "output"):
        assert cards[0][key] == cards[1][key]


def test_a_bundled_backbone_is_named_not_loaded(osbs_scene, heights, tmp_path, monkeypatch, backbone_file):
    monkeypatch.setitem(zoo.BUNDLED, "vit-bundled", backbone_file)
    features = store(osbs_scene, tmp_path / "f.zarr", "vit-bundled", "--dtype", "int8")
    run("canopy", "fit", "--features", features, "--heights", heights, "--out", tmp_path / "m", *FIT)
    about = json.loads((tmp_path / "m" / "card.json").read_text())["backbone"]
    assert about["bundled"] == "vit-bundled" and "source" not in about
    assert np.isfinite(heights_of(osbs_scene, tmp_path / "m", tmp_path / "h.tif")).any()


def test_weights_that_moved_are_named_at_prediction(osbs_scene, heights, tmp_path, backbone_file, capsys):
    features = store(osbs_scene, tmp_path / "f.zarr", backbone_file)
    model = tmp_path / "m"
    run("canopy", "fit", "--features", features, "--heights", heights, "--out", model, *FIT)
    before = heights_of(osbs_scene, model, tmp_path / "before.tif")
    moved = backbone_file.parent.rename(tmp_path / "moved") / backbone_file.name
    predict = ["canopy", "predict", osbs_scene, "-o", tmp_path / "h.tif", "--model", model, "--no-preview"]
    message = refused(capsys, *predict)
    assert f"vit-test, whose weights {backbone_file} are not there; name them with --backbone" in message
    assert "belongs to other weights" in refused(capsys, *predict, "--backbone", "vit-tiny-aerial")
    after = heights_of(osbs_scene, model, tmp_path / "after.tif", "--backbone", moved)
    np.testing.assert_array_equal(after, before)
    card = json.loads(moved.with_suffix(".json").read_text())
    card["normalization"]["mean"][0] = 0.1
    moved.with_suffix(".json").write_text(json.dumps(card))
    assert "other bands or statistics" in refused(capsys, *predict, "--backbone", moved)
    assert not (tmp_path / "h.tif").exists()


def test_what_cannot_be_fitted_on_is_one_line(osbs_scene, heights, tmp_path, backbone_file, capsys):
    out = tmp_path / "m"
    fit = ["canopy", "fit", "--heights", heights, "--out", out]
    plain = store(osbs_scene, tmp_path / "plain.zarr", backbone_file)
    pca = store(osbs_scene, tmp_path / "pca.zarr", backbone_file, "--pca", 3)
    fine = store(osbs_scene, tmp_path / "fine.zarr", backbone_file, "--image-scale", 2)
    assert "holds 3 principal components" in refused(capsys, *fit, "--features", pca)
    both = ["--features", plain, "--features", fine]
    assert "differ in image scale" in refused(capsys, *fit, *both)
    for setting in ("num_maps=4", "views=2", "colours=true", "image_scale=2"):
        message = refused(capsys, *fit, "--features", plain, "--set", setting)
        assert message.startswith(f"error: {setting.partition('=')[0]} is ") and "of block 1 alone" in message
    (tmp_path / "c.yaml").write_text("image_scale: 2\n")
    message = refused(capsys, *fit, "--features", plain, "--config", tmp_path / "c.yaml")
    assert message.startswith("error: image_scale is 2")
    assert "either --images, or" in refused(capsys, *fit)
    assert "either --images, or" in refused(capsys, *fit, "--features", plain, "--images", osbs_scene)
    assert "leave out --backbone" in refused(capsys, *fit, "--features", plain, "--backbone", backbone_file)
    assert "no such file of features" in refused(capsys, *fit, "--features", tmp_path / "none.zarr")
    assert "no file of features" in refused(capsys, *fit, "--features", heights.with_suffix(".png"))
    assert "no features found" in refused(capsys, *fit, "--features", backbone_file.parent)
    assert "does not say which backbone" in refused(capsys, *fit, "--features", heights)
    assert not out.exists()


def test_a_dry_run_reads_headers_only(osbs_scene, heights, tmp_path, backbone_file, capsys):
    store(osbs_scene, tmp_path / "stores" / "f.zarr", backbone_file)
    shutil.rmtree(backbone_file.parent)
    capsys.readouterr()
    run("canopy", "fit", "--features", tmp_path / "stores", "--heights", heights, "--out", "m", "--dry-run")
    out = capsys.readouterr().out
    assert "num_maps: 1" in out and f"{backbone_file}, not loaded" in out


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_read_alike_from_each_kind(write_raster, tmp_path, backbone_file, kind):
    array = np.random.default_rng(0).integers(1, 255, (3, 1250, 101), dtype=np.uint8)
    array[:, 32:64, 16:48] = 0
    scene = write_raster("s.tif", array=array, nodata=0)
    expected = open_features(store(scene, tmp_path / "e.zarr", backbone_file)).read()
    features = open_features(store(scene, tmp_path / f"f.{kind}", backbone_file))
    assert features.grid.shape_hw == (79, 7) and np.isnan(expected[:, 2:4, 1:3]).all()
    np.testing.assert_array_equal(features.read(), expected)
    np.testing.assert_array_equal(features.read(slice(60, 70), slice(2, 5)), expected[:, 60:70, 2:5])


def test_samples_are_those_of_the_images_where_patches_and_cells_do_not_meet(
    write_raster, tmp_path, backbone_file
):
    """Cells begin 3 pixels from a patch's corner; the scene ends within a patch, and has a hole."""
    array = np.random.default_rng(0).integers(1, 255, (3, 75, 93), dtype=np.uint8)
    array[:, :16, :32] = 0
    scene = write_raster("s.tif", array=array, nodata=0)
    chm = np.random.default_rng(1).uniform(1, 20, (6, 8)).astype(np.float32)
    target = write_raster("h.tif", array=chm, pixel_size=1.0, origin=(400_000.3, 3_280_000.0))
    scenes = open_scenes(store(scene, tmp_path / "f.zarr", backbone_file))
    settings = stored_settings(shared_facts(scenes))
    (ours,) = stored_samples(match_stored(scenes, target, settings), scenes)
    from dinov3geo.data.pairs import find_pairs

    frozen = zoo.load_backbone(backbone_file)
    arguments = {"blocks": (1,), "image_scale": 1.0, "views": 1, "cache": FeatureCache(None)}
    (theirs,) = image_samples.build_samples(find_pairs(scene, target), frozen, **arguments)
    mine, image = ours.views[0], theirs.views[0]
    assert (mine.origin, image.origin) == ((0, 3), (0, 0)) and mine.covered_hw == (64, 96)
    assert ours.factor == theirs.factor == 10
    torch.testing.assert_close(mine.target, image.target)
    torch.testing.assert_close(mine.valid, image.valid)
    assert not mine.valid.all()
    # A head whose pixels tell where they lie: cells are means over the right ones.
    columns = torch.arange(96.0).expand(1, 1, 64, 96)
    from dinov3geo.heads.fit import predict_cells

    class Columns(torch.nn.Linear):
        def forward(self, maps: object, size_hw: object) -> torch.Tensor:
            return columns

    cells = predict_cells(Columns(1, 1), [mine], 10)[0, 0]
    torch.testing.assert_close(cells[0], 7.5 + 10 * torch.arange(8.0))


def test_errors_of_the_functions(tmp_path):
    with pytest.raises(DataError, match="no features found"):
        open_scenes(tmp_path / "*.zarr")
    with pytest.raises(ConfigError, match="no file of features"):
        open_features(tmp_path / "x.npy")
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(RasterError, match="no table of features"):
        open_features(tmp_path / "x.parquet")
    (tmp_path / "x.tif").write_text("x")
    with pytest.raises(RasterError, match="cannot be read as features"):
        open_features(tmp_path / "x.tif")
