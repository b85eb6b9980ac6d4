"""The benchmark of cached features runs, and its assertion that the cache changes no bit holds."""

import importlib.util
import json

import numpy as np
import pytest

CLASSES = "classes:\n  - {name: dark, values: 1}\n  - {name: bright, values: 2}\n"


@pytest.fixture
def benchmark(project_root):
    spec = importlib.util.spec_from_file_location("cached_fit", project_root / "benchmarks" / "cached_fit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_fits_give_one_head(benchmark, write_raster, tmp_path, capsys):
    image = write_raster("rgb/a.tif", shape=(3, 32, 32), pixel_size=1.0)
    mask = np.where(np.arange(32) < 16, 1, 2)[None].repeat(32, 0).astype(np.uint8)
    target = write_raster("mask/a.tif", array=mask, pixel_size=1.0)
    (tmp_path / "classes.yaml").write_text(CLASSES)
    words = ["--images", str(image), "--masks", str(target), "--classes", f"{tmp_path}/classes.yaml"]
    words += ["--backbone", "vit-tiny-aerial", "--epochs", "1", "--image-scale", "1", "--threads", "1"]
    assert benchmark.main([*words, "--out", f"{tmp_path}/out/r.json"]) == 0
    (row,) = json.loads((tmp_path / "out" / "r.json").read_text())["rows"]
    assert row["windows"] == 1 and row["first_s"] > 0 and "vit-tiny-aerial" in capsys.readouterr().out
