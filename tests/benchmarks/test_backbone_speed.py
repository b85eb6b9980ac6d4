"""The speed benchmark runs and checks that everybody computes the same."""

import json
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")

from benchmarks.backbone_speed import LIBRARIES, Cell, main, ratios  # noqa: E402


@pytest.mark.parametrize("model", ["vit_tiny", "convnext_tiny"])
def test_a_small_cell(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    words = ["--models", model, "--sizes", "64", "--tokens", "16", "--repeats", "1", "--dtypes", "float32"]
    assert main([*words, "--device", "cpu", "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert [cell["library"] for cell in cells] == list(LIBRARIES)
    assert all(cell["difference"] < 1e-4 and cell["images_per_s"] > 0 for cell in cells)
    assert "geometric mean" in capsys.readouterr().out


def test_results_of_several_runs_become_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for size in ("32", "48"):
        files.append(tmp_path / f"{size}.json")
        words = ["--models", "vit_tiny", "--sizes", size, "--tokens", "4", "--repeats", "1"]
        assert main([*words, "--device", "cpu", "--dtypes", "float32", "--out", str(files[-1])]) == 0
    capsys.readouterr()
    assert main(["--merge", *map(str, files)]) == 0
    assert capsys.readouterr().out.count("| vit_tiny |") == 2 * len(LIBRARIES)


def test_we_are_compared_with_the_fastest_peer() -> None:
    cells = [
        Cell("m", 64, "float32", library, 1, speed, 0, 0, 0, 0)
        for library, speed in zip(LIBRARIES, (3.0, 2.0, 1.0), strict=True)
    ]
    assert ratios(cells) == [1.5]
