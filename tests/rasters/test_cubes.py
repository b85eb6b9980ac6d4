"""Zarr stores and NetCDF files as scenes: pixels, bands by name, dates, position, and what cannot be used."""

import numpy as np
import pandas as pd
import pytest
import torch

from dinov3geo.cli import main
from dinov3geo.data.mixture import DataSettings, SourceSettings, chip_loader, open_sources
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import UserError
from dinov3geo.rasters.reader import SceneReader, inspect_scene

xarray = pytest.importorskip("xarray")
pytest.importorskip("rioxarray")

BANDS = ["nir", "red", "green", "blue"]
DATES = pd.to_datetime(["2020-01-01", "2020-06-01"])
KINDS = ["zarr", "nc"]


def numbers(dtype="uint8", shape=(2, 4, 90, 120)):
    return np.random.default_rng(0).integers(1, 255, shape).astype(dtype)


def cube(array, *, crs="EPSG:32617", north_up=True, x=None, bands=BANDS):
    height, width = array.shape[-2:]
    y = 3_280_000 - 0.5 - np.arange(height)
    coords = {
        "time": DATES,
        "band": bands,
        "y": y if north_up else y[::-1],
        "x": 400_000.5 + np.arange(width) if x is None else x,
    }
    found = xarray.DataArray(array, dims=("time", "band", "y", "x"), coords=coords, name="reflectance")
    return found.to_dataset() if crs is None else found.to_dataset().rio.write_crs(crs)


