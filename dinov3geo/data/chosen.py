"""Tables of chosen chips: what `dinov3geo curate` writes and the samplers read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov3geo.data.catalog import footprints
from dinov3geo.data.grid_chips import ChipPlace
from dinov3geo.data.image_folder import ImageFolder
from dinov3geo.data.indexed import IndexedChips, Order
from dinov3geo.data.sampling import IndexSampler, WeightedSampler
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import DataError
from dinov3geo.rasters.crs import to_rasterio
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.parquet import geo_metadata, import_pyarrow, read_table, write_table

_PURPOSE = "tables of chips"
_FORMAT = "dinov3geo-chips/1"
_LONGITUDE_LATITUDE = "OGC:CRS84"


@dataclass(frozen=True, slots=True)
class ChosenTable:
    """Chips by the file they lie in.

    Attributes:
        root: folder that relative paths are relative to when the table was written.
        paths: of scenes or images, below `root` or absolute.
        places: [n, 3] row, column and side in the scene's own pixels; None for whole images.
        clusters: [n, levels] from the highest level to the lowest; no levels where nothing was clustered.
        weights: [n] how often a chip should be drawn, relative to the others.
        origins: [n] why it was chosen.
    """

    root: Path
    paths: tuple[str, ...]
    places: NDArray[np.int64] | None
    clusters: NDArray[np.int32]
    weights: NDArray[np.float64]
    origins: tuple[str, ...]


def write_chosen(
    table: ChosenTable, path: Path, *, grids: Sequence[PixelGrid] | None, facts: Mapping[str, str]
) -> None:
    """Writes GeoParquet (of scenes, with the footprints in longitude and latitude) or Parquet (of images).

    Args:
        table: the chips.
        path: file to write, whole or not at all.
        grids: of the chips, for their footprints; None for images.
        facts: kept in the file's metadata.

    Raises:
        DataError: the disk refuses.
        ConfigError: pyarrow is not installed.
    """
    arrow = import_pyarrow(_PURPOSE)
    columns: dict[str, Any] = {"path": arrow.array(table.paths, arrow.string())}
    metadata = {"dinov3geo": json.dumps({"format": _FORMAT, "root": str(table.root), **facts})}
    if table.places is not None:
        for name, values in zip(("row", "col", "size"), table.places.T, strict=True):
            columns[name] = arrow.array(values, arrow.int32())
    columns["cluster"] = arrow.array(table.clusters.tolist(), arrow.list_(arrow.int32()))
    columns["weight"] = arrow.array(table.weights, arrow.float64())
    columns["origin"] = arrow.array(table.origins, arrow.string())
    if grids is not None:
        polygons = footprints(grids, to_rasterio(_LONGITUDE_LATITUDE))
        columns["geometry"] = arrow.array(shapely.to_wkb(polygons).tolist(), arrow.binary())
        metadata["geo"] = json.dumps(geo_metadata(None, ["Polygon"]))
    written = arrow.table(columns).replace_schema_metadata(metadata)
    write_table(written, path, _PURPOSE)


def read_chosen(path: Path) -> ChosenTable:
    """Reads what `write_chosen` wrote; columns that a user has added are left alone.

    Raises:
        DataError: no such file, no Parquet, or a column is missing.
        ConfigError: pyarrow is not installed.
    """
    table = read_table(path, _PURPOSE)
    names = set(table.column_names)
    missing = {"path", "weight"} - names
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(sorted(missing))}; expected a table of `dinov3geo curate` with "
            f"path, weight and, of scenes, row, col, size; it has {', '.join(table.column_names)}"
        )
    if table.num_rows == 0:
        raise DataError(f"{path} holds no chip")
    placed = {"row", "col", "size"} <= names
    places = [table[name].to_numpy() for name in ("row", "col", "size")] if placed else None
    facts = json.loads((table.schema.metadata or {}).get(b"dinov3geo", b"{}"))
    count = table.num_rows
    clusters = table["cluster"].to_pylist() if "cluster" in names else [[]] * count
    return ChosenTable(
        root=Path(facts.get("root", ".")),
        paths=tuple(table["path"].to_pylist()),
        places=None if places is None else np.stack(places, axis=1).astype(np.int64),
        clusters=np.array(clusters, dtype=np.int32).reshape(count, -1),
        weights=_checked_weights(table["weight"].to_numpy(), path),
        origins=tuple(table["origin"].to_pylist() if "origin" in names else ["given"] * count),
    )


class ChosenScenes(IndexedChips):
    """The chips of a table, read from the scenes that it names."""

    def __init__(self, dataset: SceneDataset, table: ChosenTable, *, chip_size: int, source: Path) -> None:
        """Finds the scene of every chip.

        Args:
            dataset: of the scenes.
            table: the chips.
            chip_size: side in pixels that is read about the centre of each chip.
            source: the folder or file that the scenes were found in; relative paths are below it.

        Raises:
            DataError: a table of images, or a scene that is not among those of the data set.
        """
        if table.places is None:
            raise DataError(
                "the table of chips has no columns row, col, size: it was made of images, not scenes"
            )
        self.dataset = dataset
        self._weights = table.weights
        self._size = chip_size
        known = {os.path.abspath(path): path for path in dataset.infos}
        self._paths = [_find(name, known, (source, table.root)) for name in table.paths]
        row, col, size = table.places.T
        self._corners: NDArray[np.int64] = np.stack([row, col], axis=1) + (size[:, None] - chip_size) // 2

    def __len__(self) -> int:
        """Number of chips."""
        return len(self._paths)

    @property
    def dtype(self) -> torch.dtype:
        """Of the scenes."""
        return self.dataset.dtype

    @property
    def gsd_range_m(self) -> tuple[float, float]:
        """Of the scenes."""
        return self.dataset.gsd_range_m

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Reads a chip; errors as `SceneDataset`."""
        place = self._place(index)
        numbers, valid = self.dataset.read_window(place.path, place.row, place.col, (place.size, place.size))
        return {"image": torch.from_numpy(numbers), "valid": torch.from_numpy(valid)}

    def place(self, index: int) -> str:
        """Where a chip comes from."""
        place = self._place(index)
        return f"{place.path} at row {place.row}, column {place.col}"

    def grid(self, index: int) -> PixelGrid:
        """Where a chip lies."""
        place = self._place(index)
        return self.dataset.window_grid(place.path, place.row, place.col, (place.size, place.size))

    def order(self, *, seed: int, rank: int, world_size: int) -> Order:
        """By the weights of the table."""
        return _weighted(self, self._weights, seed=seed, rank=rank, world_size=world_size)

    def _place(self, index: int) -> ChipPlace:
        row, col = self._corners[index].tolist()
        return ChipPlace(self._paths[index], row, col, self._size)


