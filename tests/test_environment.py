"""The lists of dependencies agree with each other and with what the package imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dinov3geo

# Names that differ between PyPI and conda-forge.
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base", "netCDF4": "netcdf4"}
# Names that differ between PyPI and the import.
IMPORT_NAMES = {
    "faiss-cpu": "faiss",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "rio-tiler": "rio_tiler",
    "scikit-learn": "sklearn",
    "torchgeo-bench": "torchgeo_bench",
}
# Only in environment.yml.
CONDA_ONLY = {"python", "pip"}


@pytest.fixture(scope="module")
def project(project_root) -> dict:
    return tomllib.loads((project_root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def conda(project_root) -> dict[str, str]:
    """Version by conda-forge name."""
    listed = yaml.safe_load((project_root / "environment.yml").read_text())["dependencies"]
    return {name: version for name, _, version in (entry.partition(">=") for entry in listed)}


def requirements(project: dict, *, dev: bool = False, extras: bool = False) -> dict[str, str]:
    """Lower bound by PyPI name."""
    optional = project["optional-dependencies"]
    texts = project["dependencies"] + (optional["dev"] if dev else [])
    if extras:
        texts = [text for name, listed in optional.items() if name != "dev" for text in listed]
    found = {}
    for requirement in map(Requirement, texts):
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        assert len(bounds) == 1, f"{requirement}: one lower bound expected"
        found[requirement.name] = bounds[0]
    return found


def third_party_imports(root: Path) -> set[str]:
    found: set[str] = set()
    for path in (root / "dinov3geo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"dinov3geo"}


def test_conda_environment_holds_the_same_list(project, conda):
    expected = {CONDA_NAMES.get(n, n): v for n, v in requirements(project, dev=True).items()}
    assert {n: v for n, v in conda.items() if n not in CONDA_ONLY} == expected


def test_python_version_agrees_everywhere(project, conda, project_root):
    assert project["requires-python"] == f">={conda['python']}" == ">=3.12"
    assert (project_root / ".python-version").read_text().strip() == conda["python"]
    tools = tomllib.loads((project_root / "pyproject.toml").read_text())["tool"]
    assert tools["mypy"]["python_version"] == conda["python"]
    assert tools["ruff"]["target-version"] == "py" + conda["python"].replace(".", "")


def test_imports_are_declared_and_the_declared_are_imported(project, project_root):
    declared = {IMPORT_NAMES.get(n, n) for n in requirements(project)}
    extras = {IMPORT_NAMES.get(n, n) for n in requirements(project, extras=True)}
    # pydantic_core comes with pydantic, which pins it exactly.
    imports = third_party_imports(project_root) - {"pydantic_core"}
    assert declared <= imports <= declared | extras


def test_every_dependency_says_what_for(project_root):
    lines = (project_root / "pyproject.toml").read_text().splitlines()
    start = lines.index("dependencies = [") + 1
    entries = lines[start : lines.index("]", start)]
    assert entries and all(re.fullmatch(r'    "[^"]+",\s+# \S.*', line) for line in entries)


def test_version_and_changelog_agree(project_root):
    assert Version(dinov3geo.__version__)
    assert dinov3geo.__version__ in (project_root / "CHANGELOG.md").read_text()


def test_licence_is_the_whole_apache_text(project, project_root):
    text = (project_root / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert text.count("\n") == 202


def test_names_of_the_front_door_are_found_lazily():
    assert set(dinov3geo._HOMES) == set(dinov3geo.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dinov3geo.nonsense


@pytest.mark.parametrize("name", sorted(dinov3geo._HOMES))
def test_front_door(name):
    assert callable(getattr(dinov3geo, name))
