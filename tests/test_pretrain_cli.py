"""Pretraining from the command line."""

from pathlib import Path

import pytest

from tests.command_line import error_of, run

TINY_RUN = """
name: tiny
steps: 2
batch_size: 2
device: cpu
data: {chip_size: 48, workers: 0}
crops: {global_size: 32, local_size: 16, local_count: 1}
losses:
  dino_head: &small {hidden: 8, bottleneck: 4, prototypes: 16}
  ibot_head: *small
"""


@pytest.fixture
def tiny_config(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RUN)
    return path


def test_pretrain(capsys, tmp_path, tiny_config, pairs):
    words = ["pretrain", tiny_config, "--set", f"data.root={pairs[0]}", "--out", tmp_path / "run"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert str(tmp_path / "run" / "backbone.safetensors") in out
    assert "--resume" in error_of(capsys, *words)
    assert run(capsys, *words, "--resume")[0] == 0


def test_pretrain_says_what_a_signal_does(capsys):
    out = run(capsys, "pretrain", "--help")[1]
    assert "SIGTERM" in out and "--resume goes on" in " ".join(out.split())


def test_pretrain_dry_run(capsys, tmp_path, tiny_config, pairs):
    words = ["pretrain", tiny_config, "--set", f"data.root={pairs[0]}", "--out", tmp_path / "run"]
    code, out, err = run(capsys, *words, "--dry-run")
    assert code == 0, err
    assert "steps: 2" in out and "output folder" in out
    assert not (tmp_path / "run").exists()


def test_pretrain_errors(capsys, tmp_path, tiny_config):
    tiny_config.write_text(TINY_RUN + "optimizer:\n  layer_deca: 3\n")
    words = ["pretrain", tiny_config, "--out", tmp_path / "run"]
    line = TINY_RUN.count("\n") + 2
    assert error_of(capsys, *words).startswith(
        f"error: {tiny_config}:{line}: unknown key 'optimizer.layer_deca' "
        "(did you mean 'optimizer.layer_decay'?"
    )
    assert "cannot read" in error_of(capsys, "pretrain", tmp_path / "absent.yaml")
    tiny_config.write_text(TINY_RUN)
    (tmp_path / "empty").mkdir()
    assert "no " in error_of(capsys, *words, "--set", f"data.root={tmp_path / 'empty'}")
    assert "is a file" in error_of(capsys, "pretrain", tiny_config, "--out", tiny_config / "x")
    assert not (tmp_path / "run").exists()
