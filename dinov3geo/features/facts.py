"""What stored features are of: written beside them, so that a head can be fitted without their backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.hub import is_hub_name
from dinov3geo.backbones.zoo import BUNDLED
from dinov3geo.errors import ConfigError
from dinov3geo.features.extract import pixels_per_patch, weights_digest

TAG = "DINOV3GEO_FEATURES"
"""Name of the tag, attribute or metadata of a file of features."""


@dataclass(frozen=True, slots=True)
class FeatureFacts:
    """What stored features are of.

    Attributes:
        backbone: name in its card.
        source: bundled name, name on the hub or absolute path of its weights; "" if unknown.
        weights: `weights_digest` of the backbone.
        licence: of the weights.
        normalization: how the scene's numbers were scaled for the backbone.
        block: 0-based number of the block.
        image_scale: see `extract_feature_maps`.
        stride: scene pixels per patch.
        scene_hw: rows and columns of the scene in pixels; the last patches may reach beyond.
        components: number of principal components that were kept, or None for the features themselves.
    """

    backbone: str
    source: str
    weights: str
    licence: str
    normalization: Normalization
    block: int
    image_scale: float
    stride: int
    scene_hw: tuple[int, int]
    components: int | None = None

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        *,
        source: str | Path | None,
        image_scale: float,
        scene_hw: tuple[int, int],
        components: int | None = None,
    ) -> FeatureFacts:
        """Facts of the last block's features.

        Args:
            backbone: with a card.
            source: name or path that it was loaded from, or None if unknown.
            image_scale: see `extract_feature_maps`.
            scene_hw: rows and columns of the scene in pixels.
            components: number of principal components, or None.
        """
        assert backbone.card is not None
        return cls(
            backbone=backbone.card.name,
            source=_lasting(source),
            weights=weights_digest(backbone),
            licence=backbone.card.licence,
            normalization=backbone.card.normalization,
            block=backbone.num_blocks - 1,
            image_scale=image_scale,
            stride=pixels_per_patch(backbone.patch_size, image_scale),
            scene_hw=scene_hw,
            components=components,
        )

    @property
    def tags(self) -> dict[str, str]:
        """As a tag of a file."""
        return {TAG: json.dumps(asdict(self))}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str], *, source: Path) -> FeatureFacts:
        """Reads the tag of a file.

        Args:
            tags: of the file, by name.
            source: the file, for messages.

        Raises:
            ConfigError: no such tag, or one that cannot be understood.
        """
        if TAG not in tags:
            raise ConfigError(
                f"{source} does not say which backbone its features are of; expected a file that "
                "`dinov3geo features` wrote in this version: compute them again"
            )
        try:
            fields = json.loads(tags[TAG])
            numbers = {name: tuple(values) for name, values in fields.pop("normalization").items()}
            height, width = fields.pop("scene_hw")
            return cls(**fields, normalization=Normalization(**numbers), scene_hw=(int(height), int(width)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{source} has a tag {TAG} that cannot be understood: {error}") from error


def _lasting(source: str | Path | None) -> str:
    """The name or path of weights in a form that holds in another folder, too."""
    if source is None or str(source) in BUNDLED or is_hub_name(source):
        return str(source or "")
    return str(Path(source).resolve())
