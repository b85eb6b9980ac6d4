"""Headers of many rasters: read in parallel, kept on disk, read again only where a file has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from rasterio.crs import CRS

from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneInfo, inspect_scene

# Fewer headers are read faster than an inventory is looked up.
SMALLEST_KEPT = 200
# Opening waits for the disk or the network more than for the processor.
_THREADS = 16
_VERSION = 1


def inspect_scenes(paths: Sequence[Path], *, folder: Path | None = None) -> list[SceneInfo]:
    """Reads the headers of rasters, in the order given.

    Args:
        paths: files.
        folder: where inventories are kept; None means `dinov3geo/inventories` in the user's cache folder.
            Few files are read without one.

    Raises:
        RasterError, GeoreferenceError: as `inspect_scene`, of the first file that has one.
    """
    if len(paths) < SMALLEST_KEPT:
        return _inspect(paths)
    store = (folder or default_folder()) / f"{_name(paths)}.npz"
    stamps = [_stamp(path) for path in paths]
    known = _load(store)
    stale = [
        path for path, stamp in zip(paths, stamps, strict=True) if known.get(str(path), ("",))[0] != stamp
    ]
    fresh = dict(zip(stale, _inspect(stale), strict=True))
    infos = [fresh[path] if path in fresh else known[str(path)][1] for path in paths]
    if fresh or len(known) != len(paths):
        _save(store, infos, stamps)
    return infos


def default_folder() -> Path:
    """`dinov3geo/inventories` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dinov3geo" / "inventories"


def _inspect(paths: Sequence[Path]) -> list[SceneInfo]:
    if len(paths) < 2:
        return [inspect_scene(path) for path in paths]
    with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
        return list(pool.map(inspect_scene, paths))


def _name(paths: Sequence[Path]) -> str:
    """One inventory for each folder that holds all the files: files may come and go."""
    shared = os.path.commonpath([os.path.abspath(path) for path in paths])
    return hashlib.sha256(shared.encode()).hexdigest()[:24]


def _stamp(path: Path) -> str:
    """What changes when a file does; empty for addresses and missing files, which are looked at again."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def _save(store: Path, infos: Sequence[SceneInfo], stamps: Sequence[str]) -> None:
    """Writes an inventory under a temporary name first; a folder that refuses only costs time later."""
    crs_of = {id(info.grid.crs): info.grid.crs for info in infos}
    number = {identity: index for index, identity in enumerate(crs_of)}
    kind_of = [_kind(info) for info in infos]
    kinds = list(dict.fromkeys(kind_of))
    kind_number = {kind: index for index, kind in enumerate(kinds)}
    columns: dict[str, Any] = {
        "path": np.array([str(info.path) for info in infos]),
        "stamp": np.array(stamps),
        "transform": np.array([_six(info.grid.transform) for info in infos]),
        "shape": np.array([info.grid.shape_hw for info in infos]),
        "crs": np.array([number[id(info.grid.crs)] for info in infos]),
        "kind": np.array([kind_number[kind] for kind in kind_of]),
        "tables": np.array(json.dumps([_VERSION, [crs.to_wkt() for crs in crs_of.values()], kinds])),
    }
    temporary = store.with_suffix(f".{os.getpid()}.tmp")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, **columns)
        temporary.replace(store)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _kind(info: SceneInfo) -> str:
    """What many files have in common."""
    return json.dumps([info.num_bands, info.dtype, info.nodata, info.band_names, info.colours])


def _six(a: Affine) -> tuple[float, ...]:
    return a.a, a.b, a.c, a.d, a.e, a.f


def _load(store: Path) -> dict[str, tuple[str, SceneInfo]]:
    """Stamp and header per path; nothing if there is no inventory of this version."""
    try:
        with store.open("rb") as file, np.load(file, allow_pickle=False) as columns:
            content = {name: columns[name] for name in columns.files}
        version, texts, kinds = json.loads(str(content["tables"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    if version != _VERSION:
        return {}
    systems = [CRS.from_wkt(text) for text in texts]
    tables = [json.loads(kind) for kind in kinds]
    found: dict[str, tuple[str, SceneInfo]] = {}
    rows = zip(
        *(content[name].tolist() for name in ("path", "stamp", "transform", "shape", "crs", "kind")),
        strict=True,
    )
    for path, stamp, transform, (height, width), crs, kind in rows:
        num_bands, dtype, nodata, names, colours = tables[kind]
        grid = PixelGrid(systems[crs], Affine(*transform), height, width)
        info = SceneInfo(Path(path), grid, num_bands, dtype, tuple(nodata), tuple(names), tuple(colours))
        if stamp:
            found[path] = stamp, info
    return found
