"""Self-supervised learning and dense prediction on georeferenced rasters.

The names below are loaded when they are first used, so that `import dinov3geo` costs no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov3geo.backbones.inference import for_inference
    from dinov3geo.backbones.zoo import load_backbone
    from dinov3geo.heads.canopy import load_canopy_model
    from dinov3geo.heads.models import load_height_model
    from dinov3geo.predict.products import predict_canopy

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "for_inference",
    "load_backbone",
    "load_canopy_model",
    "load_height_model",
    "predict_canopy",
]

_HOMES = {
    "for_inference": "dinov3geo.backbones.inference",
    "load_backbone": "dinov3geo.backbones.zoo",
    "load_canopy_model": "dinov3geo.heads.canopy",
    "load_height_model": "dinov3geo.heads.models",
    "predict_canopy": "dinov3geo.predict.products",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