def save(dataset, path, **encoding):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zarr":
        pytest.importorskip("zarr")
        dataset.to_zarr(path, encoding=encoding or None, consolidated=False)
    else:
        pytest.importorskip("netCDF4")
        dataset.to_netcdf(path, encoding=encoding or None)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_every_step_is_a_scene_with_its_bands_by_name(tmp_path, kind, dtype):
    array = numbers(dtype)
    path = save(cube(array), tmp_path / f"c.{kind}")
    dataset = SceneDataset(path, is_image=True, sensor="aerial_rgb", time=("2020-05-01", "2020-07-01"))
    assert (
        len(dataset) == 1 and dataset.dtype == torch.from_numpy(array).dtype and dataset.files == [str(path)]
    )
    sample = dataset[400_010:400_042, 3_279_950:3_279_982]
    np.testing.assert_array_equal(sample["image"], array[1][[1, 2, 3], 18:50, 10:42])
    assert sample["valid"].all()
    (interval,) = dataset.index.index
    assert interval.left == interval.right == DATES[1]
    both = SceneDataset(path, sensor="aerial_rgb")
    assert len(both) == 2 and both.intervals(tuple(both.index.total_bounds), (DATES[0], DATES[0])) == [
        (DATES[1], DATES[1])
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_run_northwards_and_several_variables(tmp_path, kind):
    array = numbers()
    split = cube(array, north_up=False)["reflectance"].to_dataset(dim="band").rio.write_crs("EPSG:32617")
    path = save(split.isel(time=0, drop=True), tmp_path / f"c.{kind}")
    sample = SceneDataset(path, sensor="aerial_rgbn")[:]
    np.testing.assert_array_equal(sample["image"], array[0][[1, 2, 3, 0], ::-1])
    np.testing.assert_array_equal(SceneDataset(f"{path}#nir", is_image=False)[:]["mask"], array[0, 0, ::-1])


def test_chunks_are_read_and_nodata_is_masked(tmp_path):
    array = numbers("int16")
    array[:, :, :20] = -9999
    dataset = cube(array)
    dataset["reflectance"].attrs["_FillValue"] = np.int16(-9999)
    path = save(dataset, tmp_path / "c.zarr", reflectance={"chunks": (1, 4, 64, 32)})
    info = next(iter(SceneDataset(path, sensor="aerial_rgb").infos.values()))
    assert info.nodata == (-9999.0,) * 3 and info.band_names == ("red", "green", "blue")
    with SceneReader(info) as reader:
        assert reader._dataset.block_shapes[0] == (64, 32)
    sample = SceneDataset(path, sensor="aerial_rgb")[:]
    assert not sample["valid"][:20].any() and sample["valid"][20:].all()
    # Whatever their type, fractions are missing where they are NaN.
    fractions = numbers("float32")
    fractions[:, :, 5, 7] = np.nan
    sample = SceneDataset(save(cube(fractions), tmp_path / "f.zarr"), sensor="aerial_rgb")[:]
    assert (~sample["valid"]).nonzero().tolist() == [[5, 7]] and torch.isfinite(sample["image"]).all()


def test_sensors_of_one_file_per_band_find_bands_by_token_and_quality(tmp_path):
    array = numbers("uint16", (2, 3, 40, 40))
    array[:, 2] = np.where(np.arange(40) < 10, 1 << 3, 64)
    path = save(cube(array, bands=["SR_B5", "SR_B4", "QA_PIXEL"]), tmp_path / "c.zarr")
    sample = SceneDataset(path, sensor="landsat89_l2", bands=["red", "nir"])[:]
    np.testing.assert_array_equal(sample["image"], array[0, [1, 0]])
    np.testing.assert_array_equal(sample["valid"], np.tile(np.arange(40) >= 10, (40, 1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_processes_give_the_same(tmp_path, workers):
    save(cube(numbers()), tmp_path / "d" / "a.zarr")
    save(cube(numbers()), tmp_path / "d" / "b.nc")
    sources = (SourceSettings(path="d/*.zarr"), SourceSettings(path="d/b.nc"))
    settings = DataSettings(root=tmp_path, chip_size=32, sources=sources, workers=0)
    used = settings.model_copy(update={"workers": workers})
    loaders = [iter(chip_loader(open_sources(s), s, batch_size=8, seed=0)) for s in (settings, used)]
    for _ in range(3):
        one, other = (next(loader) for loader in loaders)
        assert torch.equal(one["image"], other["image"]) and one["valid"].all()


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_from_yaml_with_two_dates(tmp_path, kind):
    save(cube(numbers()), tmp_path / f"c.{kind}")
    head = "{prototypes: 32, hidden: 16, bottleneck: 8}"
    config = tmp_path / "c.yaml"
    config.write_text(
        "steps: 3\nbatch_size: 2\nthreads: 1\nmodel: {variant: vit_tiny}\n"
        f"data:\n  root: {tmp_path}\n  chip_size: 48\n  workers: 1\n"
        f"  sources: [{{path: c.{kind}, two_dates: true}}]\n"
        "crops: {global_size: 32, local_size: 16, local_count: 1}\n"
        f"losses: {{dino_head: {head}, ibot_head: {head}}}\n"
    )
    assert main(["pretrain", str(config), "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ({"crs": None}, "c.zarr", "has no coordinate reference system; write it with rioxarray"),
        ({"x": np.r_[0:119, 500.0]}, "c.zarr", "along x are no regular grid"),
        ({"bands": ["a", "red", "green", "b"]}, "c.zarr", "lacks band blue; it has a, red, green, b"),
        ({}, "c.zarr#albedo", "unknown variable of .* 'albedo'; valid names: reflectance"),
        ({"empty": True}, "c.zarr", "holds no variable with x and y"),
        ({"text": True}, "c.nc", "cannot be opened by xarray"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, change, name, message):
    path = tmp_path / name.partition("#")[0]
    if change.pop("text", False):
        path.write_text("no cube")
    elif change.pop("empty", False):
        save(xarray.Dataset({"n": ("time", np.arange(2))}), path)
    else:
        save(cube(numbers(), **change), path)
    with pytest.raises(UserError, match=message) as caught:
        SceneDataset(tmp_path / name, sensor="aerial_rgb")
    assert "\n" not in str(caught.value)


def test_variables_that_do_not_fit_together(tmp_path):
    first = cube(numbers())
    second = first["reflectance"].rename("other")
    path = save(xarray.merge([first, second]), tmp_path / "c.zarr")
    with pytest.raises(UserError, match=r"several variables with bands .*name one, e\.g\. c\.zarr#"):
        SceneDataset(path, sensor="aerial_rgb")
    assert len(SceneDataset(f"{path}#other", sensor="aerial_rgb")) == 2
    with pytest.raises(UserError, match="has 2 time steps"):
        inspect_scene(f"{path}#other(red)[2]")


def test_a_store_that_is_damaged_while_it_is_read(tmp_path):
    path = save(cube(numbers()), tmp_path / "c.zarr")
    dataset = SceneDataset(path, sensor="aerial_rgb")
    for chunk in (path / "reflectance" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read .*c\.zarr#reflectance"):
        dataset[:]
