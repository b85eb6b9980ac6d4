"""Filter banks: whitening, filters, cells, files, refusals, and networks that begin with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinov3geo.backbones.export import FORMATS, export_backbone
from dinov3geo.backbones.filter_bank import STRIDE, FilterBank, FilterBankConfig
from dinov3geo.backbones.inference import for_inference
from dinov3geo.backbones.variants import build_backbone
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.backbones.zoo import load_backbone, save_backbone
from dinov3geo.cli import main
from dinov3geo.config import load_model
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.training.describe import describe, describe_distillation
from dinov3geo.training.distiller import distill
from dinov3geo.training.filter_fit import fit_filters
from dinov3geo.training.settings import DistillSettings, FilterSettings, TrainSettings
from dinov3geo.training.trainer import pretrain

SMALL = {
    "images": 300,
    "patches": 600,
    "kernels": [{"size": 3, "count": 12}, {"size": 5, "count": 20}],
    "embed_dim": 24,
    "threads": 1,
}


def write_textures(folder: Path, count: int = 60, side: int = 48) -> Path:
    """Pictures of three kinds of texture in random colours."""
    rng = np.random.default_rng(0)
    rows = np.arange(side)[:, None, None]
    for number in range(count):
        noise = rng.normal(0, 25, (side, side, 3))
        waves = 40 * np.sin(rows * rng.uniform(0.2, 2.5)) * (number % 3 > 0)
        checks = 40 * np.sin(rows.transpose(1, 0, 2) * rng.uniform(0.2, 2.5)) * (number % 3 > 1)
        picture = rng.uniform(60, 190, 3) + noise + waves + checks
        path = folder / f"kind{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_textures(tmp_path_factory.mktemp("textures"))


def settings_of(pictures: Path, **changes) -> FilterSettings:
    data = {
        "root": pictures,
        "sources": [{"path": ".", "kind": "images"}],
        "chip_size": 48,
        "workers": 0,
        **changes.pop("data", {}),
    }
    return load_model(FilterSettings, None, values={**SMALL, "data": data, **changes})


@pytest.fixture(scope="module")
def bank_folder(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bank")
    fit_filters(settings_of(pictures), out)
    return out


@pytest.fixture(scope="module")
def bank(bank_folder) -> FilterBank:
    found = load_backbone(bank_folder)
    assert isinstance(found, FilterBank)
    return found


def read_all(pictures: Path) -> torch.Tensor:
    images = [np.asarray(Image.open(path)) for path in sorted(pictures.glob("*/*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_features_of_the_fitted_images_are_white(bank, pictures) -> None:
    images = bank.card.normalization(read_all(pictures))
    found = bank.responses(images)
    whole = bank.whole(bank.describe(found))
    cells = bank.cells(found.sqrt().permute(0, 2, 3, 1).flatten(0, 2))
    features = bank(images)
    torch.testing.assert_close(features.cls.norm(dim=1), torch.full([60], 24**0.5))
    torch.testing.assert_close(F.cosine_similarity(features.cls, whole), torch.ones(60))
    torch.testing.assert_close(features.patches.flatten(0, 1), cells)
    for vectors in (whole, cells):
        # 300 draws of 60 pictures, so the pictures weigh alike.
        torch.testing.assert_close(vectors.mean(0), torch.zeros(24), rtol=0, atol=1e-3)
        covariance = torch.cov(vectors.T, correction=0)
        torch.testing.assert_close(covariance, torch.eye(24), rtol=0, atol=5e-3)


def test_responses_are_those_of_a_loop(bank, pictures) -> None:
    image = bank.card.normalization(read_all(pictures)[:1])
    found = bank.responses(image)
    assert found.shape == (1, 2 * (12 + 20), 6, 6)
    group = bank.filters[1]
    padded = F.pad(image, (2,) * 4, mode="replicate")[0]
    row, column, number = 3, 0, 7
    above, below = [], []
    for y in range(row * 8, row * 8 + 8, STRIDE):
        for x in range(column * 8, column * 8 + 8, STRIDE):
            answer = float(
                (padded[:, y : y + 5, x : x + 5] * group.weight[number]).sum() + group.bias[number]
            )
            above.append(max(answer - 0.5, 0))
            below.append(max(-answer - 0.5, 0))
    first = 2 * 12 + number
    assert float(found[0, first, row, column]) == pytest.approx(np.mean(above), abs=1e-5)
    assert float(found[0, first + 20, row, column]) == pytest.approx(np.mean(below), abs=1e-5)


def test_filters_are_whitened_patches(bank, pictures) -> None:
    """Answers of a filter to its own images vary by about one: they are white but for the ridge."""
    images = bank.card.normalization(read_all(pictures))
    for group in bank.filters:
        answers = F.conv2d(images, group.weight, group.bias)
        assert 0.5 < float(answers.std()) < 1.5
        assert abs(float(answers.mean())) < 0.2


def test_the_batch_is_only_a_way_to_save_memory(bank, pictures, monkeypatch) -> None:
    images = bank.card.normalization(read_all(pictures)[:5])
    whole = bank(images)
    monkeypatch.setattr("dinov3geo.backbones.filter_bank._NUMBERS_AT_ONCE", 1)
    one_by_one = bank(images)
    torch.testing.assert_close(one_by_one.cls, whole.cls, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one_by_one.patches, whole.patches, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_bits(pictures, bank_folder, tmp_path) -> None:
    fit_filters(settings_of(pictures), tmp_path / "again")
    fit_filters(settings_of(pictures, seed=1), tmp_path / "other")
    first, again, other = (
        load_backbone(folder).state_dict() for folder in (bank_folder, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["filters.0.weight"], other["filters.0.weight"])


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_cells_of_any_size_survive_the_file(tmp_path, bank, patch_size) -> None:
    config = FilterBankConfig(embed_dim=24, kernels=((3, 12), (5, 20)), patch_size=patch_size)
    other = FilterBank(config)
    other.load_state_dict(bank.state_dict())
    card = bank.card
    save_backbone(
        tmp_path / "b.safetensors", other, type(card)(**{**asdict_of(card), "patch_size": patch_size})
    )
    read = load_backbone(tmp_path / "b.safetensors")
    assert read.config == config
    image = torch.randn(1, 3, 48, 40)
    assert read(image).grid_hw == (-(-48 // patch_size), -(-40 // patch_size))


def asdict_of(card) -> dict:
    return {name: getattr(card, name) for name in card.__dataclass_fields__}


def test_images_that_do_not_differ_are_refused(tmp_path) -> None:
    for number in range(5):
        Image.new("RGB", (48, 48), (90, 90, 90)).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match="all alike, or threshold"):
        fit_filters(settings_of(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fewer_images_than_directions_are_refused(pictures, tmp_path) -> None:
    few = write_textures(tmp_path / "few", count=16)
    with pytest.raises(DataError, match=r"differ in 1\d directions, 24 are wanted"):
        fit_filters(settings_of(few), tmp_path / "out")
    with pytest.raises(ConfigError, match="24 images differ in fewer than embed_dim 24"):
        settings_of(pictures, images=24)
    with pytest.raises(ConfigError, match="lose their whitening in bfloat16"):
        settings_of(pictures, export={"dtype": "bfloat16"})


def test_filters_stay_in_float32_under_autocast(bank, pictures) -> None:
    images = bank.card.normalization(read_all(pictures))
    network = build_backbone("vit_micro", patch_size=8, filters=bank).eval()
    exact, fast = bank(images), for_inference(network, dtype=torch.bfloat16)
    assert fast.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = bank(images)
        tokens = network.patch_embed(images)
    assert float(F.cosine_similarity(seen.cls, exact.cls).min()) > 0.9999
    assert float(F.cosine_similarity(seen.patches, exact.patches, dim=-1).min()) > 0.9999
    expected = network.patch_embed(images)
    assert float(F.cosine_similarity(tokens.float().flatten(1), expected.flatten(1)).min()) > 0.999


def test_sharded_filters_in_bfloat16_are_refused(pictures, bank_folder, tmp_path) -> None:
    lower = {"precision": "bfloat16", "parallel": {"layout": "shard"}}
    model = {"variant": "vit_micro", "patch_size": 8, "filters": bank_folder}
    with pytest.raises(ConfigError, match="filters need float32"):
        pretrain(
            load_model(TrainSettings, None, values=run_settings(pictures) | lower | {"model": model}),
            out=tmp_path / "run",
        )
    taught = {
        "teacher": bank_folder,
        "targets": "features",
        "students": [{"name": "a", "variant": "vit_micro"}],
    }
    with pytest.raises(ConfigError, match="filters need float32"):
        distill(
            load_model(DistillSettings, None, values=run_settings(pictures) | lower | taught),
            out=tmp_path / "run",
        )
    with pytest.raises(ConfigError, match="feature_map: none is for targets: features"):
        load_model(
            DistillSettings,
            None,
            values=run_settings(pictures) | taught | {"targets": "prototypes", "feature_map": "none"},
        )


def test_a_card_that_does_not_fit_the_filters(bank_folder, tmp_path, capsys) -> None:
    shutil.copytree(bank_folder, tmp_path / "bank")
    card = tmp_path / "bank/backbone.json"
    card.write_text(card.read_text().replace('"patch_size": 8,', '"patch_size": 7,', 1))
    assert main(["models", str(tmp_path / "bank")]) == 2
    assert "filters have odd sides, patches an even one" in capsys.readouterr().err


def test_chips_that_miss_pixels_are_left_out(tmp_path, write_raster_in) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 255, (3, 200, 200)).astype(np.uint8)
    numbers[:, :, :60] = 0
    write_raster_in(tmp_path / "scenes", "a.tif", array=numbers, nodata=0)
    data = {"sources": [{"path": "scenes"}], "chip_size": 32}
    fit_filters(settings_of(tmp_path, data=data), tmp_path / "out")
    numbers[:] = 0
    numbers[:, :20, :20] = rng.integers(1, 255, (3, 20, 20))
    write_raster_in(tmp_path / "holes", "b.tif", array=numbers, nodata=0)
    data = {"sources": [{"path": "holes"}], "chip_size": 32, "min_valid_share": 0.01}
    with pytest.raises(DataError, match="chips have no missing pixels, and 300 are wanted"):
        fit_filters(settings_of(tmp_path, data=data), tmp_path / "out2")


def test_other_bands_are_refused_and_their_order_is_not(bank_folder) -> None:
    image = torch.randn(1, 3, 48, 48)
    turned = load_backbone(bank_folder, bands=["blue", "green", "red"])
    torch.testing.assert_close(
        turned(image.flip(1)).cls, load_backbone(bank_folder)(image).cls, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ConfigError, match="fit others to these"):
        load_backbone(bank_folder, bands=["red", "green"], stem="mean")


def test_a_transformer_begins_with_the_whitened_cells(bank) -> None:
    torch.manual_seed(0)
    network = build_backbone("vit_micro", patch_size=8, filters=bank).eval()
    assert isinstance(network, VisionTransformer)
    image = torch.randn(2, 3, 40, 48)
    tokens = network.patch_embed(image).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[..., :24], bank(image).patches, rtol=1e-4, atol=1e-4)
    fast = for_inference(network)
    torch.testing.assert_close(fast(image).patches, network(image).patches, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("file_format", ["exported-program", "torchscript"])
def test_networks_with_filters_are_exported(bank, tmp_path, file_format) -> None:
    network = build_backbone("vit_micro", patch_size=8, filters=bank).eval()
    for number, backbone in enumerate((bank, network)):
        output = tmp_path / f"{number}{FORMATS[file_format]}"
        report = export_backbone(
            backbone, output, file_format, size_hw=(48, 40), dynamic=file_format != "torchscript"
        )
        assert output.is_file() and max(report.differences.values()) < 1e-3


def test_only_the_map_of_the_filters_learns(bank) -> None:
    network = build_backbone("vit_micro", patch_size=8, filters=bank)
    network(torch.randn(2, 3, 48, 48)).cls.sum().backward()
    learns = {name for name, each in network.named_parameters() if each.grad is not None}
    assert "patch_embed.proj.weight" in learns
    assert not any("filters" in name for name in learns)


def test_networks_that_cannot_have_the_filters(bank) -> None:
    with pytest.raises(ConfigError, match="patch 16"):
        build_backbone("vit_micro", patch_size=16, filters=bank)
    with pytest.raises(ConfigError, match="no filters"):
        build_backbone("convnext_tiny", filters=bank)


def run_settings(pictures: Path) -> dict:
    return {
        "steps": 2,
        "batch_size": 4,
        "threads": 1,
        "data": {
            "root": pictures,
            "sources": [{"path": ".", "kind": "images"}],
            "chip_size": 48,
            "workers": 0,
        },
        "crops": {"global_size": 48, "local_size": 24, "local_count": 2},
        "losses": {
            "dino_head": {"hidden": 32, "bottleneck": 16, "prototypes": 32},
            "ibot_head": {"hidden": 32, "bottleneck": 16, "prototypes": 32},
        },
        "checkpoints": {"every": 1},
    }


def test_pretraining_keeps_the_filters_and_resumes(pictures, bank_folder, tmp_path) -> None:
    values = run_settings(pictures) | {
        "model": {"variant": "vit_micro", "patch_size": 8, "layer_scale": 0.1, "filters": bank_folder}
    }
    pretrain(load_model(TrainSettings, None, values=values), out=tmp_path / "whole")
    first = load_model(TrainSettings, None, values=values | {"steps": 2})
    network = load_backbone(tmp_path / "whole")
    kept, given = network.state_dict(), load_backbone(bank_folder).state_dict()
    assert torch.equal(kept["patch_embed.filters.1.weight"], given["filters.1.weight"])
    assert not torch.equal(kept["patch_embed.proj.weight"][:24], given["cells.weight"])
    assert network.config.stem_kernels == ((3, 12), (5, 20))
    result = pretrain(first, out=tmp_path / "whole", resume=True)
    assert result.steps == 2


def test_a_bank_teaches_a_transformer_that_has_its_filters(pictures, bank_folder, tmp_path) -> None:
    values = run_settings(pictures) | {
        "teacher": bank_folder,
        "targets": "features",
        "steps": 12,
        "students": [
            {"name": "vit", "variant": "vit_micro", "layer_scale": 0.1, "filters": bank_folder},
        ],
        "losses": {"koleo_weight": 0.0},
    }
    distill(load_model(DistillSettings, None, values=values), out=tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["vit/cls_global"] < 1.0
    assert load_backbone(tmp_path / "run/vit").patch_size == 8


def test_without_a_map_a_student_becomes_the_teacher(pictures, bank_folder, tmp_path) -> None:
    values = run_settings(pictures) | {
        "teacher": bank_folder,
        "targets": "features",
        "feature_map": "none",
        "students": [{"name": "vit", "variant": "vit_micro", "filters": bank_folder}],
        "losses": {"koleo_weight": 0.0},
    }
    with pytest.raises(ConfigError, match="teacher's width 24, got 96"):
        distill(load_model(DistillSettings, None, values=values), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="teacher's width 24, got 96"):
        describe_distillation(load_model(DistillSettings, None, values=values))
    bank_of_96 = tmp_path / "bank"
    kernels = [{"size": 5, "count": 60}]
    many = write_textures(tmp_path / "many", count=150)
    fit_filters(settings_of(many, embed_dim=96, kernels=kernels, patches=4000), bank_of_96)
    student = {"name": "vit", "variant": "vit_micro", "filters": bank_of_96, "layer_scale": 0.1}
    values |= {"teacher": bank_of_96, "students": [student], "steps": 3, "log_every": 1}
    distill(load_model(DistillSettings, None, values=values), out=tmp_path / "run")
    numbers = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # The filters' own cells are right from the first step on; the class token has to learn.
    assert numbers[0]["vit/patches"] < 0.1 < numbers[0]["vit/cls_global"]
    assert not any("head" in name for name in numbers[0])
    assert load_backbone(tmp_path / "run/vit").embed_dim == 96


def test_filters_of_other_statistics_are_refused(pictures, bank_folder, tmp_path) -> None:
    values = run_settings(pictures) | {
        "model": {"variant": "vit_micro", "patch_size": 8, "filters": bank_folder}
    }
    values["data"]["sensor"] = "photo_rgb"
    with pytest.raises(ConfigError, match="use one sensor for both"):
        pretrain(load_model(TrainSettings, None, values=values), out=tmp_path / "run")


def test_a_plan_tells_that_filters_are_missing(pictures) -> None:
    model = {"variant": "vit_micro", "patch_size": 8, "filters": "not/there"}
    plan = dict(describe(load_model(TrainSettings, None, values=run_settings(pictures) | {"model": model})))
    assert plan["filters"] == "not/there ARE MISSING"


def test_the_command_from_dry_run_to_features(pictures, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bank.yaml"
    lines = [
        "name: bank",
        "images: 300",
        "patches: 600",
        "embed_dim: 24",
        "kernels: [{size: 3, count: 12}, {size: 5, count: 20}]",
        f"data: {{root: {pictures}, sources: [{{path: ., kind: images}}], chip_size: 48, workers: 0}}",
    ]
    file.write_text("\n".join(lines) + "\n")
    assert main(["filters", str(file), "--dry-run"]) == 0
    assert "64 responses a cell" in capsys.readouterr().out
    assert not (tmp_path / "outputs").exists()
    assert main(["filters", str(file)]) == 0
    assert "variance kept" in capsys.readouterr().out
    assert main(["filters", str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["models", "outputs/bank"]) == 0
    assert json.loads(capsys.readouterr().out)["variant"] == "filter_bank"
    assert main(["convert", "outputs/bank", "out.pth", "--to", "official"]) == 2
    assert "no form in the official dialect" in capsys.readouterr().err
    assert main(["filters", str(file), "--set", "embed_dim=100", "--dry-run", "--overwrite"]) == 2
    assert "exceeds the 64 responses" in capsys.readouterr().err
    assert main(["filters", str(file), "--set", "kernels=[{size: 4, count: 9}]", "--dry-run"]) == 2
    assert "expected an odd side, got 4" in capsys.readouterr().err
