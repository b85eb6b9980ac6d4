"""Batches that do not fit are run in parts."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from typer.testing import CliRunner

from dinov3geo.cli import app
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.predict.runners import InParts


def test_parts_get_smaller_until_they_fit() -> None:
    sizes = []

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("no room")
        return images[:, :1] * valid[:, None].astype(np.float32)

    runner = InParts(run)
    images, valid = np.random.default_rng(0).random((7, 3, 4, 4), dtype=np.float32), np.ones((7, 4, 4), bool)
    assert np.array_equal(runner(images, valid), images[:, :1])
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1] and runner.size == 1
    sizes.clear()
    assert np.array_equal(runner(images[:2], valid[:2]), images[:2, :1])
    assert sizes == [1, 1]


def test_one_tile_that_does_not_fit_is_told() -> None:
    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(DataError, match="smaller --tile"):
        InParts(run)(np.zeros((2, 3, 4, 4)), np.ones((2, 4, 4), bool))


def test_precision_of_the_verbs(osbs_scene: Path, tmp_path: Path) -> None:
    def heights(name: str, *words: str) -> np.ndarray:
        command = ["canopy", "predict", str(osbs_scene), "-o", str(tmp_path / name), "--no-preview", *words]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        with rasterio.open(tmp_path / name) as raster:
            return raster.read(1, masked=True)

    tiles = ("--tile", "128", "--overlap", "32")
    exact = heights("a.tif", *tiles)
    assert np.abs(heights("b.tif", *tiles, "--batch-size", "3") - exact).max() < 1e-4
    rough = heights("c.tif", *tiles, "--precision", "bfloat16")
    assert 0 < np.abs(rough - exact).mean() < 0.1
    with pytest.raises(ConfigError, match="float32"):
        heights("e.tif", "--precision", "float16")
    assert not (tmp_path / "e.tif").exists()


@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_maps(osbs_scene: Path, tmp_path: Path) -> None:
    maps = {}
    for name, words in {"eager": (), "compiled": ("--compile",)}.items():
        for verb in (["canopy", "predict"], ["features"]):
            file = tmp_path / f"{name}_{verb[0]}.tif"
            command = [*verb, str(osbs_scene), "-o", str(file), "--tile", "256", *words]
            assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
            with rasterio.open(file) as raster:
                maps[name, verb[0]] = raster.read()
    for verb in ("canopy", "features"):
        np.testing.assert_allclose(maps["compiled", verb], maps["eager", verb], atol=1e-3)
