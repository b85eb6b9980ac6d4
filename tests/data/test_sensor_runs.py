"""Sensors of one file per band, quality bits, two dates: what is read, and that runs take fifty steps."""

import json

import numpy as np
import pytest
import rasterio
import torch

from dinov3geo.backbones.card import Normalization
from dinov3geo.cli import main
from dinov3geo.data.crops import CropMaker, CropSettings
from dinov3geo.data.dates import Twice, TwoDates
from dinov3geo.data.masking import MaskSettings
from dinov3geo.data.sampling import ChipSampler
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.rasters.sensor_files import dump_sensor, load_sensor
from dinov3geo.rasters.sensors import SENSORS
from dinov3geo.rasters.statistics import band_statistics

RUNS = {
    "landsat8": "landsat8",
    "sentinel2": "sentinel2_l1c",
    "hyperspectral": "neon/hsi",
    "three_zones": "neon_plots/rgb",
    "naip_two_dates": "naip",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_fifty_steps_from_the_configuration(data_root, project_root, tmp_path, name):
    config = project_root / "configs" / "sensors" / f"{name}_vit_tiny.yaml"
    words = ["pretrain", str(config), "--set", f"data.root={data_root / RUNS[name]}", "--out", str(tmp_path)]
    assert main([*words, "--set", "log_every=1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 50 and np.isfinite(losses).all()


def test_landsat_without_its_clouds(data_root):
    dataset = SceneDataset(data_root / "landsat8", sensor="landsat8_l1", bands=["red", "nir"])
    sample = dataset[:]
    folder = data_root / "landsat8"
    red, nir, bits = (rasterio.open(folder / f"l8_{b}.tif").read(1) for b in ("B4", "B5", "BQA"))
    np.testing.assert_array_equal(sample["image"], np.stack([red, nir]))
    np.testing.assert_array_equal(sample["valid"], ((bits & 1) == 0) & ((bits >> 14) < 2))
    assert 0.1 < (~sample["valid"]).float().mean() < 0.2


def test_sentinel_bands_of_three_resolutions(data_root):
    dataset = SceneDataset(data_root / "sentinel2_l1c", sensor="sentinel2_l1c")
    assert dataset.res == (10.0, 10.0) and len(dataset) == 1
    sample = dataset[:]["image"].numpy()
    assert sample.shape == (13, 768, 768)
    fine = rasterio.open(data_root / "sentinel2_l1c" / "s2_B04.tif").read(1)
    np.testing.assert_array_equal(sample[3], fine)
    # 20 m pixels begin one 10 m pixel further west; interpolation keeps what is flat and the mean.
    coarse = rasterio.open(data_root / "sentinel2_l1c" / "s2_B11.tif").read(1).astype(float)
    halved = sample[11][:, 1:767].reshape(384, 2, 383, 2).mean((1, 3))
    assert abs(halved - coarse[:, 1:]).mean() < 0.05 * coarse.mean()
    with pytest.raises(DataError, match="none of 5 rasters"):
        SceneDataset(data_root / "naip", sensor="sentinel2_l1c", bands=["red"])


def test_a_scene_that_lacks_a_band(write_raster):
    path = write_raster("s/x_B02.tif", shape=(1, 8, 8), dtype="uint16")
    write_raster("s/y_B02.tif", shape=(1, 8, 8), dtype="uint16", origin=(400_100, 3_280_000))
    write_raster("s/x_B03.tif", shape=(1, 8, 8), dtype="uint16")
    with pytest.raises(DataError, match=r"y_\*\.tif lacks B03.*has B02"):
        SceneDataset(path.parent, sensor="sentinel2_l1c", bands=["blue", "green"])
    assert len(SceneDataset(path.parent, sensor="sentinel2_l1c", bands=["blue"])) == 2


@pytest.mark.parametrize("name", sorted(SENSORS))
def test_sensor_files_give_the_record_back(name, tmp_path):
    path = tmp_path / "sensor.yaml"
    path.write_text(dump_sensor(SENSORS[name]))
    assert load_sensor(path) == SENSORS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gsd_m: 10", "gsd_m"),
        ("bands:\n- {name: a, mean: 0}", "std"),
        ("colour: red", "a sensor file has the keys"),
    ],
)
def test_sensor_files_that_say_too_little_or_too_much(tmp_path, change, message):
    path = tmp_path / "sensor.yaml"
    path.write_text(f"name: x\ndtype: uint8\nsource: me\n{change}\n")
    with pytest.raises(ConfigError, match=message):
        load_sensor(path if message != "gsd_m" else tmp_path / "gsd_m_absent.yaml")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_statistics_are_those_of_all_valid_pixels_at_once(dtype):
    generator = np.random.default_rng(0)
    numbers = (generator.normal(20, 40, (2, 60, 50)).clip(-90 if dtype != "uint8" else 0, 200)).astype(dtype)
    valid = generator.random((60, 50)) < 0.7
    parts = [(numbers[:, i : i + 7], valid[i : i + 7]) for i in range(0, 60, 7)]
    percents = (0, 1, 50, 99, 100)
    for band, found in zip(numbers, band_statistics(lambda: parts, percents), strict=True):
        values = band[valid].astype(np.float64)
        assert found.count == valid.sum()
        assert found.mean == pytest.approx(values.mean(), rel=1e-12)
        assert found.std == pytest.approx(values.std(), rel=1e-9)
        assert (found.minimum, found.maximum) == (values.min(), values.max())
        expected = np.percentile(values, percents, method="lower")
        assert list(found.percentiles.values()) == expected.tolist()
    with pytest.raises(DataError, match="no valid pixel"):
        band_statistics(lambda: [(numbers, np.zeros_like(valid))], percents)


def test_stats_writes_a_sensor_that_reads(write_raster, tmp_path, capsys):
    array = np.random.default_rng(0).integers(1, 200, (3, 40, 40)).astype(np.uint8)
    array[:, :10] = 0
    path = write_raster(array=array, nodata=0)
    out = tmp_path / "mine.yaml"
    assert main(["stats", str(path), "-o", str(out), "--name", "mine"]) == 0
    assert "1200" in capsys.readouterr().out
    sensor = load_sensor(out)
    assert sensor.bands[1].mean == pytest.approx(array[1, 10:].mean() / 255)
    assert SceneDataset(path, sensor=str(out)).sensor == sensor
    assert main(["stats", str(path), "-o", str(out)]) == 2
    assert main(["stats", str(path), "--percentiles", "1,x"]) == 2


def test_two_dates_are_the_two_views(data_root):
    dataset = SceneDataset(data_root / "naip", sensor="naip", time=("2010-01-01", "2016-12-31"))
    assert len(dataset) == 2
    query = next(ChipSampler(dataset, chip_size=64, chips_per_epoch=1, seed=0).stream())
    sample = TwoDates(dataset)[query]
    assert sample["image"].shape == (2, 4, 64, 64) and sample["valid"].all()
    assert torch.equal(sample["image"][0], dataset[query]["image"])
    # The same fields in another year: alike, not equal.
    one, other = sample["image"].float().flatten(1)
    assert not torch.equal(one, other) and torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.1
    again = TwoDates(dataset)[query]
    assert torch.equal(again["image"], sample["image"])
    one_date = SceneDataset(data_root / "naip", sensor="naip", time=("2020-01-01", "2021-01-01"))
    twice = TwoDates(one_date)[(*query[:2],)]["image"]
    assert torch.equal(twice[0], twice[1]) and Twice(one_date)[query[:2]]["image"].shape[0] == 2
    with pytest.raises(DataError, match="none of 5 scenes"):
        SceneDataset(data_root / "naip", sensor="naip", time=("2030-01-01", "2031-01-01"))


@pytest.mark.parametrize("dates", [1, 2])
def test_poisoned_pixels_never_reach_a_crop(dates):
    """Whatever stands at pixels without data, crops and masks are the same bits."""
    bands = ("a", "b", "c", "d")
    norm = Normalization(bands=bands, scale=(1.0,) * 4, offset=(0.0,) * 4, mean=(50.0,) * 4, std=(9.0,) * 4)
    crops = CropSettings(global_size=32, local_size=16, local_count=4, gram_size=48)
    maker = CropMaker(crops, MaskSettings(), norm, patch_size=16, nadir=True)
    generator = torch.Generator().manual_seed(0)
    shape = (6, 40, 40) if dates == 1 else (6, 2, 40, 40)
    valid = torch.rand(shape, generator=generator) < 0.6
    valid[..., :12, :] = False
    numbers = torch.randint(1, 200, (*shape[:-2], 4, 40, 40), generator=generator)
    hidden = ~valid.unsqueeze(-3).expand_as(numbers)
    clean = maker(numbers.to(torch.int32), valid, seed=3)
    poisoned = maker(numbers.masked_fill(hidden, 2**30).to(torch.int32), valid, seed=3)
    assert clean.gram_crops is not None and poisoned.gram_crops is not None
    for name in ("global_crops", "local_crops", "gram_crops", "patch_masks", "patch_valid"):
        assert torch.equal(getattr(clean, name), getattr(poisoned, name)), name
    assert torch.isfinite(clean.global_crops).all()
