"""Runs that are killed, disks that are full, workers that die: in processes of their own."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio

from dinov3geo.commands.console import run_all
from dinov3geo.heads.canopy import CanopyModel
from dinov3geo.predict.products import predict_canopy, predict_features

WriteRaster = Callable[..., Path]

# The model of tests/predict/conftest.py, slowed down so that a kill finds the run at work.
SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.errors import UserError
from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.canopy import CanopyModel
from dinov3geo.heads.dpt import DPTHead
from dinov3geo.predict.products import predict_canopy, predict_features

torch.manual_seed(0)
backbone = VisionTransformer(VitConfig(24, 2, 2, "mlp", 48, layer_scale=0.5)).eval().requires_grad_(False)
bands = Normalization(("red", "green", "blue"), (1 / 255,) * 3, (0.0,) * 3, (0.5,) * 3, (0.2,) * 3)
backbone.card = BackboneCard("vit-test", "vit_tiny", 16, bands)
output = OutputSpec("canopy_height", unit="m", minimum=0.0, maximum=60.0)
head = DPTHead([24, 24], output=output, channels=8).eval().requires_grad_(False)
model = CanopyModel(backbone, head, (0, 1), 1.0, 1, {"name": "test"})
scene, target, engine, pause, gsd = sys.argv[1:6]
try:
    predict_canopy(
        scene, target, model=model, tile=128, overlap=32, engine=engine, command="c", gsd=float(gsd),
        progress=lambda done, total: time.sleep(float(pause)),
    )
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def start(
    scene: Path, target: Path, *, engine: str = "local", pause: float = 0.0, gsd: float = 0.1
) -> subprocess.Popen:
    words = [sys.executable, "-c", SCRIPT, str(scene), str(target), engine, str(pause), str(gsd)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, error = process.communicate(timeout=300)
    return process.returncode, error


@pytest.fixture
def scene(write_raster: WriteRaster) -> Path:
    array = np.random.default_rng(0).integers(1, 255, (3, 5200, 300), dtype=np.uint8)
    array[:, 1000:1400] = 0
    return write_raster(array=array, nodata=0)


@pytest.mark.slow
def test_killed_ten_times_at_random_it_ends_in_the_same_bytes(scene: Path, tmp_path: Path) -> None:
    assert finish(start(scene, tmp_path / "whole.tif"))[0] == 0
    target, folder = tmp_path / "out.tif", tmp_path / ".out.tif.unfinished"
    rng, kills, strips = random.Random(0), 0, []
    while kills < 10:
        process = start(scene, target, pause=0.1)
        # Imports take most of a short run; the clock starts when the run is at work.
        while not folder.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.2, 3.0) if kills else 3.0)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        finish(process)
        kills += 1
        assert not target.exists()
        strips.append(len(list(folder.glob("strip*.tif"))))
    assert strips == sorted(strips)
    assert finish(start(scene, target))[0] == 0
    assert target.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tif", "scene.tif", "whole.tif"]


@pytest.mark.slow
def test_killed_at_another_pixel_size_it_ends_in_the_same_bytes(scene: Path, tmp_path: Path) -> None:
    assert finish(start(scene, tmp_path / "whole.tif", gsd=0.07))[0] == 0
    target, folder = tmp_path / "out.tif", tmp_path / ".out.tif.unfinished"
    process = start(scene, target, pause=0.1, gsd=0.07)
    while not list(folder.glob("strip*.tif")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL and not target.exists()
    code, error = finish(start(scene, target, gsd=0.08))
    assert code == 2 and "unfinished work of another command" in error
    assert finish(start(scene, target, gsd=0.07))[0] == 0
    assert target.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    with rasterio.open(target) as dataset:
        assert dataset.shape == (7429, 429) and dataset.res == pytest.approx((0.07, 0.07))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    scene: Path, tmp_path: Path, small_disk: Path
) -> None:
    assert finish(start(scene, tmp_path / "whole.tif"))[0] == 0
    size = (tmp_path / "whole.tif").stat().st_size
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 500_000)
    assert size > shutil.disk_usage(small_disk).free
    code, error = finish(start(scene, small_disk / "out.tif"))
    assert code == 2 and error.count("\n") == 1
    assert "out.tif" in error and "run the same command again" in error
    assert not (small_disk / "out.tif").exists()
    ballast.unlink()
    megabytes = size * 3 // 2**20 + 1
    subprocess.run(["mount", "-o", f"remount,size={megabytes}m", str(small_disk)], check=True)
    assert finish(start(scene, small_disk / "out.tif"))[0] == 0
    assert (small_disk / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def busy_workers() -> list[int]:
    """Processes of this test's own cluster that compute rows: grandchildren, known by their title."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if title.startswith(b"ray::_compute") and parent(parent(int(entry.name))) == os.getpid():
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cluster_whose_worker_is_killed_gives_the_bytes_of_one_process(scene: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    assert finish(start(scene, tmp_path / "whole.tif"))[0] == 0
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        process = start(scene, tmp_path / "out.tif", engine="ray")
        killed = False
        while process.poll() is None and not killed:
            time.sleep(0.05)
            for worker in busy_workers():
                os.kill(worker, signal.SIGKILL)
                killed = True
                break
        code, error = finish(process)
        assert (code, killed) == (0, True), error
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.shape == (5200, 300)


@pytest.mark.slow
def test_scenes_that_share_a_cluster_give_the_bytes_of_one_process(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    scenes = [write_raster(f"{k}.tif", shape=(3, 700, 200), seed=k) for k in range(3)]

    def predict(number: int, engine: str) -> bytes:
        target, gsd = tmp_path / engine / f"{number}.tif", (None, 0.14, "model")[number]
        predict_canopy(scenes[number], target, model=model, gsd=gsd, tile=128, overlap=32, engine=engine)
        return target.read_bytes()

    whole = [predict(number, "local") for number in range(3)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        names = [scene.name for scene in scenes]
        shared = run_all(lambda number, tell: predict(number, "ray"), [1, 1, 1], names, at_once=3)
    finally:
        ray.shutdown()
    assert shared == whole


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".tif", ".parquet", ".zarr"])
def test_features_of_a_cluster_are_those_of_one_process(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path, suffix: str
) -> None:
    ray = pytest.importorskip("ray")
    scene = write_raster("scene.tif", shape=(3, 700, 200))

    def predict(engine: str) -> list[bytes]:
        target = tmp_path / f"{engine}{suffix}"
        predict_features(scene, target, backbone=model.backbone, tile=128, overlap=32, engine=engine)
        files = (
            [path for path in sorted(target.rglob("*")) if path.is_file()] if target.is_dir() else [target]
        )
        return [path.read_bytes() for path in files]

    whole = predict("local")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert predict("ray") == whole
    finally:
        ray.shutdown()
