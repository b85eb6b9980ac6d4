"""The benchmark of the reader runs on small files, in pieces, and all contenders read the same pixels."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from dinov3geo.rasters.blocks import BLOCKS


@pytest.fixture
def benchmark(project_root, monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "reader_speed", project_root / "benchmarks" / "reader_speed.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIDE", 2560)
    monkeypatch.setattr(module, "CODECS", {"uint8": ("deflate", "jpeg"), "uint16": ("zstd",)})
    monkeypatch.setattr(module, "COUNT", dict.fromkeys(module.COUNT, 8))
    monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr(module, "CACHE_BYTES", 64 * 2**20)
    monkeypatch.setattr(BLOCKS, "limit_bytes", BLOCKS.limit_bytes)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    BLOCKS.clear()


def test_a_run_in_pieces(benchmark, write_raster, tmp_path, capsys):
    for number in range(2):
        write_raster(f"tiles/{number}.tif", shape=(5, 512, 512), seed=number)
    words = ["--tiles", f"{tmp_path}/tiles", "--work", f"{tmp_path}/files", "--out", f"{tmp_path}/out"]
    files = ["uint8_deflate_256", "uint16_zstd_512"]
    assert benchmark.main([*words, "--files", *files, "--sizes", "224", "--seconds", "0"]) == 0
    assert not (tmp_path / "out" / "cells.json").exists()
    assert sorted(p.stem for p in (tmp_path / "files").iterdir()) == sorted(files)
    assert benchmark.main([*words, "--files", files[0], "--sizes", "224", "--modes", "warm", "loader"]) == 0
    first = json.loads((tmp_path / "out" / "cells.json").read_text())["cells"]
    assert benchmark.main([*words, "--files", files[0], "--sizes", "224"]) == 0
    cells = json.loads((tmp_path / "out" / "cells.json").read_text())["cells"]
    assert cells[: len(first)] == first
    contenders = {"warm": 4, "cold": 4, "reprojected": 2, "loader": 3}
    assert len(cells) == sum(contenders.values())
    assert all(cell["chips_per_s"] > 0 and np.isfinite(cell["spread"]) for cell in cells)
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("| warm |") == 1 and "warm 224 px, ours / torchgeo: median" in capsys.readouterr().out


def test_all_contenders_read_the_same_pixels(benchmark, write_raster, tmp_path):
    write_raster("tiles/a.tif", shape=(4, 512, 512))
    (path,) = benchmark.make_files(tmp_path / "f", f"{tmp_path}/tiles", ["uint16_zstd_256"])
    queries = benchmark.torchgeo_queries(path, 96, 6, 0)
    theirs, ours = benchmark.TorchgeoDataset(path), benchmark.our_dataset(path)
    bare = benchmark.BareWindows(path)
    for query, window in zip(queries, benchmark._windows(queries, 96), strict=True):
        expected = theirs[query]["image"]
        assert torch.equal(ours[query]["image"].float(), expected)
        assert torch.equal(bare[window]["image"].float(), expected)
