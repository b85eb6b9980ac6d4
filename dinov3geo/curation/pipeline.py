"""From a pool of scenes or images to a table of chosen chips (DINOv3 paper, section 3.1)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinov3geo.backbones.base import Backbone
from dinov3geo.curation.duplicates import find_duplicates
from dinov3geo.curation.embedding import Encoder, embed, leave, make_encoder
from dinov3geo.curation.hierarchy import (
    Hierarchy,
    balanced_rows,
    build_hierarchy,
    check_levels,
    default_levels,
)
from dinov3geo.curation.kmeans import Assign
from dinov3geo.curation.retrieval import nearest_rows, union_of_neighbours
from dinov3geo.curation.vectors import Numbers, VectorFile
from dinov3geo.data.chosen import ChosenTable, relative_paths, write_chosen
from dinov3geo.data.grid_chips import GridChips
from dinov3geo.data.image_folder import ImageFolder
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import DataError
from dinov3geo.rasters.sensors import get_sensor

Tell = Callable[[str, int, int], None]
# A chip that a small cluster lacks others beside is not drawn more often than this.
_MAX_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What chips are chosen from.

    Attributes:
        path: folder, glob or file.
        kind: "scenes" or "images".
        sensor: name or file; of scenes.
        chip_size: side in pixels.
        stride: pixels between chips of a scene; the chip's side if None.
        min_valid_share: chips of scenes with less data are left out.
    """

    path: str
    kind: str = "scenes"
    sensor: str = "aerial_rgb"
    chip_size: int = 224
    stride: int | None = None
    min_valid_share: float = 0.5


@dataclass(frozen=True, slots=True)
class ChoiceSettings:
    """How chips are chosen.

    Attributes:
        count: drawn evenly from the clusters; None for a tenth of the pool, or none where there are seeds.
        levels: clusters per level, the lowest first; None chooses by the size of the pool.
        similarity: cosine from which on chips count as near-duplicates; None keeps all.
        seeds: images or scenes whose neighbours are chosen as well.
        neighbours: of each seed.
        least_similarity: a neighbour's cosine to its seed.
        seed: of everything random.
    """

    count: int | None
    levels: tuple[int, ...] | None = None
    similarity: float | None = 0.995
    seeds: str | None = None
    neighbours: int = 8
    least_similarity: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Curation:
    """What was chosen.

    Attributes:
        pool: chips looked at.
        unusable: of them with too little data.
        duplicates: of them left out as near-duplicates.
        levels: clusters per level.
        balanced: chosen evenly from the clusters.
        retrieved: chosen as neighbours of seeds, beside those.
        output: the table.
    """

    pool: int
    unusable: int
    duplicates: int
    levels: tuple[int, ...]
    balanced: int
    retrieved: int
    output: Path


Chips = GridChips | ImageFolder


def open_pool(pool: PoolSettings, bands: Sequence[str]) -> Chips:
    """Opens scenes or images.

    Raises:
        UserError: nothing is there, or it cannot be used.
    """
    if pool.kind == "images":
        return ImageFolder(pool.path, chip_size=pool.chip_size)
    scenes = SceneDataset(pool.path, sensor=pool.sensor, bands=bands, allow_mixed_resolution=True)
    return GridChips(scenes, chip_size=pool.chip_size, stride=pool.stride)


def curate(
    pool: PoolSettings,
    choice: ChoiceSettings,
    output: Path,
    *,
    backbone: Backbone,
    assign: Assign | None = None,
    batch_size: int = 64,
    workers: int = 0,
    work: Path | None = None,
    keep_work: bool = False,
    tell: Tell | None = None,
) -> Curation:
    """Embeds a pool, chooses chips and writes their table.

    Memory grows with the number of chips (some tens of bytes each), not with the size of their embeddings,
    which lie in the work folder; a run that was cut off goes on with those it has.

    Args:
        pool: what is chosen from.
        choice: how.
        output: Parquet file; GeoParquet where the chips have a place on the ground.
        backbone: with a card.
        assign: finds nearest centroids.
        batch_size: chips per forward pass.
        workers: reading processes.
        work: folder of the embeddings; a hidden one beside the output if None.
        keep_work: leave it there for another choice from the same pool.
        tell: called with a stage's name, steps done and in all.

    Raises:
        UserError: input that cannot be used; nothing is written.
    """
    if choice.levels is not None:
        check_levels(choice.levels)
    tell = tell or _silent
    work = work or output.with_name(f".{output.name}.embeddings")
    sensor = get_sensor(pool.sensor) if pool.kind == "scenes" else None
    encoder = make_encoder(backbone, sensor)
    chips = open_pool(pool, encoder.normalization.bands)
    vectors = _embedded(chips, pool, encoder, work, "embed", batch_size, workers, tell)
    hierarchy = _clusters(vectors, choice, assign, tell)
    usable = hierarchy.labels >= 0
    unusable = int((~usable).sum())
    duplicates = 0
    if choice.similarity is not None:
        copies = find_duplicates(vectors, hierarchy.labels, choice.similarity)
        duplicates = int(copies.sum())
        usable &= ~copies
    generator = np.random.default_rng(choice.seed)
    balanced = balanced_rows(hierarchy, _wanted(choice, len(chips)), usable=usable, generator=generator)
    retrieved = balanced[:0]
    if choice.seeds is not None:
        seeds = PoolSettings(choice.seeds, pool.kind, pool.sensor, pool.chip_size)
        retrieved = _retrieved(
            seeds, choice, vectors, usable, encoder, work / "seeds", batch_size, workers, tell
        )
        retrieved = np.setdiff1d(retrieved, balanced)
    _write(chips, pool, choice, hierarchy, balanced, retrieved, encoder, output)
    if not keep_work:
        leave(work)
    return Curation(len(chips), unusable, duplicates, hierarchy.sizes, len(balanced), len(retrieved), output)


