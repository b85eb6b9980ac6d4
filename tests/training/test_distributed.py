"""Two processes on Gloo against one."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from two_processes import crops, finish, start

from dinov3geo.backbones.store import read_tensors
from dinov3geo.errors import ConfigError
from dinov3geo.training.checkpoint import list_checkpoints, read_networks, read_state
from dinov3geo.training.distributed import World
from dinov3geo.training.settings import TrainSettings
from dinov3geo.training.trainer import pretrain


def test_losses_and_gradients_equal_those_of_one_process() -> None:
    finish(start("losses_and_gradients"))


def test_shards_take_the_same_steps_as_replicas() -> None:
    finish(start("five_steps"))


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    (tmp_path / "images").mkdir()
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 255, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    head = {"hidden": 32, "bottleneck": 16, "prototypes": 32}
    return TrainSettings.model_validate(
        {
            "steps": 6,
            "batch_size": 4,
            "threads": 1,
            "log_every": 1,
            "model": {"variant": "vit_tiny", "layer_scale": 0.1},
            "data": {
                "root": str(tmp_path / "images"),
                "sources": [{"kind": "images"}],
                "chip_size": 64,
                "workers": 0,
            },
            "crops": {"global_size": 48, "local_size": 32, "local_count": 2},
            "losses": {"dino_head": head, "ibot_head": head},
            "checkpoints": {"every": 2, "keep_last": 9},
            "parallel": {"layout": "shard"},
        }
    )


def test_checkpoints_change_hands_between_numbers_of_processes(
    settings: TrainSettings, tmp_path: Path
) -> None:
    file, out = tmp_path / "settings.json", tmp_path / "run"
    file.write_text(settings.model_copy(update={"steps": 6}).model_dump_json())
    # Two processes make steps 1 and 2, one goes on to 4, two end the run.
    pretrain(settings, out=tmp_path / "whole")
    for processes, steps in ((2, 2), (1, 4), (2, 6)):
        for late in list_checkpoints(out):
            assert int(late.name[-8:]) <= steps
        if processes == 2:
            finish(start("pretrain", str(file), str(out)))
        else:
            pretrain(settings, out=out, resume=True)
        for late in list_checkpoints(out):
            if int(late.name[-8:]) > steps:
                (late / "state.json").unlink()  # as if the sitting had ended here
    sharded = list_checkpoints(out)
    assert (sharded[0] / "model").is_dir() and (sharded[1] / "model.safetensors").is_file()
    assert [path.name[-1] for path in sharded] == ["2", "4", "6"]
    ends = [read_networks(list_checkpoints(run)[-1], "student.") for run in (tmp_path / "whole", out)]
    # AdamW moves a parameter by the full rate however small its gradient is: where that is rounding noise
    # (a few of the weights), so is the direction.
    differences = torch.cat([(ends[0][name] - ends[1][name]).abs().flatten() for name in ends[0]])
    assert (
        float(differences.mean()) < 1e-6
        and float(differences.sort().values[int(0.99 * len(differences))]) < 1e-5
    )
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "whole", out)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicate", "shard"])
def test_bfloat16_with_selective_recomputation_stays_near_float32(
    settings: TrainSettings, tmp_path: Path, layout: str
) -> None:
    exact = settings.model_copy(update={"steps": 3})
    pretrain(exact, out=tmp_path / "exact")
    parallel = exact.parallel.model_copy(update={"layout": layout, "recompute": "selective"})
    low = exact.model_copy(update={"precision": "bfloat16", "parallel": parallel})
    (tmp_path / "low.json").write_text(low.model_dump_json())
    finish(start("pretrain", str(tmp_path / "low.json"), str(tmp_path / "low")))
    for name in ("loss", "dino_global", "ibot", "grad_norm/backbone"):
        losses = [
            [json.loads(line)[name] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("exact", "low")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=0.03 if "grad" not in name else 0.2), name
    weights = read_tensors(tmp_path / "low" / "backbone.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide by 3 processes.*use 9 or 12"):
        World(0, 3).images_per_process(10)
    assert World(1, 2).images_per_process(8, accumulate=2) == 4


def test_all_images_of_a_step_are_those_of_one_process(settings: TrainSettings) -> None:
    together = crops(5)
    for rank in range(2):
        own = crops(5, World(rank, 2).share)
        assert torch.equal(own.global_crops, together.global_crops[:, rank::2])
        assert torch.equal(own.local_crops, together.local_crops[:, rank::2])
        assert own.gram_crops is not None and together.gram_crops is not None
        assert torch.equal(own.gram_crops, together.gram_crops[:, rank::2])
        masks = together.patch_masks.unflatten(0, (2, 8))[:, rank::2].flatten(0, 1)
        assert torch.equal(own.patch_masks, masks)


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


@pytest.mark.slow
def test_killed_at_twenty_moments_two_processes_end_in_the_bits_of_the_unbroken_run(
    settings: TrainSettings, tmp_path: Path
) -> None:
    stage = {
        "steps": 60,
        "model": {"variant": "vit_tiny", "layer_scale": 0.1, "drop_path": 0.2},
        "parallel": {"layout": "replicate"},
        "checkpoints": {"every": 1, "keep_last": 2, "keep_every": 25},
    }
    first = TrainSettings.model_validate(settings.model_dump() | stage | {"steps": 2})
    pretrain(first, out=tmp_path / "first")
    everything = TrainSettings.model_validate(
        settings.model_dump()
        | stage
        | {
            "start_from": tmp_path / "first",
            "gram": {
                "anchor": tmp_path / "first",
                "refresh_every": 7,
                "first_refresh": 10,
                "max_refreshes": 4,
            },
            "resolutions": [
                {"global_size": 48, "local_size": 32, "gram_size": 64, "probability": 0.6},
                {"global_size": 64, "local_size": 16, "gram_size": 96, "probability": 0.4},
            ],
            "accumulate": 2,
            "batch_size": 8,
        }
    )
    file, whole, broken = tmp_path / "settings.json", tmp_path / "whole", tmp_path / "broken"
    file.write_text(everything.model_dump_json())
    finish(start("pretrain", str(file), str(whole)))
    moments = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    kills = 0
    for moment in moments:
        before = steps_logged(broken)
        processes = start("pretrain", str(file), str(broken))
        while steps_logged(broken) == before and processes[0].poll() is None:
            time.sleep(0.005)
        time.sleep(moment * 0.8)
        for process in processes:
            process.kill()
        codes = [(process.communicate(), process.returncode)[1] for process in processes]
        kills += codes[0] == -signal.SIGKILL
    finish(start("pretrain", str(file), str(broken)))
    assert kills >= 15  # the last ones may find the run at its end
    ends = [
        read_tensors(list_checkpoints(run)[-1] / f"{part}.safetensors")
        for run in (whole, broken)
        for part in ("model", "optimizer")
    ]
    for one, other in zip(ends[:2], ends[2:], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, broken)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 60
    states = [read_state(list_checkpoints(run)[-1]) for run in (whole, broken)]
    assert states[0] == states[1] and states[0]["num_refreshes"] == 4
    assert [path.name[-2:] for path in list_checkpoints(broken)] == ["25", "50", "59", "60"]
