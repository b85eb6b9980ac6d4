"""The study of the high-resolution stage: windows lie rightly, scores are known, it runs and goes on."""

import json

import numpy as np
import pytest
import torch

from benchmarks import high_resolution as study
from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig

CELLS = study.LARGEST // 16


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    network = VisionTransformer(VitConfig(24, 2, 2, "mlp", 48, layer_scale=0.5)).eval()
    numbers = (1 / 255,) * 3, (0.0,) * 3, (0.4,) * 3, (0.2,) * 3
    network.card = BackboneCard("vit-test", "vit_test", 16, Normalization(("red", "green", "blue"), *numbers))
    return network


def make_plot(seed, height=None):
    image = torch.rand(3, study.LARGEST, study.LARGEST, generator=torch.Generator().manual_seed(seed)) * 255
    height = torch.zeros(CELLS, CELLS) if height is None else height
    return study.Plot(image, height, torch.ones(CELLS, CELLS, dtype=torch.bool), f"plot{seed}")


def test_windows_lie_where_they_were_cut(backbone):
    plot = make_plot(0)
    found = study.plot_features(backbone, plot, 96, 1)
    window = plot.image[None, :, 96:192, 288:384]
    with torch.inference_mode():
        own = backbone(backbone.card.normalization(window)).patches[0].reshape(6, 6, -1).double()
    torch.testing.assert_close(found[6:12, 18:24], own, atol=1e-5, rtol=0)


def test_an_enlarged_window_is_averaged_over_the_same_cells(backbone):
    plot = make_plot(0)
    found = study.plot_features(backbone, plot, 192, 2)
    image = backbone.card.normalization(plot.image[None, :, :192, 192:])
    large = torch.nn.functional.interpolate(image, scale_factor=2, mode="bicubic", antialias=True)
    with torch.inference_mode():
        own = backbone(large).patches[0].reshape(12, 2, 12, 2, -1).mean((1, 3)).double()
    assert found.shape == (CELLS, CELLS, 24)
    torch.testing.assert_close(found[:12, 12:], own, atol=1e-5, rtol=0)


def test_heights_that_features_tell_are_told_and_others_are_not(backbone, monkeypatch):
    monkeypatch.setattr(study, "_RIDGE", 1e-9)
    weights = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plots = []
    for seed in range(5):
        features = study.plot_features(backbone, make_plot(seed), 384, 1)
        plots.append(make_plot(seed, (features @ weights + 7).float()))
    residual, spread = study.height_errors(backbone, plots, 384, 1)
    assert residual.sum() < 1e-3 * spread.sum()
    own = plots[2].height.double()
    assert spread[2] == pytest.approx(float((own - own.mean()).square().sum()), rel=1e-6)
    noise = [make_plot(seed, torch.randn(CELLS, CELLS)) for seed in range(5)]
    residual, spread = study.height_errors(backbone, noise, 384, 1)
    assert residual.sum() > 0.95 * spread.sum()


def test_cells_without_height_do_not_count(backbone):
    plots = [make_plot(seed, torch.randn(CELLS, CELLS)) for seed in range(5)]
    before = study.height_errors(backbone, plots, 384, 1)
    for plot in plots:
        plot.known[:, 3] = False
    expected = study.height_errors(backbone, plots, 384, 1)
    for plot in plots:
        plot.height[:, 3] = 1e6
    found = study.height_errors(backbone, plots, 384, 1)
    assert not np.allclose(before[0], expected[0])
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.slow
def test_the_study_runs_and_goes_on(data_root, tmp_path, capsys):
    words = ["--data", str(data_root), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    words += ["--steps", "1", "--set", "steps=1", "--set", "batch_size=4"]
    assert study.main(words) == 0
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert len(report["rows"]) == len(study.ARMS) * len(study.VIEWS)
    assert all(row["r2_low"] <= row["r2"] <= row["r2_high"] for row in report["rows"])
    assert all(row["gain"] == 0 for row in report["rows"] if row["arm"] == study.TRUNK)
    assert (tmp_path / "out/table.md").read_text().count("192 and 288 px, Gram") == 2
    assert (tmp_path / "out/heights.png").stat().st_size > 10_000
    capsys.readouterr()
    assert study.main(words) == 0
    assert "steps of" not in capsys.readouterr().out


def test_missing_data_is_one_line(tmp_path, capsys):
    words = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert study.main(words) == 2
    assert capsys.readouterr().err.startswith("error: no such") and not (tmp_path / "out").exists()
