"""Features of a scene into a Zarr store or a Parquet table, strip by strip."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from dinov3geo.errors import DataError
from dinov3geo.features.store import StoredType, ZarrWriter
from dinov3geo.features.table import TableWriter
from dinov3geo.predict.engines import Counter, Progress, TileTask, check_finite
from dinov3geo.rasters.grid import PixelGrid

WRITERS: dict[str, type[ZarrWriter] | type[TableWriter]] = {".zarr": ZarrWriter, ".parquet": TableWriter}
"""Kinds of stores by the suffix of their name."""


def write_store(
    output: Path,
    task: TileTask,
    grid: PixelGrid,
    names: tuple[str, ...],
    stored: StoredType,
    *,
    attributes: dict[str, str],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Computes the features of a scene and stores them.

    Args:
        output: name that ends in a key of `WRITERS`.
        task: what to compute.
        grid: of the patches.
        names: of the features.
        stored: how they are stored.
        attributes: of the store.
        overwrite: whether an existing store may be replaced.
        progress: told about tiles done.

    Returns:
        Tiles run and patches with data.

    Raises:
        DataError: no valid pixel at all, or a backbone that gives NaN.
        ConfigError: the package that writes such a store is not installed.
        RasterError: the scene cannot be read or the store not written.
    """
    counter = Counter(task, 0, progress)
    make_writer = WRITERS[output.suffix.lower()]
    patches = 0
    with make_writer(output, grid, names, stored, attributes=attributes, overwrite=overwrite) as writer:
        with closing(task.rows(0, task.shape_hw[0], counter.counting(task.make_runner()))) as strips:
            for _, values, valid in strips:
                check_finite(values, valid, task.scene)
                writer.write(values, valid)
                patches += int(valid.sum())
        if not patches:
            raise DataError(
                f"scene {task.scene} holds no valid pixel: all of it is nodata; nothing was written"
            )
    counter.finish()
    return counter.done, patches
