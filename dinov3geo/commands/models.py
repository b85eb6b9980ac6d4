"""`dinov3geo models`: what can be named as a backbone, a model or a variant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dinov3geo.commands.console import print_table
from dinov3geo.errors import UnknownNameError


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|PATH",
            help="Show the card of one model: a name, weights of any dialect, or hub:owner/repository.",
            show_default=False,
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a hub: model first; nothing else ever does.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the weights that come with the package and the architectures, or show one model's card."""
    from dinov3geo.backbones.hub import is_hub_name

    cards = _bundled_cards()
    if name is not None:
        if name not in cards and not is_hub_name(name) and not Path(name).exists():
            raise UnknownNameError("model", name, [*cards, "a path", "hub:owner/repository"])
        card = cards[name] if name in cards else _foreign_card(name, download=download)
        print(json.dumps(card, indent=2))
        return
    variants = _variants()
    if as_json:
        print(json.dumps({"models": cards, "variants": variants}, indent=2))
        return
    rows = [[key, card["kind"], _scale(card), card["file_size"]] for key, card in cards.items()]
    print_table(["model", "kind", "trained at", "size"], rows)
    print("\nArchitectures for `model.variant` of a pretraining configuration:\n")
    shapes = [
        [key, str(shape["embed_dim"]), str(shape["num_blocks"]), f"{shape['parameters'] / 1e6:.1f} M"]
        for key, shape in variants.items()
    ]
    print_table(["variant", "width", "blocks", "parameters"], shapes)


def _bundled_cards() -> dict[str, dict[str, Any]]:
    """The card of every bundled model, with its kind and the size of its weights."""
    from dinov3geo.backbones.zoo import BUNDLED as BACKBONES
    from dinov3geo.evaluation.classifier import BUNDLED_MODELS as CLASSIFIERS
    from dinov3geo.heads.canopy import BUNDLED_MODELS as CANOPY
    from dinov3geo.heads.folders import CARD_FILE, HEAD_FILE, WEIGHTS
    from dinov3geo.heads.landcover import BUNDLED_MODELS as LANDCOVER

    places = [("backbone", name, path, path.with_suffix(".json")) for name, path in BACKBONES.items()]
    kinds = {"canopy height": CANOPY, "land cover": LANDCOVER, "scene class": CLASSIFIERS}
    places += [
        (kind, name, WEIGHTS / name / HEAD_FILE, WEIGHTS / name / CARD_FILE)
        for kind, names in kinds.items()
        for name in names
    ]
    return {name: _as_kind(kind, _read_card(weights, card)) for kind, name, weights, card in places}


def _foreign_card(name: str, *, download: bool) -> dict[str, Any]:
    """What weights from elsewhere are recognised as, once every tensor has found its place."""
    from dataclasses import asdict

    from dinov3geo.backbones.hub import is_hub_name, locate_repository
    from dinov3geo.backbones.zoo import inspect_weights
    from dinov3geo.heads.models import describe_height_model

    path = locate_repository(name, download=download) if is_hub_name(name) else Path(name)
    fitted = _fitted_card(path)
    if fitted is not None:
        return fitted
    heights = describe_height_model(path)
    if heights is not None:
        return {"kind": "canopy height", **heights}
    opened = inspect_weights(name)
    return {
        "kind": "backbone",
        "path": str(opened.path),
        "dialect": opened.dialect,
        "tensors": len(opened.tensors),
        "left_out": list(opened.dropped),
        **asdict(opened.card),
    }


def _fitted_card(folder: Path) -> dict[str, Any] | None:
    """The card of a fitted model of classes or objects, once its tensors fit; None for anything else."""
    from dinov3geo.evaluation.classifier import load_classifier
    from dinov3geo.heads.detection import load_detection_model
    from dinov3geo.heads.folders import card_product
    from dinov3geo.heads.landcover import load_landcover_model

    loaders: dict[str, Callable[[Path], Any]] = {
        "land_cover": load_landcover_model,
        "scene_class": load_classifier,
        "objects": load_detection_model,
    }
    product = card_product(folder)
    if product is None or product not in loaders:
        return None
    return _as_kind(product.replace("_", " "), loaders[product](folder).card)


def _as_kind(kind: str, card: dict[str, Any]) -> dict[str, Any]:
    """A card with the kind of its model; a classifier's own `kind` is that of its head."""
    return {**card, "kind": kind, **({"head_kind": card["kind"]} if "kind" in card else {})}


def _read_card(weights: Path, card: Path) -> dict[str, Any]:
    if not (weights.is_file() and card.is_file()):
        return {"file_size": "not installed"}
    fields: dict[str, Any] = json.loads(card.read_text(encoding="utf-8"))
    return {"file_size": f"{weights.stat().st_size / 1e6:.1f} MB", **fields}


def _scale(card: dict[str, Any]) -> str:
    """Ground sampling distances of the training, for the table."""
    if not card.get("gsd_m"):
        return "unknown"
    low, high = card["gsd_m"]
    return f"{low:g} m" if low == high else f"{low:g} to {high:g} m"


def _variants() -> dict[str, dict[str, int]]:
    """Width, depth and number of parameters of every architecture."""
    import torch

    from dinov3geo.backbones.zoo import VARIANTS, build_backbone

    shapes = {}
    for name in VARIANTS:
        with torch.device("meta"):  # counts without allocating
            backbone = build_backbone(name)
        shapes[name] = {
            "embed_dim": backbone.embed_dim,
            "num_blocks": backbone.num_blocks,
            "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        }
    return shapes
