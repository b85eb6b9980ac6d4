"""Fixtures of all tests: where real data lie, and small awkward rasters."""

import functools
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import rasterio
from affine import Affine

# Idle threads of torch and scikit-learn sleep instead of spinning: on a machine that is busy with other
# work, small problems are otherwise ten times slower. It must be set before either is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds pyproject.toml."""
    return PROJECT_ROOT


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real data sets; the test is skipped where there is none."""
    named = os.environ.get("DINOV3GEO_DATA")
    root = Path(named) if named else PROJECT_ROOT.parent / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"no real data in {root}: set DINOV3GEO_DATA to a folder that holds neon/, teak/, ...")
    return root.resolve()


@pytest.fixture(scope="session")
def osbs_scene() -> Path:
    """A real NEON scene: 400 x 400 pixels of 0.1 m, uint8 RGB, EPSG:32617, nodata 255."""
    try:
        files = importlib.metadata.files("deepforest") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "OSBS_029.tif":
            return Path(str(file.locate())).resolve()
    pytest.skip("no OSBS_029.tif: pip install --no-deps deepforest")


@pytest.fixture
def write_raster(tmp_path: Path, write_raster_in: Callable[..., Path]) -> Callable[..., Path]:
    """`write_raster_in` the test's temporary folder: `write_raster("a.tif", shape=(1, 8, 8))`."""
    return functools.partial(write_raster_in, tmp_path)


@pytest.fixture(scope="session")
def write_raster_in() -> Callable[..., Path]:
    """A function that writes a small GeoTIFF and returns its path.

    Arguments of the function, all but the first two by keyword:
        folder: to write into; it and those of the name are made.
        name: file name (or path) below the folder.
        array: [C, H, W] or [H, W] numbers; without it random ones of `shape` and `dtype`.
        shape: (C, H, W) of the random numbers.
        dtype: of the random numbers.
        crs: anything rasterio takes, or None for a raster without a reference system.
        transform: affine transform, or None for square pixels of `pixel_size` north-up at `origin`.
        pixel_size: metres (CRS units).
        origin: x, y of the upper left corner.
        nodata: declared nodata value or None.
        band_names: description of each band.
        tags: of the data set.
        seed: of the random numbers.
        options: further creation options of the driver GTiff.
    """

    def write(
        folder: Path,
        name: str | Path = "scene.tif",
        *,
        array: np.ndarray | None = None,
        shape: tuple[int, int, int] = (3, 48, 64),
        dtype: str = "uint8",
        crs: object = "EPSG:32617",
        transform: Affine | None = None,
        pixel_size: float = 0.1,
        origin: tuple[float, float] = (400_000.0, 3_280_000.0),
        nodata: float | None = None,
        band_names: Sequence[str] = (),
        tags: dict[str, str] | None = None,
        seed: int = 0,
        **options: object,
    ) -> Path:
        numbers = _random_numbers(shape, dtype, seed) if array is None else np.asarray(array)
        if numbers.ndim == 2:
            numbers = numbers[None]
        if transform is None:
            transform = Affine.translation(*origin) @ Affine.scale(pixel_size, -pixel_size)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        count, height, width = numbers.shape
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype=numbers.dtype.name,
            crs=crs,
            transform=transform,
            nodata=nodata,
            **options,
        ) as dataset:
            dataset.write(numbers)
            for index, band_name in enumerate(band_names, start=1):
                dataset.set_band_description(index, band_name)
            dataset.update_tags(**(tags or {}))
        return path

    return write


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """An untrained backbone, as a pretraining run exports it."""
    import torch

    from dinov3geo.backbones.card import BackboneCard, Normalization
    from dinov3geo.backbones.zoo import RUN_EXPORT, build_backbone, save_backbone

    folder = tmp_path_factory.mktemp("run")
    statistics = Normalization(("red", "green", "blue"), (1 / 255,) * 3, (0.0,) * 3, (0.4,) * 3, (0.2,) * 3)
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny")
    save_backbone(folder / RUN_EXPORT, backbone, BackboneCard("toy", "vit_tiny", 16, statistics, (0.1, 0.1)))
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, write_raster_in) -> tuple[Path, Path]:
    """Folders of three images of 64 x 64 pixels and of their heights, ten pixels to a cell."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(3):
        place = {"origin": (400_000.0 + 100 * number, 3_280_000.0)}
        write_raster_in(folder, f"images/AAAA_{number}.tif", shape=(3, 80, 80), seed=number, **place)
        heights = np.linspace(0, 20, 64, dtype=np.float32).reshape(8, 8)
        write_raster_in(folder, f"heights/{number}.tif", array=heights, pixel_size=1.0, **place)
    return folder / "images", folder / "heights"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, run_folder, pairs) -> Path:
    """A canopy-height model, fitted for one epoch by the command."""
    from dinov3geo import cli

    folder = tmp_path_factory.mktemp("models") / "toy"
    words = ["canopy", "fit", "--images", pairs[0], "--heights", pairs[1], "--backbone", run_folder]
    words += ["--out", folder, "--epochs", 1, "--set", "views=1", "--cache", folder.with_name("cache")]
    assert cli.main([str(word) for word in words]) == 0
    return folder


def _random_numbers(shape: tuple[int, int, int], dtype: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if np.issubdtype(np.dtype(dtype), np.floating):
        return generator.random(shape).astype(dtype)
    # 0 and 255 are left out: both are common nodata values.
    high = 255 if dtype in ("uint8", "int8") else 10_000
    return generator.integers(1, min(high, np.iinfo(dtype).max), shape).astype(dtype)
