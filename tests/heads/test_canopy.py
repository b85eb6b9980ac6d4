import json

import numpy as np
import pytest
import rasterio
import torch
from safetensors.torch import load_file

from dinov3geo.backbones import zoo
from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.backbones.zoo import save_backbone
from dinov3geo.cli import main
from dinov3geo.data.pairs import find_pairs
from dinov3geo.errors import ConfigError, DataError, GeoreferenceError, RasterError, UnknownNameError
from dinov3geo.features.extract import FeatureCache
from dinov3geo.heads import canopy, epochs
from dinov3geo.heads.canopy import (
    CANOPY_BACKBONE,
    CanopySettings,
    HeadSettings,
    fit_canopy,
    load_canopy_model,
    save_canopy_model,
)
from dinov3geo.heads.epochs import EpochFit
from dinov3geo.heads.heights import HeightFitSettings as FitSettings
from dinov3geo.heads.samples import build_samples

X, Y = 400_000.0, 3_280_000.0
SETTINGS = CanopySettings(
    views=2,
    predict_views=2,
    num_maps=2,
    head=HeadSettings(kind="context"),
    fit=FitSettings(epochs=2, batch_pixels=4096),
)


@pytest.fixture
def backbone_file(tmp_path, monkeypatch):
    config = VitConfig(24, 2, 2, "mlp", 48, layer_scale=0.5)
    monkeypatch.setitem(zoo.VARIANTS, "vit_test", config)
    torch.manual_seed(0)
    numbers = (1 / 255,) * 3, (0.0,) * 3, (0.4, 0.5, 0.3), (0.2, 0.2, 0.2)
    normalization = Normalization(("red", "green", "blue"), *numbers)
    card = BackboneCard("vit-test", "vit_test", 16, normalization, licence="CC BY 4.0")
    path = tmp_path / "backbone" / "vit.safetensors"
    save_backbone(path, VisionTransformer(config), card)
    return path


@pytest.fixture
def plots(write_raster):
    """Folders of three images of 4.8 x 6.4 m and heights of 1 m cells that follow their brightness."""
    for number in range(3):
        origin = X + 100 * number, Y
        cells = np.random.default_rng(number).uniform(20, 200, (4, 6))
        image = np.kron(cells, np.ones((10, 10)))[None].repeat(3, 0).astype(np.uint8)
        images = write_raster(f"rgb/P_{number}.tif", array=image, origin=origin)
        heights = write_raster(
            f"chm/{9 - number}.tif", array=(cells / 10).astype(np.float32), pixel_size=1.0, origin=origin
        )
    return images.parent, heights.parent


@pytest.fixture
def fitted(plots, backbone_file, tmp_path):
    out = tmp_path / "model"
    report = fit_canopy(*plots, out=out, backbone=backbone_file, settings=SETTINGS, command="the command")
    return out, report


