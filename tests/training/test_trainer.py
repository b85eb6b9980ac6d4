"""Runs on small real files: resume bit for bit, refusals, gram stage."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dinov3geo.backbones.zoo import load_backbone, read_tensors
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.training.checkpoint import list_checkpoints
from dinov3geo.training.describe import describe
from dinov3geo.training.learner import step_seed
from dinov3geo.training.settings import TrainSettings
from dinov3geo.training.trainer import pretrain

HEAD = {"hidden": 32, "bottleneck": 16, "prototypes": 32}


@pytest.fixture
def settings(write_raster: Callable[..., Path]) -> TrainSettings:
    for number, crs in enumerate(("EPSG:32617", "EPSG:32618", "EPSG:32611")):
        scene = write_raster(f"scenes/plot_{number}.tif", shape=(3, 90, 100), seed=number, crs=crs)
    return TrainSettings.model_validate(
        {
            "steps": 6,
            "batch_size": 4,
            "threads": 1,
            "log_every": 1,
            "model": {"variant": "vit_tiny", "drop_path": 0.2},
            "data": {"root": str(scene.parent), "chip_size": 64, "workers": 0},
            "crops": {"global_size": 48, "local_size": 32, "local_count": 2},
            "losses": {"dino_head": HEAD, "ibot_head": HEAD},
            "checkpoints": {"every": 2, "keep_last": 2},
        }
    )


def changed(settings: TrainSettings, **values: object) -> TrainSettings:
    return TrainSettings.model_validate(settings.model_dump() | values)


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    last = list_checkpoints(run)[-1]
    return read_tensors(last / "model.safetensors") | read_tensors(last / "optimizer.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    tensors, others = final_tensors(one), final_tensors(other)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    lines, other_lines = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, other)
    )
    assert [(line["step"], line["loss"]) for line in lines] == [
        (line["step"], line["loss"]) for line in other_lines
    ]


def test_a_run_leaves_weights_that_load(settings: TrainSettings, tmp_path: Path) -> None:
    result = pretrain(settings, out=tmp_path / "run")
    assert result.stopped_by is None and result.steps == 6
    backbone = load_backbone(tmp_path / "run")
    assert backbone.card is not None
    assert backbone.card.recipe["steps"] == 6
    assert backbone.card.gsd_m == pytest.approx((0.1, 0.1))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000004", "step_00000006"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"dino_global", "dino_local", "ibot", "koleo", "grad_norm/backbone", "images_per_s"} <= lines[
        0
    ].keys()


def test_resume_is_bit_for_bit(settings: TrainSettings, tmp_path: Path) -> None:
    pretrain(settings, out=tmp_path / "whole")

    class Killed(Exception):
        pass

    def stop(step: int, _total: int, _metrics: dict[str, float]) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        pretrain(settings, out=tmp_path / "broken", progress=stop)
    torch.manual_seed(999)
    pretrain(settings, out=tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_killed_at_random_moments_ends_the_same(settings: TrainSettings, tmp_path: Path) -> None:
    pretrain(settings, out=tmp_path / "whole")
    run = tmp_path / "broken"
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    code = (
        "import sys; from pathlib import Path\n"
        "from dinov3geo.training.settings import TrainSettings\n"
        "from dinov3geo.training.trainer import pretrain\n"
        "settings = TrainSettings.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "pretrain(settings, out=Path(sys.argv[2]), resume=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "settings.json"), str(run)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 120
        before = len(list_checkpoints(run))
        # Killed at a random moment after the run has begun to write: at best in the middle of a file.
        while process.poll() is None and not (run / "settings.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(3 + 4 * float(torch.rand(1, generator=generator)))
        process.kill()
        process.wait()
        assert len(list_checkpoints(run)) >= min(before, 1)
    subprocess.run(command, check=True)
    assert_same_run(tmp_path / "whole", run)


def test_sigterm_saves_and_ends(settings: TrainSettings, tmp_path: Path) -> None:
    def ask(step: int, _total: int, _metrics: dict[str, float]) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    result = pretrain(settings, out=tmp_path / "run", progress=ask)
    assert result.stopped_by == signal.SIGTERM and result.steps == 3
    pretrain(settings, out=tmp_path / "whole")
    pretrain(settings, out=tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_gram_stage_goes_on_from_a_run(settings: TrainSettings, tmp_path: Path) -> None:
    first = tmp_path / "first"
    pretrain(settings, out=first)
    stage = changed(
        settings,
        start_from=first,
        gram={"anchor": first, "refresh_every": 3, "weight": 1.0},
        crops={"global_size": 48, "local_size": 32, "local_count": 2, "gram_size": 96},
    )
    pretrain(stage, out=tmp_path / "gram")
    lines = [json.loads(line) for line in (tmp_path / "gram" / "metrics.jsonl").read_text().splitlines()]
    # The student begins as the anchor's own run left it, so that the first values are small.
    assert all(0 < line["gram"] < 0.5 for line in lines)
    state = json.loads((list_checkpoints(tmp_path / "gram")[-1] / "state.json").read_text())
    assert state["num_refreshes"] == 2


def test_refusals(settings: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gram\.anchor is not"):
        pretrain(
            changed(settings, crops={"global_size": 48, "local_size": 32, "gram_size": 96}),
            out=tmp_path / "a",
        )
    with pytest.raises(ConfigError, match="not a multiple of patch_size 16; use 48 or 64"):
        pretrain(changed(settings, crops={"global_size": 50, "local_size": 32}), out=tmp_path / "b")
    pretrain(settings, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="--resume"):
        pretrain(settings, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="batch_size: 4 -> 8"):
        pretrain(changed(settings, batch_size=8), out=tmp_path / "run", resume=True)
    other_heads = {"dino_head": HEAD | {"prototypes": 40}, "ibot_head": HEAD}
    with pytest.raises(DataError, match="prototypes"):
        pretrain(changed(settings, losses=other_heads, start_from=tmp_path / "run"), out=tmp_path / "c")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_loss_that_is_not_finite_stops_the_run(settings: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not finite in step \d+"):
        pretrain(
            changed(settings, schedules={"lr": 1e30, "weight_decay": 0.0}, optimizer={"clip_norm": None}),
            out=tmp_path / "run",
        )


def test_a_half_deleted_checkpoint_does_not_count(settings: TrainSettings, tmp_path: Path) -> None:
    pretrain(settings, out=tmp_path / "run")
    last = list_checkpoints(tmp_path / "run")[-1]
    (last / "state.json").unlink()
    pretrain(settings, out=tmp_path / "run", resume=True)
    pretrain(settings, out=tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_dry_run_finds_what_would_stop_the_run(settings: TrainSettings, tmp_path: Path) -> None:
    lines = dict(describe(settings, tmp_path / "run"))
    assert lines["data ."] == "3 scenes" and lines["steps"].startswith("6 of 4 images")
    with pytest.raises(ConfigError, match="multiple of patch_size"):
        describe(changed(settings, crops={"global_size": 50, "local_size": 32}))
    with pytest.raises(DataError, match="no checkpoint"):
        describe(changed(settings, start_from=tmp_path))


def test_ranges_are_checked_with_the_settings(settings: TrainSettings) -> None:
    for bad in (
        {"masks": {"ratio": [0.1, 1.5]}},
        {"crops": {"aspect": [0, 1]}},
        {"crops": {"global_scale": [1.0, 0.3]}},
        {"optimizer": {"betas": [1, 1]}},
    ):
        with pytest.raises(ValidationError):
            changed(settings, **bad)


def test_step_seeds_differ() -> None:
    seeds = {step_seed(s, t, stream) for s in range(5) for t in range(200) for stream in (1, 2)}
    assert len(seeds) == 5 * 200 * 2