def _wanted(choice: ChoiceSettings, pool: int) -> int:
    if choice.count is not None:
        return choice.count
    return max(1, pool // 10) if choice.seeds is None else 0


def _embedded(
    chips: Chips,
    pool: PoolSettings,
    encoder: Encoder,
    folder: Path,
    stage: str,
    batch_size: int,
    workers: int,
    tell: Tell,
) -> VectorFile:
    share = pool.min_valid_share if isinstance(chips, GridChips) else 0.0
    return embed(
        chips,
        encoder,
        folder,
        identity=_identity(chips, pool),
        batch_size=batch_size,
        workers=workers,
        min_valid_share=share,
        tell=lambda done, total: tell(stage, done, total),
    )


def _identity(chips: Chips, pool: PoolSettings) -> str:
    """Changes with the files and with how they are cut."""
    paths = list(chips.dataset.infos) if isinstance(chips, GridChips) else chips.files
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.path.abspath(path).encode())
        if path.exists():
            state = path.stat()
            digest.update(f"{state.st_size}:{state.st_mtime_ns}".encode())
    return f"{digest.hexdigest()} {pool.kind} {pool.sensor} {pool.chip_size} {pool.stride}"


def _clusters(vectors: VectorFile, choice: ChoiceSettings, assign: Assign | None, tell: Tell) -> Hierarchy:
    held = sum(int(block.any(axis=1).sum()) for _, block in vectors.blocks())
    if held == 0:
        raise DataError(
            f"none of {len(vectors)} chips holds enough data; lower the valid share, or use smaller chips"
        )
    levels = choice.levels or default_levels(held)
    return build_hierarchy(
        vectors,
        levels,
        seed=choice.seed,
        assign=assign,
        tell=lambda done, total: tell("cluster", done, total),
    )


def _retrieved(
    seeds: PoolSettings,
    choice: ChoiceSettings,
    vectors: VectorFile,
    usable: NDArray[np.bool_],
    encoder: Encoder,
    folder: Path,
    batch_size: int,
    workers: int,
    tell: Tell,
) -> Numbers:
    chips = open_pool(seeds, encoder.normalization.bands)
    queries = _embedded(chips, seeds, encoder, folder, "embed seeds", batch_size, workers, tell)
    wanted = queries.read(0, len(queries))
    leave(folder)
    rows, cosines = nearest_rows(vectors, wanted[wanted.any(axis=1)], choice.neighbours, usable=usable)
    return union_of_neighbours(rows, cosines, choice.least_similarity)


def _write(
    chips: Chips,
    pool: PoolSettings,
    choice: ChoiceSettings,
    hierarchy: Hierarchy,
    balanced: Numbers,
    retrieved: Numbers,
    encoder: Encoder,
    output: Path,
) -> None:
    rows = np.concatenate([balanced, retrieved])
    if len(rows) == 0:
        raise DataError(
            f"no chip was chosen from {len(chips)} of {pool.path}: none holds enough data, or no seed has a "
            "neighbour of the least similarity"
        )
    order = np.argsort(rows, kind="stable")
    is_balanced = np.repeat([True, False], [len(balanced), len(retrieved)])[order]
    rows = rows[order]
    paths = hierarchy.paths(rows)
    if isinstance(chips, GridChips):
        found = [chips.locate(row) for row in rows.tolist()]
        files = [place.path for place in found]
        places: Numbers | None = np.array([(p.row, p.col, p.size) for p in found], dtype=np.int64)
        grids = [chips.grid(row) for row in rows.tolist()]
        root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in chips.dataset.infos]))
        named = Path(pool.path)
        root = named if named.is_dir() else root
    else:
        files, places, grids, root = [chips.files[row] for row in rows.tolist()], None, None, chips.root
    table = ChosenTable(
        root=Path(os.path.abspath(root)),
        paths=relative_paths(files, root),
        places=places,
        clusters=paths,
        weights=_weights(paths[:, 0], is_balanced),
        origins=tuple("balanced" if own else "retrieved" for own in is_balanced.tolist()),
    )
    facts = {
        "weights": encoder.digest,
        "levels": ",".join(map(str, hierarchy.sizes)),
        "seed": str(choice.seed),
        "similarity": str(choice.similarity),
    }
    write_chosen(table, output, grids=grids, facts=facts)


def _weights(top: NDArray[np.int32], is_balanced: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Makes clusters of the highest level that could not give their share as frequent as the others."""
    weights = np.ones(len(top))
    if is_balanced.any():
        sizes = np.bincount(top[is_balanced])
        usual = np.median(sizes[sizes > 0])
        weights[is_balanced] = np.clip(usual / sizes[top[is_balanced]], 1, _MAX_WEIGHT)
    return weights


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Tells nobody."""
