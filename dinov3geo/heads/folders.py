"""The folder of a fitted model: head, card, and the backbone unless it is a bundled one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.hub import is_hub_name
from dinov3geo.backbones.zoo import (
    BUNDLED,
    RUN_EXPORT,
    load_backbone,
    read_tensors,
    save_backbone,
    write_tensors,
)
from dinov3geo.errors import ConfigError, DataError, RasterError, UnknownNameError, one_line
from dinov3geo.features.extract import weights_digest
from dinov3geo.features.facts import FeatureFacts
from dinov3geo.heads.base import OutputSpec
from dinov3geo.paths import folder_obstacle

CARD_FORMAT = "dinov3geo-head/1"
SOURCE = "source"
"""Key of a card: where the backbone lies that is neither bundled nor in the folder."""
HEAD_FILE, CARD_FILE = "head.safetensors", "card.json"
WEIGHTS = Path(__file__).parent / "weights"
"""Models that come with the package, a folder each."""
_PRODUCTS = {
    "canopy": "canopy_height",
    "land-cover": "land_cover",
    "detection": "objects",
    "classification": "scene_class",
}


def save_model(
    folder: Path,
    backbone: Backbone | None,
    head: nn.Module,
    card: Mapping[str, Any],
    *,
    what: str,
    overwrite: bool = False,
    pictures: Mapping[str, bytes] | None = None,
) -> None:
    """Writes head.safetensors, card.json and, unless the backbone is a bundled one, the backbone.

    The folder appears under its name only when whole.

    Args:
        folder: to make.
        backbone: frozen, or None to leave it where the card says.
        head: fitted.
        card: from `model_card` or `head_card`.
        what: kind of model, for messages.
        overwrite: replace an existing folder.
        pictures: further files by name.

    Raises:
        RasterError: the folder exists and may not be replaced, or cannot be written.
    """
    check_free(folder, what=what, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise RasterError(f"cannot write into {folder.parent} ({error.strerror})") from error
    try:
        tensors = {n: t.detach().cpu().contiguous() for n, t in head.state_dict().items()}
        write_tensors(staging / HEAD_FILE, tensors)
        (staging / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        for name, content in (pictures or {}).items():
            (staging / name).write_bytes(content)
        if backbone is not None and card["backbone"]["bundled"] is None:
            assert backbone.card is not None
            save_backbone(staging / RUN_EXPORT, backbone, backbone.card)
        staging.chmod(0o755)
        if folder.exists():
            retired = staging.with_name(staging.name + ".old")
            os.replace(folder, retired)
            os.replace(staging, folder)
            shutil.rmtree(retired)
        else:
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_free(folder: Path, *, what: str, overwrite: bool) -> None:
    """Says before hours of work what would stop the writing after them, without leaving a trace.

    Raises:
        RasterError: the folder exists, is no model, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise RasterError(f"{folder} is a file, expected a folder; give another one")
    if folder.exists() and not overwrite:
        raise RasterError(f"{folder} exists; give another folder or allow overwriting")
    if folder.exists() and not (folder / CARD_FILE).is_file() and any(folder.iterdir()):
        raise RasterError(f"{folder} is not a {what} model (no {CARD_FILE}), so it is not overwritten")
    product = card_product(folder)
    if product is not None and product != _PRODUCTS[what]:
        gives = product.replace("_", " ")
        raise RasterError(f"{folder} is a model of {gives}, not a {what} model, so it is not overwritten")
    obstacle = folder_obstacle(folder.parent)
    if obstacle is not None:
        raise RasterError(f"cannot write into {folder.parent}: {obstacle}")


def model_card(backbone: Backbone, source: str | Path, output: OutputSpec) -> dict[str, Any]:
    """The part of a card that every model has.

    Args:
        backbone: with a card.
        source: name or path that it was loaded from.
        output: what the head gives.
    """
    assert backbone.card is not None
    about = {
        "name": backbone.card.name,
        "bundled": str(source) if str(source) in BUNDLED else None,
        "weights_digest": weights_digest(backbone),
    }
    return head_card(about, backbone.card.licence, output)


def stored_card(facts: FeatureFacts, output: OutputSpec) -> dict[str, Any]:
    """`model_card` of a head on stored features: it says where the backbone lies, which is in no folder."""
    bundled = facts.source if facts.source in BUNDLED else None
    about: dict[str, Any] = {"name": facts.backbone, "bundled": bundled, "weights_digest": facts.weights}
    if bundled is None:
        about |= {SOURCE: facts.source, "normalization": asdict(facts.normalization)}
    return head_card(about, facts.licence, output)


def head_card(about: Mapping[str, Any], licence: str, output: OutputSpec) -> dict[str, Any]:
    """The part of a card that every model has, from what is known of its backbone."""
    return {
        "format": CARD_FORMAT,
        "backbone": dict(about),
        "output": asdict(output),
        "licence": f"The backbone's weights: {licence}. The head follows the terms of its training data.",
    }


