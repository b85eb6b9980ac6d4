"""The decoder of CHMv2 against transformers with random weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3geo.backbones.convert import from_ours, to_ours
from dinov3geo.backbones.variants import VARIANTS, build_network
from dinov3geo.backbones.vit import VitConfig
from dinov3geo.errors import ConfigError, DataError, UnknownNameError
from dinov3geo.heads import chmv2
from dinov3geo.heads.chmv2 import load_chmv2
from dinov3geo.heads.models import describe_height_model, load_height_model

DIM = 64


@pytest.fixture(scope="module", autouse=True)
def _small_variant() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "vit_nano", VitConfig(DIM, 4, 1, "mlp", 128))
        yield


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A small random model of transformers and the folder it was saved to."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "CHMv2ForDepthEstimation"):
        pytest.skip("this version of transformers has no CHMv2")
    config = transformers.CHMv2Config(
        backbone_config={
            "model_type": "dinov3_vit",
            "hidden_size": DIM,
            "num_attention_heads": 1,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_register_tokens": 4,
            "out_indices": [1, 2, 3, 4],
            "return_class_token": True,
            "apply_layernorm": True,
            "reshape_hidden_states": True,
        },
        post_process_channels=[8, 16, 16, 24],
        fusion_hidden_size=16,
        head_hidden_size=8,
        number_output_channels=32,
    )
    torch.manual_seed(0)
    model = transformers.CHMv2ForDepthEstimation(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.normal_(std=0.1).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    folder = tmp_path_factory.mktemp("chmv2") / "hf"
    model.save_pretrained(folder)
    return model, folder


def numbers(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator).to(torch.uint8)


def expected(model: nn.Module, image: Tensor) -> Tensor:
    """What transformers makes of an image whose sides are multiples of 16."""
    mean, std = torch.tensor([0.420, 0.411, 0.296]), torch.tensor([0.213, 0.156, 0.143])
    normalised = (image / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        heights = model(normalised).predicted_depth[:, None]
    return nn.functional.interpolate(heights, image.shape[-2:], mode="bilinear", align_corners=True)


@pytest.mark.parametrize("size_hw", [(64, 96), (80, 48)])
def test_equals_transformers(oracle: tuple[nn.Module, Path], size_hw: tuple[int, int]) -> None:
    model, folder = oracle
    image = numbers(*size_hw)
    heights, wanted = load_chmv2(folder).predict(image), expected(model, image)
    assert heights.shape == wanted.shape and wanted.std() > 0.01
    assert float((heights - wanted).abs().max()) < 1e-4


def test_equals_transformers_on_a_real_scene(oracle: tuple[nn.Module, Path], osbs_scene: Path) -> None:
    import rasterio

    with rasterio.open(osbs_scene) as scene:
        image = torch.from_numpy(scene.read())[None]
    model, folder = oracle
    heights, wanted = load_chmv2(folder).predict(image), expected(model, image)
    assert heights.shape == (1, 1, 400, 400)  # 25 patches, an odd number
    assert float((heights - wanted).abs().max()) < 1e-4


def written_heights(scene: Path, output: Path, *words: object) -> Tensor:
    """What `canopy predict` writes."""
    import rasterio
    from typer.testing import CliRunner

    from dinov3geo.cli import app

    command = ["canopy", "predict", scene, "-o", output, "--no-preview", *words]
    result = CliRunner().invoke(app, [str(word) for word in command], catch_exceptions=False)
    assert result.exit_code == 0
    with rasterio.open(output) as raster:
        return torch.from_numpy(raster.read(1))


def check_both_dialects(model: nn.Module, folder: Path, tmp_path: Path, scene: Path) -> None:
    """The verb against transformers, from its folder and from the files of the release."""
    import rasterio

    with rasterio.open(scene) as raster:
        pixels, profile = raster.read(), raster.profile
    # Transformers knows no nodata: for the comparison, 255 is a number like any other.
    scene = tmp_path / "plot.tif"
    with rasterio.open(scene, "w", **profile | {"nodata": None}) as raster:
        raster.write(pixels)
    image = torch.from_numpy(pixels)[None]
    wanted = expected(model, image)[0, 0]
    assert wanted.std() > 0.01
    torch.save(official_names(folder), tmp_path / "head.pth")
    backbone = build_network(to_ours(backbone_tensors(model)).config)
    backbone.load_state_dict(to_ours(backbone_tensors(model)).tensors)
    torch.save(from_ours(backbone.state_dict(), backbone.config, "official"), tmp_path / "vitl.pth")
    released = ("--model", tmp_path / "head.pth", "--backbone", tmp_path / "vitl.pth")
    for name, words in {"hf": ("--model", folder), "official": released}.items():
        heights = written_heights(scene, tmp_path / f"{name}.tif", *words)
        assert float((heights - wanted).abs().max()) < 1e-4, name


def backbone_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("backbone."): t for n, t in model.state_dict().items() if n[:9] == "backbone."}


def test_canopy_predict_equals_transformers_on_a_real_plot(
    oracle: tuple[nn.Module, Path], tmp_path: Path, osbs_scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chmv2, "BLOCKS", (0, 1, 2, 3))  # the release has 24 blocks
    check_both_dialects(*oracle, tmp_path, osbs_scene)


@pytest.mark.slow
def test_canopy_predict_in_the_released_size(tmp_path: Path, osbs_scene: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {
        "model_type": "dinov3_vit",
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_register_tokens": 4,
        "out_indices": [6, 12, 18, 24],
        "return_class_token": True,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
    }
    model = transformers.CHMv2ForDepthEstimation(transformers.CHMv2Config(backbone_config=shape)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            fan = tensor[0].numel() if tensor.ndim > 1 and "token" not in name else 100
            tensor.normal_(std=fan**-0.5).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.save_pretrained(tmp_path / "hf")
    check_both_dialects(model, tmp_path / "hf", tmp_path, osbs_scene)


def test_what_models_says_of_it(oracle: tuple[nn.Module, Path], tmp_path: Path) -> None:
    card = describe_height_model(oracle[1])
    assert card is not None and card["name"] == "CHMv2" and card["blocks"] == [0, 1, 2, 3]
    torch.save(official_names(oracle[1]), tmp_path / "head.pth")
    decoder = describe_height_model(tmp_path / "head.pth")
    assert decoder is not None and decoder["backbone"] == "to be named beside it"
    save_file(backbone_tensors(oracle[0]), tmp_path / "backbone.safetensors")
    assert describe_height_model(tmp_path / "backbone.safetensors") is None


def test_a_second_backbone_is_refused(oracle: tuple[nn.Module, Path]) -> None:
    with pytest.raises(ConfigError, match="holds its own backbone; leave vit-tiny-aerial out"):
        load_height_model(oracle[1], backbone="vit-tiny-aerial")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 2}, "2 heads for width 64, expected 1"),
        ({"layer_norm_eps": "small"}, "no number"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"out_indices": ["a", 2, 3, 4]}, "expected four numbers of blocks"),
        ({"out_indices": [0, 2, 3, 4]}, r"reads blocks \(-1, 1, 2, 3\)"),
    ],
)
def test_settings_that_contradict_the_tensors(
    oracle: tuple[nn.Module, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    shutil.copytree(oracle[1], tmp_path / "hf")
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    fields["backbone_config"] |= changes
    (tmp_path / "hf" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=message):
        load_chmv2(tmp_path / "hf")


def test_models_that_are_none(oracle: tuple[nn.Module, Path], tmp_path: Path) -> None:
    save_file(backbone_tensors(oracle[0]), tmp_path / "backbone.safetensors")
    with pytest.raises(DataError, match="not CHMv2's"):
        load_height_model(tmp_path / "backbone.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="no canopy model"):
        load_height_model(tmp_path / "notes.txt")
    with pytest.raises(UnknownNameError, match="canopy-tiny-aerial"):
        load_height_model(tmp_path / "nothing.pth")
    with pytest.raises(ConfigError, match="has its own backbone"):
        load_height_model("canopy-tiny-aerial", backbone="vit-tiny-aerial")


def official_names(folder: Path) -> dict[str, Tensor]:
    """The decoder of a Hugging Face folder under the names of the release."""
    from safetensors.torch import load_file

    rules = (
        (r"^head\.", ""),
        (r"reassemble_stage\.layers\.(\d)\.projection\.", r"reassemble_blocks.projects.\1.conv."),
        (r"reassemble_stage\.layers\.(\d)\.resize\.", r"reassemble_blocks.resize_layers.\1."),
        (r"reassemble_stage\.readout", "reassemble_blocks.readout"),
        (r"^convs\.(\d)\.", r"convs.\1.conv."),
        (r"fusion_layers\.(\d)\.projection\.", r"fusion_blocks.\1.project.conv."),
        (r"fusion_layers\.(\d)\.residual_layer(\d)\.", r"fusion_blocks.\1.res_conv_unit\2."),
        (r"\.convolution(\d)\.", r".conv\1.conv."),
    )
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("head."):
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
    return renamed


def test_official_decoder_with_a_backbone_beside_it(oracle: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = oracle
    head = official_names(folder)
    torch.save(head, tmp_path / "head.pth")
    save_file(backbone_tensors(model), tmp_path / "backbone.safetensors")
    with pytest.raises(ConfigError, match="decoder only"):
        load_chmv2(tmp_path / "head.pth")
    with pytest.raises(DataError, match=r"reads blocks \(5, 11, 17, 23\)"):
        load_chmv2(tmp_path / "head.pth", backbone=tmp_path / "backbone.safetensors")
    # The release has 24 blocks; four are enough to see that both namings give the same numbers.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chmv2, "BLOCKS", (0, 1, 2, 3))
        loaded = load_chmv2(tmp_path / "head.pth", backbone=tmp_path / "backbone.safetensors")
    image = numbers(64, 96)
    assert torch.equal(loaded.predict(image), load_chmv2(folder).predict(image))
    assert loaded.backbone.card.normalization.mean[0] == 0.420


def test_any_size_keeps_its_place(oracle: tuple[nn.Module, Path]) -> None:
    loaded = load_chmv2(oracle[1])
    heights = loaded.predict(numbers(50, 70))
    assert heights.shape == (2, 1, 50, 70)
    assert float(heights.min()) >= 0 and float(heights.max()) <= 96
    with pytest.raises(DataError, match="3 bands"):
        loaded.predict(torch.zeros(1, 4, 32, 32))


def test_what_is_left_over_is_listed(oracle: tuple[nn.Module, Path], tmp_path: Path) -> None:
    head = official_names(oracle[1])
    torch.save({n: t for n, t in head.items() if n != "convs.1.conv.weight"}, tmp_path / "a.pth")
    with pytest.raises(DataError, match=r"levels\.1\.mix\.weight"):
        load_chmv2(tmp_path / "a.pth")
    torch.save(head | {"reassemble_blocks.batchnorm_layers.0.weight": torch.ones(1)}, tmp_path / "b.pth")
    with pytest.raises(DataError, match="batchnorm"):
        load_chmv2(tmp_path / "b.pth")
