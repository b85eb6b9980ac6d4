"""Runs of the command line: a killed reading process, packed chips."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3geo.cli import main

HEAD = "{prototypes: 32, hidden: 16, bottleneck: 8}"
TEXT = (
    "steps: 6\nbatch_size: 8\nthreads: 1\nlog_every: 1\nmodel: {variant: vit_tiny}\n"
    "crops: {global_size: 32, local_size: 16, local_count: 1}\n"
    f"losses: {{dino_head: {HEAD}, ibot_head: {HEAD}}}\n"
)


def write_config(path: Path, data: str, more: str = "") -> Path:
    path.write_text(TEXT + more + f"data: {data}\n")
    return path


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def photographs(tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(48):
        pixels = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path / "photos"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the reading process in /proc")
def test_a_killed_reading_process_is_one_line_and_the_run_goes_on(write_raster, tmp_path, project_root):
    write_raster("s/a.tif", shape=(3, 96, 96))
    data = f"{{root: {tmp_path / 's'}, chip_size: 48, workers: 1}}"
    config = write_config(tmp_path / "c.yaml", data, "checkpoints: {every: 1, keep_last: 2}\n")
    words = [sys.executable, "-m", "dinov3geo", "pretrain", str(config), "--out", str(tmp_path / "run")]
    words += ["--set", "steps=60"]
    environment = os.environ | {"PYTHONPATH": str(project_root)}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while lines(tmp_path / "run") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    readers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for reader in readers:
        os.kill(int(reader), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and readers
    assert "Traceback" not in error
    assert " ".join(error.split()).count("a reading process was killed") == 1
    assert main([*words[3:], "--resume"]) == 0 and lines(tmp_path / "run") == 60


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_chips_in_order_give_the_losses_of_the_run(photographs, write_raster, tmp_path, workers):
    """Scenes with holes and photographs, packed, read back by a run of any number of readers."""
    array = np.random.default_rng(0).integers(1, 255, (3, 120, 160)).astype("uint8")
    array[:, 30:70, 40:80] = 0
    write_raster("s/a.tif", array=array, nodata=0)
    sources = "sources: [{path: s, weight: 2}, {path: photos, kind: images}]"
    config = write_config(tmp_path / "a.yaml", f"{{root: {tmp_path}, chip_size: 48, workers: 1, {sources}}}")
    assert main(["pretrain", str(config), "--out", str(tmp_path / "scenes")]) == 0
    packed = tmp_path / "packed"
    assert main(["pack", str(config), "-o", str(packed), "--chips", "48", "--per-shard", "10"]) == 0
    read = ["--set", f"data.root={packed}", "--set", f"data.workers={workers}", "--set"]
    words = ["pretrain", str(config), "--out"]
    ordered = "data.sources=[{kind: shards, in_order: true}]"
    assert main([*words, str(tmp_path / "packed_run"), *read, ordered]) == 0
    assert losses(tmp_path / "packed_run") == losses(tmp_path / "scenes")
    # Shuffled, the same chips come in other steps.
    assert main([*words, str(tmp_path / "shuffled"), *read, "data.sources=[{kind: shards}]"]) == 0
    assert losses(tmp_path / "shuffled") != losses(tmp_path / "scenes")


def test_only_packed_chips_have_an_order(photographs, tmp_path, capsys):
    data = f"{{root: {photographs}, sources: [{{kind: images, in_order: true}}]}}"
    config = write_config(tmp_path / "a.yaml", data)
    assert main(["pretrain", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "in_order is for kind: shards" in " ".join(capsys.readouterr().err.split())
