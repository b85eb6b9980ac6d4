"""Canopy height and features of whole scenes, on awkward rasters and on real ones."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.enums import ColorInterp
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from dinov3geo import __version__
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.errors import ConfigError, DataError, RasterError, UserError
from dinov3geo.features.extract import extract_feature_maps
from dinov3geo.heads.canopy import CanopyModel
from dinov3geo.predict.encodings import FINEST_M
from dinov3geo.predict.products import predict_canopy, predict_features
from dinov3geo.predict.runners import canopy_runner
from dinov3geo.rasters.grid import blend_weights
from dinov3geo.rasters.reader import inspect_scene

WriteRaster = Callable[..., Path]


def read(path: Path) -> tuple[np.ndarray, dict]:
    with rasterio.open(path) as dataset:
        return dataset.read(), dataset.profile


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def south_up(pixel: float = 0.1) -> Affine:
    return Affine(pixel, 0, 400_000, 0, pixel, 3_280_000)


def test_a_real_scene_becomes_a_cog_in_metres(osbs_scene: Path, model: CanopyModel, tmp_path: Path) -> None:
    output, png = tmp_path / "deep" / "heights.tif", tmp_path / "heights.png"
    told: list[tuple[int, int]] = []
    report = predict_canopy(
        osbs_scene,
        output,
        model=model,
        tile=256,
        overlap=64,
        preview=png,
        progress=lambda done, total: told.append((done, total)),
        command="dinov3geo canopy predict",
    )
    with rasterio.open(osbs_scene) as scene:
        holes = (scene.read() == 255).all(axis=0)
        expected = (scene.crs, scene.transform, scene.shape)
    with rasterio.open(output) as dataset:
        heights = dataset.read(1)
        assert (dataset.crs, dataset.transform, dataset.shape) == expected
        assert (dataset.dtypes, dataset.nodata, dataset.units) == (("float32",), -9999.0, ("m",))
        assert dataset.descriptions == ("canopy height",)
        tags = dataset.tags()
    assert tags["DINOV3GEO_MODEL"] == "canopy-test"
    assert tags["DINOV3GEO_COMMAND"] == "dinov3geo canopy predict"
    assert tags["DINOV3GEO_VERSION"] == __version__
    assert cog_validate(output, quiet=True)[0]
    np.testing.assert_array_equal(heights == -9999, holes)
    assert heights[~holes].min() >= 0
    assert heights[~holes].max() <= 60
    assert (report.output, report.preview, report.tiles, report.warnings) == (output, png, 4, ())
    assert report.valid_share == pytest.approx((~holes).mean())
    assert report.area_km2 == pytest.approx((~holes).sum() * 0.01 / 1e6)
    assert report.minimum_m == pytest.approx(heights[~holes].min())
    assert report.mean_m == pytest.approx(heights[~holes].mean(dtype=np.float64), rel=1e-5)
    assert report.maximum_m == pytest.approx(heights[~holes].max())
    assert told == [(4, 4), (4, 4)]
    assert png.stat().st_size > 10_000
    assert snapshot(tmp_path) == {"deep", "deep/heights.tif", "heights.png"}


def test_every_neon_plot_is_read_in_its_own_utm_zone(
    data_root: Path, model: CanopyModel, tmp_path: Path
) -> None:
    zones = set()
    for site in ("HARV", "OSBS", "SJER"):
        scene = min((data_root / "neon_plots" / "rgb").glob(f"*{site}*.tif"))
        predict_canopy(scene, tmp_path / f"{site}.tif", model=model)
        with rasterio.open(scene) as source, rasterio.open(tmp_path / f"{site}.tif") as dataset:
            assert (dataset.crs, dataset.transform) == (source.crs, source.transform)
            zones.add(dataset.crs.to_epsg())
    assert len(zones) == 3


def test_a_scene_of_one_tile_equals_the_model_itself(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene = write_raster(shape=(3, 40, 75))
    predict_canopy(scene, tmp_path / "out.tif", model=model)
    numbers = torch.from_numpy(read(scene)[0])[None]
    with torch.no_grad():
        expected = model.predict(numbers, torch.ones(1, 40, 75, dtype=torch.bool))
    np.testing.assert_allclose(
        read(tmp_path / "out.tif")[0][0], expected[0, 0].numpy(), atol=FINEST_M / 2 + 1e-5
    )


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 97), (3, 131, 1), (3, 67, 101)])
@pytest.mark.parametrize("transform", [None, south_up(), Affine(0.1, 0, 4e5, 0, -0.3, 3e6)])
def test_awkward_shapes_and_grids_keep_size_and_position(
    write_raster: WriteRaster,
    model: CanopyModel,
    tmp_path: Path,
    shape: tuple[int, int, int],
    transform: Affine | None,
) -> None:
    scene = write_raster(shape=shape, transform=transform)
    predict_canopy(
        scene, tmp_path / "out.tif", model=model, tile=48, overlap=16, preview=tmp_path / "out.png"
    )
    heights, profile = read(tmp_path / "out.tif")
    assert heights.shape == (1, *shape[1:])
    assert np.isfinite(heights).all()
    assert (heights >= 0).all()
    with rasterio.open(scene) as dataset:
        assert profile["transform"].almost_equals(dataset.transform)
    assert (tmp_path / "out.png").exists()


def test_an_alpha_band_becomes_the_mask(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    array = np.random.default_rng(0).integers(1, 255, (4, 40, 50), dtype=np.uint8)
    array[3] = 255
    array[3, 10:20, 30:] = 0
    scene = write_raster(array=array, photometric="RGB", alpha="YES")
    with rasterio.open(scene) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
    report = predict_canopy(scene, tmp_path / "out.tif", model=model)
    heights = read(tmp_path / "out.tif")[0][0]
    np.testing.assert_array_equal(heights == -9999, array[3] == 0)
    assert report.warnings == ()


def test_holes_and_their_neighbours(write_raster: WriteRaster, model: CanopyModel, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(1, 255, (3, 90, 70), dtype=np.uint8)
    array[:, 20:60, 10:40] = 0
    array[0, 5, 5] = 0  # black in one band only: data
    predict_canopy(
        write_raster(array=array, nodata=0), tmp_path / "out.tif", model=model, tile=32, overlap=16
    )
    heights = read(tmp_path / "out.tif")[0][0]
    np.testing.assert_array_equal(heights == -9999, (array == 0).all(axis=0))


def test_bands_are_found_by_name(write_raster: WriteRaster, model: CanopyModel, tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(1, 255, (3, 32, 32), dtype=np.uint8)
    shuffled = np.stack([rgb[2], np.zeros_like(rgb[0]) + 7, rgb[1], rgb[0]])
    names = ["Blue", "nir", "Green", "Red"]
    plain = write_raster("plain.tif", array=rgb)
    named = write_raster("named.tif", array=shuffled, band_names=names)
    predict_canopy(plain, tmp_path / "a.tif", model=model)
    report = predict_canopy(named, tmp_path / "b.tif", model=model)
    np.testing.assert_array_equal(read(tmp_path / "a.tif")[0], read(tmp_path / "b.tif")[0])
    assert report.warnings == ()


def test_the_model_is_named_as_the_caller_says(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    predict_canopy(write_raster(), tmp_path / "out.tif", model=model, model_name="my-forest")
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.tags()["DINOV3GEO_MODEL"] == "my-forest"
    with pytest.raises(DataError, match="model 'my-forest' needs 3"):
        scene = write_raster("grey.tif", shape=(1, 8, 8))
        predict_canopy(scene, tmp_path / "grey_out.tif", model=model, model_name="my-forest")


def test_surplus_bands_and_another_gsd_are_warned_about(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene = write_raster(shape=(5, 32, 32), pixel_size=0.6, photometric="MINISBLACK")
    report = predict_canopy(scene, tmp_path / "out.tif", model=model)
    surplus, gsd = report.warnings
    assert "has 5 bands without the names red, green, blue; bands 1, 2, 3 were taken" in surplus
    assert "has pixels of 0.6 m, but model 'canopy-test' was trained at 0.1 m" in gsd


def test_8_bit_numbers_in_a_wider_type_are_taken(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    rgb = np.random.default_rng(0).integers(1, 255, (3, 32, 32), dtype=np.uint8)
    for name, dtype in (("a", "uint8"), ("b", "uint16"), ("c", "float32")):
        scene = write_raster(f"{name}_scene.tif", array=rgb.astype(dtype))
        predict_canopy(scene, tmp_path / f"{name}.tif", model=model)
    heights = read(tmp_path / "a.tif")[0]
    np.testing.assert_array_equal(heights, read(tmp_path / "b.tif")[0])
    np.testing.assert_array_equal(heights, read(tmp_path / "c.tif")[0])


def test_an_existing_output_is_replaced_only_when_asked(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene, output = write_raster(), tmp_path / "out.tif"
    output.write_text("mine")
    with pytest.raises(RasterError, match="exists already"):
        predict_canopy(scene, output, model=model)
    assert output.read_text() == "mine"
    predict_canopy(scene, output, model=model, overwrite=True)
    assert read(output)[0].shape == (1, 48, 64)


def test_features_of_one_tile_are_the_backbones_own(
    osbs_scene: Path, backbone: VisionTransformer, tmp_path: Path
) -> None:
    output = tmp_path / "features.tif"
    report = predict_features(osbs_scene, output, backbone=backbone, command="dinov3geo features")
    assert (report.grid_hw, report.dimensions, report.tiles) == ((25, 25), 24, 1)
    features, profile = read(output)
    image, source = read(osbs_scene)
    valid = ~(image == 255).all(axis=0)
    (expected,) = extract_feature_maps(
        backbone, torch.from_numpy(image)[None], torch.from_numpy(valid)[None], blocks=(1,)
    )
    np.testing.assert_allclose(features, expected[0].numpy(), atol=1e-4)
    assert profile["crs"] == source["crs"]
    assert profile["transform"].almost_equals(source["transform"] * Affine.scale(16))
    assert np.isnan(profile["nodata"])
    assert cog_validate(output, quiet=True)[0]


def test_features_keep_holes_and_reach_over_the_edge(
    write_raster: WriteRaster, backbone: VisionTransformer, tmp_path: Path
) -> None:
    array = np.random.default_rng(0).integers(1, 255, (3, 150, 101), dtype=np.uint8)
    array[:, 32:64, 16:48] = 0
    array[:, 40, 20] = 9  # one pixel is enough for a patch
    output = tmp_path / "features.tif"
    report = predict_features(
        write_raster(array=array, nodata=0), output, backbone=backbone, tile=70, overlap=17
    )
    features, _ = read(output)
    assert features.shape == (24, 10, 7)
    holes = np.zeros((10, 7), dtype=bool)
    holes[2:4, 1:3] = True
    holes[2, 1] = False
    np.testing.assert_array_equal(np.isnan(features), np.broadcast_to(holes, features.shape))
    assert report.valid_share == pytest.approx(67 / 70)


def test_principal_components_are_projections_of_the_features(
    osbs_scene: Path, backbone: VisionTransformer, tmp_path: Path
) -> None:
    arguments = {"backbone": backbone, "tile": 128, "overlap": 32, "image_scale": 2.0}
    whole = predict_features(osbs_scene, tmp_path / "whole.tif", **arguments)
    reduced = predict_features(osbs_scene, tmp_path / "pca.tif", pca=3, **arguments)
    assert whole.grid_hw == reduced.grid_hw == (50, 50)
    assert reduced.dimensions == len(reduced.explained) == 3
    features = read(tmp_path / "whole.tif")[0].reshape(24, -1)
    components = read(tmp_path / "pca.tif")[0].reshape(3, -1)
    design = np.vstack([features, np.ones_like(features[:1])])
    fitted = np.linalg.lstsq(design.T, components.T, rcond=None)[0]
    np.testing.assert_allclose(fitted.T @ design, components, atol=1e-2)
    assert components.var(axis=1) == pytest.approx(sorted(components.var(axis=1), reverse=True))


def test_an_existing_picture_is_replaced_only_when_asked(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene, output, png = write_raster(), tmp_path / "out.tif", tmp_path / "out.png"
    png.write_text("mine")
    with pytest.raises(RasterError, match="out.png: it exists already"):
        predict_canopy(scene, output, model=model, preview=png)
    assert png.read_text() == "mine" and not output.exists()
    predict_canopy(scene, output, model=model, preview=png, overwrite=True)
    assert png.stat().st_size > 1000


def test_a_tile_of_a_large_scene_equals_a_scene_of_that_tile(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    large = write_raster("large.tif", shape=(3, 200, 192))
    predict_canopy(large, tmp_path / "large_out.tif", model=model, tile=64, overlap=0)
    array, _ = read(large)
    cut = write_raster("cut.tif", array=array[:, 64:128, 64:128])
    predict_canopy(cut, tmp_path / "cut_out.tif", model=model, tile=64, overlap=0)
    with rasterio.open(tmp_path / "large_out.tif") as dataset:
        part = dataset.read(window=Window(64, 64, 64, 64))
    np.testing.assert_allclose(part, read(tmp_path / "cut_out.tif")[0], atol=FINEST_M + 1e-5)


class Interrupted(BaseException):
    """Ends a run as a signal does."""


def test_a_run_that_is_cut_off_again_and_again_ends_in_the_same_bytes(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    array = np.random.default_rng(0).integers(1, 255, (3, 2300, 80), dtype=np.uint8)
    array[:, 900:1400] = 0
    scene = write_raster(array=array, nodata=0)
    arguments = {"model": model, "tile": 80, "overlap": 16, "batch_size": 3, "command": "c"}
    whole = predict_canopy(scene, tmp_path / "whole.tif", **arguments)
    limits = iter([5, 9, 4, 12, 11, 10**9])
    cuts, starts = 0, []

    while not (tmp_path / "out.tif").exists():
        limit, first = next(limits), None

        def tell(done: int, total: int, limit: int = limit) -> None:
            nonlocal first
            first = done if first is None else first
            if done >= first + limit:
                raise Interrupted

        try:
            report = predict_canopy(scene, tmp_path / "out.tif", progress=tell, **arguments)
        except Interrupted:
            cuts += 1
            assert not (tmp_path / "out.tif").exists()
        starts.append(first)
    assert cuts == 5 and starts == sorted(starts) and starts[-1] > starts[0]
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert report.mean_m == whole.mean_m and report.valid_share == whole.valid_share
    assert report.tiles < whole.tiles
    assert snapshot(tmp_path) == {"scene.tif", "whole.tif", "out.tif"}


def test_other_settings_do_not_go_on_with_unfinished_work(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene = write_raster(shape=(3, 1100, 64))

    def cut(done: int, total: int) -> None:
        if done >= 15:
            raise Interrupted

    with pytest.raises(Interrupted):
        predict_canopy(
            scene, tmp_path / "out.tif", model=model, tile=64, overlap=0, batch_size=1, progress=cut
        )
    assert ".out.tif.unfinished" in os.listdir(tmp_path)
    with pytest.raises(RasterError, match="unfinished work of another command.*--overwrite"):
        predict_canopy(scene, tmp_path / "out.tif", model=model, tile=64, overlap=16)
    predict_canopy(scene, tmp_path / "out.tif", model=model, tile=64, overlap=16, overwrite=True)
    assert snapshot(tmp_path) == {"scene.tif", "out.tif"}


@pytest.mark.parametrize(
    ("integer", "dtype", "nodata", "step"), [("dm", "uint16", 65535, 0.1), ("m", "uint8", 255, 1.0)]
)
def test_whole_numbers(
    osbs_scene: Path, model: CanopyModel, tmp_path: Path, integer: str, dtype: str, nodata: int, step: float
) -> None:
    predict_canopy(osbs_scene, tmp_path / "metres.tif", model=model)
    report = predict_canopy(osbs_scene, tmp_path / "out.tif", model=model, integer=integer)
    metres = read(tmp_path / "metres.tif")[0][0]
    with rasterio.open(tmp_path / "out.tif") as dataset:
        stored = dataset.read(1)
        assert (dataset.dtypes, dataset.nodata, dataset.scales) == ((dtype,), nodata, (step,))
    np.testing.assert_array_equal(stored == nodata, metres == -9999)
    known = stored != nodata
    np.testing.assert_allclose(stored[known] * step, metres[known], atol=step / 2 + 1e-5)
    assert report.mean_m == pytest.approx(stored[known].mean() * step)
    with pytest.raises(ConfigError, match="valid names: dm, m"):
        predict_canopy(osbs_scene, tmp_path / "no.tif", model=model, integer="km")


def test_the_uncertainty_is_the_spread_over_flips_and_turns(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene = write_raster(shape=(3, 64, 64))
    predict_canopy(scene, tmp_path / "out.tif", model=model, uncertainty=True)
    bands, profile = read(tmp_path / "out.tif")
    numbers = read(scene)[0]
    flips = [(), (2,), (1,), (1, 2)]
    views = []
    for axes in flips:
        turned = (
            torch.from_numpy(np.flip(numbers, axes).copy())[None] if axes else torch.from_numpy(numbers)[None]
        )
        with torch.no_grad():
            heights = model.predict(turned)[0].numpy()
        views.append(np.flip(heights, axes)[0] if axes else heights[0])
    # The head may be fitted north up: turns must not change the height itself.
    np.testing.assert_allclose(bands[0], views[0], atol=1e-4)
    np.testing.assert_allclose(bands[1], np.std(views, axis=0, ddof=1), atol=1e-4)
    assert profile["count"] == 2 and bands[1].max() > 0


def test_bfloat16_is_close_and_unknown_precisions_are_refused(
    write_raster: WriteRaster, model: CanopyModel, tmp_path: Path
) -> None:
    scene = write_raster(shape=(3, 64, 64))
    predict_canopy(scene, tmp_path / "a.tif", model=model)
    predict_canopy(scene, tmp_path / "b.tif", model=model, precision="bfloat16")
    a, b = read(tmp_path / "a.tif")[0], read(tmp_path / "b.tif")[0]
    assert 0 < np.abs(a - b).max() < 0.5
    with pytest.raises(ConfigError, match="auto, float32, bfloat16"):
        predict_canopy(scene, tmp_path / "c.tif", model=model, precision="half")


def test_unknown_engines_are_refused(write_raster: WriteRaster, model: CanopyModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown engine 'dask'; valid names: local, ray"):
        predict_canopy(write_raster(), tmp_path / "out.tif", model=model, engine="dask")


@pytest.mark.slow
def test_a_scene_of_2048_pixels_equals_a_blend_in_memory(write_raster, model, tmp_path):
    scene = write_raster(shape=(3, 2048, 2048))
    predict_canopy(scene, tmp_path / "heights.tif", model=model, tile=512, overlap=128, batch_size=4)
    with rasterio.open(scene) as source, rasterio.open(tmp_path / "heights.tif") as target:
        image, heights = source.read(), target.read(1)
    run, weights = canopy_runner(model), blend_weights((512, 512), 128).astype(np.float64)
    total, weight = np.zeros((2, 2048, 2048))
    for window in inspect_scene(scene).grid.tiles(512, 128).windows():
        place = window.toslices()
        tile = np.ascontiguousarray(image[:, *place])
        total[place] += weights * run(tile[None], np.ones((1, 512, 512), dtype=np.bool_))[0, 0]
        weight[place] += weights
    np.testing.assert_allclose(heights, total / weight, atol=1e-4)