class ChosenImages(IndexedChips):
    """The images of a table."""

    noun = "images"

    def __init__(self, folder: ImageFolder, table: ChosenTable) -> None:
        """Finds every image.

        Args:
            folder: that holds them.
            table: which of them.

        Raises:
            DataError: an image that is not in the folder.
        """
        self.folder = folder
        self._weights = table.weights
        known = {os.path.abspath(path): number for number, path in enumerate(folder.files)}
        self._numbers = [_find(name, known, (folder.root, table.root)) for name in table.paths]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._numbers)

    @property
    def band_count(self) -> int:
        """Red, green and blue."""
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Reads an image; errors as `ImageFolder`."""
        return self.folder[self._numbers[index]]

    def place(self, index: int) -> str:
        """The file."""
        return self.folder.place(self._numbers[index])

    def order(self, *, seed: int, rank: int, world_size: int) -> Order:
        """By the weights of the table."""
        return _weighted(self, self._weights, seed=seed, rank=rank, world_size=world_size)


def relative_paths(paths: Iterator[Path] | Sequence[Path], root: Path) -> tuple[str, ...]:
    """Paths below a folder relative to it, others absolute."""
    base = os.path.abspath(root)
    found = []
    for path in map(os.path.abspath, paths):
        inside = path.startswith(base.rstrip(os.sep) + os.sep)
        found.append(Path(os.path.relpath(path, base)).as_posix() if inside else path)
    return tuple(found)


def _find[T](name: str, known: Mapping[str, T], folders: Sequence[Path]) -> T:
    for folder in folders:
        path = os.path.abspath(folder / name)
        if path in known:
            return known[path]
    raise DataError(
        f"the table of chips names {name}, which is not among the {len(known)} files in {folders[0]}; "
        "point the source at the folder that the table was made from"
    )


def _weighted(
    dataset: IndexedChips, weights: NDArray[np.float64], *, seed: int, rank: int, world_size: int
) -> Order:
    shard: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
    if np.all(weights == weights[0]):
        return IndexSampler(dataset, **shard)
    return WeightedSampler(weights, **shard)


def _checked_weights(weights: NDArray[Any], path: Path) -> NDArray[np.float64]:
    numbers = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(numbers).all() or numbers.min() < 0 or numbers.sum() <= 0:
        raise DataError(f"the weights in {path} must be finite, at least 0 and not all 0")
    return numbers