def test_fit_writes_a_whole_model_with_its_card(fitted):
    out, report = fitted
    assert sorted(p.name for p in out.iterdir()) == [
        "backbone.json",
        "backbone.safetensors",
        "card.json",
        "head.safetensors",
    ]
    assert (report.pairs, report.cells) == (3, 72)
    card = json.loads((out / "card.json").read_text())
    assert card["format"] == "dinov3geo-head/1" and card["name"] == "model"
    assert card["command"] == "the command" and card["gsd_m"] == [0.1, 0.1]
    assert card["backbone"]["name"] == "vit-test" and card["blocks"] == [0, 1]
    assert card["trained_on"] == {"pairs": 3, "images": 3, "cells": 72}
    assert card["training_mae_m"] == report.training_mae_m > 0
    assert "CC BY 4.0" in card["licence"] and card["output"]["unit"] == "m"
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".model")]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"kind": "dpt", "channels": 4, "finest": 1}, ".cut.fit"),
        ({"kind": "context", "components": 4, "hidden": 8}, ".cut.fit0"),
        ({"kind": "context", "components": 4, "hidden": 8, "members": 2}, ".cut.fit1"),
    ],
)
def test_the_same_command_goes_on_with_an_interrupted_fit(
    plots, backbone_file, tmp_path, monkeypatch, capsys, changes, state
):
    words = ["canopy", "fit", "--images", plots[0], "--heights", plots[1], "--backbone", backbone_file]
    words += ["--epochs", 6, "--cache", tmp_path / "cache"]
    for name, value in changes.items():
        words += ["--set", f"head.{name}={value}"]

    def run(name):
        return main([str(word) for word in [*words, "--out", tmp_path / name]])

    assert run("whole") == 0
    monkeypatch.setattr(epochs, "SECONDS_BETWEEN_SAVES", 0.0)
    advance, calls = EpochFit._advance, []
    stop = 4 + 6 * (changes.get("members", 1) - 1)

    def interrupted(fit):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        advance(fit)

    monkeypatch.setattr(EpochFit, "_advance", interrupted)
    assert run("cut") == 130
    assert (tmp_path / state).is_file() and not (tmp_path / "cut").exists()
    capsys.readouterr()
    assert run("cut") == 0
    assert len(calls) == stop + (3 if stop == 4 else 6 + 3)
    assert "went on after epoch 3 of a fit that was cut off" in capsys.readouterr().err
    assert not list(tmp_path.glob(".cut*"))
    whole, cut = (load_file(tmp_path / name / "head.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_loaded_model_predicts_what_was_fitted(fitted, plots):
    model = load_canopy_model(fitted[0])
    (pair, *_) = find_pairs(*plots)
    (sample,) = build_samples(
        [pair],
        model.backbone,
        blocks=model.blocks,
        image_scale=model.image_scale,
        views=1,
        cache=FeatureCache(None),
    )
    image = torch.from_numpy(np.array(canopy_arrays(pair).image))[None]
    model.views = 1
    with torch.no_grad():
        cells = canopy.predict_cells(model.head, sample.views, sample.factor)
    pixels = model.predict(image)
    assert pixels.shape == (1, 1, 40, 60) and pixels.dtype == torch.float32
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(pixels, 10), cells, rtol=1e-2, atol=1e-2)


def canopy_arrays(pair):
    from dinov3geo.data.pairs import load_pair

    return load_pair(pair)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_predictions_have_the_size_of_the_image_and_stay_within_limits(fitted, scale):
    model = load_canopy_model(fitted[0])
    model.image_scale = scale
    image = torch.randint(0, 256, (2, 3, 37, 50), dtype=torch.uint8)
    heights = model.predict(image, torch.ones(2, 37, 50, dtype=torch.bool))
    assert heights.shape == (2, 1, 37, 50)
    assert heights.isfinite().all() and heights.min() >= 0 and heights.max() <= 80
    assert not heights.requires_grad


def test_all_views_make_a_prediction_that_turns_with_the_image(fitted):
    model = load_canopy_model(fitted[0])
    model.views = 8
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    turned = model.predict(torch.rot90(image, 1, (-2, -1)))
    torch.testing.assert_close(torch.rot90(model.predict(image), 1, (-2, -1)), turned, rtol=1e-3, atol=1e-3)


def test_equal_seeds_give_equal_heads_with_or_without_cache(plots, backbone_file, tmp_path):
    contents = []
    for name in ("first", "second", "third"):
        out = tmp_path / name
        cache = FeatureCache(None if name == "first" else tmp_path / "cache")
        fit_canopy(*plots, out=out, backbone=backbone_file, settings=SETTINGS, cache=cache)
        contents.append((out / "head.safetensors").read_bytes())
    assert contents[0] == contents[1] == contents[2]
    assert len(list((tmp_path / "cache").iterdir())) == 3 * SETTINGS.views


def test_fitting_reads_bands_by_name_as_prediction_does(plots, backbone_file, write_raster, tmp_path):
    images, heights = plots
    for image in sorted(images.iterdir()):
        with rasterio.open(image) as source:
            numbers = source.read()
        # Unlike bands, or an exchange would not show.
        numbers = (numbers * np.array([1.0, 0.7, 0.4])[:, None, None]).astype(np.uint8)
        origin = source.transform.c, source.transform.f
        write_raster(
            f"as_rgb/{image.name}", array=numbers, origin=origin, band_names=["red", "green", "blue"]
        )
        write_raster(
            f"as_bgr/{image.name}", array=numbers[::-1], origin=origin, band_names=["blue", "green", "red"]
        )
    written = []
    for name in ("as_rgb", "as_bgr"):
        out = tmp_path / f"model_{name}"
        fit_canopy(images.parent / name, heights, out=out, backbone=backbone_file, settings=SETTINGS)
        written.append((out / "head.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_head_averages_only_the_views_that_it_was_fitted_on():
    with pytest.raises(ValueError, match="predict_views is 8, but the head is fitted on 1 views"):
        CanopySettings(predict_views=8)


def test_an_existing_folder_is_replaced_only_on_request(fitted, plots, backbone_file):
    out, _ = fitted
    before = (out / "head.safetensors").read_bytes()
    with pytest.raises(RasterError, match="exists"):
        fit_canopy(*plots, out=out, backbone=backbone_file, settings=SETTINGS)
    longer = SETTINGS.model_copy(update={"fit": FitSettings(epochs=3, batch_pixels=4096)})
    fit_canopy(*plots, out=out, backbone=backbone_file, settings=longer, overwrite=True)
    assert (out / "head.safetensors").read_bytes() != before
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []


def test_a_folder_that_is_no_model_is_never_replaced(plots, backbone_file, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data.txt").write_text("mine")
    with pytest.raises(RasterError, match="not a canopy model"):
        fit_canopy(*plots, out=tmp_path / "precious", backbone=backbone_file, overwrite=True)
    assert (tmp_path / "precious" / "data.txt").read_text() == "mine"


def test_bad_heights_leave_nothing_behind(plots, backbone_file, write_raster, tmp_path):
    far = write_raster("far.tif", array=np.ones((4, 6), np.float32), pixel_size=1.0, origin=(X, Y + 5000))
    empty = write_raster(
        "empty.tif", array=np.full((4, 6), -9999, np.float32), pixel_size=1.0, origin=(X, Y), nodata=-9999
    )
    for heights, error in ((far, GeoreferenceError), (empty, DataError)):
        with pytest.raises(error):
            fit_canopy(
                plots[0], heights, out=tmp_path / "out" / "m", backbone=backbone_file, settings=SETTINGS
            )
        assert not (tmp_path / "out" / "m").exists()


def test_images_with_other_bands_are_refused(plots, backbone_file, write_raster, tmp_path):
    gray = write_raster("gray.tif", shape=(1, 40, 60), origin=(X, Y))
    with pytest.raises(DataError, match=r"has 1 band; model 'vit-test' needs 3: red, green, blue"):
        fit_canopy(gray, plots[1], out=tmp_path / "m", backbone=backbone_file, settings=SETTINGS)


def test_unknown_model_names_list_the_valid_ones(tmp_path):
    with pytest.raises(UnknownNameError, match="canopy-tiny-aerial"):
        load_canopy_model("canopy-tinny-aerial")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: "{", "not JSON"),
        (lambda card: "[]", "not a head card"),
        (lambda card: json.dumps({**card, "format": "other/1"}), "not a head card"),
        (
            lambda card: json.dumps({k: v for k, v in card.items() if k != "blocks"}),
            "not a complete head card",
        ),
        (lambda card: json.dumps({**card, "settings": {"vews": 1}}), "not a complete head card"),
        (
            lambda card: json.dumps({**card, "backbone": {**card["backbone"], "weights_digest": "0"}}),
            "other weights",
        ),
    ],
)
def test_damaged_cards_are_named(fitted, change, message):
    path = fitted[0] / "card.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ConfigError, match=message) as caught:
        load_canopy_model(fitted[0])
    assert "card.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_starter_model_is_what_a_fit_gives_that_is_told_nothing():
    card = load_canopy_model().card
    assert CanopySettings.model_validate(card["settings"]) == CanopySettings()
    assert card["backbone"]["bundled"] == CANOPY_BACKBONE


def test_a_head_that_does_not_fit_its_card_is_an_error(fitted):
    path = fitted[0] / "card.json"
    card = json.loads(path.read_text())
    card["settings"]["head"]["hidden"] = 16
    path.write_text(json.dumps(card))
    with pytest.raises(DataError, match="does not fit its card"):
        load_canopy_model(fitted[0])


def test_a_model_on_a_bundled_backbone_carries_no_copy(plots, backbone_file, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.BUNDLED, "vit-bundled", backbone_file)
    out = tmp_path / "model"
    fit_canopy(*plots, out=out, backbone="vit-bundled", settings=SETTINGS)
    assert sorted(p.name for p in out.iterdir()) == ["card.json", "head.safetensors"]
    again = load_canopy_model(out)
    copied = tmp_path / "copy"
    save_canopy_model(copied, again)
    assert (copied / "head.safetensors").read_bytes() == (out / "head.safetensors").read_bytes()
