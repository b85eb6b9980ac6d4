"""Later stages as changes of the settings of a run that is branched from.

Source: Siméoni et al. 2025 (DINOv3), sections on Gram anchoring and high-resolution adaptation, and the
published configurations: https://github.com/facebookresearch/dinov3 (values as facts).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from dinov3geo.errors import ConfigError
from dinov3geo.training import checkpoint as checkpoints
from dinov3geo.training.continuing import settings_of
from dinov3geo.training.settings import TrainSettings

Stage = Literal["gram", "highres"]
STAGES: tuple[Stage, ...] = ("gram", "highres")

FROM_START, FROM_TEACHER = "start", "teacher"
"""Words for an anchor: the EMA teacher of the checkpoint that is branched from; that of every moment."""

# Sizes relative to those of pretraining at 256 and 112 pixels, and how often each is drawn.
_HIGHRES_MIX = (
    (512 / 256, 112 / 112, 768 / 256, 0.3),
    (768 / 256, 112 / 112, 1152 / 256, 0.3),
    (768 / 256, 168 / 112, 1152 / 256, 0.3),
    (768 / 256, 224 / 112, 1152 / 256, 0.05),
    (768 / 256, 336 / 112, 1152 / 256, 0.05),
)
_REFRESHES = 3


def branch_settings(
    checkpoint: Path, stage: Stage | None, anchor: str | None, base: TrainSettings | None = None
) -> dict[str, Any]:
    """Settings of a run that goes on from a checkpoint, keeping its step count.

    Args:
        checkpoint: a checkpoint, or a run (then its latest).
        stage: what changes; None for a branch that only goes on.
        anchor: of the stage: weights, run or checkpoint, or one of the words above.
        base: the settings to change; those of the checkpoint if None.

    Returns:
        Values for `TrainSettings`, before the user's own.

    Raises:
        ConfigError: a stage without an anchor.
        DataError: no checkpoint.
    """
    found = checkpoints.locate_checkpoint(checkpoint)
    state = checkpoints.read_state(found)
    settings = base or settings_of(state, found)
    values = settings.model_dump(mode="json")
    values |= {"start_from": str(found), "keep_count": True}
    if stage is None:
        return values
    if anchor is None:
        raise ConfigError(
            f"stage {stage!r} holds patches to an anchor; name it with --anchor: a run, checkpoint, weights,"
            f" {FROM_START!r} (the teacher of --from as it is) or {FROM_TEACHER!r} (the EMA teacher)"
        )
    step = int(state["step"])
    values["name"] = f"{settings.name}-{stage}"
    values["losses"]["dino_local_weight"] = {"peak": 0.5}
    values["gram"] |= _anchor(anchor, found)
    values["schedules"]["momentum"] = {"peak": 0.999}
    values["optimizer"]["freeze_last_layer_steps"] = 0
    plateau = settings.schedules.lr.at(step, settings.steps)
    return (_gram if stage == "gram" else _highres)(settings, values, step, plateau)


def _anchor(anchor: str, start: Path) -> dict[str, Any]:
    if anchor == FROM_TEACHER:
        return {"anchor": None, "from_teacher": True, "refresh_every": None}
    path = start if anchor == FROM_START else Path(anchor)
    return {"anchor": str(path), "from_teacher": False}


def _gram(settings: TrainSettings, values: dict[str, Any], step: int, plateau: float) -> dict[str, Any]:
    """A tenth more steps; the anchor sees the crops twice as large; renewed three times."""
    steps = max(step // 10, 1)
    values["steps"] = step + steps
    values["gram"]["weight"] = {"peak": 2.0}
    if not values["gram"]["from_teacher"]:
        values["gram"] |= {
            "refresh_every": max(steps // _REFRESHES, 1),
            "first_refresh": step + max(steps // _REFRESHES, 1),
            "max_refreshes": _REFRESHES,
        }
        values["crops"]["gram_size"] = 2 * settings.crops.global_size
    values["schedules"]["lr"] = {"peak": 0.6 * plateau}
    return values


def _highres(settings: TrainSettings, values: dict[str, Any], step: int, plateau: float) -> dict[str, Any]:
    """A twelfth more steps at a quarter of the rate, in a mixture of larger crops."""
    steps = max(step // 12, 1)
    values["steps"] = step + steps
    values["gram"] |= {"weight": {"peak": 1.5}, "refresh_every": None}
    values["crops"]["gram_size"] = None
    patch = settings.model.patch_size
    anchored = not values["gram"]["from_teacher"]

    def fit(size: float) -> int:
        return max(round(size / patch), 1) * patch

    crops = settings.crops
    values["resolutions"] = [
        {
            "global_size": fit(crops.global_size * large),
            "local_size": fit(crops.local_size * small),
            "gram_size": fit(crops.global_size * gram) if anchored else None,
            "probability": share,
        }
        for large, small, gram, share in _HIGHRES_MIX
    ]
    values["schedules"]["lr"] = {
        "start": 0.0,
        "peak": 0.25 * plateau,
        "warmup_steps": steps // 3,
        "cosine_steps": 0,
        "begin": step,
    }
    values["schedules"]["teacher_temperature"] = {
        "peak": settings.schedules.teacher_temperature.at(step, settings.steps)
    }
    return values
