"""Pictures: what is read, what is drawn, and that nothing half-written is left."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from matplotlib.figure import Figure
from PIL import Image

from dinov3geo.errors import DataError, GeoreferenceError, RasterError
from dinov3geo.predict.preview import (
    draw_heights,
    draw_scale_bar,
    new_figure,
    read_overview,
    round_down,
    round_up,
    save_figure,
    to_rgba,
    write_preview,
)
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import inspect_scene

WriteRaster = Callable[..., Path]


def heights(shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 23, shape).astype(np.float32)


def scale_label(grid: PixelGrid) -> tuple[str, float]:
    """Text of the scale bar and the share of the panel it takes."""
    _, (axes,) = new_figure(grid, panels=1)
    draw_scale_bar(axes, grid)
    return axes.texts[0].get_text(), axes.patches[0].get_width()


def test_the_real_scene_gives_a_picture_of_two_panels(osbs_scene: Path, tmp_path: Path) -> None:
    write_preview(osbs_scene, osbs_scene, tmp_path / "new" / "picture.png")
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        assert picture.width > 1.5 * picture.height
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 1000
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "picture.png"]


def test_heights_alone_give_one_panel(write_raster: WriteRaster, tmp_path: Path) -> None:
    path = write_raster(array=heights((64, 64)))
    write_preview(None, path, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width < 1.4 * picture.height


def test_a_large_raster_is_read_small_and_holes_stay_holes(write_raster: WriteRaster) -> None:
    array = heights((900, 300))
    array[450:] = -9999
    overview = read_overview(write_raster(array=array, nodata=-9999), max_side=90)
    assert overview.values.shape == (1, 90, 30)
    np.testing.assert_array_equal(overview.valid, (np.arange(90) < 45)[:, None].repeat(30, axis=1))
    blocks = array[:450].reshape(45, 10, 30, 10).mean(axis=(1, 3))
    np.testing.assert_allclose(overview.values[0, :45], blocks, rtol=1e-4)


def test_south_up_rasters_are_shown_north_up(write_raster: WriteRaster) -> None:
    array = heights()
    north = read_overview(write_raster("north.tif", array=array))
    south = read_overview(
        write_raster("south.tif", array=array[::-1], transform=Affine(0.1, 0, 4e5, 0, 0.1, 3_279_995.2))
    )
    np.testing.assert_array_equal(north.values, south.values)
    assert north.extent == pytest.approx(south.extent)


def test_colours_are_found_by_name_and_alpha_is_transparent(write_raster: WriteRaster) -> None:
    array = np.zeros((4, 8, 8), dtype=np.uint8)
    array[:] = np.array([10, 20, 30, 40])[:, None, None]
    named = write_raster("named.tif", array=array, band_names=["blue", "green", "red", "nir"])
    np.testing.assert_allclose(to_rgba(read_overview(named))[0, 0], [30 / 255, 20 / 255, 10 / 255, 1])
    array[3, :4] = 0
    alpha = write_raster("alpha.tif", array=array, photometric="RGB", alpha="YES")
    opacity = to_rgba(read_overview(alpha))[..., 3]
    np.testing.assert_array_equal(opacity, (np.arange(8) >= 4)[:, None] * np.ones(8))


@pytest.mark.parametrize("bands", [1, 2, 13])
def test_other_numbers_are_stretched_and_few_bands_are_grey(write_raster: WriteRaster, bands: int) -> None:
    rgba = to_rgba(read_overview(write_raster(shape=(bands, 32, 32), dtype="uint16")))
    assert rgba.shape == (32, 32, 4)
    assert rgba[..., :3].min() == 0
    assert rgba[..., :3].max() == 1
    assert (rgba[..., 0] == rgba[..., 1]).all() == (bands < 3)


def test_heights_run_from_0_to_a_round_number_above_their_99th_percentile(write_raster: WriteRaster) -> None:
    array = heights()
    array[0, 0] = 900
    overview = read_overview(write_raster(array=array, nodata=-9999))
    _, (axes,) = new_figure(overview.grid, panels=1)
    draw_heights(axes, overview, title="Canopy height")
    assert axes.images[0].get_clim() == (0, 25)
    assert axes.get_legend() is None


def test_pixels_without_data_are_explained(write_raster: WriteRaster) -> None:
    array = heights()
    array[:10] = -9999
    overview = read_overview(write_raster(array=array, nodata=-9999))
    _, (axes,) = new_figure(overview.grid, panels=1)
    draw_heights(axes, overview, title="Canopy height")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["no data"]


@pytest.mark.parametrize(
    ("crs", "transform", "label", "share"),
    [
        ("EPSG:32617", Affine(0.1, 0, 4e5, 0, -0.1, 3e6), "1 m", 1 / 6.4),
        ("EPSG:32617", Affine(10, 0, 4e5, 0, -30, 3e6), "100 m", 100 / 640),
        ("EPSG:32617", Affine(100, 0, 4e5, 0, -100, 3e6), "1 km", 1 / 6.4),
        ("EPSG:2264", Affine(10, 0, 2e6, 0, -10, 6e5), "20 m", 20 / (640 * 0.3048006)),  # US survey feet
        ("EPSG:4326", Affine(0.001, 0, 10, 0, -0.001, 60.024), "500 m", 500 / (64 * 0.001 * 55800)),
    ],
)
def test_the_scale_bar_is_in_metres(
    write_raster: WriteRaster, crs: str, transform: Affine, label: str, share: float
) -> None:
    grid = inspect_scene(write_raster(crs=crs, transform=transform)).grid
    text, width = scale_label(grid)
    assert text == label
    assert width == pytest.approx(share, rel=0.01)


def test_round_numbers() -> None:
    assert [round_up(value) for value in (0.2, 1.1, 12.3, 20, 23.4, 61)] == [1, 1.5, 15, 20, 25, 80]
    assert [round_down(value) for value in (0.26, 1, 4.9, 9.99, 5000)] == [0.2, 1, 2, 5, 5000]


def test_maps_of_different_places_are_refused(write_raster: WriteRaster, tmp_path: Path) -> None:
    scene = write_raster("scene.tif")
    far = write_raster("far.tif", array=heights(), origin=(500_000, 3_280_000))
    other = write_raster("other.tif", array=heights(), crs="EPSG:32616")
    for path, message in ((far, "do not overlap"), (other, "expected one CRS")):
        with pytest.raises(GeoreferenceError, match=message):
            write_preview(scene, path, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_heights_without_a_valid_pixel_are_refused(write_raster: WriteRaster, tmp_path: Path) -> None:
    empty = write_raster(array=np.full((8, 8), -9999, dtype=np.float32), nodata=-9999)
    with pytest.raises(DataError, match="no valid pixel"):
        write_preview(None, empty, tmp_path / "picture.png")


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = tmp_path / "picture.png"
    png.write_text("old")

    def fail(self: Figure, path: Path, **arguments: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(RasterError, match="No space left on device"):
        save_figure(Figure(), png)
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    assert png.read_text() == "old"
