"""Scenes that a model sees at another pixel size: grids, masks, maps, and refusals."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio import warp
from rasterio.enums import ColorInterp, Resampling
from rasterio.windows import Window

from dinov3geo.errors import ConfigError
from dinov3geo.heads.canopy import CanopyModel
from dinov3geo.predict.checks import ModelInput, gsd_warnings
from dinov3geo.predict.jobs import count_tiles, model_input, prepare
from dinov3geo.predict.pixel_size import parse_pixel_size, seen_grid
from dinov3geo.predict.preview import read_overview
from dinov3geo.predict.products import predict_canopy
from dinov3geo.predict.sidecars import write_sidecars
from dinov3geo.rasters.reader import inspect_scene
from dinov3geo.rasters.regridded import RegriddedScene

WriteRaster = Callable[..., Path]


def whole(scene: Path, gsd_m: float) -> tuple[np.ndarray, np.ndarray]:
    grid = inspect_scene(scene).grid.at_gsd(gsd_m)
    with RegriddedScene(scene, grid) as reader:
        return reader.read(Window(0, 0, grid.width, grid.height))


def trained_at(model: CanopyModel, gsd_m: tuple[float, float] | None) -> ModelInput:
    known = model_input(model)
    return ModelInput(known.name, known.normalization, gsd_m)


@pytest.mark.parametrize("south_up", [False, True])
def test_the_grid_covers_the_scene_from_the_same_corner(write_raster: WriteRaster, south_up: bool) -> None:
    transform = Affine(0.1, 0, 400_000, 0, 0.1 if south_up else -0.1, 3_280_000)
    own = inspect_scene(write_raster(shape=(3, 101, 64), transform=transform)).grid
    grid = own.at_gsd(0.25)
    assert grid.shape_hw == (41, 26) and grid.gsd_m == pytest.approx(0.25)
    assert (grid.transform.c, grid.transform.f) == (400_000, 3_280_000) and grid.crs == own.crs
    assert grid.transform.e * transform.e > 0


def test_pixels_in_degrees_become_square_on_the_ground(write_raster: WriteRaster) -> None:
    transform = Affine(1e-5, 0, 8.0, 0, -1e-5, 60.0)
    own = inspect_scene(write_raster(shape=(3, 300, 500), crs="EPSG:4326", transform=transform)).grid
    grid = own.at_gsd(1.5)
    width, height = grid.resolution_xy
    latitude = 60.0 - 300 * 1e-5 / 2
    assert height * 111_412 == pytest.approx(1.5, rel=1e-3)
    assert width / height == pytest.approx(1 / math.cos(math.radians(latitude)), rel=5e-3)
    assert grid.gsd_m == pytest.approx(1.5, rel=1e-6)


def test_model_means_the_nearest_end_of_its_range(write_raster: WriteRaster, model: CanopyModel) -> None:
    scene = write_raster(shape=(3, 60, 60), pixel_size=1.0)
    own = inspect_scene(scene).grid
    sizes = {(0.1, 0.5): 0.5, (2.0, 4.0): 2.0}
    for trained, metres in sizes.items():
        assert seen_grid(scene, own, "model", trained_at(model, trained)).gsd_m == pytest.approx(metres)
    assert seen_grid(scene, own, "model", trained_at(model, (0.5, 1.0))) is own
    assert seen_grid(scene, own, 1.0, trained_at(model, None)) is own
    assert seen_grid(scene, own, None, trained_at(model, (0.1, 0.1))) is own


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "fine", ""])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gsd takes metres above 0, or model, got"):
        parse_pixel_size(text)


def test_sizes_that_make_no_sense_for_the_scene_are_refused(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene = write_raster(pixel_size=1.0)
    own = inspect_scene(scene).grid
    with pytest.raises(ConfigError, match="does not say at which pixel size it was trained"):
        seen_grid(scene, own, "model", trained_at(model, None))
    for size in (0.009, 101.0):
        with pytest.raises(ConfigError, match="has pixels of 1 m, and .* change them 1"):
            seen_grid(scene, own, size, trained_at(model, None))
    for size in (0.0, -2.0, float("nan")):
        with pytest.raises(ConfigError, match="metres above 0"):
            predict_canopy(scene, tmp_path / "out.tif", model=model, gsd=size)
    assert not list(tmp_path.glob("*out*"))


def test_warnings_name_the_option_and_what_finer_pixels_lack(model: CanopyModel) -> None:
    wanted = trained_at(model, (0.1, 0.25))
    (far,) = gsd_warnings(Path("s.tif"), 0.6, 0.6, wanted)
    assert "has pixels of 0.6 m" in far and "--gsd model" in far
    (smooth,) = gsd_warnings(Path("s.tif"), 1.0, 0.25, wanted)
    assert "has pixels of 1 m and is seen at 0.25 m: it becomes smoother" in smooth
    assert gsd_warnings(Path("s.tif"), 0.05, 0.1, wanted) == []
    assert gsd_warnings(Path("s.tif"), 0.3, 0.2, wanted) == []
    (still,) = gsd_warnings(Path("s.tif"), 0.05, 1.0, wanted)
    assert "is seen at pixels of 1 m" in still


def masked_scene(tmp_path: Path, kind: str) -> tuple[Path, np.ndarray]:
    """80 bright pixels square; the left half and a spot hold other numbers and no data."""
    known = np.ones((80, 80), dtype=bool)
    known[:, :41], known[50:53, 60:64] = False, False
    array = np.where(known, 90, 7).astype(np.uint8)[None].repeat(3, axis=0)
    path = tmp_path / f"{kind}.tif"
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": 80, "width": 80, "count": 3 + (kind == "alpha"), "dtype": "uint8",
        "crs": "EPSG:32617", "transform": Affine(0.1, 0, 400_000, 0, -0.1, 3_280_000),
    }  # fmt: skip
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **profile, nodata=7 if kind == "nodata" else None) as dataset,
    ):
        dataset.write(array, [1, 2, 3])
        if kind == "mask":
            dataset.write_mask(known)
        if kind == "alpha":
            dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
            dataset.write(known.astype(np.uint8) * 255, 4)
    return path, known


@pytest.mark.parametrize("kind", ["nodata", "mask", "alpha"])
def test_what_holds_no_data_stays_apart(tmp_path: Path, kind: str) -> None:
    scene, known = masked_scene(tmp_path, kind)
    numbers, valid = whole(scene, 0.2)
    assert numbers.shape == (3, 40, 40) and (numbers[:, valid] == 90).all()
    np.testing.assert_array_equal(valid, known.reshape(40, 2, 40, 2).any(axis=(1, 3)))
    numbers, valid = whole(scene, 0.05)
    assert numbers.shape == (3, 160, 160) and (numbers[:, valid] == 90).all()
    assert np.count_nonzero(valid != np.kron(known, np.ones((2, 2)))) <= 4
    numbers, valid = whole(scene, 0.1)
    np.testing.assert_array_equal(valid, known)


def test_tiles_of_a_scene_in_degrees_have_no_seam(write_raster: WriteRaster, model: CanopyModel) -> None:
    scene = write_raster(
        shape=(3, 400, 300), crs="EPSG:4326", transform=Affine(1e-6, 0, -82.0, 0, -1e-6, 29.7), nodata=5
    )
    job = prepare(scene, model_input(model), 128, 32, 1, gsd=0.16)
    numbers, valid = whole(scene, 0.16)
    assert job.grid.shape_hw == valid.shape and len(job.plan) > 4
    with RegriddedScene(scene, job.grid, bands=job.bands) as reader:
        for window in job.plan.windows():
            part, known = reader.read(window)
            np.testing.assert_array_equal(part, numbers[:, *window.toslices()])
            np.testing.assert_array_equal(known, valid[window.toslices()])


@pytest.fixture
def scene(osbs_scene: Path, tmp_path: Path) -> Path:
    """The real scene with white pixels where it declares no data: GDAL and we treat its edges differently."""
    with rasterio.open(osbs_scene) as dataset:
        array, profile = dataset.read(), {**dataset.profile, "nodata": None}
    with rasterio.open(tmp_path / "scene.tif", "w", **profile) as dataset:
        dataset.write(array)
    return tmp_path / "scene.tif"


@pytest.mark.parametrize("gsd_m", [0.25, 0.07])
def test_the_map_is_that_of_a_scene_warped_before(
    scene: Path, model: CanopyModel, tmp_path: Path, gsd_m: float
) -> None:
    grid = inspect_scene(scene).grid.at_gsd(gsd_m)
    first = tmp_path / "first.tif"
    with rasterio.open(scene) as dataset:
        profile = {**dataset.profile, "height": grid.height, "width": grid.width, "transform": grid.transform}
        with rasterio.open(first, "w", **profile) as target:
            for band in (1, 2, 3):
                warp.reproject(
                    rasterio.band(dataset, band),
                    rasterio.band(target, band),
                    resampling=Resampling.average if gsd_m > 0.1 else Resampling.bilinear,
                )
    with rasterio.open(first) as dataset:
        warped = dataset.read()
    numbers, valid = whole(scene, gsd_m)
    inner = (slice(3, -3), slice(3, -3))
    assert valid[inner].all() and np.abs(numbers.astype(int) - warped)[:, *inner].max() <= 1
    predict_canopy(first, tmp_path / "a.tif", model=model, tile=128, overlap=32)
    predict_canopy(scene, tmp_path / "b.tif", model=model, gsd=gsd_m, tile=128, overlap=32)
    with rasterio.open(tmp_path / "a.tif") as one, rasterio.open(tmp_path / "b.tif") as other:
        assert one.transform == other.transform and one.shape == other.shape and one.crs == other.crs
        difference = np.abs(one.read(1) - other.read(1))
    assert difference[16:-16, 16:-16].max() < 0.05


def test_sidecars_preview_and_tags_tell_the_size_of_the_map(
    osbs_scene: Path, model: CanopyModel, tmp_path: Path
) -> None:
    target = tmp_path / "heights.tif"
    report = predict_canopy(
        osbs_scene, target, model=model, gsd=0.3, preview=tmp_path / "p.png", command="c --gsd 0.3"
    )
    item = json.loads(write_sidecars(target, scene=osbs_scene)[0].read_text())
    properties = item["properties"]
    assert properties["gsd"] == pytest.approx(0.3) and properties["proj:shape"] == [134, 134]
    assert properties["proj:transform"][0] == pytest.approx(0.3)
    assert item["assets"]["data"]["raster:bands"][0]["spatial_resolution"] == pytest.approx(0.3)
    with rasterio.open(target) as dataset:
        known = int((dataset.read_masks(1) > 0).sum())
        assert dataset.tags()["DINOV3GEO_COMMAND"] == "c --gsd 0.3"
    assert report.area_km2 == pytest.approx(known * 0.09 / 1e6)
    assert read_overview(target).grid == inspect_scene(osbs_scene).grid.at_gsd(0.3)
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert count_tiles(osbs_scene, 128, 32, seen=(0.3, model_input(model))) == 4


PEAK = """
import sys, resource
import numpy as np
from rasterio.windows import Window
from dinov3geo.rasters.reader import inspect_scene
from dinov3geo.rasters.regridded import RegriddedScene
from dinov3geo.rasters.geotiff import block_cache

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grid = inspect_scene(sys.argv[1]).grid.at_gsd(9.0)
with block_cache(16 * 2**20), RegriddedScene(sys.argv[1], grid) as reader:
    for row in range(0, grid.height, 100):
        reader.read(Window(0, row, grid.width, 100))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes of ru_maxrss are Linux's")
def test_memory_does_not_grow_with_what_lies_under_a_window(write_raster: WriteRaster) -> None:
    options = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "zstd", "sparse_ok": True}
    scene = write_raster(
        array=np.full((3, 12_000, 9_000), 9, dtype=np.uint8), pixel_size=0.1, nodata=0, **options
    )
    words = [sys.executable, "-c", PEAK, str(scene)]
    used = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    # A window of 100 rows lies over 9,000 x 9,000 pixels, 243 MB.
    assert used < 160
