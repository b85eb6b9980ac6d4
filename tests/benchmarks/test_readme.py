"""The tables of the README are those of benchmarks/results."""

import importlib.util

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
