"""The script that compares the recipe's arithmetic with hand-written references finds no difference."""

from benchmarks import recipe_numbers


def test_all_numbers_agree(tmp_path, capsys):
    assert recipe_numbers.main(["--json", str(tmp_path / "numbers.json")]) == 0
    assert "ABOVE" not in capsys.readouterr().out
