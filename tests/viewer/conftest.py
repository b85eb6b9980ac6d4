"""A scene, a map of heights and a store of features that lie on each other, in UTM."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS

from dinov3geo.features.store import StoredType
from dinov3geo.features.zarr_writer import ZarrWriter
from dinov3geo.rasters.grid import PixelGrid

SIDE = 64
NODATA = -9999.0


class Files(NamedTuple):
    scene: Path
    heights: Path
    array: np.ndarray


@pytest.fixture(scope="session")
def heights_array() -> np.ndarray:
    """[64, 64] float32 metres: every number is another one; the lower left quarter is nodata."""
    values = np.random.default_rng(3).permutation(SIDE * SIDE).reshape(SIDE, SIDE) / 200
    values = values.astype(np.float32)
    values[SIDE // 2 :, : SIDE // 2] = NODATA
    return values


@pytest.fixture
def files(write_raster: Callable[..., Path], heights_array: np.ndarray) -> Files:
    heights = write_raster(
        "heights.tif",
        array=heights_array,
        pixel_size=0.5,
        nodata=NODATA,
        band_names=("canopy height",),
        tags={"DINOV3GEO_MODEL": "test"},
    )
    return Files(write_raster("scene.tif", shape=(3, SIDE, SIDE), pixel_size=0.5), heights, heights_array)


@pytest.fixture
def features() -> np.ndarray:
    """[5, 8, 8] features of 4 m patches; the last row holds no data."""
    values = np.random.default_rng(4).standard_normal((5, 8, 8)).astype(np.float32)
    values[:, -1] = np.nan
    return values


@pytest.fixture
def store(tmp_path: Path, features: np.ndarray) -> Path:
    pytest.importorskip("zarr")
    grid = PixelGrid(CRS.from_epsg(32617), Affine(4, 0, 400_000, 0, -4, 3_280_000), 8, 8)
    path = tmp_path / "features.zarr"
    names = [f"feature {k}" for k in range(5)]
    with ZarrWriter(path, grid, names, StoredType("float32"), attributes={}) as writer:
        writer.write(features, np.isfinite(features[0]))
    return path
