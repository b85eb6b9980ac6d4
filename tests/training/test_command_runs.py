"""Runs of the command line: who reads which chips, a killed reading process, packed chips."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from two_processes import finish, start

from dinov3geo.backbones.store import read_tensors
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


def chips_read(folder: Path) -> list[list[str]]:
    """Chips of each of the two reading processes of each of the two ranks."""
    files = sorted(folder.iterdir())
    assert [path.name.split("_")[0] for path in files] == ["0", "0", "1", "1"]
    return [path.read_text().splitlines() for path in files]


def run_ranks(folder: Path, *words: str | Path) -> None:
    folder.mkdir()
    finish(start("command", str(folder), *map(str, words)))


@pytest.fixture
def photographs(tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(48):
        pixels = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_two_ranks_of_two_readers_share_the_epoch_and_go_on_bit_for_bit(photographs, write_raster, tmp_path):
    """48 images are 6 steps of 8, each read once. Scenes in superblocks end in the same bits."""
    data = f"{{root: {photographs}, chip_size: 48, workers: 2, sources: [{{kind: images}}]}}"
    config = write_config(tmp_path / "a.yaml", data)
    run_ranks(tmp_path / "log", "pretrain", config, "--out", tmp_path / "images")
    readers = chips_read(tmp_path / "log")
    # Readers are ahead of the model by a few batches, which belong to the next epoch.
    keys = [ast.literal_eval(chip)[1][0] for chips in readers for chip in chips[:12]]
    assert sorted(keys) == list(range(48))

    write_raster("s/a.tif", shape=(3, 200, 220))
    write_raster("s/b.tif", shape=(3, 90, 90), crs="EPSG:32611")
    blocks = "superblocks: {size: 64, chips_per_visit: 4, shuffled_visits: 2, lanes: 2}"
    data = f"{{root: {tmp_path / 's'}, chip_size: 48, workers: 2, {blocks}}}"
    config = write_config(tmp_path / "b.yaml", data, "checkpoints: {every: 1}\n")
    words = ["pretrain", config, "--set", "steps=12", "--out"]
    run_ranks(tmp_path / "whole_log", *words, tmp_path / "whole")
    whole = chips_read(tmp_path / "whole_log")
    assert len({chip for chips in whole for chip in chips}) == sum(map(len, whole))
    (tmp_path / "first_log").mkdir()
    processes = start("command", str(tmp_path / "first_log"), *map(str, words), str(tmp_path / "parts"))
    while lines(tmp_path / "parts") < 4:
        assert processes[0].poll() is None
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.communicate()
    assert lines(tmp_path / "parts") < 12
    run_ranks(tmp_path / "second_log", *words, tmp_path / "parts", "--resume")
    second = {chip for chips in chips_read(tmp_path / "second_log") for chip in chips}
    assert not any(chips[0] in second for chips in whole)  # it did not begin anew
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ends = [read_tensors(tmp_path / run / "backbone.safetensors") for run in ("whole", "parts")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


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
