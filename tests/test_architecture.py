"""The house rules of ARCHITECTURE.md and CONTRIBUTING.md, read from the source text."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dinov3geo"

# A room may import from itself and from rooms on a lower floor.
FLOORS = [
    {"errors", "allocator"},
    {"paths"},
    {"rasters", "backbones", "losses"},
    {"data", "features"},
    {"training", "heads", "curation"},
    {"predict", "evaluation"},
    {"config", "viewer"},
    {"cli", "commands", "benchmarks"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# cli.py is the door of the room commands/.
SAME_ROOM = {"commands": "cli"}
ONLY_THIRD_PARTY = {"backbones": {"torch", "safetensors", "huggingface_hub"}, "losses": {"torch"}}
LIGHT_MODULES = {"dinov3geo", "dinov3geo.cli", "dinov3geo.errors", "dinov3geo.paths", "dinov3geo.allocator"}
MAX_FILE_LINES = 500
MAX_BODY_LINES = 60
WRITER = PACKAGE / "rasters" / "geotiff.py"
# What other libraries' users write, in the benchmark against them.
PEERS = ROOT / "benchmarks" / "peers.py"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
MODULES = {module_name(path): path for path in FILES}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] != "dinov3geo":
        return parts[0]
    return parts[1] if len(parts) > 1 else "dinov3geo"


def imported_names(node: ast.AST) -> Iterator[str]:
    """Absolute names that an import statement brings in; `from a import b` may mean the module a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    """Everything imported anywhere in a file."""
    return {name for node in ast.walk(tree_of(path)) for name in imported_names(node)}


def imports_on_load(path: Path) -> set[str]:
    """What a file imports when it is imported itself."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree_of(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        found.update(imported_names(node))
        waiting.extend(ast.iter_child_nodes(node))
    return found


def loads(module: str) -> set[str]:
    """Third-party packages that importing a module of this package imports, through our own modules too."""
    seen: set[str] = set()
    waiting = [module]
    third_party: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in MODULES or name in seen:
            continue
        seen.add(name)
        names = imports_on_load(MODULES[name])
        third_party |= {n.split(".")[0] for n in names}
        waiting.extend(n for n in names if n.split(".")[0] == "dinov3geo")
        waiting.extend(name.rsplit(".", k)[0] for k in range(1, name.count(".") + 1))
    return third_party


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_every_room_has_a_floor():
    assert {room_of(name) for name in MODULES} - {"dinov3geo"} <= set(FLOOR_OF)


@each_file
def test_imports_run_downwards(path):
    room = room_of(module_name(path))
    if room == "dinov3geo":  # the front door may show what lies anywhere
        return
    ours = {name for name in imports_of(path) if name.startswith("dinov3geo.")}
    for name in ours:
        other = room_of(name)
        if other == "__version__":
            continue
        same = SAME_ROOM.get(room, room) == SAME_ROOM.get(other, other)
        assert same or FLOOR_OF[other] < FLOOR_OF[room], f"{path.name}: {room} must not import {name}"


@each_file
def test_imports_are_absolute(path):
    relative = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.ImportFrom) and n.level]
    assert not relative


@each_file
def test_file_size(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_FILE_LINES


@each_file
def test_function_size(path):
    long = {f.name: body_lines(f) for f in functions_of(path) if body_lines(f) >= MAX_BODY_LINES}
    assert not long


@each_file
def test_third_party_imports_of_low_rooms(path):
    allowed = ONLY_THIRD_PARTY.get(room_of(module_name(path)))
    if allowed is None:
        return
    roots = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names - {"dinov3geo"}
    assert roots <= allowed


def test_rasters_do_not_load_torch():
    for name in MODULES:
        if room_of(name) == "rasters":
            assert not {"torch", "torchgeo", "kornia"} & loads(name), name


def test_command_line_loads_nothing_heavy():
    heavy = {"torch", "torchgeo", "kornia", "rasterio", "numpy", "pydantic", "matplotlib", "sklearn"}
    for name in LIGHT_MODULES:
        assert not heavy & loads(name), name


def test_configuration_does_not_import_torch_itself():
    assert "torch" not in {name.split(".")[0] for name in imports_of(PACKAGE / "config.py")}


def is_write_open(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("rasterio.open", "rasterio.io.open"):
        return False
    modes = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
    return any(not (isinstance(mode, ast.Constant) and mode.value == "r") for mode in modes)


@each_file
def test_one_place_writes_georeferenced_files(path):
    if path in (WRITER, PEERS):
        return
    writers = {"rasterio.shutil", "rasterio.io.DatasetWriter", "rasterio.io.MemoryFile"}
    assert not writers & imports_of(path)
    assert "rasterio.shutil" not in path.read_text(encoding="utf-8")
    assert not [node.lineno for node in ast.walk(tree_of(path)) if is_write_open(node)]


@each_file
def test_no_catch_all(path):
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "BaseException" if node.type is None else ast.unparse(node.type)
        if not re.search(r"\b(Base)?Exception\b", caught):
            continue
        last = node.body[-1]
        passes_on = isinstance(last, ast.Raise) and last.exc is None
        assert passes_on or is_in_main(path, node), f"{path.name}:{node.lineno} catches everything"


def is_in_main(path: Path, node: ast.AST) -> bool:
    """Only the command line's main() may turn any exception into a message."""
    if path != PACKAGE / "cli.py":
        return False
    return any(inner is node for f in functions_of(path) if f.name == "main" for inner in ast.walk(f))


