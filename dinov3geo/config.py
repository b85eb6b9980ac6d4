"""One YAML file, checked by one pydantic model, with errors that name the file and the line.

Plain values follow the core schema of YAML 1.2: `1e-3` is a number, `on` and `2024-01-01` are text.
Nothing but text, numbers, truth values, null, lists and mappings can come out of a file. Its key `base`
names another file, relative to its own folder, whose values hold wherever it sets none.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dinov3geo.errors import ConfigError, one_line
from dinov3geo.training.settings import DistillSettings, TrainSettings

type Key = tuple[str | int, ...]

_BASE_KEY = "base"
_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


@dataclass(frozen=True, slots=True)
class _Document:
    """Values of a file, and where each of them was written.

    Attributes:
        values: nested dicts and lists of plain values.
        origins: per key path the place to name in a message; the empty path stands for the whole.
    """

    values: dict[str, Any]
    origins: dict[Key, str] = field(default_factory=dict)

    def overlaid_by(self, other: _Document) -> _Document:
        """These values, replaced by the other's wherever it has any; mappings are merged."""
        return _Document(_merge(self.values, other.values), {**self.origins, **other.origins})


def load_model[Model: BaseModel](
    model_type: type[Model],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
) -> Model:
    """Reads and checks a configuration.

    Args:
        model_type: the pydantic model to fill; its models forbid extra keys.
        path: YAML file, or None for the defaults alone.
        overrides: `"a.b=value"` each, applied in order over the file. A value that begins with a
            bracket, brace or quote is read as YAML, anything else as one plain value.
        values: that hold where neither file nor overrides say anything.

    Raises:
        ConfigError: the file cannot be read or parsed, or a value does not fit. The message is one line
            with file and line (or the override), the dotted key, what was expected and what arrived.
    """
    document = _Document(dict(values or {}))
    if path is not None:
        document = document.overlaid_by(_read_document(Path(path), seen=()))
    for override in overrides:
        document = document.overlaid_by(_parse_override(override))
    try:
        return model_type.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(_describe_errors(error, model_type, document)) from error


def dump_model(model: BaseModel) -> str:
    """The whole configuration, defaults included, as YAML that `load_model` reads back."""
    values = model.model_dump(mode="json")
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes words that YAML 1.2 reads as numbers and YAML 1.1, which PyYAML writes, does not: `0E0`."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(_plain_value(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dotted_keys(model_type: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a model and of the models in it, e.g. `"optim.lr"`."""
    keys: list[str] = []
    for name, info in model_type.model_fields.items():
        keys.append(prefix + name)
        for inner in _models_in(info.annotation):
            keys.extend(dotted_keys(inner, f"{prefix}{name}."))
    return list(dict.fromkeys(keys))


def _read_document(path: Path, seen: tuple[Path, ...]) -> _Document:
    """Reads a file and what it is based on."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: {_BASE_KEY!r} leads back to this file; break the circle")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; expected a YAML file") from error
    origins: dict[Key, str] = {(): str(path)}
    values = _parse_yaml(text, str(path), origins)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got a {type(values).__name__}")
    base = values.pop(_BASE_KEY, None)
    document = _Document(values, origins)
    if base is None:
        return document
    place = origins[(_BASE_KEY,)]
    if not isinstance(base, str):
        raise ConfigError(f"{place}: {_BASE_KEY!r} must be the path of one file, got {base!r}")
    base_path = path.parent / base
    if not base_path.is_file():
        raise ConfigError(f"{place}: no such {_BASE_KEY} file: {base_path}")
    return _read_document(base_path, (*seen, path.resolve())).overlaid_by(document)


def _parse_override(override: str) -> _Document:
    """Reads `a.b=value`."""
    dotted, separator, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override}: expected key=value, for example optim.lr=1e-3")
    origin = f"--set {override}"
    key: Key = tuple(parts)
    origins: dict[Key, str] = {key: origin}
    text = text.strip()
    if text[:1] in ("[", "{", "'", '"'):
        found: dict[Key, str] = {}
        value = _parse_yaml(text, origin, found)
        origins.update({key + inner: origin for inner in found})
    else:
        value = _plain_value(text)
    for part in reversed(parts):
        value = {part: value}
    # Keys above the one that is set keep the origin that a file gave them.
    return _Document(value, origins)


def _parse_yaml(text: str, source: str, origins: dict[Key, str]) -> Any:  # noqa: ANN401 (what YAML holds)
    """Parses a document and notes the `source:line` of every value in `origins`."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = source if mark is None else f"{source}:{mark.line + 1}"
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {one_line(str(error))}") from error
    return None if node is None else _node_value(node, source, (), origins, frozenset())