def read_card(path: Path, *, product: str) -> dict[str, Any]:
    """The card of a model folder.

    Args:
        path: of card.json.
        product: name of the output that is expected, e.g. `"canopy_height"`.

    Raises:
        ConfigError: not there, not JSON, or not the card of such a model.
    """
    what = product.replace("_", " ")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); expected a {what} model's card"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); expected a {what} model's card") from error
    if not isinstance(card, dict) or card.get("format") != CARD_FORMAT:
        raise ConfigError(f"{path} is not a head card (format {CARD_FORMAT!r} expected)")
    found = card.get("output", {}).get("name", product) if isinstance(card.get("output"), dict) else product
    if found != product:
        raise ConfigError(f"{path.parent} is a model of {found.replace('_', ' ')}, expected {what}")
    return card


def card_product(folder: Path) -> str | None:
    """What a model's folder gives, e.g. `"land_cover"`, as far as its card can be read; else None."""
    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        return str(card["output"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        # Whoever opens the model says what is wrong with its card.
        return None


def load_model_backbone(
    folder: Path, card: Mapping[str, Any], backbone: str | Path | None = None
) -> Backbone:
    """The backbone that a card names, or that lies in its folder.

    Args:
        folder: of the model.
        card: from `read_card`.
        backbone: name or path, for a head on stored features whose backbone is no longer where it was.

    Raises:
        KeyError, TypeError: the card is incomplete.
        ConfigError: other weights or statistics than those that the head was fitted on; a backbone is named
            for a model that has its own, or none for one whose backbone is not there.
    """
    about = card["backbone"]
    bundled, digest = about["bundled"], about["weights_digest"]
    if bundled is not None or (folder / RUN_EXPORT).is_file() or SOURCE not in about:
        if backbone is not None:
            raise ConfigError(f"{folder} has its own backbone; leave out --backbone")
        source = folder if bundled is None else bundled
    else:
        source = backbone or about[SOURCE]
        if not source or not (is_hub_name(source) or Path(source).exists() or source in BUNDLED):
            raise ConfigError(
                f"{folder} was fitted from stored features of the backbone {about['name']}, whose weights "
                f"{source or '(unknown)'} are not there; name them with --backbone"
            )
    found = load_backbone(source)
    if weights_digest(found) != digest:
        raise ConfigError(
            f"{folder / CARD_FILE} belongs to other weights of the backbone "
            f"{RUN_EXPORT if source is folder else source}; fit it again"
        )
    if "normalization" in about:
        assert found.card is not None
        if json.loads(json.dumps(asdict(found.card.normalization))) != about["normalization"]:
            raise ConfigError(
                f"{source} has other bands or statistics than the features that {folder} was fitted on; "
                "fit it again"
            )
    return found


@dataclass(frozen=True, slots=True)
class StoredModel[S: BaseModel]:
    """What a model's folder holds, but for the weights of the head.

    Attributes:
        folder: of the model.
        card: from `read_card`.
        settings: that the head was built and fitted with.
        blocks: of the backbone that the head reads.
        output: what the head gives.
        backbone: on the CPU.
    """

    folder: Path
    card: dict[str, Any]
    settings: S
    blocks: tuple[int, ...]
    output: OutputSpec
    backbone: Backbone


def find_model(name_or_folder: str | Path, bundled: Collection[str], *, what: str, command: str) -> Path:
    """The folder behind a bundled name or a path.

    Args:
        name_or_folder: given by the user.
        bundled: names of models of this kind in `WEIGHTS`.
        what: kind of model, for the message.
        command: that writes such folders, for the message.

    Raises:
        UnknownNameError: neither such a name nor a folder.
    """
    if str(name_or_folder) in bundled:
        return WEIGHTS / str(name_or_folder)
    folder = Path(name_or_folder)
    if not str(name_or_folder) or not folder.is_dir():
        valid = [*bundled, f"a folder that `{command}` wrote"]
        raise UnknownNameError(f"{what} model", str(name_or_folder), valid)
    return folder


def open_model[S: BaseModel](
    folder: Path,
    settings: type[S],
    *,
    product: str,
    backbone: str | Path | None = None,
) -> StoredModel[S]:
    """Reads a model's folder, all but the head.

    Args:
        folder: from `find_model`.
        settings: kind of settings in the card.
        product: name of the output that is expected.
        backbone: see `load_model_backbone`.

    Raises:
        ConfigError: the card is missing, incomplete, or belongs to other backbone weights.
    """
    card = read_card(folder / CARD_FILE, product=product)
    try:
        return StoredModel(
            folder,
            card,
            settings.model_validate(card["settings"]),
            tuple(int(b) for b in card["blocks"]),
            OutputSpec.from_json(card["output"]),
            load_model_backbone(folder, card, backbone),
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{folder / CARD_FILE} is not a complete head card: {one_line(str(error))}"
        ) from error


def load_head_weights(folder: Path, head: nn.Module) -> None:
    """Fills a head and makes it ready to predict.

    Raises:
        DataError: the weights are damaged or do not fit.
    """
    tensors = read_tensors(folder / HEAD_FILE)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(f"{folder / HEAD_FILE} does not fit its card: {one_line(str(error))}") from error
    head.eval().requires_grad_(False)
