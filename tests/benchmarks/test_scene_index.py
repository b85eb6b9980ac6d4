"""The benchmark of the index and of memory runs, on few files."""

import importlib.util
import json

import pytest
import torch


@pytest.fixture
def benchmark(project_root, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("scene_index", project_root / "benchmarks/scene_index.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "QUERIES", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_index_and_memory(benchmark, tmp_path):
    words = ["--work", f"{tmp_path}/work", "-o", f"{tmp_path}/out"]
    assert benchmark.main(["index", *words, "--files", "250"]) == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    # Files of 16 m every 20 m: places of 12 m meet 28 / 20 of them each way.
    assert index["files"] == 250 and index["inventory_mb"] > 0
    assert index["scenes_per_query"] == pytest.approx(1.4**2, abs=0.3)
    assert benchmark.main(["memory", *words, "--files", "5", "--reads", "40"]) == 0
    memory = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert memory["reads"] == 40 and memory["under_bound"] and len(memory["growth_mib"]) == 2
