"""The benchmark of water through the years: areas by the closed form, and what it refuses."""

import csv

import numpy as np
import pytest
import rasterio
from PIL import Image

from benchmarks.water_years import main, ndwi

SIDE, PIXEL_M = 96, 10.0
# red, green, blue, near infrared: of these only water and wet soil have a positive NDWI.
WATER, FOREST, SOIL = (20, 60, 140, 10), (30, 120, 40, 220), (190, 150, 110, 200)
WET_SOIL = (*SOIL[:3], 50)


@pytest.fixture
def dates(tmp_path, write_raster):
    """Water left of column 48, then left of column 32 beside a wet field of 16 x 32 pixels, then none."""
    surfaces = {
        "2010": [(np.s_[:, :48], WATER)],
        "2012": [(np.s_[:, :32], WATER), (np.s_[80:, 64:], WET_SOIL)],
        "2014": [],
    }
    for year, own in surfaces.items():
        numbers = np.empty((4, SIDE, SIDE), np.uint8)
        for (rows, cols), colour in [(np.s_[:, :64], FOREST), (np.s_[:, 64:], SOIL), *own]:
            numbers[:, rows, cols] = np.array(colour)[:, None, None]
        names = ("red", "green", "blue", "nir")
        write_raster(f"dates/{year}.tif", array=numbers, pixel_size=PIXEL_M, band_names=names)
        write_raster(f"unnamed/{year}.tif", array=numbers, pixel_size=PIXEL_M)
    return tmp_path / "dates"


def rows_of(folder):
    with (folder / "areas.csv").open() as opened:
        return list(csv.reader(opened))


def test_areas_of_pixels_are_exact(dates, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(dates), "-o", str(out), "--pixels", "--short-side", str(SIDE)]) == 0
    hectares = PIXEL_M**2 / 10_000
    first, second, wet = SIDE * 48 * hectares, SIDE * 32 * hectares, 16 * 32 * hectares
    # The colours of wet soil are those of soil, so the tracker leaves out what the NDWI counts.
    assert rows_of(out) == [
        ["date", "tracked_ha", "ndwi_ha", "iou"],
        ["2010", f"{first:.2f}", f"{first:.2f}", "1.000"],
        ["2012", f"{second:.2f}", f"{second + wet:.2f}", f"{second / (second + wet):.3f}"],
        ["2014", "0.00", "0.00", "1.000"],
    ]
    assert capsys.readouterr().out.splitlines() == ["  ".join(row) for row in rows_of(out)]
    with rasterio.open(out / "masks" / "2012.tif") as mask, rasterio.open(dates / "2010.tif") as image:
        assert (mask.crs, mask.transform) == (image.crs, image.transform)
        np.testing.assert_array_equal(mask.read(1), np.arange(SIDE)[None].repeat(SIDE, 0) < 32)
    with Image.open(out / "overlay.gif") as video:
        assert video.n_frames == 3


def test_a_backbone_begins_with_the_water_of_the_first_date(dates, tmp_path):
    out = tmp_path / "out"
    assert main([str(dates), "-o", str(out), "--short-side", str(SIDE)]) == 0
    rows = rows_of(out)
    assert rows[1] == ["2010", "46.08", "46.08", "1.000"]
    assert [row[2] for row in rows[2:]] == ["35.84", "0.00"]


def test_files_that_name_no_bands_are_read_in_the_order_of_their_sensor(dates, tmp_path):
    words = ["--pixels", "--short-side", str(SIDE)]
    assert main([str(dates), "-o", f"{tmp_path}/named", *words]) == 0
    unnamed = dates.with_name("unnamed")
    assert main([str(unnamed), "-o", f"{tmp_path}/ordered", *words, "--sensor", "naip"]) == 0
    assert rows_of(tmp_path / "ordered") == rows_of(tmp_path / "named")


def test_ndwi():
    green, nir = np.array([[0, 3, 1]], np.uint8), np.array([[0, 1, 3]], np.uint8)
    np.testing.assert_array_equal(ndwi(green, nir), [[0.0, 0.5, -0.5]])


def refusal(capsys, *words):
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_what_cannot_be_tracked_is_refused_in_a_line(dates, tmp_path, write_raster, capsys):
    out = tmp_path / "out"
    message = refusal(capsys, dates, "-o", out, "--threshold", 0.9)
    assert "no pixel of the first date has an NDWI above 0.9; lower --threshold" in message
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "pictures" / f"{number}.png")
    message = refusal(capsys, tmp_path / "pictures", "-o", out)
    assert "without a place; expected GeoTIFFs of one place" in message
    for number in range(2):
        write_raster(f"colours/{number}.tif", shape=(3, SIDE, SIDE))
    message = refusal(capsys, tmp_path / "colours", "-o", out)
    assert "does not say which band is green and which near infrared" in message and "--sensor" in message
    message = refusal(capsys, tmp_path / "colours", "-o", out, "--sensor", "naip")
    assert "has 3 bands, expected 4: red, green, blue, nir" in message
    message = refusal(capsys, tmp_path / "colours", "-o", out, "--sensor", "aerial_rgb")
    assert "unknown band 'nir'; valid names: blue, green, red" in message
    assert "no such folder" in refusal(capsys, tmp_path / "absent", "-o", out)
    assert not out.exists()
