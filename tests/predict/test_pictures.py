"""Feature pictures of the real scene."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.errors import DataError, RasterError
from dinov3geo.predict import pictures
from dinov3geo.predict.pictures import show_pca, show_similarity
from dinov3geo.predict.preview import Overview
from dinov3geo.rasters.reader import inspect_scene

WriteRaster = Callable[..., Path]


def point_at(scene: Path, row: float, col: float) -> tuple[float, float]:
    return inspect_scene(scene).grid.transform * (col, row)


def test_pca_of_the_real_scene_is_a_picture(
    osbs_scene: Path, backbone: VisionTransformer, tmp_path: Path
) -> None:
    show_pca(osbs_scene, tmp_path / "pca.png", backbone=backbone)
    with Image.open(tmp_path / "pca.png") as picture:
        assert picture.width > 1.5 * picture.height
    assert [p.name for p in tmp_path.iterdir()] == ["pca.png"]


@pytest.mark.parametrize("row_col", [(3, 5), (129, 70), (180, 200), (187, 202)])
def test_the_marked_patch_is_the_most_similar_one(
    write_raster: WriteRaster,
    backbone: VisionTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row_col: tuple[int, int],
) -> None:
    scene = write_raster(shape=(3, 188, 203))
    drawn: list[Overview] = []
    monkeypatch.setattr(pictures, "_draw_similarity", lambda axes, similarity: drawn.append(similarity))
    xy = point_at(scene, row_col[0] + 0.5, row_col[1] + 0.5)
    show_similarity(scene, tmp_path / "s.png", backbone=backbone, points=[xy], image_scale=1)
    (values,) = drawn[0].values
    assert values.shape == (12, 13)
    assert np.unravel_index(values.argmax(), values.shape) == (row_col[0] // 16, row_col[1] // 16)
    assert values.max() == pytest.approx(1, abs=1e-4)


def test_similarity_of_the_real_scene_is_a_picture(
    osbs_scene: Path, backbone: VisionTransformer, tmp_path: Path
) -> None:
    xy = point_at(osbs_scene, 120, 190)
    show_similarity(osbs_scene, tmp_path / "s.png", backbone=backbone, points=[xy])
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_points_outside_and_on_holes_are_refused(
    write_raster: WriteRaster, backbone: VisionTransformer, tmp_path: Path
) -> None:
    array = np.full((3, 40, 40), 9, dtype=np.uint8)
    array[:, 20:] = 0
    scene = write_raster(array=array, nodata=0)
    for xy, message in (
        ((0.0, 0.0), "point 0 0 lies outside of scene .* expected x 400000 to 400004"),
        (point_at(scene, 30, 10), "holds no data at point"),
    ):
        with pytest.raises(DataError, match=message):
            show_similarity(scene, tmp_path / "s.png", backbone=backbone, points=[xy])
    assert not (tmp_path / "s.png").exists()


def test_bad_scenes_and_names_are_refused(
    write_raster: WriteRaster, backbone: VisionTransformer, tmp_path: Path
) -> None:
    with pytest.raises(RasterError, match="PNG"):
        show_pca(write_raster(), tmp_path / "pca.tif", backbone=backbone)
    with pytest.raises(DataError, match="needs 3: red, green, blue"):
        show_pca(write_raster(shape=(1, 8, 8)), tmp_path / "pca.png", backbone=backbone)
    with pytest.raises(DataError, match="at least 4 valid patches"):
        show_pca(write_raster(shape=(3, 16, 16)), tmp_path / "pca.png", backbone=backbone, image_scale=1)
