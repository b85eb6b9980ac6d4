"""Feature stores, read by xarray and geopandas, and a head fitted from one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS

from dinov3geo.errors import ConfigError, DataError, RasterError
from dinov3geo.features.store import FeatureStore, StoredType
from dinov3geo.features.table import TableWriter
from dinov3geo.features.zarr_writer import ZarrWriter
from dinov3geo.rasters.grid import PixelGrid

GRID = PixelGrid(CRS.from_epsg(32617), Affine(1.6, 0, 400_000, 0, -1.6, 3_280_000), 70, 90)
NAMES = tuple(f"feature {n}" for n in range(6))
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(6, 70, 90)).astype(np.float32)
VALID = RNG.random((70, 90)) > 0.1

pytest.importorskip("zarr")


def write(kind: type, path: Path, dtype: str = "float32", **options: object) -> StoredType:
    stored = StoredType.fitted(dtype, VALUES.reshape(6, -1).T)
    with kind(path, GRID, NAMES, stored, attributes={"DINOV3GEO_MODEL": "x"}, **options) as writer:
        for start in range(0, 70, 23):
            writer.write(VALUES[:, start : start + 23].copy(), VALID[start : start + 23])
    return stored


TOLERANCE = {"float32": 0, "float16": 2e-3, "int8": 0.02}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_xarray_opens_the_store_with_its_place(tmp_path: Path, dtype: str) -> None:
    xarray = pytest.importorskip("xarray")
    write(ZarrWriter, tmp_path / "f.zarr", dtype)
    with xarray.open_zarr(tmp_path / "f.zarr", consolidated=False) as data:
        features = data["features"]
        assert features.dims == ("feature", "y", "x")
        for row, col in ((0, 0), (0, 89), (69, 0), (69, 89)):
            x, y = GRID.transform @ (col + 0.5, row + 0.5)
            assert float(data["x"][col]) == pytest.approx(x, abs=1e-6)
            assert float(data["y"][row]) == pytest.approx(y, abs=1e-6)
        assert CRS.from_wkt(data["spatial_ref"].attrs["crs_wkt"]) == GRID.crs
        numbers = features.values.astype(np.float32)
        assert data.attrs["DINOV3GEO_MODEL"] == "x"
    assert np.isnan(numbers[:, ~VALID]).all()
    # The last thousandth of the numbers is cut off at the greatest one that fits.
    wrong = np.abs(numbers - VALUES)[:, VALID]
    assert np.quantile(wrong, 0.998) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_store_reads_what_was_written(tmp_path: Path, dtype: str) -> None:
    stored = write(ZarrWriter, tmp_path / "f.zarr", dtype)
    store = FeatureStore(tmp_path / "f.zarr")
    assert (store.grid, store.names) == (GRID, NAMES)
    expected = stored.decode(stored.encode(VALUES.copy(), VALID))
    np.testing.assert_array_equal(store.read(), expected)
    np.testing.assert_array_equal(store.read(slice(3, 9), slice(5, 50)), expected[:, 3:9, 5:50])
    cells = np.array([[0, 0], [69, 89], [13, 7]])
    xy = np.array([GRID.transform @ (col + 0.3, row + 0.8) for row, col in cells])
    np.testing.assert_array_equal(store.sample(xy), expected[:, cells[:, 0], cells[:, 1]].T)
    with pytest.raises(DataError, match="outside of the feature store"):
        store.sample(np.array([[0.0, 0.0]]))


def test_a_head_is_fitted_from_the_store_alone(tmp_path: Path) -> None:
    from sklearn.linear_model import Ridge

    write(ZarrWriter, tmp_path / "f.zarr", "int8")
    heights = 3 * VALUES[0] - VALUES[4] + 10
    rows, cols = np.nonzero(VALID)
    xy = np.column_stack(GRID.transform @ (cols + 0.5, rows + 0.5))
    features = FeatureStore(tmp_path / "f.zarr").sample(xy)
    half = len(features) // 2
    fitted = Ridge().fit(features[:half], heights[rows, cols][:half])
    assert fitted.score(features[half:], heights[rows, cols][half:]) > 0.99


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_geopandas_opens_the_table(tmp_path: Path, dtype: str) -> None:
    geopandas = pytest.importorskip("geopandas")
    pytest.importorskip("pyarrow")
    stored = write(TableWriter, tmp_path / "f.parquet", dtype)
    frame = geopandas.read_parquet(tmp_path / "f.parquet")
    assert len(frame) == VALID.sum() and frame.crs.to_epsg() == 32617
    first = frame.iloc[17]
    x, y = GRID.transform @ (first["col"] + 0.5, first["row"] + 0.5)
    assert (first.geometry.x, first.geometry.y) == pytest.approx((x, y))
    expected = stored.encode(VALUES.copy(), VALID)[:, first["row"], first["col"]]
    np.testing.assert_array_equal(np.asarray(first["features"]), expected)
    import pyarrow.parquet

    facts = pyarrow.parquet.read_schema(tmp_path / "f.parquet").metadata
    assert float(facts[b"scale"]) == stored.scale and json.loads(facts[b"transform"])[0] == 1.6


@pytest.mark.parametrize(("kind", "name"), [(ZarrWriter, "f.zarr"), (TableWriter, "f.parquet")])
def test_whole_or_absent(tmp_path: Path, kind: type, name: str) -> None:
    stored = StoredType("float32")
    with pytest.raises(KeyboardInterrupt):
        with kind(tmp_path / name, GRID, NAMES, stored, attributes={}) as writer:
            writer.write(VALUES[:, :10].copy(), VALID[:10])
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    write(kind, tmp_path / name)
    with pytest.raises(RasterError, match="exists"):
        write(kind, tmp_path / name)
    write(kind, tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float32, float16, int8"):
        StoredType.fitted("int4", VALUES.reshape(6, -1).T)
    with pytest.raises(RasterError, match="no feature store"):
        FeatureStore(tmp_path)


@pytest.fixture(scope="module")
def tiny_backbone() -> object:
    """Two untrained blocks, 24 wide."""
    import torch

    from dinov3geo.backbones.card import BackboneCard, Normalization
    from dinov3geo.backbones.vit import VisionTransformer, VitConfig

    torch.manual_seed(0)
    backbone = VisionTransformer(VitConfig(24, 2, 2, "mlp", 48, layer_scale=0.5)).eval().requires_grad_(False)
    scale = (1 / 255,) * 3
    normalization = Normalization(("red", "green", "blue"), scale, (0.0,) * 3, (0.5,) * 3, (0.2,) * 3)
    backbone.card = BackboneCard("vit-test", "vit_tiny", 16, normalization)
    return backbone


def test_features_of_a_scene_go_into_each_kind_of_store(
    write_raster: Callable[..., Path], tmp_path: Path, tiny_backbone: object
) -> None:
    from dinov3geo.predict.products import predict_features

    scene = write_raster(shape=(3, 100, 150), nodata=0)
    options = {"backbone": tiny_backbone, "tile": 64, "overlap": 16}
    predict_features(scene, tmp_path / "f.tif", **options)
    report = predict_features(scene, tmp_path / "f.zarr", dtype="float16", **options)
    predict_features(scene, tmp_path / "i.tif", dtype="int8", **options)
    assert report.grid_hw == (7, 10) and report.dimensions == 24
    with rasterio.open(tmp_path / "f.tif") as plain, rasterio.open(tmp_path / "i.tif") as small:
        expected = plain.read()
        step = small.scales[0]
        fits = np.abs(expected) < 127 * step
        np.testing.assert_allclose((small.read() * step)[fits], expected[fits], atol=step * 0.51)
        assert fits.mean() > 0.99
        assert (small.dtypes[0], small.nodata) == ("int8", -128)
    np.testing.assert_allclose(FeatureStore(tmp_path / "f.zarr").read(), expected, atol=5e-3)
    with pytest.raises(ConfigError, match="float16 goes into"):
        predict_features(scene, tmp_path / "h.tif", dtype="float16", **options)


class Killed(BaseException):
    """Ends a run as a kill does: nothing but the journal is left to go by."""


def feature_run(scene: Path, output: Path, backbone: object, *, stop_after: int | None = None) -> int:
    """Computes features; returns the calls of the network."""
    from dinov3geo.predict.products import predict_features

    calls = 0

    def count(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_after:
            raise Killed

    predict_features(
        scene, output, backbone=backbone, tile=64, overlap=16, batch_size=2, dtype="int8", progress=count
    )
    return calls


def content_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", ["f.zarr", "f.parquet"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    write_raster: Callable[..., Path], tmp_path: Path, tiny_backbone: object, name: str
) -> None:
    pytest.importorskip("pyarrow")
    scene = write_raster(shape=(3, 2500, 70), nodata=0)
    whole = feature_run(scene, tmp_path / "whole" / name, tiny_backbone)
    output = tmp_path / "broken" / name
    for calls in (30, 25):  # a band of 64 rows takes 21
        with pytest.raises(Killed):
            feature_run(scene, output, tiny_backbone, stop_after=calls)
        assert [path.name for path in output.parent.iterdir()] == [f".{name}.unfinished"]
    from dinov3geo.predict.products import predict_features

    with pytest.raises(RasterError, match="unfinished work of another command"):
        predict_features(scene, output, backbone=tiny_backbone, tile=64, overlap=0)
    rest = feature_run(scene, output, tiny_backbone)
    assert rest < whole / 2
    assert content_of(output) == content_of(tmp_path / "whole" / name)
    assert [path.name for path in output.parent.iterdir()] == [name]


@pytest.mark.parametrize(("kind", "name"), [(ZarrWriter, "f.zarr"), (TableWriter, "f.parquet")])
@pytest.mark.parametrize("step", [1, 64, 70])
def test_bytes_do_not_depend_on_how_rows_arrive(tmp_path: Path, kind: type, name: str, step: int) -> None:
    pytest.importorskip("pyarrow")
    write(kind, tmp_path / name)
    other = tmp_path / "other" / name
    with kind(other, GRID, NAMES, StoredType("float32"), attributes={"DINOV3GEO_MODEL": "x"}) as writer:
        for start in range(0, 70, step):
            writer.write(VALUES[:, start : start + step].copy(), VALID[start : start + step])
    assert content_of(other) == content_of(tmp_path / name)
    assert writer.cells == VALID.sum()


def test_missing_rows_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="10 of 70 rows"):
        with ZarrWriter(tmp_path / "f.zarr", GRID, NAMES, StoredType("float32"), attributes={}) as writer:
            writer.write(VALUES[:, :10].copy(), VALID[:10])
    assert not list(tmp_path.iterdir())


def test_components_of_a_set_of_scenes_mean_the_same_in_all_of_them(
    write_raster: Callable[..., Path], tmp_path: Path, tiny_backbone: object
) -> None:
    from dinov3geo.features.visualize import fit_pca
    from dinov3geo.predict.products import predict_features, sample_scenes

    scenes = [write_raster(f"{k}.tif", shape=(3, 96, 96), seed=k) for k in range(2)]
    options = {"backbone": tiny_backbone, "tile": 96, "overlap": 0}
    empty = write_raster("empty.tif", array=np.zeros((3, 96, 96), np.uint8), nodata=0)
    sample, left_out = sample_scenes([scenes[0], empty, scenes[1]], **options)
    assert left_out == (empty,)
    with pytest.raises(DataError, match="none of the 1 scenes"):
        sample_scenes([empty], **options)
    assert sample.shape == (72, 24)
    basis = fit_pca(sample, components=3)
    for scene in scenes:
        predict_features(scene, scene.with_suffix(".all.zarr"), **options)
        predict_features(scene, scene.with_suffix(".pca.zarr"), pca=3, sample=sample, **options)
        features = np.moveaxis(FeatureStore(scene.with_suffix(".all.zarr")).read(), 0, -1)
        found = np.moveaxis(FeatureStore(scene.with_suffix(".pca.zarr")).read(), 0, -1)
        np.testing.assert_allclose(found, basis.project(features), atol=1e-4)
