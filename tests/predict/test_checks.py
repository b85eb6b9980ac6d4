"""What the scene must be for a model, beyond what the products' tests show."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.errors import DataError, RasterError
from dinov3geo.predict.checks import ModelInput, check_numbers, check_picture, gsd_warnings
from dinov3geo.predict.preview import read_overview
from dinov3geo.rasters.bands import choose_bands
from dinov3geo.rasters.reader import SceneReader

WriteRaster = Callable[..., Path]


def make_input(
    scale: float, *, bands: tuple[str, ...] = ("red",), gsd_m: tuple[float, float] | None = (0.1, 0.25)
) -> ModelInput:
    count = len(bands)
    numbers = Normalization(bands, (scale,) * count, (0.0,) * count, (0.2,) * count, (0.1,) * count)
    return ModelInput("vit-test", numbers, gsd_m)


def test_8_bit_numbers_for_a_reflectance_model_are_refused(write_raster: WriteRaster) -> None:
    scene = write_raster(shape=(1, 8, 8))
    with SceneReader(scene) as reader, pytest.raises(DataError, match="8-bit numbers"):
        check_numbers(reader, make_input(1e-4))


def test_reflectance_for_a_reflectance_model_is_taken(write_raster: WriteRaster) -> None:
    with SceneReader(write_raster(shape=(1, 8, 8), dtype="uint16")) as reader:
        check_numbers(reader, make_input(1e-4))


def test_numbers_without_data_do_not_count(write_raster: WriteRaster) -> None:
    array = np.full((1, 400, 300), 60_000, dtype=np.uint16)
    array[0, 200, 150] = 77
    with SceneReader(write_raster(array=array, nodata=60_000)) as reader:
        check_numbers(reader, make_input(1 / 255))


@pytest.mark.parametrize(("gsd_m", "warned"), [(0.04, 1), (0.05, 0), (0.2, 0), (0.5, 0), (0.51, 1)])
def test_gsd_is_warned_about_beyond_a_factor_of_two(gsd_m: float, warned: int) -> None:
    assert len(gsd_warnings(Path("scene.tif"), gsd_m, gsd_m, make_input(1.0))) == warned
    assert gsd_warnings(Path("scene.tif"), gsd_m, gsd_m, make_input(1.0, gsd_m=None)) == []


RGB = ("red", "green", "blue")


def test_bands_without_names_are_taken_in_order(write_raster: WriteRaster) -> None:
    scene = write_raster(photometric="MINISBLACK")
    assert choose_bands(scene, ("nir", "red", "green"), model="vit-test") == ((1, 2, 3), [])
    assert choose_bands(scene, RGB, model="vit-test") == ((1, 2, 3), [])


@pytest.mark.parametrize("names", [["nir", "red", "green"], ["Red", "", ""], ["height"]])
def test_names_that_lack_a_band_are_refused(write_raster: WriteRaster, names: list[str]) -> None:
    # GDAL calls any three bands of bytes red, green, blue, whatever their names.
    options = {"photometric": "MINISBLACK"} if "" in names else {}
    scene = write_raster(shape=(len(names), 8, 8), band_names=names, **options)
    listed = ", ".join(name.lower() or "unnamed" for name in names)
    with pytest.raises(DataError, match=f"names its bands {listed}; model 'vit-test' needs 3: red, green, b"):
        choose_bands(scene, RGB, model="vit-test")


def test_descriptions_that_name_no_band_do_not_count(write_raster: WriteRaster) -> None:
    scene = write_raster(band_names=["first", "B3", "B2"])
    assert choose_bands(scene, RGB, model="vit-test") == ((1, 2, 3), [])


def test_numbered_bands_of_sentinel2_are_colours(write_raster: WriteRaster) -> None:
    scene = write_raster(band_names=["B02", "b03", "B04"], photometric="MINISBLACK")
    assert choose_bands(scene, RGB, model="vit-test") == ((3, 2, 1), [])
    assert choose_bands(scene, ("B02", "B03", "B04"), model="vit-test") == ((1, 2, 3), [])
    with pytest.raises(DataError, match="names its bands blue, green, red; model 'vit-test' needs"):
        choose_bands(scene, ("red", "nir", "blue"), model="vit-test")


def test_bands_are_found_by_colour_interpretation(write_raster: WriteRaster) -> None:
    scene = write_raster(shape=(4, 8, 8))
    with rasterio.open(scene, "r+") as dataset:
        dataset.colorinterp = [getattr(ColorInterp, name) for name in ("blue", "green", "red", "undefined")]
    assert choose_bands(scene, RGB, model="vit-test") == ((3, 2, 1), [])
    bands, (warning,) = choose_bands(scene, (*RGB, "nir"), model="vit-test")
    assert bands == (1, 2, 3, 4) and "were taken as these" in warning
    np.testing.assert_array_equal(read_overview(scene).values, rasterio.open(scene).read([3, 2, 1]))


def test_an_alpha_band_is_no_band(write_raster: WriteRaster) -> None:
    scene = write_raster(shape=(4, 8, 8), photometric="RGB", alpha="YES")
    with pytest.raises(DataError, match="has 3 bands; model 'vit-test' needs 4"):
        choose_bands(scene, ("red", "green", "blue", "nir"), model="vit-test")


def test_a_backbone_tells_what_it_takes_by_its_card(backbone: VisionTransformer) -> None:
    wanted = ModelInput.of_backbone(backbone)
    assert (wanted.name, wanted.normalization.bands) == ("vit-test", ("red", "green", "blue"))
    with pytest.raises(DataError, match="no card"):
        ModelInput.of_backbone(VisionTransformer(VitConfig(8, 1, 1, "mlp", 8)))


def test_a_picture_may_lie_in_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    check_picture(tmp_path / "a" / "b" / "picture.PNG", sources=(), overwrite=False)
    assert not (tmp_path / "a").exists()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(RasterError, match="it is a folder"):
        check_picture(tmp_path / "folder.png", sources=(), overwrite=True)


def test_a_picture_replaces_no_source_and_others_only_when_asked(tmp_path: Path) -> None:
    png, link = tmp_path / "a.png", tmp_path / "link.png"
    png.touch()
    link.hardlink_to(png)
    for other in (png, link):
        with pytest.raises(RasterError, match="would replace"):
            check_picture(other, sources=(tmp_path / "none.tif", png), overwrite=True)
    with pytest.raises(RasterError, match="exists already"):
        check_picture(png, sources=(), overwrite=False)
    check_picture(png, sources=(), overwrite=True)
