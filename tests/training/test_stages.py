"""Branches, stages, mixtures of sizes, retention, and what a run shows of itself."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinov3geo.cli import main
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.training.checkpoint import list_checkpoints, read_networks
from dinov3geo.training.observe import Listeners
from dinov3geo.training.settings import TrainSettings
from dinov3geo.training.stages import branch_settings
from dinov3geo.training.trainer import Trainer, pretrain
from dinov3geo.training.watch import CollapseWatch, feature_statistics, target_statistics

HEAD = {"hidden": 32, "bottleneck": 16, "prototypes": 32}


@pytest.fixture
def settings(write_raster: Callable[..., Path]) -> TrainSettings:
    scene = write_raster("scenes/plot.tif", shape=(3, 90, 100))
    return TrainSettings.model_validate(
        {
            "name": "base",
            "steps": 6,
            "batch_size": 4,
            "threads": 1,
            "log_every": 1,
            "model": {"variant": "vit_tiny"},
            "data": {"root": str(scene.parent), "chip_size": 64, "workers": 0},
            "crops": {"global_size": 32, "local_size": 16, "local_count": 2},
            "losses": {"dino_head": HEAD, "ibot_head": HEAD},
            "schedules": {"lr": {"peak": 1e-3, "cosine_steps": 0}},
            "checkpoints": {"every": 2, "keep_last": 1, "keep_every": 4},
        }
    )


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_branch_without_changes_is_the_run_itself(settings: TrainSettings, tmp_path: Path) -> None:
    pretrain(settings, out=tmp_path / "whole")
    kept = list_checkpoints(tmp_path / "whole")
    assert [path.name[-1] for path in kept] == ["4", "6"]
    values = branch_settings(kept[0], None, None)
    pretrain(TrainSettings.model_validate(values), out=tmp_path / "branch")
    ends = [read_networks(list_checkpoints(tmp_path / r)[-1], "") for r in ("whole", "branch")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert [line["loss"] for line in lines(tmp_path / "branch")] == [
        line["loss"] for line in lines(tmp_path / "whole")[4:]
    ]


def test_stages_from_the_command_line(
    settings: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pretrain(settings, out=run)
    gram = ["pretrain", "--from", str(run), "--stage", "gram", "--set", "steps=9", "--set", "data.workers=0"]
    assert main([*gram, "--out", str(tmp_path / "no")]) == 2
    assert "name it with --anchor" in capsys.readouterr().err and not (tmp_path / "no").exists()
    early = list_checkpoints(run)[0]
    assert main([*gram, "--anchor", str(early), "--out", str(tmp_path / "gram")]) == 0
    state = json.loads((list_checkpoints(tmp_path / "gram")[-1] / "state.json").read_text())
    assert state["step"] == 9 and state["settings"]["name"] == "base-gram" and state["num_refreshes"] >= 1
    assert [line["step"] for line in lines(tmp_path / "gram")] == [7, 8, 9]
    assert all(line["gram"] > 0 for line in lines(tmp_path / "gram"))
    high = ["pretrain", "--from", str(tmp_path / "gram"), "--stage", "highres", "--anchor", "teacher"]
    assert main([*high, "--set", "steps=11", "--out", str(tmp_path / "high")]) == 0
    assert [line["step"] for line in lines(tmp_path / "high")] == [10, 11]
    capsys.readouterr()
    assert main(["pretrain", "--from", str(run), "--stage", "gramm", "--anchor", "start"]) == 2
    assert "gram" in capsys.readouterr().err


def test_an_anchor_of_another_width_cannot_be_refreshed(settings: TrainSettings, tmp_path: Path) -> None:
    pretrain(settings, out=tmp_path / "run")
    other = settings.model_dump() | {
        "model": {"variant": "vit_small"},
        "gram": {"anchor": tmp_path / "run", "refresh_every": 2},
    }
    with pytest.raises(ConfigError, match="one variant and width"):
        pretrain(TrainSettings.model_validate(other), out=tmp_path / "other")


def test_sizes_are_drawn_by_the_step_alone(settings: TrainSettings, tmp_path: Path) -> None:
    mixed = TrainSettings.model_validate(
        settings.model_dump()
        | {
            "resolutions": [
                {"global_size": 32, "local_size": 16, "probability": 1},
                {"global_size": 64, "local_size": 32, "probability": 3},
            ]
        }
    )
    trainer = Trainer(mixed, tmp_path)
    batch = trainer._first_chips(4)
    sizes = []
    for step in range(40):
        trainer.step = step
        crops = trainer.make_crops(batch)
        sizes.append((crops.global_crops.shape[-1], crops.local_crops.shape[-1]))
    assert set(sizes) == {(32, 16), (64, 32)} and 20 < sizes.count((64, 32)) < 40
    trainer.step = 3
    assert trainer.make_crops(batch).global_crops.shape[-1] == sizes[3][0]


def test_a_step_that_is_not_finite_is_skipped_and_in_the_end_explained(
    settings: TrainSettings, tmp_path: Path
) -> None:
    said: list[str] = []
    trainer = Trainer(settings, tmp_path, listeners=Listeners(warn=said.append))
    trainer.recipe.train()
    before = trainer.recipe.student["backbone"].norm.weight.clone()
    batch = next(trainer._batches())
    broken = dict(batch, image=batch["image"].float() * torch.nan)
    assert trainer._is_finite({"loss": torch.tensor(1.0)}, batch)
    for _ in range(2):
        assert not trainer._is_finite({"loss": torch.tensor(torch.nan)}, broken)
    assert trainer.skipped == trainer.skipped_in_a_row == 2 and len(said) == 2
    assert torch.equal(trainer.recipe.student["backbone"].norm.weight, before)
    with pytest.raises(DataError, match="described in"):
        trainer._is_finite({"loss": torch.tensor(torch.nan), "ibot": torch.tensor(torch.nan)}, broken)
    report = json.loads(next((tmp_path / "broken_batches").glob("*.json")).read_text())
    assert len(report["chips"]) == 4 and "plot.tif at x " in report["chips"][0]["source"]
    assert report["chips"][0]["finite"] == 0.0


def test_a_run_shows_itself(settings: TrainSettings, tmp_path: Path) -> None:
    watched = settings.model_copy(
        update={
            "watch": settings.watch.model_copy(
                update={"evaluate_every": 3, "pictures_every": 6, "pictures": 2, "tensorboard": True}
            )
        }
    )
    pretrain(watched, out=tmp_path / "run", evaluators={"one": lambda backbone: {"one": 1.0}})
    logged = lines(tmp_path / "run")
    names = {"teacher_entropy", "prototype_use", "feature_rank", "patch_similarity", "memory_gib", "lr"}
    assert names <= logged[0].keys() and "data_wait_share" in logged[0]
    assert [line["step"] for line in logged if "eval/one" in line] == [3, 6]
    assert (tmp_path / "run" / "pictures" / "step_00000006.png").is_file()
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_statistics_have_known_values() -> None:
    flat = target_statistics(torch.full((6, 8), 1 / 8))
    assert float(flat["teacher_entropy"]) == pytest.approx(1.0)
    sharp = target_statistics(torch.eye(8)[[0, 1, 2, 2]])
    assert float(sharp["teacher_entropy"]) == 0.0 and float(sharp["prototype_use"]) == pytest.approx(3 / 4)
    from dinov3geo.backbones.features import Features

    cls = torch.eye(5, 12)
    patches = torch.ones(5, 9, 12)
    numbers = feature_statistics(Features(cls, torch.zeros(5, 0, 12), patches, (3, 3)))
    assert float(numbers["feature_rank"]) == pytest.approx(4.0, abs=0.01)  # five centred, equal directions
    assert float(numbers["patch_similarity"]) == pytest.approx(1.0, abs=1e-5)
    assert float(numbers["patch_norm_ratio"]) == pytest.approx(1.0)


def test_collapse_is_told_after_three_lines_and_not_at_every_one() -> None:
    watch = CollapseWatch(quiet_steps=2)
    told = [bool(watch.check(step, {"feature_rank": 1.1})) for step in range(1, 12)]
    assert told == [False] * 4 + [True] + [False] * 6
    assert watch.check(20, {"feature_rank": 40.0}) == []
