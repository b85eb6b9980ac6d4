"""Weights from every source, their normalisation and their bands."""

import dataclasses
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov3geo.backbones import zoo
from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import NORMALIZATIONS, BackboneCard
from dinov3geo.backbones.convert import from_ours
from dinov3geo.backbones.stems import adapt_stem
from dinov3geo.backbones.store import write_checkpoint, write_tensors
from dinov3geo.backbones.vit import VitConfig
from dinov3geo.backbones.zoo import VARIANTS, build_network, load_backbone, save_backbone
from dinov3geo.errors import ConfigError, DataError, UnknownNameError
from dinov3geo.rasters.sensors import get_sensor

SMALL = VitConfig(128, 2, 2, "mlp", 256)


@pytest.fixture(autouse=True)
def _small_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "vit_nano", SMALL)


def network(**changes: object) -> Backbone:
    torch.manual_seed(0)
    backbone = build_network(dataclasses.replace(SMALL, layer_scale=0.5, **changes)).eval()
    with torch.no_grad():
        for name, tensor in backbone.named_parameters():
            if name.endswith("_bias"):
                torch.nn.init.normal_(tensor, std=0.3)
    return backbone.requires_grad_(False)


def official(backbone: Backbone) -> dict[str, Tensor]:
    return from_ours(backbone.state_dict(), backbone.config, "official")


def write_hf(folder: Path, backbone: Backbone, **files: Mapping[str, object]) -> Path:
    write_tensors(folder / "model.safetensors", from_ours(backbone.state_dict(), backbone.config, "hf"))
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


def same(found: Backbone, backbone: Backbone) -> bool:
    image = torch.randn(1, found.in_channels, 32, 40)
    return torch.equal(found(image).patches, backbone(image).patches)


def test_official_file(tmp_path: Path) -> None:
    backbone = network()
    write_checkpoint(tmp_path / "anything.pth", official(backbone))
    loaded = load_backbone(tmp_path / "anything.pth")
    assert same(loaded, backbone)
    assert loaded.card is not None and loaded.card.variant == "vit_nano"
    assert loaded.card.normalization == NORMALIZATIONS["web"]
    assert loaded.card.recipe["normalization"].startswith("web, assumed")
    assert not any(p.requires_grad for p in loaded.parameters())


def test_teacher_of_a_training_checkpoint(tmp_path: Path) -> None:
    backbone = network(local_cls_norm=True)
    inner = {f"backbone.{n}": t for n, t in official(backbone).items()} | {"dino_head.x": torch.zeros(1)}
    torch.save({"teacher": inner, "iteration": 7}, tmp_path / "teacher.pth")
    assert same(load_backbone(tmp_path / "teacher.pth"), backbone)


def test_rounded_periods_survive_saving(tmp_path: Path) -> None:
    backbone = network(rope_rounded_periods=True)
    write_checkpoint(tmp_path / "w.pth", official(backbone))
    loaded = load_backbone(tmp_path / "w.pth")
    save_backbone(tmp_path / "ours.safetensors", loaded, loaded.card)
    again = load_backbone(tmp_path / "ours.safetensors")
    assert same(loaded, backbone) and same(again, backbone)
    assert again.card.architecture == {"rope_rounded_periods": True}
    assert not same(again, network())


def test_hugging_face_folder(tmp_path: Path) -> None:
    backbone = network(norm_eps=1e-3)
    processor = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
    folder = write_hf(
        tmp_path / "m", backbone, config={"layer_norm_eps": 1e-3}, preprocessor_config=processor
    )
    loaded = load_backbone(folder)
    assert same(loaded, backbone)
    assert loaded.card.normalization == NORMALIZATIONS["sat"]
    assert loaded.card.architecture == {"norm_eps": 1e-3}