def _node_value(
    node: yaml.Node, source: str, key: Key, origins: dict[Key, str], parents: frozenset[int]
) -> Any:  # noqa: ANN401 (what YAML holds)
    place = f"{source}:{node.start_mark.line + 1}"
    if key:
        origins.setdefault(key, place)
    if node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"{place}: YAML tag {node.tag!r} is not allowed; write a plain value")
    if id(node) in parents:
        raise ConfigError(f"{place}: the value of {_dotted(key)!r} contains itself")
    within = parents | {id(node)}
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else _plain_value(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [
            _node_value(item, source, (*key, index), origins, within) for index, item in enumerate(node.value)
        ]
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        place = f"{source}:{name_node.start_mark.line + 1}"
        name = name_node.value
        if not isinstance(name, str):
            raise ConfigError(f"{place}: a key must be one word, got a list or a mapping")
        if name in values:
            raise ConfigError(f"{place}: key {_dotted((*key, name))!r} is given twice")
        origins[(*key, name)] = place
        values[name] = _node_value(value_node, source, (*key, name), origins, within)
    return values


def _plain_value(text: str) -> str | int | float | bool | None:
    """What an unquoted YAML 1.2 scalar stands for."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text):
        return -math.inf if text.startswith("-") else math.inf
    if _NAN.fullmatch(text):
        return math.nan
    return text


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A deep merge in which `above` wins."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[name] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _describe_errors(error: ValidationError, model_type: type[BaseModel], document: _Document) -> str:
    """One line for the first error and the number of the others."""
    # A misspelt key often makes another one missing: the misspelling comes first.
    details = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    first = one_line(_describe_error(details[0], model_type, document))
    others = len(details) - 1
    return first if not others else f"{first} (and {others} more error{'s' if others > 1 else ''})"


def _describe_error(detail: ErrorDetails, model_type: type[BaseModel], document: _Document) -> str:
    key = _key_in_document(detail["loc"], document.values, absent=detail["type"] == "missing")
    origin = _origin(key, document)
    if detail["type"] == "extra_forbidden":
        return f"{origin}: unknown key {_dotted(key)!r}{_hint(key, model_type)}"
    if detail["type"] == "missing":
        return f"{origin}: key {_dotted(key)!r} is missing"
    if "error" in detail.get("ctx", {}):
        said = str(detail["ctx"]["error"])
        return f"{origin}: {_dotted(key)}: {said}" if key else f"{origin}: {said}"
    said = re.sub(r"^Input should be ", "must be ", detail["msg"])
    return f"{origin}: {_dotted(key)} {said}, got {_short(detail['input'])}"


def _hint(key: Key, model_type: type[BaseModel]) -> str:
    """The nearest valid key and the valid names beside an unknown one."""
    *parents, name = key
    prefix = "".join(f"{part}." for part in parents if isinstance(part, str))
    known = dotted_keys(model_type)
    siblings = [k.removeprefix(prefix) for k in known if k.startswith(prefix)]
    siblings = [k for k in siblings if "." not in k]
    near = difflib.get_close_matches(str(name), siblings, n=1, cutoff=0.5)
    if near:
        guess = prefix + near[0]
    else:
        # The right key in the wrong place.
        leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
        guess = next(
            (leaves[leaf] for leaf in difflib.get_close_matches(str(name), leaves, n=1, cutoff=0.7)), ""
        )
    question = f" (did you mean {guess!r}?)" if guess else ""
    return f"{question}; valid here: {', '.join(sorted(siblings)) or 'nothing'}"


def _key_in_document(loc: Key, values: object, *, absent: bool) -> Key:
    """The part of pydantic's location that the user wrote; names of union members fall away."""
    key: list[str | int] = []
    for index, part in enumerate(loc):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, Sequence) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif not (absent and index == len(loc) - 1):
            continue
        key.append(part)
    return tuple(key)


def _origin(key: Key, document: _Document) -> str:
    """The place of a key, or of the nearest one above it."""
    for length in range(len(key), -1, -1):
        if key[:length] in document.origins:
            return document.origins[key[:length]]
    return "configuration"


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The pydantic models inside an annotation such as `dict[str, Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class PretrainConfig(TrainSettings):
    """A file of `configs/pretrain`, `configs/gram` or `configs/highres`."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Reads the configuration of a pretraining run; see `load_model`."""
    return load_model(PretrainConfig, path, overrides)


class DistillConfig(DistillSettings):
    """A file of `configs/distill`."""
