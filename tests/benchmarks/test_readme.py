"""The tables of the README are those of benchmarks/results."""

import importlib.util
import json

import pytest

from dinov3geo.evaluation.results import Row, results_text


@pytest.fixture(scope="module")
def readme(project_root):
    spec = importlib.util.spec_from_file_location("readme", project_root / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path):
    rows = [
        Row("set", encoder, method, "accuracy", value, value - 0.1, value + 0.1)
        for encoder, method, value in (("a", "kNN", 0.5), ("a", "linear", 0.6), ("b", "kNN", 0.7))
    ]
    (tmp_path / "2026_set").mkdir()
    (tmp_path / "2026_set" / "results.json").write_text(results_text(rows, {}))
    return tmp_path


def test_a_mark_gets_its_table(readme, results):
    text = 'x\n<!-- results 2026_set methods="kNN" encoders="b; a" -->\nold\n<!-- /results -->\ny\n'
    new = readme.filled(text, results)
    assert new.startswith("x\n") and new.endswith("<!-- /results -->\ny\n") and "old" not in new
    assert new.index("| b | 0.700") < new.index("| a | 0.500") and "linear" not in new
    assert readme.filled(new, results) == new
    assert "linear" in readme.filled(text.replace(' methods="kNN"', ""), results)


def test_canopy_heights_get_their_table(readme, results):
    rows = [
        {"method": "trees", "site": site, "mae": mae, "rmse": 2, "bias": -0.5, "r2": 0.25, "block_r2": 0.1239}
        for site, mae in (("all", 1.234), ("X", 9.0))
    ]
    (results / "c.json").write_text(json.dumps({"rows": rows}))
    text = "<!-- canopy\nc.json | trees | our `trees`\n-->\n<!-- /canopy -->\n"
    marked = f"<!-- results 2026_set -->\n<!-- /results -->\n{text}"
    new = readme.filled(marked, results)
    assert "| our `trees` | 1.23 | 2.00 | -0.50 | 0.250 | 0.124 |\n<!-- /canopy -->" in new
    assert readme.filled(new, results) == new
    assert "1.23" in readme.filled(text, results)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.json | trees", "expected FILE | METHOD | NAME"),
        ("none.json | trees | x", "no readable report none.json"),
        ("2026_set/results.json | trees | x", "no readable report|no method 'trees'"),
    ],
)
def test_bad_rows_of_canopy_heights(readme, results, line, message):
    marks = "<!-- results 2026_set -->\n<!-- /results -->\n"
    with pytest.raises(ValueError, match=message):
        readme.filled(f"{marks}<!-- canopy\n{line}\n-->\n<!-- /canopy -->\n", results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marks", "no marks"),
        ("<!-- results none -->\n<!-- /results -->", "no readable table"),
        ('<!-- results 2026_set methods="knn" -->\n<!-- /results -->', "no method 'knn'"),
        ('<!-- results 2026_set method="kNN" -->\n<!-- /results -->', "unknown option 'method'"),
    ],
)
def test_bad_marks(readme, results, text, message):
    with pytest.raises(ValueError, match=message):
        readme.filled(text, results)


def test_the_readme_is_in_step(readme, project_root, capsys, tmp_path):
    assert readme.main(["--check", str(project_root / "README.md")]) == 0, "run python benchmarks/readme.py"
    (tmp_path / "x.md").write_text("no marks")
    assert readme.main([str(tmp_path / "x.md")]) == 2 and "no marks" in capsys.readouterr().err
