"""Features of a scene into a Zarr store or a Parquet table, strip by strip."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from dinov3geo.errors import EmptySceneError
from dinov3geo.features.store import StoredType
from dinov3geo.features.table import TableWriter
from dinov3geo.features.zarr_writer import ZarrWriter
from dinov3geo.predict.encodings import feature_encoding
from dinov3geo.predict.engines import (
    Counter,
    Progress,
    TileTask,
    check_engine,
    check_finite,
    compute_rows,
    job_name,
)
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
    job: Mapping[str, object],
    engine: str = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Computes the features of a scene and stores them; a run that was killed goes on where it was.

    Args:
        output: name that ends in a key of `WRITERS`.
        task: what to compute.
        grid: of the patches.
        names: of the features.
        stored: how they are stored.
        attributes: of the store.
        job: names the backbone and its settings; scene, tiles and types are added.
        engine: a name in `ENGINES`.
        overwrite: whether an existing store may be replaced.
        progress: told about tiles done.

    Returns:
        Tiles run (those of an earlier run that was cut off are not counted) and patches with data.

    Raises:
        UnknownNameError: no such engine.
        DataError: no valid pixel at all, or a backbone that gives NaN.
        ConfigError: the package that writes such a store is not installed.
        RasterError: the scene cannot be read or the store not written.
    """
    check_engine(engine)
    make_writer = WRITERS[output.suffix.lower()]
    name = job_name(task, feature_encoding(names, stored, tags={}), job)
    with make_writer(
        output, grid, names, stored, attributes=attributes, job=name, overwrite=overwrite
    ) as writer:
        counter = Counter(task, writer.next_row, progress)
        with closing(compute_rows(engine, task, writer.next_row, counter)) as strips:
            for _, values, valid in strips:
                check_finite(values, valid, task.scene)
                writer.write(values, valid)
        if not writer.cells:
            raise EmptySceneError(
                f"scene {task.scene} holds no valid pixel: all of it is nodata; nothing was written"
            )
    counter.finish()
    return counter.done - counter.before, writer.cells
