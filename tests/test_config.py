import math
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dinov3geo.config import dotted_keys, dump_model, load_config, load_model
from dinov3geo.errors import ConfigError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optim(Strict):
    lr: float = Field(default=1e-3, gt=0)
    steps: int = Field(default=10, ge=1)
    name: Literal["adamw", "sgd"] = "adamw"


class Gram(Strict):
    weight: float = 2.0
    checkpoint: Path


class Crops(Strict):
    sizes: tuple[int, ...] = (96, 48)
    mirror: bool = True


class Model(Strict):
    seed: int = 0
    root: str
    optim: Optim = Optim()
    gram: Gram | None = None
    views: dict[str, Crops] = {}
    first: int = 0
    last: int = 1

    @model_validator(mode="after")
    def in_order(self):
        if self.last < self.first:
            raise ValueError(f"last ({self.last}) comes before first ({self.first})")
        return self


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(Model, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_of_the_file_and_defaults(tmp_path):
    path = write(tmp_path, "root: scenes\noptim:\n  lr: 1e-4\nviews:\n  global:\n    sizes: [64, 32]\n")
    config = load_model(Model, path)
    assert config == Model(root="scenes", optim=Optim(lr=1e-4), views={"global": Crops(sizes=(64, 32))})


def test_overrides_win_and_reach_into_absent_mappings(tmp_path):
    path = write(tmp_path, "root: scenes\noptim: {lr: 0.5, steps: 3}\ngram: null\n")
    overrides = ["optim.lr=2e-2", "gram.checkpoint=a/b=c.pt", "views.local.sizes=[8, 4]", "root='7'"]
    config = load_model(Model, path, overrides)
    assert config.optim == Optim(lr=0.02, steps=3)
    assert config.gram == Gram(checkpoint=Path("a/b=c.pt"))
    assert config.views["local"].sizes == (8, 4)
    assert config.root == "7"
    assert load_model(Model, path, [*overrides, "gram=null"]).gram is None


def test_glob_in_override_is_text(tmp_path):
    assert load_model(Model, write(tmp_path, ""), ["root=*.tif"]).root == "*.tif"


def test_unknown_key_names_nearest_file_and_line(tmp_path):
    path = write(tmp_path, "root: a\n\noptim:\n  steps: 3\n  lrate: 2\n")
    assert error_of(path) == (
        f"{path}:5: unknown key 'optim.lrate' (did you mean 'optim.lr'?); valid here: lr, name, steps"
    )


def test_unknown_key_is_found_at_its_right_place(tmp_path):
    path = write(tmp_path, "root: a\ncheckpoint: x.pt\n")
    assert f"{path}:2: unknown key 'checkpoint' (did you mean 'gram.checkpoint'?)" in error_of(path)


def test_unknown_key_below_dict_and_union(tmp_path):
    path = write(tmp_path, "root: a\nviews:\n  small:\n    size: [3]\n")
    assert f"{path}:4: unknown key 'views.small.size'" in error_of(path)
    path = write(tmp_path, "root: a\ngram:\n  checkpoint: x\n  wait: 3\n")
    assert f"{path}:4: unknown key 'gram.wait' (did you mean 'gram.weight'?)" in error_of(path)


def test_unknown_key_of_override_names_the_override(tmp_path):
    path = write(tmp_path, "root: a\n")
    message = error_of(path, "optim.lrate=3")
    assert message.startswith("--set optim.lrate=3: unknown key 'optim.lrate' (did you mean 'optim.lr'?)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("root: a\noptim:\n  lr: -1\n", ":3: optim.lr must be greater than 0, got -1"),
        ("root: a\noptim:\n  lr: fast\n", ":3: optim.lr must be a valid number"),
        ("root: a\noptim:\n  steps: 1.5\n", ":3: optim.steps must be a valid integer"),
        ("root: a\noptim:\n  name: adam\n", ":3: optim.name must be 'adamw' or 'sgd', got 'adam'"),
        ("root: a\noptim: 3\n", ":2: optim must be a valid dictionary or instance of Optim, got 3"),
        (
            "root: a\nviews:\n  g:\n    sizes:\n      - 3\n      - x\n",
            ":6: views.g.sizes.1 must be a valid int",
        ),
        ("seed: 3\n", ": key 'root' is missing"),
        ("root: a\ngram:\n  weight: 1\n", ":2: key 'gram.checkpoint' is missing"),
        ("root: a\nfirst: 9\n", ": last (1) comes before first (9)"),
        ("root: a\nroot: b\n", ":2: key 'root' is given twice"),
        ("root: a\noptim:\n  lr: 1\n  lr: 2\n", ":4: key 'optim.lr' is given twice"),
        ("root: [a\nseed: 1\n", ": not valid YAML: "),
        ("- a\n", ": expected 'key: value' lines, got a list"),
        ("root: !!python/name:os.system\n", ":1: YAML tag 'tag:yaml.org,2002:python/name:os.system' is not"),
        ("root: &x [*x]\n", ":1: the value of 'root.0' contains itself"),
        ("? [a, b]\n: 3\n", ":1: a key must be one word"),
    ],
)
def test_bad_values(tmp_path, text, expected):
    path = write(tmp_path, text)
    assert expected in error_of(path)
    assert error_of(path).startswith(str(path))


