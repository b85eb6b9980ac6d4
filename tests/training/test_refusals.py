"""Settings that cannot be run end in one line and exit status 2, with nothing written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3geo.cli import main
from dinov3geo.training.checkpoint import list_checkpoints, read_state
from dinov3geo.training.memory import least_memory_bytes, memory_bytes
from dinov3geo.training.settings import TrainSettings

HEAD = {"hidden": 16, "bottleneck": 8, "prototypes": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `c.yaml`, and `run` made by it."""
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "images").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    values = {
        "steps": 1,
        "batch_size": 4,
        "data": {
            "root": str(folder / "images"),
            "sources": [{"path": ".", "kind": "images"}],
            "sensor": "photo_rgb",
            "chip_size": 32,
            "workers": 0,
        },
        "crops": {"global_size": 32, "local_size": 16, "local_count": 1},
        "losses": {"dino_head": HEAD, "ibot_head": HEAD},
    }
    (folder / "c.yaml").write_text(json.dumps(values))
    assert main(["pretrain", str(folder / "c.yaml"), "--out", str(folder / "run")]) == 0
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "losses.dino_head.prototypes=9000000000"], "lower losses.dino_head.prototypes"),
        (
            ["--set", "crops.global_size=40"],
            "global_size 40 is not a multiple of patch_size 16; use 32 or 48",
        ),
        (["--set", "crops.gram_size=64"], "name the anchor"),
        (
            ["--set", "gram.anchor=RUN", "--set", "gram.refresh_every=1", "--set", "model.variant=vit_small"],
            "width",
        ),
        (["--set", "gram.anchor=nowhere"], "nowhere"),
        (["--dry-run", "--ranks", "3"], "batch_size 4 does not divide by 3 processes"),
        (["--set", "model.variant=convnext_tiny"], "set model.patch_size to 32"),
        (
            ["--set", "model.variant=convnext_tiny", "--set", "model.patch_size=32"],
            "cannot see masked patches; set masks.probability to 0",
        ),
        (["--set", "data.homogeneous=1.5"], "data.homogeneous"),
        (["--set", "start_from=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_run_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    arguments = [argument.replace("RUN", str(run / "run")) for argument in arguments]
    assert main(["pretrain", str(run / "c.yaml"), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_changed_recipe_is_not_resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pretrain", str(run / "c.yaml"), "--out", str(run / "run"), "--resume"]
    assert main([*command, "--set", "schedules.momentum=0.5", "--set", "batch_size=2"]) == 2
    error = capsys.readouterr().err
    assert "batch_size: 4 -> 2; schedules.momentum.end" in error and "or branch off" in error
    assert main([*command, "--set", "log_every=5"]) == 0


def test_checkpoints_of_an_older_form_are_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that have come up since take their defaults; keys that are gone are named."""
    checkpoint = list_checkpoints(run / "run")[-1]
    state = read_state(checkpoint)
    young = json.dumps(state)
    del state["skipped"], state["skipped_in_a_row"], state["settings"]["data"]["homogeneous"]
    del state["settings"]["parallel"], state["settings"]["resolutions"], state["settings"]["watch"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    command = ["pretrain", str(run / "c.yaml"), "--out", str(run / "run"), "--resume"]
    assert main(command) == 0
    state["settings"]["crops"]["colour_wheel"] = 3
    (checkpoint / "state.json").write_text(json.dumps(state))
    capsys.readouterr()
    assert main(command) == 2
    assert "crops.colour_wheel" in capsys.readouterr().err
    (checkpoint / "state.json").write_text(young)


def test_least_memory_is_counted_by_hand() -> None:
    head = {"hidden": 2048, "bottleneck": 256, "prototypes": 65536}
    settings = TrainSettings.model_validate(
        {"steps": 1, "batch_size": 8, "losses": {"dino_head": head, "ibot_head": head}}
    )
    mlp = 192 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    backbone = sum(p.numel() for p in _vit_tiny().parameters())
    trained = backbone + 2 * (mlp + 256 * 65536)
    rows = 8 * 2 * (1 + 14**2 * 0.5 * 0.3)
    assert least_memory_bytes(settings) == int(4 * 5 * trained + 4 * rows * 65536)
    assert memory_bytes(settings) > least_memory_bytes(settings)


def _vit_tiny() -> torch.nn.Module:
    from dinov3geo.backbones.variants import build_backbone

    with torch.device("meta"):
        return build_backbone("vit_tiny")
