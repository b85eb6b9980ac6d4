"""What may change between the sittings of a run, and what was said in earlier ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dinov3geo.errors import ConfigError, DataError, one_line
from dinov3geo.training import checkpoint as checkpoints
from dinov3geo.training.settings import DistillSettings, RunSettings, TrainSettings

# Keys that may change between the sittings of one run. Device, threads, layout and number of processes change
# its bits, not its recipe.
FREE_ON_RESUME = (
    "log_every",
    "checkpoints",
    "export",
    "watch",
    "parallel",
    "data.workers",
    "data.root",
    "device",
    "threads",
)


def settings_of(state: dict[str, Any], source: Path) -> TrainSettings:
    """The settings of a pretraining run's checkpoint; see `read_settings`.

    Raises:
        DataError: they are not understood any more, or the checkpoint is of another kind of run.
    """
    return read_settings(TrainSettings, state, source)


def read_settings[Settings: RunSettings](
    kind: type[Settings], state: dict[str, Any], source: Path
) -> Settings:
    """The settings that a checkpoint was made with; keys that have come up since take their defaults.

    Args:
        kind: of run that is expected.
        state: of the checkpoint.
        source: the checkpoint, for messages.

    Raises:
        DataError: they are not understood any more, or the checkpoint is of another kind of run.
    """
    distilled = "students" in state["settings"]
    if distilled and not issubclass(kind, DistillSettings):
        names = [student["name"] for student in state["settings"]["students"]]
        raise DataError(
            f"{source} is of a distillation; give the weights of one student instead: "
            f"{source.parent.parent}/NAME with NAME one of {', '.join(names)}"
        )
    if not distilled and issubclass(kind, DistillSettings):
        raise DataError(f"{source} is of a pretraining run; expected the checkpoint of a distillation")
    try:
        return kind.model_validate(state["settings"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{source} was written with a setting that this version does not know: {key} "
            f"({one_line(first['msg'])}); "
            "use the version of the program that wrote it"
        ) from error


def check_same_run(state: dict[str, Any], settings: RunSettings, source: Path) -> None:
    """Refuses to go on with another recipe than a run was begun with.

    Raises:
        ConfigError: names what differs, and how to allow it.
    """
    kind = DistillSettings if isinstance(settings, DistillSettings) else TrainSettings
    old = read_settings(kind, state, source).model_dump(mode="json")
    changed = changed_keys(old, settings.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"--resume with other settings than the run in {source.parent.parent}: {'; '.join(changed)}. "
            "Use the run's own settings, or branch off: a new --out with --from "
            f"{source.parent.parent} (free to change on --resume: {', '.join(FREE_ON_RESUME)})"
        )


def check_out(out: Path, *, resume: bool) -> list[Path]:
    """The checkpoints that `out` already holds.

    Raises:
        ConfigError: there are some, and the run is not to go on from them.
    """
    existing = checkpoints.list_checkpoints(out)
    if existing and not resume:
        raise ConfigError(
            f"{out} already holds a run ({existing[-1].name}); go on with --resume or name another --out"
        )
    return existing


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that differ and matter, as `key: old -> new`."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    return [
        f"{key}: {flat_old.get(key)} -> {flat_new.get(key)}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