def test_statistics_beside_the_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0], "rescale_factor": 0.5}
    card = load_backbone(write_hf(tmp_path / "a", network(), preprocessor_config=own)).card
    assert card.normalization.mean == (0.1, 0.2, 0.3) and card.normalization.scale == (0.5,) * 3
    assert card.recipe["normalization"] == "its own, read from preprocessor_config.json"
    timm = {"pretrained_cfg": {"mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}}
    card = load_backbone(write_hf(tmp_path / "b", network(), config=timm)).card
    assert card.normalization == NORMALIZATIONS["sat"]
    bad = {"image_mean": [0.1, "x", 0.3], "image_std": [1.0, 2.0, 3.0]}
    with pytest.raises(DataError, match="cannot be used"):
        load_backbone(write_hf(tmp_path / "c", network(), preprocessor_config=bad))


def test_sharded_hugging_face_folder(tmp_path: Path) -> None:
    backbone = network()
    tensors = from_ours(backbone.state_dict(), SMALL, "hf")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        write_tensors(tmp_path / file, {n: tensors[n] for n in part})
    index = {"weight_map": {n: file for file, part in halves.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_backbone(tmp_path), backbone)


def test_timm_file(tmp_path: Path) -> None:
    backbone = network()
    write_tensors(tmp_path / "t.safetensors", from_ours(backbone.state_dict(), SMALL, "timm"))
    assert same(load_backbone(tmp_path / "t.safetensors"), backbone)


def test_config_that_contradicts_the_tensors(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "m", network(), config={"num_attention_heads": 4})
    with pytest.raises(DataError, match="4 heads"):
        load_backbone(folder)
    with pytest.raises(DataError, match="'gelu_new', this network has 'gelu'"):
        load_backbone(write_hf(folder, network(), config={"hidden_act": "gelu_new"}))


def test_an_index_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["a.safetensors"]}')
    with pytest.raises(DataError, match="no 'weight_map'"):
        load_backbone(tmp_path)


def test_satellite_weights_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "vit_large", SMALL)
    monkeypatch.delitem(VARIANTS, "vit_nano")
    write_checkpoint(tmp_path / "w.pth", official(network(local_cls_norm=True)))
    assert load_backbone(tmp_path / "w.pth").card.normalization == NORMALIZATIONS["sat"]
    named = load_backbone(tmp_path / "w.pth", normalization="web")
    assert named.card.normalization == NORMALIZATIONS["web"]
    assert named.card.recipe["normalization"] == "web, named by the user"
    with pytest.raises(UnknownNameError, match="chmv2, sat, web"):
        load_backbone(tmp_path / "w.pth", normalization="moon")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "w.pth", official(network()))
    return tmp_path / "w.pth"


def test_new_bands_take_the_mean(weights: Path) -> None:
    loaded = load_backbone(weights, sensor=get_sensor("naip"), stem="mean")
    kernels, adapted = network().patch_embed.weight, loaded.patch_embed.weight
    assert torch.allclose(adapted[:, :3], kernels * 3 / 4)
    assert torch.allclose(adapted[:, 3], kernels.mean(1) * 3 / 4)
    assert loaded.card.normalization.bands == ("red", "green", "blue", "nir")
    assert loaded.card.normalization.mean[3] == pytest.approx(0.5807)
    assert loaded.card.recipe["stem"]["how"] == "mean"


def test_new_bands_may_begin_at_zero(weights: Path) -> None:
    loaded = load_backbone(weights, sensor=get_sensor("naip"), stem="zero")
    rgb = torch.randn(1, 3, 32, 32)
    image = torch.cat([rgb, torch.randn(1, 1, 32, 32)], dim=1)
    assert torch.allclose(loaded(image).cls, network()(rgb).cls, atol=1e-5)


