"""Scenes, places and settings that prediction refuses, leaving nothing behind."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.errors import ConfigError, DataError, GeoreferenceError, RasterError, UserError
from dinov3geo.heads.canopy import CanopyModel
from dinov3geo.predict import products
from dinov3geo.predict.products import predict_canopy, predict_features

WriteRaster = Callable[..., Path]


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def nan_pixel() -> np.ndarray:
    array = np.full((3, 300, 300), 100, dtype=np.float32)
    array[1, 290, 17] = np.nan
    return array


BAD_SCENES = {
    "one band": ({"shape": (1, 9, 9)}, DataError, "has 1 band; model 'canopy-test' needs 3: red, green, b"),
    "no CRS": ({"crs": None}, GeoreferenceError, "no coordinate reference system"),
    "rotated": (
        {"transform": Affine(0.1, 0.02, 4e5, 0.02, -0.1, 3e6)},
        GeoreferenceError,
        "rotated or sheared",
    ),
    "all nodata": (
        {"array": np.zeros((3, 20, 20), dtype=np.uint8), "nodata": 0},
        DataError,
        "no valid pixel",
    ),
    "NaN": ({"array": nan_pixel()}, DataError, "holds NaN or infinity"),
    "reflectance": ({"dtype": "uint16"}, DataError, "expects 0 to 255"),
    "unit range": ({"dtype": "float32"}, DataError, "expects 0 to 255"),
}


@pytest.mark.parametrize("kind", BAD_SCENES)
def test_a_bad_scene_gives_one_line_and_leaves_nothing(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path, kind: str
) -> None:
    arguments, error, message = BAD_SCENES[kind]
    scene = write_raster("scene.tif", **arguments)
    threads = threading.active_count()
    with pytest.raises(error, match=message) as caught:
        predict_canopy(
            scene, tmp_path / "new" / "out.tif", model=model, tile=64, overlap=16, preview=tmp_path / "o.png"
        )
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert str(scene) in str(caught.value)
    assert snapshot(tmp_path) == {"scene.tif"}
    assert threading.active_count() == threads


def test_a_scene_that_breaks_in_the_middle_leaves_nothing(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene = write_raster(
        shape=(3, 256, 64), tiled=True, blockxsize=64, blockysize=64, compress="deflate", interleave="pixel"
    )
    with rasterio.open(scene) as dataset:
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_0_2", "TIFF", bidx=1))
    content = bytearray(scene.read_bytes())
    content[offset : offset + 2000] = b"\x00" * 2000
    scene.write_bytes(content)
    told: list[int] = []
    with pytest.raises(RasterError, match="damaged or truncated"):
        predict_canopy(
            scene,
            tmp_path / "out.tif",
            model=model,
            tile=64,
            overlap=0,
            batch_size=1,
            progress=lambda done, total: told.append(done),
        )
    assert told
    assert snapshot(tmp_path) == {"scene.tif"}


def test_a_truncated_file_is_refused(write_raster: WriteRaster, model: CanopyModel, tmp_path: Path) -> None:
    scene = write_raster(shape=(3, 200, 200))
    os.truncate(scene, scene.stat().st_size // 2)
    with pytest.raises(RasterError, match="truncated"):
        predict_canopy(scene, tmp_path / "out.tif", model=model)
    assert snapshot(tmp_path) == {"scene.tif"}


def test_no_scene_no_raster_no_place_for_the_output(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene, text, output = write_raster(), tmp_path / "notes.txt", tmp_path / "out.tif"
    text.write_text("not a raster")
    for bad in (tmp_path / "missing.tif", text):
        with pytest.raises(RasterError, match=bad.name):
            predict_canopy(bad, output, model=model)
    for place, png in (
        (text / "out.tif", None),
        (tmp_path, None),
        (scene, None),
        (output, tmp_path / "out.jpg"),
        (output, text / "out.png"),
        (output, Path("/proc/none/out.png")),
    ):
        with pytest.raises(RasterError, match="cannot write"):
            predict_canopy(scene, place, model=model, preview=png, overwrite=True)
    assert snapshot(tmp_path) == {"scene.tif", "notes.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 0}, "tile must be at least"),
        ({"batch_size": 0}, "batch size"),
        ({"tile": 64, "overlap": 64}, "overlap"),
    ],
)
def test_senseless_tiles_are_refused(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path, arguments: dict, message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        predict_canopy(write_raster(), tmp_path / "out.tif", model=model, **arguments)


def test_too_many_components_are_refused_before_anything_is_written(
    osbs_scene: Path, backbone: VisionTransformer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="1 to 24"):
        predict_features(osbs_scene, tmp_path / "pca.tif", backbone=backbone, pca=25)
    assert snapshot(tmp_path) == set()


def test_more_features_than_a_file_should_hold_are_refused(
    write_raster: WriteRaster, backbone: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "MAX_BANDS", 23)
    scene = write_raster()
    with pytest.raises(ConfigError, match="24 bands are too many .* at most 23; .*--pca K"):
        predict_features(scene, tmp_path / "out.tif", backbone=backbone)
    assert snapshot(tmp_path) == {scene.name}
    assert predict_features(scene, tmp_path / "out.tif", backbone=backbone, pca=2).dimensions == 2
