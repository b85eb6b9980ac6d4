"""Land cover by a model whose classes are known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from rio_cogeo.cogeo import cog_validate

from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.errors import ConfigError
from dinov3geo.heads.base import OutputSpec
from dinov3geo.predict.landcover import predict_landcover, write_polygons
from dinov3geo.predict.sidecars import write_sidecars

WriteRaster = Callable[..., Path]
NAMES = ("dark", "middle", "bright")


@dataclass
class BrightnessModel:
    """Classes by the brightness of the red band; each tile is a little surer of what it sees on its left."""

    backbone: VisionTransformer
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> OutputSpec:
        return OutputSpec("land_cover", class_names=NAMES, dtype="uint8", nodata=255)

    def predict(self, numbers: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        red = numbers[:, 0].float()
        distances = torch.stack([(red - centre).abs() for centre in (0, 128, 255)], dim=1)
        sure = torch.linspace(1.5, 0.5, red.shape[-1], device=red.device)
        return torch.softmax(-distances / 40 * sure, dim=1)


@pytest.fixture
def model(backbone: VisionTransformer) -> BrightnessModel:
    return BrightnessModel(backbone)


@pytest.fixture
def scene(write_raster: WriteRaster) -> Path:
    rng = np.random.default_rng(0)
    array = np.kron(rng.integers(1, 255, (3, 9, 12)), np.ones((1, 10, 10))).astype(np.uint8)
    array[:, 20:40, 50:70] = 0
    return write_raster(array=array, nodata=0, pixel_size=2.0)


def blended(scene: Path, model: BrightnessModel) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of tiles averaged in memory."""
    from dinov3geo.rasters.grid import blend_weights
    from dinov3geo.rasters.reader import SceneReader

    with SceneReader(scene) as reader:
        grid = reader.info.grid
        plan = grid.tiles(48, 16)
        total, weights = np.zeros((3, *grid.shape_hw)), np.zeros(grid.shape_hw)
        known = np.zeros(grid.shape_hw, dtype=bool)
        for window in plan.windows():
            rows, cols = window.toslices()
            numbers, valid = reader.read(window)
            weight = blend_weights(plan.size_hw, 16)
            total[:, rows, cols] += model.predict(torch.from_numpy(numbers)[None])[0].numpy() * weight
            weights[rows, cols] += weight
            known[rows, cols] = valid
    return total / weights, known


def test_probabilities_are_blended_before_the_class_is_chosen(
    scene: Path, model: BrightnessModel, tmp_path: Path
) -> None:
    report = predict_landcover(
        scene,
        tmp_path / "cover.tif",
        model=model,
        uncertainty=tmp_path / "unsure.tif",
        probabilities=tmp_path / "shares.tif",
        tile=48,
        overlap=16,
    )
    shares, known = blended(scene, model)
    with rasterio.open(tmp_path / "cover.tif") as dataset:
        classes = dataset.read(1)
        assert (dataset.dtypes, dataset.nodata) == (("uint8",), 255)
        assert dataset.colormap(1)[0] != dataset.colormap(1)[1]
        assert [dataset.tags()[f"CLASS_{n}"] for n in range(3)] == list(NAMES)
    np.testing.assert_array_equal(classes == 255, ~known)
    np.testing.assert_array_equal(classes[known], shares.argmax(axis=0)[known])
    with rasterio.open(tmp_path / "shares.tif") as dataset:
        assert dataset.descriptions == NAMES
        np.testing.assert_allclose(dataset.read()[:, known], 100 * shares[:, known], atol=0.51)
    entropy = -(shares * np.log(shares)).sum(axis=0) / np.log(3)
    with rasterio.open(tmp_path / "unsure.tif") as dataset:
        np.testing.assert_allclose(dataset.read(1)[known], 100 * entropy[known], atol=0.51)
    for name in ("cover", "shares", "unsure"):
        assert cog_validate(tmp_path / f"{name}.tif", quiet=True)[0]
    assert report.valid_share == pytest.approx(known.mean())


@pytest.mark.parametrize("suffix", ["gpkg", "parquet"])
def test_polygons_cover_each_class_and_tell_its_area(
    scene: Path, model: BrightnessModel, tmp_path: Path, suffix: str
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    predict_landcover(scene, tmp_path / "cover.tif", model=model)
    output = tmp_path / f"cover.{suffix}"
    count = write_polygons(tmp_path / "cover.tif", output)
    frame = geopandas.read_parquet(output) if suffix == "parquet" else geopandas.read_file(output)
    assert len(frame) == count > 3 and frame.crs.to_epsg() == 32617
    with rasterio.open(tmp_path / "cover.tif") as dataset:
        classes = dataset.read(1)
    for number, name in enumerate(NAMES):
        own = frame[frame["class"] == number]
        assert set(own["name"]) <= {name}
        assert own.area.sum() == pytest.approx((classes == number).sum() * 4.0)
    # On the ellipsoid; UTM is 0.04 % off in lengths there.
    assert frame["area_m2"].sum() == pytest.approx((classes != 255).sum() * 4.0, rel=2e-3)
    assert write_polygons(tmp_path / "cover.tif", output, min_area_m2=450, overwrite=True) < count
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["scene.tif", "cover.tif", output.name])


def test_bad_names(scene: Path, model: BrightnessModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names of their own"):
        predict_landcover(scene, tmp_path / "a.tif", model=model, uncertainty=tmp_path / "a.tif")
    predict_landcover(scene, tmp_path / "a.tif", model=model)
    with pytest.raises(ConfigError, match=r"\.gpkg or \.parquet"):
        write_polygons(tmp_path / "a.tif", tmp_path / "a.shp")


def test_names_and_colours_go_beside_it(scene: Path, model: BrightnessModel, tmp_path: Path) -> None:
    predict_landcover(scene, tmp_path / "a.tif", model=model)
    names = {path.name for path in write_sidecars(tmp_path / "a.tif", scene=scene)}
    assert names == {"a.stac.json", "a.qml", "a_legend.png", "a.tif.aux.xml"}
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert dataset.tags()["CLASS_2"] == "bright"
