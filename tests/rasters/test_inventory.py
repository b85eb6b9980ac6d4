"""Inventories of headers: what is kept is what is read, and what has changed is read again."""

import os

import numpy as np
import pytest

from dinov3geo.errors import GeoreferenceError
from dinov3geo.rasters import inventory
from dinov3geo.rasters.inventory import inspect_scenes
from dinov3geo.rasters.reader import inspect_scene


@pytest.fixture
def scenes(write_raster, monkeypatch):
    monkeypatch.setattr(inventory, "SMALLEST_KEPT", 3)
    paths = [write_raster(f"in/{i}.tif", shape=(3, 8, 8 + i), seed=i) for i in range(4)]
    paths.append(
        write_raster("in/far.tif", shape=(1, 8, 8), crs="EPSG:4326", pixel_size=1e-5, origin=(7, 50))
    )
    return paths


def count_reads(monkeypatch):
    seen = []
    monkeypatch.setattr(inventory, "inspect_scene", lambda path: seen.append(path) or inspect_scene(path))
    return seen


def test_kept_headers_are_those_of_the_files(scenes, tmp_path, monkeypatch, write_raster):
    seen, folder = count_reads(monkeypatch), tmp_path / "kept"
    expected = [inspect_scene(path) for path in scenes]
    assert inspect_scenes(scenes, folder=folder) == expected and sorted(seen) == sorted(scenes)
    seen.clear()
    assert inspect_scenes(scenes, folder=folder) == expected and not seen
    # One file changes, one goes, one comes.
    write_raster("in/1.tif", shape=(3, 16, 16))
    os.utime(scenes[1], ns=(1, 1))
    new = write_raster("in/new.tif", nodata=float("nan"), dtype="float32")
    now = [scenes[1], *scenes[2:], new]
    found = inspect_scenes(now, folder=folder)
    assert sorted(seen) == sorted([scenes[1], new]) and found[0].grid.shape_hw == (16, 16)
    assert np.isnan(found[-1].nodata[0])
    seen.clear()
    inspect_scenes(now, folder=folder)
    assert not seen


def test_damaged_inventories_and_folders_that_refuse_only_cost_time(scenes, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    inspect_scenes(scenes, folder=folder)
    (store,) = folder.iterdir()
    store.write_bytes(store.read_bytes()[:100])
    assert len(inspect_scenes(scenes, folder=folder)) == len(scenes)
    taken = tmp_path / "file"
    taken.write_text("no folder")
    assert len(inspect_scenes(scenes, folder=taken / "below")) == len(scenes)


def test_errors_of_files_come_through(scenes, tmp_path, write_raster):
    bad = write_raster("in/bad.tif", crs=None)
    with pytest.raises(GeoreferenceError, match=r"bad\.tif"):
        inspect_scenes([*scenes, bad], folder=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert inventory.default_folder() == tmp_path / "dinov3geo" / "inventories"
