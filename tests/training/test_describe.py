"""Every configuration of every size is built without memory, and says the published numbers."""

from pathlib import Path

import pytest

from dinov3geo.config import DistillConfig, load_config, load_model
from dinov3geo.training.describe import describe, describe_distillation
from dinov3geo.training.memory import count_parameters

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path for stage in ("pretrain", "gram", "highres") for path in (CONFIGS / stage).glob("*.yaml"))


def processes(path: Path) -> int:
    return 256 if "7b" in path.name else 32 if "32gpu" in path.name else 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_dry_run_of_every_configuration(path, write_raster):
    scene = write_raster("rgb.tif", shape=(3, 64, 64))
    settings = load_config(path, [f"data.root={scene.parent}", "data.sources=[{path: '.'}]"])
    lines = dict(describe(settings, ranks=processes(path)))
    assert "M parameters" in lines["backbone"] and lines["memory per process (estimate)"]
    text = path.read_text()
    assert all(word in text for word in ("Reproduces", "Command", "Hardware")) or "bundled" in text
    assert f"configs/{path.parent.name}/{path.name}" in text
    if path.parent.name != "pretrain":
        assert "gram anchor" in lines and "start from" in lines


@pytest.mark.parametrize("path", sorted((CONFIGS / "distill").glob("*.yaml")), ids=lambda path: path.stem)
def test_dry_run_of_every_distillation(path, write_raster):
    scene = write_raster("rgb.tif", shape=(3, 64, 64))
    settings = load_model(DistillConfig, path, [f"data.root={scene.parent}", "data.sources=[{path: '.'}]"])
    ranks = 296 if "296gpu" in path.name else 1
    lines = dict(describe_distillation(settings, ranks=ranks))
    assert {f"student {student.name}" for student in settings.students} <= set(lines)
    assert all("GiB" in lines[f"student {student.name}"] for student in settings.students)
    assert ("IS MISSING" in lines["teacher"]) == ("outputs" in str(settings.teacher))
    assert f"configs/distill/{path.name}" in path.read_text()


def test_published_numbers():
    large = load_config(CONFIGS / "pretrain" / "vit_l_32gpu.yaml")
    assert (large.batch_size, large.steps) == (64 * 32, 100 * 1250)
    assert large.schedules.lr.at(12500, large.steps) == pytest.approx(1e-3 * 4 * 2**0.5, rel=1e-3)
    assert (large.schedules.momentum.peak, large.schedules.momentum.end) == (0.992, 1.0)
    assert large.schedules.weight_decay.at(0, 10) == pytest.approx(0.04)
    assert large.schedules.weight_decay.end == 0.4
    assert large.optimizer.freeze_last_layer_steps == 1250 and large.model.drop_path == 0.3
    assert large.schedules.teacher_temperature.warmup_steps == 30 * 1250
    huge = load_config(CONFIGS / "pretrain" / "vit_7b_256gpu.yaml")
    assert count_parameters(huge)[0] == pytest.approx(6716e6, rel=1e-4)
    assert (huge.batch_size, huge.steps) == (16 * 256, 1_000_000)
    assert huge.schedules.lr.at(999_999, huge.steps) == pytest.approx(5e-5 * 4 * 2)
    assert (huge.optimizer.clip_norm, huge.optimizer.layer_decay, huge.optimizer.betas) == (
        30,
        0.98,
        (0.9, 0.99),
    )
    assert (huge.losses.dino_head.prototypes, huge.losses.ibot_head.prototypes) == (262144, 98304)
    assert (huge.crops.global_size, huge.crops.local_size) == (256, 112) and not huge.crops.flips
    gram = load_config(CONFIGS / "gram" / "vit_7b_256gpu.yaml")
    assert gram.keep_count and gram.gram.first_refresh == 1_010_000
    assert (gram.gram.refresh_every, gram.gram.max_refreshes, gram.crops.gram_size) == (10_000, 3, 512)
    assert gram.schedules.lr.at(10, gram.steps) == pytest.approx(3e-5 * 8)
    assert gram.losses.dino_local_weight.at(0, 1) == 0.5 and gram.gram.weight.at(0, 1) == 2.0
    high = load_config(CONFIGS / "highres" / "vit_7b_256gpu.yaml")
    assert [(c.global_size, c.gram_size, c.probability) for c in high.resolutions] == [
        (512, 768, 0.3),
        (768, 1152, 0.3),
        (768, 1152, 0.3),
        (768, 1152, 0.05),
        (768, 1152, 0.05),
    ]
    assert high.schedules.lr.at(10_000, high.steps) == pytest.approx(1.25e-5 * 4 * 2**0.5, rel=1e-3)
    lengths = [
        load_config(CONFIGS / s / "vit_7b_sat493m.yaml").steps for s in ("pretrain", "gram", "highres")
    ]
    assert lengths == [100_000, 110_000, 8_000]
