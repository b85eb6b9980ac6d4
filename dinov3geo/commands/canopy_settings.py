"""What `dinov3geo canopy` is told: settings, variants, the cache; and what a fit would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dinov3geo.commands.console import print_pairs

if TYPE_CHECKING:
    from dinov3geo.heads.canopy import CanopySettings


def read_settings(
    config: Path | None,
    changes: Sequence[str] | None,
    *,
    epochs: int | None,
    seed: int | None,
    required: Mapping[str, float] | None = None,
) -> CanopySettings:
    """The settings of a fit.

    Args:
        config: YAML file of `configs/heads`, or None for the defaults.
        changes: `"key=value"` each; they win over the other arguments.
        epochs: passes over the data, or None for the file's.
        seed: of everything random, or None for the file's.
        required: settings that hold where neither file nor changes say anything.

    Raises:
        ConfigError: an unknown key or a value that does not fit.
    """
    from dinov3geo.config import load_model as load_settings
    from dinov3geo.heads.canopy import CanopySettings

    given = {"fit.seed": seed, "fit.epochs": epochs}
    shortcuts = [f"{key}={value}" for key, value in given.items() if value is not None]
    return load_settings(CanopySettings, config, [*shortcuts, *(changes or [])], values=required)


def read_variants(path: Path) -> dict[str, CanopySettings]:
    """Settings by name from a YAML file.

    Raises:
        ConfigError: the file cannot be read, or a key or value does not fit.
    """
    from dinov3geo.config import load_model as load_settings
    from dinov3geo.evaluation.canopy import CanopyVariants

    return load_settings(CanopyVariants, path).variants


def print_plan(
    images: list[str] | None,
    heights: list[str],
    settings: CanopySettings,
    backbone: str | None,
    features: list[str] | None,
) -> None:
    """What a fit on images, or else on stored features, would do, on stdout.

    Raises:
        UserError: data or backbone cannot be used.
    """
    from dinov3geo.backbones.zoo import locate_weights
    from dinov3geo.config import dump_model
    from dinov3geo.data.pairs import match_pairs
    from dinov3geo.heads.canopy import CANOPY_BACKBONE
    from dinov3geo.heads.stored import check_stored, match_stored, open_scenes, shared_facts

    if images:
        weights = str(locate_weights(backbone or CANOPY_BACKBONE))
        match = match_pairs(images, heights, max_size=settings.max_window)
    else:
        scenes = open_scenes(features or [])
        facts = shared_facts(scenes)
        check_stored(settings, facts)
        weights = f"{facts.source or facts.backbone}, not loaded"
        match = match_stored(scenes, heights, settings)
    print(dump_model(settings))
    print_pairs(
        [
            ("backbone", weights),
            ("pairs", str(len(match.pairs))),
            ("plots", str(len({pair.group for pair in match.pairs}))),
            ("images without heights", str(len(match.unmatched_images))),
            ("heights without image", str(len(match.unmatched_targets))),
        ]
    )
