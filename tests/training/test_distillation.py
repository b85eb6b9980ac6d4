"""One frozen teacher, several students: targets, losses, files, resumption, processes of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from two_processes import HEAD, RGB, build, crops, finish, start

import dinov3geo
from dinov3geo.backbones.variants import build_vit
from dinov3geo.cli import main
from dinov3geo.losses.cosine import cosine_loss
from dinov3geo.training.checkpoint import list_checkpoints
from dinov3geo.training.distillation import DistillPass, FrozenTeacher
from dinov3geo.training.distiller import distill
from dinov3geo.training.settings import DistillSettings, TrainSettings
from dinov3geo.training.trainer import pretrain

SHAPE = {"hidden": 32, "bottleneck": 16, "prototypes": 32}


def test_cosine_loss_is_the_weighted_sum_over_rows() -> None:
    student, teacher, weights = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.rand(3, 4)
    naive = sum(
        float(weights[i, j] * (1 - F.cosine_similarity(student[i, j], teacher[i, j], dim=0)))
        for i in range(3)
        for j in range(4)
    )
    assert float(cosine_loss(student, teacher, weights)) == pytest.approx(naive, rel=1e-5)
    assert float(cosine_loss(3 * teacher, teacher, weights)) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="differ"):
        cosine_loss(student, teacher[:2], weights)


def test_a_teacher_says_what_the_teacher_of_pretraining_said() -> None:
    recipe = build()
    heads = {name: recipe.teacher[name] for name in ("dino_head", "ibot_head")}
    teacher = FrozenTeacher(recipe.teacher["backbone"], heads, own=RGB, run=RGB)
    batch = crops(3)
    expected = recipe.targets(batch, teacher_temperature=0.05, anchored=False)
    for parts in (1, 3):
        answers = teacher.answer(batch, parts=parts)
        said = teacher.targets(answers, batch, temperature=0.05, group=None)
        torch.testing.assert_close(said.cls, expected.cls, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(said.patches, expected.patches, rtol=1e-4, atol=1e-6)


def test_a_teacher_of_other_statistics_sees_the_same_colours() -> None:
    other = type(RGB)(RGB.bands, RGB.scale, RGB.offset, (0.3, 0.5, 0.1), (0.1, 0.3, 0.2))
    backbone = build_vit("vit_tiny", layer_scale=0.1).eval()
    chips = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    teacher = FrozenTeacher(backbone, {}, own=other, run=RGB)
    expected = backbone(other(chips))
    seen = backbone(RGB(chips) * teacher.gain + teacher.shift)
    torch.testing.assert_close(seen.cls, expected.cls, rtol=1e-4, atol=1e-4)


def test_losses_are_those_of_pretraining_on_crops_without_masks() -> None:
    recipe, batch = build(), crops(3)
    batch.patch_masks.zero_()
    targets = recipe.targets(batch, teacher_temperature=0.05, anchored=False)
    settings = DistillSettings.model_validate(
        {
            "steps": 1,
            "teacher": "x",
            "students": [{"name": "a", "variant": "vit_tiny"}],
            "losses": {"dino_head": HEAD, "ibot_head": HEAD},
        }
    )
    passing = DistillPass(recipe.student, settings, teacher_patch=16, group=None)
    torch.manual_seed(0)
    expected = recipe.student_pass(batch, targets)
    torch.manual_seed(0)
    terms = passing(batch, targets)
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 255, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def shared(images: Path) -> dict[str, object]:
    return {
        "batch_size": 6,
        "threads": 1,
        "log_every": 1,
        "data": {
            "root": str(images),
            "sources": [{"path": ".", "kind": "images"}],
            "chip_size": 64,
            "workers": 0,
        },
        "crops": {"global_size": 32, "local_size": 16, "local_count": 2},
        "losses": {"dino_head": SHAPE, "ibot_head": SHAPE},
        "checkpoints": {"every": 2, "keep_last": 9},
    }


@pytest.fixture(scope="module")
def teacher(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {**shared(images), "steps": 1, "model": {"variant": "vit_tiny", "layer_scale": 0.1}}
    out = tmp_path_factory.mktemp("runs") / "teacher"
    pretrain(TrainSettings.model_validate(settings), out=out)
    return out


@pytest.fixture
def settings(images: Path, teacher: Path) -> DistillSettings:
    students = [
        {"name": "fine", "variant": "vit_tiny", "patch_size": 8, "layer_scale": 0.1},
        {"name": "plain", "variant": "vit_tiny", "layer_scale": 0.1, "lr_factor": 0.5},
    ]
    more = {"steps": 4, "teacher": str(teacher), "students": students, "gram_weight": 1.0}
    return DistillSettings.model_validate({**shared(images), **more})


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_ends_in_the_same_bits(settings: DistillSettings, tmp_path: Path) -> None:
    distill(settings, out=tmp_path / "whole")
    distill(settings, out=tmp_path / "broken")
    (list_checkpoints(tmp_path / "broken")[-1] / "state.json").unlink()  # as if the run had ended before it
    distill(settings, out=tmp_path / "broken", resume=True)
    for name in ("fine", "plain"):
        ends = [(tmp_path / run / name / "backbone.safetensors").read_bytes() for run in ("whole", "broken")]
        assert ends[0] == ends[1]
        numbers = lines(tmp_path / "whole")[-1]
        assert numbers[f"{name}/loss"] == lines(tmp_path / "broken")[-1][f"{name}/loss"]
        assert {f"{name}/{term}" for term in ("dino_global", "dino_local", "ibot", "gram", "koleo")} <= set(
            numbers
        )
        backbone = dinov3geo.load_backbone(tmp_path / "whole" / name)
        assert backbone.card is not None and backbone.card.name.endswith(name)
    assert dinov3geo.load_backbone(tmp_path / "whole" / "fine").patch_size == 8


@pytest.mark.parametrize("layout", ["replicate", pytest.param("shard", marks=pytest.mark.slow)])
def test_students_on_processes_of_their_own_learn_the_same(
    settings: DistillSettings, tmp_path: Path, layout: str
) -> None:
    distill(settings.model_copy(update={"steps": 3}), out=tmp_path / "turn")
    apart = settings.model_dump(mode="json")
    for student, processes in zip(apart["students"], (2, 1), strict=True):
        student["processes"] = processes
    apart |= {"steps": 3, "parallel": {"layout": layout}}
    (tmp_path / "apart.json").write_text(json.dumps(apart))
    finish(start("distill", str(tmp_path / "apart.json"), str(tmp_path / "apart"), processes=3))
    for one, other in zip(lines(tmp_path / "turn"), lines(tmp_path / "apart"), strict=True):
        for name in ("fine/loss", "fine/ibot", "fine/gram", "plain/loss", "plain/ibot", "plain/gram"):
            assert one[name] == pytest.approx(other[name], rel=2e-5), name
    for name in ("fine", "plain"):
        own, expected = (
            dinov3geo.load_backbone(tmp_path / run / name).state_dict() for run in ("apart", "turn")
        )
        far = torch.cat([(own[key] - expected[key]).abs().flatten() for key in own])
        assert float(far.mean()) < 1e-6  # a few weights follow the sign of rounding noise, see AdamW
    if layout == "shard":
        (list_checkpoints(tmp_path / "apart")[-1] / "state.json").unlink()
        before = lines(tmp_path / "apart")[-1]
        finish(start("distill", str(tmp_path / "apart.json"), str(tmp_path / "apart"), processes=3))
        assert lines(tmp_path / "apart")[-1]["fine/loss"] == before["fine/loss"]


def write_config(path: Path, settings: DistillSettings, **changes: object) -> list[str]:
    path.write_text(json.dumps({**settings.model_dump(mode="json"), **changes}))
    return ["distill", str(path), "--out", str(path.parent / "run")]


def test_a_convnext_learns_features_from_the_command_line(
    settings: DistillSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "steps": 1,
        "targets": "features",
        "teacher": "vit-tiny-aerial",
        "students": [{"name": "conv", "variant": "convnext_tiny", "layer_scale": 0.1}],
    }
    command = write_config(tmp_path / "c.yaml", settings, **changes)
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "convnext_tiny, 27.8 M parameters, stride 32" in said and "vit-tiny-aerial: 5.5 M" in said
    assert not (tmp_path / "run").exists()
    assert main([*command, "--set", "watch.pictures_every=1", "--set", "watch.pictures=2"]) == 0
    numbers = lines(tmp_path / "run")[-1]
    assert 0 < numbers["conv/cls_global"] < 2 and 0 < numbers["conv/patches"] < 2
    assert (tmp_path / "run" / "pictures" / "conv_step_00000001.png").is_file()
    assert dinov3geo.load_backbone(tmp_path / "run" / "conv").patch_size == 32
    capsys.readouterr()
    assert main(["pretrain", "--from", str(tmp_path / "run")]) == 2
    assert "run/NAME with NAME one of conv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "vit-tiny-aerial"}, "set targets: features"),
        ({"teacher": "nowhere", "targets": "features"}, "nowhere"),
        ({"losses": {"dino_head": {**SHAPE, "prototypes": 48}}}, "set it to 32"),
        ({"crops": {"global_size": 40, "local_size": 16}}, "not a multiple of patch_size 16"),
        ({"students": [{"name": "a", "variant": "convnext_tiny"}] * 2}, "a name of its own"),
        ({"students": [{"name": "a/b", "variant": "vit_tiny"}]}, "students"),
        ({"students": [{"name": "a", "variant": "vit_tinny"}]}, "vit_tiny"),
        ({"students": [{"name": "a", "variant": "vit_tiny", "processes": 2}]}, "--nproc-per-node 2"),
        (
            {
                "students": [{"name": "a", "variant": "convnext_tiny"}],
                "crops": {"global_size": 48, "local_size": 16},
            },
            "the stride of student 'a'",
        ),
        ({"students": []}, "students"),
        ({"data": {"sensor": "naip", "sources": [{"kind": "images"}]}}, "was trained on the bands"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    settings: DistillSettings,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, dict[str, object]],
    said: str,
) -> None:
    if "data" in changes:
        changes = {"data": {**changes["data"], "root": str(images)}}
    assert main([*write_config(tmp_path / "c.yaml", settings, **changes)]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