def test_another_order_needs_no_choice(weights: Path) -> None:
    loaded = load_backbone(weights, bands=("blue", "green", "red"))
    image = torch.randn(1, 3, 32, 32)
    assert torch.allclose(loaded(image.flip(1)).cls, network()(image).cls, atol=1e-5)
    assert loaded.card.normalization.mean == NORMALIZATIONS["web"].mean[::-1]
    assert "stem" not in loaded.card.recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sensor": get_sensor("naip")}, "say how to adapt the stem: mean or zero"),
        ({"sensor": get_sensor("naip"), "stem": "copy"}, "not 'copy'"),
        ({"bands": ("red", "green", "blue", "nir"), "stem": "mean"}, "give a sensor"),
        ({"bands": ("red", "red", "blue"), "stem": "mean"}, "once each"),
    ],
)
def test_bands_must_be_explained(weights: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        load_backbone(weights, **arguments)  # type: ignore[arg-type]


def test_four_bands_that_nothing_names(tmp_path: Path) -> None:
    backbone = network(in_channels=4)
    write_checkpoint(tmp_path / "w.pth", official(backbone))
    with pytest.raises(ConfigError, match="take 4 bands, but the statistics are of 3; name a sensor"):
        load_backbone(tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="statistics are of 2"):
        load_backbone(tmp_path / "w.pth", sensor=get_sensor("naip"), bands=("nir", "red"))
    loaded = load_backbone(tmp_path / "w.pth", sensor=get_sensor("naip"))
    assert same(loaded, backbone)
    assert loaded.card.normalization.bands == ("red", "green", "blue", "nir")
    assert loaded.card.recipe["normalization"].startswith("that of the sensor naip")


def test_activations_keep_their_size() -> None:
    torch.manual_seed(0)
    kernels = torch.randn(64, 3, 4, 4)
    wide = adapt_stem(kernels, ("red", "green", "blue"), ("red", "green", "blue", "a", "b", "c"), how="mean")
    flat = torch.ones(1, 6, 4, 4)
    before = torch.nn.functional.conv2d(flat[:, :3], kernels)
    assert torch.allclose(torch.nn.functional.conv2d(flat, wide), before, atol=1e-4)


class Bomb:
    """What a malicious file holds."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_code_in_a_pickle_is_refused_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cls_token": Bomb()}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"cls_token": Bomb()}))
    for name, why in (("new.pth", r"asks for \w+\.mkdir"), ("old.pth", "more than tensors")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(DataError, match=f"refused, nothing in it was run: it .*{why}"):
                load_backbone(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_damaged_files(weights: Path, tmp_path: Path) -> None:
    whole = weights.read_bytes()
    for length in (0, 100, len(whole) // 2):
        weights.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"w\.pth"):
            load_backbone(weights)
    torch.save([1, 2], weights)
    with pytest.raises(DataError, match="holds list"):
        load_backbone(weights)
    torch.save({"cls_token": 3}, weights)
    with pytest.raises(DataError, match="no tensors"):
        load_backbone(weights)
    (tmp_path / "w.txt").write_text("x")
    with pytest.raises(DataError, match="no file of weights"):
        load_backbone(tmp_path / "w.txt")


def test_what_is_left_over_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    tensors = official(network())
    write_checkpoint(path, {n: t for n, t in tensors.items() if n != "blocks.1.norm1.bias"})
    with pytest.raises(DataError, match=r"1 tensors missing \['blocks.1.norm1.bias'\], 0 not expected"):
        load_backbone(path)
    write_checkpoint(path, tensors | {"blocks.0.extra": torch.zeros(1)})
    with pytest.raises(DataError, match=r"blocks\.0\.extra"):
        load_backbone(path)
    write_checkpoint(path, tensors | {"norm.weight": torch.zeros(3)})
    with pytest.raises(DataError, match="another shape"):
        load_backbone(path)


def test_card_of_another_variant(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    card = BackboneCard("x", "vit_nano", 16, NORMALIZATIONS["web"])
    save_backbone(path, network(), card)
    for changes in ({"variant": "vit_tiny"}, {"variant": "convnext_tiny"}, {"patch_size": 8}):
        path.with_suffix(".json").write_text(dataclasses.replace(card, **changes).to_json())
        with pytest.raises(DataError, match="does not fit"):
            load_backbone(path)
    path.with_suffix(".json").write_text(dataclasses.replace(card, architecture={"magic": 1}).to_json())
    with pytest.raises(ConfigError, match="magic"):
        load_backbone(path)


# First five numbers of the CLS token and the first patch: COCO val2017 000000039769.jpg, resized to 224 x 224
# (bilinear, antialias), ImageNet statistics. Source: conversion scripts of transformers.
GOLDEN = {
    "VITS": (
        (0.463561, -0.415609, 0.408236, -0.126613, -0.286636),
        (-0.038754, -0.250895, -0.016392, -0.455473, 0.571582),
    ),
    "VITSPLUS": (
        (-0.471349, -1.365778, -0.317983, 0.377219, -0.769085),
        (0.144551, -0.388117, -0.393433, -0.157695, -0.600380),
    ),
    "VITB": (
        (1.034643, -0.180609, -0.341018, -0.066376, -0.011383),
        (-0.082523, -0.456272, -0.728029, -0.430680, -0.152880),
    ),
    "VITL": (
        (0.484527, -0.582214, 0.480636, 0.592040, 0.945166),
        (-0.211367, -0.490863, -0.257131, 0.101763, 0.154511),
    ),
    "VITHPLUS": (
        (-0.064575, -0.148866, -0.621524, 0.634878, 0.152695),
        (-0.093817, 0.287407, -0.050036, 0.428043, 0.094561),
    ),
    "VIT7B": (
        (0.275439, -0.261353, 0.067772, 0.049936, -0.158747),
        (0.044442, -0.052542, 0.070777, -0.065111, -0.026546),
    ),
    "VITL_SAT": (
        (-0.33235, 0.34052, -0.22087, 0.21434, 0.09003),
        (0.18488, 0.30309, -0.20689, 0.12848, 0.06207),
    ),
    "VIT7B_SAT": (
        (-0.19779, 0.11819, -0.00581, -0.21055, -0.03971),
        (-0.12423, 0.07879, -0.10057, 0.02835, -0.11727),
    ),
    "CONVNEXT_TINY": (
        (-6.372119, 1.300791, 2.074303, -0.079975, 0.607205),
        (0.490530, -3.713466, 1.848513, -1.040319, -1.090818),
    ),
    "CONVNEXT_SMALL": (
        (-0.903914, 1.412183, 0.287465, 0.175296, -2.397940),
        (-1.081114, 0.637362, 3.748765, 0.170179, 1.445153),
    ),
    "CONVNEXT_BASE": (
        (0.155366, -0.378771, -0.735157, -2.818718, 0.015095),
        (3.039118, 0.778155, -1.961322, -1.607147, -2.411941),
    ),
    "CONVNEXT_LARGE": (
        (-2.219094, -0.594451, -2.300294, -0.957415, -0.520473),
        (-1.477349, -0.217038, -3.128137, 0.418962, 0.334949),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", GOLDEN)
def test_released_weights_give_the_published_numbers(model: str) -> None:
    path, picture = os.environ.get(f"DINOV3GEO_{model}"), os.environ.get("DINOV3GEO_COCO_39769")
    if path is None or picture is None:
        pytest.skip(f"set DINOV3GEO_{model} to the weights and DINOV3GEO_COCO_39769 to the JPEG picture")
    from torchvision.io import read_image
    from torchvision.transforms.functional import resize

    image = resize(read_image(picture), [224, 224], antialias=True)[None]
    with torch.no_grad():
        features = load_backbone(path)(NORMALIZATIONS["web"](image))
    cls, patch = (torch.tensor(numbers) for numbers in GOLDEN[model])
    assert torch.allclose(features.cls[0, :5], cls, atol=1e-3)
    assert torch.allclose(features.patches[0, 0, :5], patch, atol=1e-3)


def test_bundled_names_are_listed() -> None:
    with pytest.raises(UnknownNameError, match=zoo.DEFAULT_BACKBONE):
        load_backbone("vit-tiny-arial")


def test_files_of_weights_are_as_readable_as_others(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)})
    (tmp_path / "b").write_text("as others")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