def test_other_errors_are_counted(tmp_path):
    path = write(tmp_path, "root: a\noptim: {lr: -1, steps: 0}\nsede: 1\n")
    message = error_of(path)
    assert "unknown key 'sede' (did you mean 'seed'?)" in message
    assert message.endswith("(and 2 more errors)")


def test_long_values_are_cut(tmp_path):
    path = write(tmp_path, f"root: a\nseed: {'x' * 500}\n")
    assert len(error_of(path)) < 300 + len(str(path))


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=3", ""])
def test_malformed_override(tmp_path, override):
    assert "expected key=value" in error_of(write(tmp_path, "root: a\n"), override)


def test_unreadable_files(tmp_path):
    assert "cannot read configuration" in error_of(tmp_path / "absent.yaml")
    assert "cannot read configuration" in error_of(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(binary)


def test_base_is_merged_below_and_keeps_its_lines(tmp_path):
    base = write(tmp_path, "root: a\noptim:\n  lr: 0.1\n  steps: 5\n", "base.yaml")
    path = write(tmp_path, "base: ../base.yaml\noptim:\n  steps: 7\n", "sub/x.yaml")
    config = load_model(Model, path)
    assert config.optim == Optim(lr=0.1, steps=7)
    write(tmp_path, "root: a\noptim:\n  lr: -1\n", "base.yaml")
    assert f"{path.parent / '../base.yaml'}:3: optim.lr must be" in error_of(path)
    assert "--set optim.lr=-2: optim.lr must be" in error_of(path, "optim.lr=-2")
    base.unlink()
    assert f"{path}:1: no such base file" in error_of(path)


def test_base_circle(tmp_path):
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "leads back to this file" in error_of(tmp_path / "a.yaml")


def test_base_must_be_a_path(tmp_path):
    assert ":1: 'base' must be the path of one file, got 3" in error_of(write(tmp_path, "base: 3\n"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("010", 10),
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("~", None),
        ('"3"', "3"),
        ("1_000", "1_000"),
    ],
)
def test_plain_values_follow_yaml_1_2(tmp_path, text, value):
    class Loose(Strict):
        model_config = ConfigDict(extra="forbid", strict=True)
        value: str | int | float | bool | None

    loaded = load_model(Loose, write(tmp_path, f"value: {text}\n")).value
    assert loaded == value and type(loaded) is type(value)
    loaded = load_model(Loose, write(tmp_path, ""), [f"value={text}"]).value
    assert loaded == value and type(loaded) is type(value)


@given(
    root=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    lr=st.floats(min_value=1e-12, max_value=1e12),
    sizes=st.lists(st.integers(0, 10**9), max_size=4),
    mirror=st.booleans(),
)
@example(root="0E0", lr=1.0, sizes=[], mirror=False)
def test_dump_is_read_back(tmp_path_factory, root, lr, sizes, mirror):
    views = {"local": Crops(sizes=tuple(sizes), mirror=mirror)}
    config = Model(root=root, optim=Optim(lr=lr), views=views)
    path = write(tmp_path_factory.mktemp("dump"), dump_model(config))
    assert load_model(Model, path) == config
    assert yaml.safe_load(path.read_text())["views"]["local"]["mirror"] is mirror


def test_defaults_without_a_file():
    assert load_model(Optim, None, ["steps=3"]) == Optim(steps=3)
    with pytest.raises(ConfigError, match="configuration: key 'root' is missing"):
        load_model(Model, None)


ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(p for room in ("pretrain", "gram", "highres") for p in ROOT.glob(f"configs/{room}/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_configurations(path, tmp_path):
    config = load_config(path)
    assert load_config(write(tmp_path, dump_model(config))) == config


def test_there_are_shipped_configurations():
    assert len(SHIPPED) >= 2


def test_dotted_keys():
    keys = dotted_keys(Model)
    assert {"seed", "optim", "optim.lr", "gram.checkpoint", "views.sizes"} <= set(keys)
    assert len(keys) == len(set(keys))