@each_file
def test_public_names_have_docstrings(path):
    assert ast.get_docstring(tree_of(path)), f"{path} has no docstring"

    def missing(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from missing(node.body)

    assert not list(missing(tree_of(path).body))


def settings_classes() -> dict[str, tuple[Path, ast.ClassDef]]:
    """Every pydantic model of the package by its class name."""
    classes = {
        node.name: (path, node)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
    }

    def is_model(name: str) -> bool:
        if name.split(".")[-1] == "BaseModel":
            return True
        return name in classes and any(is_model(ast.unparse(base)) for base in classes[name][1].bases)

    return {
        name: found
        for name, found in classes.items()
        if any(is_model(ast.unparse(b)) for b in found[1].bases)
    }


def fields_of(node: ast.ClassDef) -> list[str]:
    return [
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not ast.unparse(statement.annotation).startswith("ClassVar")
    ]


def spread_parameters() -> set[str]:
    """Parameters of what is called with `**settings.model_dump()`: Python checks that they fit."""
    nodes = [node for path in FILES for node in ast.walk(tree_of(path))]
    called = {
        ast.unparse(node.func).split(".")[-1]
        for node in nodes
        if isinstance(node, ast.Call)
        and any(k.arg is None and ast.unparse(k.value).endswith(".model_dump()") for k in node.keywords)
    }
    inside = [
        inner
        for node in nodes
        if isinstance(node, ast.ClassDef) and node.name in called
        for inner in node.body
    ]
    functions = [f for f in [*nodes, *inside] if isinstance(f, ast.FunctionDef)]
    taken = [f for f in functions if f.name in called or (f in inside and f.name == "__init__")]
    return {argument.arg for f in taken for argument in [*f.args.args, *f.args.kwonlyargs]}


def test_every_configuration_key_is_read():
    models = settings_classes()
    # A check of a value is no use of it.
    checks = {
        id(inner)
        for _, node in models.values()
        for method in ast.walk(node)
        if isinstance(method, ast.FunctionDef)
        and any("validator" in ast.unparse(d) for d in method.decorator_list)
        for inner in ast.walk(method)
    }
    read = {
        node.attr
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks
    }
    read |= spread_parameters()
    unread = {
        f"{name}.{key}" for name, (_, node) in models.items() for key in fields_of(node) if key not in read
    }
    assert not unread, f"configuration keys that nothing reads: {sorted(unread)}"


def test_settings_are_frozen_and_refuse_unknown_keys():
    models = settings_classes()

    def config_text(name: str) -> str:
        node = models[name][1]
        texts = [ast.unparse(s.value) for s in node.body if ast.unparse(s).startswith("model_config")]
        return " ".join(texts + [config_text(b) for b in map(ast.unparse, node.bases) if b in models])

    loose = [n for n in models if not all(w in config_text(n) for w in ("extra='forbid'", "frozen=True"))]
    assert not loose


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_tests_mirror_the_package(path):
    relative = path.relative_to(ROOT / "tests")
    if path.name == "conftest.py" or not relative.parent.parts:
        return
    room = relative.parts[0]
    assert room in FLOOR_OF and path.name.startswith("test_"), f"{relative} mirrors nothing in the package"
