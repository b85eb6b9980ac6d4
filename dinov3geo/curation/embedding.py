"""From a pool of chips to a file of embeddings that a killed run goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.inference import for_inference
from dinov3geo.curation.vectors import VectorFile
from dinov3geo.data.failures import readers_watched
from dinov3geo.data.indexed import IndexedChips
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.features.extract import weights_digest
from dinov3geo.rasters.sensors import Sensor

_VECTORS, _STATE = "vectors.f16", "state.json"


@dataclass(frozen=True, slots=True)
class Encoder:
    """What turns chips into embeddings: the class token of a frozen backbone.

    Attributes:
        backbone: in evaluation mode, on its device.
        normalization: of the numbers in the chips.
        digest: of the weights.
    """

    backbone: Backbone
    normalization: Normalization
    digest: str

    @torch.no_grad()
    def __call__(self, images: Tensor, valid: Tensor) -> NDArray[np.float32]:
        """Embeddings [B, D] of chips [B, C, S, S] with their masks [B, S, S]."""
        device = next(self.backbone.parameters()).device
        images, valid = images.to(device), valid.to(device)
        tokens = self.backbone(self.normalization(images, None if bool(valid.all()) else valid)).cls
        vectors: NDArray[np.float32] = tokens.float().cpu().numpy()
        return vectors


def make_encoder(backbone: Backbone, sensor: Sensor | None) -> Encoder:
    """Prepares a backbone for chips of a sensor.

    Args:
        backbone: with a card.
        sensor: whose numbers the chips hold; None for 8-bit images.

    Raises:
        ConfigError: the backbone has no card.
        UnknownNameError: the sensor lacks a band of the backbone.
    """
    if backbone.card is None:
        raise ConfigError(
            "the backbone has no card, so its normalisation is unknown; load it with load_backbone"
        )
    trained = backbone.card.normalization
    normalization = trained
    if sensor is not None:
        bands = sensor.select(trained.bands)
        scale, offset = tuple(b.scale for b in bands), tuple(b.offset for b in bands)
        normalization = Normalization(trained.bands, scale, offset, trained.mean, trained.std)
    elif len(trained.bands) != 3:
        raise ConfigError(
            f"images have 3 bands, but the backbone takes {len(trained.bands)} ({', '.join(trained.bands)})"
        )
    return Encoder(for_inference(backbone.eval()), normalization, weights_digest(backbone))


def embed(
    chips: IndexedChips,
    encoder: Encoder,
    folder: Path,
    *,
    identity: str,
    batch_size: int,
    workers: int,
    min_valid_share: float,
    tell: Callable[[int, int], None] | None = None,
) -> VectorFile:
    """Embeds every chip in order; a chip with too little data gets a row of zeros.

    Args:
        chips: the pool.
        encoder: from `make_encoder`.
        folder: for the embeddings and for what they were made of; a folder of the same chips and weights is
            gone on with, any other begun anew.
        identity: what the chips are, e.g. files with their times and the size of a chip.
        batch_size: chips per forward pass.
        workers: processes that read chips; 0 reads in this one.
        min_valid_share: of the pixels of a chip.
        tell: called with chips done and in all.

    Raises:
        DataError: a chip cannot be read, or the folder not be written.
    """
    vectors = VectorFile(folder / _VECTORS, encoder.backbone.embed_dim)
    state = hashlib.sha256(json.dumps([identity, encoder.digest, min_valid_share]).encode()).hexdigest()
    _enter(folder, state, vectors)
    with readers_watched():
        _embed_rest(chips, encoder, vectors, batch_size, workers, min_valid_share, tell)
    return vectors


def _embed_rest(
    chips: IndexedChips,
    encoder: Encoder,
    vectors: VectorFile,
    batch_size: int,
    workers: int,
    min_valid_share: float,
    tell: Callable[[int, int], None] | None,
) -> None:
    for images, valid in _batches(chips, len(vectors), batch_size, workers):
        shares = valid.flatten(1).float().mean(1).numpy()
        found = encoder(images, valid)
        if not np.isfinite(found).all():
            raise DataError(f"the backbone gives embeddings that are not finite near chip {len(vectors)}")
        found[shares < min_valid_share] = 0
        vectors.append(found)
        if tell is not None:
            tell(len(vectors), len(chips))


def leave(folder: Path) -> None:
    """Removes what `embed` wrote."""
    for name in (_VECTORS, _STATE):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _enter(folder: Path, state: str, vectors: VectorFile) -> None:
    """Begins anew unless the folder belongs to the same chips and weights."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        noted = folder / _STATE
        if not noted.is_file() or json.loads(noted.read_text(encoding="utf-8")) != state:
            vectors.path.unlink(missing_ok=True)
            noted.write_text(json.dumps(state), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot keep embeddings in {folder}: {error}") from error


def _batches(
    chips: IndexedChips, start: int, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    rest = Subset(chips, range(start, len(chips)))
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        rest, batch_size=batch_size, num_workers=workers, worker_init_fn=_leave_group
    )
    for batch in loader:
        yield batch["image"], batch["valid"]


def _leave_group(_worker: int) -> None:
    os.setpgid(0, 0)
