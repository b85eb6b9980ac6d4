"""Features, neighbours and pictures of scenes from the command line."""

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.windows import Window

from dinov3geo.rasters.reader import inspect_scene
from dinov3geo.rasters.regridded import RegriddedScene
from tests.command_line import error_of, run


def test_features_and_pictures(capsys, tmp_path, write_raster, run_folder):
    scene = write_raster(shape=(3, 96, 128))
    code, out, err = run(
        capsys, "features", scene, "-o", tmp_path / "f.tif", "--backbone", run_folder, "--pca", 2
    )
    assert code == 0, err
    assert "6 x 8 patches, 2 bands" in out
    with rasterio.open(scene) as image:
        x, y = image.xy(48, 64)
    for words in (["pca"], ["similarity", "--xy", x, y]):
        picture = tmp_path / f"{words[0]}.png"
        show = ["show", words[0], scene, "-o", picture, "--backbone", run_folder, *words[1:]]
        assert run(capsys, *show)[0] == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    similarity = [
        "show",
        "similarity",
        scene,
        "-o",
        tmp_path / "s2.png",
        "--xy",
        x,
        y,
        "--backbone",
        run_folder,
    ]
    assert run(capsys, *similarity, "--also", f"{x + 2},{y - 1}")[0] == 0
    assert "a point is given as X,Y" in error_of(capsys, *similarity, "--also", "1 2")
    outside = ["show", "similarity", scene, "-o", tmp_path / "x.png", "--xy", 0, 0]
    assert "outside" in error_of(capsys, *outside, "--backbone", run_folder)


def test_neighbours_are_searched_in_other_scenes(capsys, tmp_path, write_raster, run_folder):
    image = np.random.default_rng(1).integers(1, 255, (3, 96, 96)).astype(np.uint8)
    first = write_raster("a/first.tif", array=image)
    # The other scene holds the same pixels one patch further right and down.
    moved = write_raster(
        "b/moved.tif", array=np.roll(image, (32, 48), axis=(1, 2)), origin=(500_000, 100_000)
    )
    x, y = 400_000 + 0.1 * 24, 3_280_000 - 0.1 * 24
    picture = tmp_path / "n.png"
    words = ["show", "neighbours", first, "--xy", x, y, "-o", picture, "--backbone", run_folder]
    words += ["--image-scale", 1]
    code, out, err = run(capsys, *words, moved.parent, "--count", 3)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[2:-1]]
    assert len(rows) == 3 and rows[0][0] == str(moved)
    assert (float(rows[0][1]), float(rows[0][2])) == pytest.approx((500_000 + 0.1 * 72, 100_000 - 0.1 * 56))
    assert float(rows[0][3]) >= float(rows[1][3]) >= float(rows[2][3])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "names 2 scenes" in error_of(capsys, *words[:2], tmp_path, *words[3:])
    assert ".png" in error_of(capsys, *words, "-o", tmp_path / "n.jpg")


def test_features_of_several_scenes(capsys, tmp_path, write_raster, run_folder):
    scenes = [write_raster(f"in/{name}.tif", shape=(3, 64, 96), seed=k) for k, name in enumerate("ab")]
    words = ["features", scenes[0].parent, "-o", tmp_path / "out", "--backbone", run_folder]
    code, out, err = run(capsys, *words, "--format", "tif", "--pca", 2, "--tile", 64, "--overlap", 0)
    assert code == 0, err
    assert [line.split()[1:] for line in out.splitlines()[2:]] == [["4x6", "2", "100.0%"]] * 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_features.tif", "b_features.tif"]
    assert "cannot go into" in error_of(capsys, *words[:2], "-o", tmp_path / "x.zarr")
    assert "valid names: parquet, tif, zarr" in error_of(capsys, *words, "--format", "png")


def test_features_at_another_pixel_size(capsys, tmp_path, write_raster, run_folder):
    scene = write_raster("scene.tif", shape=(3, 96, 128))
    grid = inspect_scene(scene).grid.at_gsd(0.15)
    with RegriddedScene(scene, grid) as reader:
        numbers, _ = reader.read(Window(0, 0, grid.width, grid.height))
    other = write_raster("coarse.tif", array=numbers, transform=grid.transform)
    words = ["features", "--backbone", run_folder, "--tile", 32, "--overlap", 16]
    assert run(capsys, *words, scene, "-o", tmp_path / "a.tif", "--gsd", 0.15)[0] == 0
    assert run(capsys, *words, other, "-o", tmp_path / "b.tif")[0] == 0
    with rasterio.open(tmp_path / "a.tif") as a, rasterio.open(tmp_path / "b.tif") as b:
        assert a.shape == (4, 6) and a.transform == b.transform
        np.testing.assert_array_equal(a.read(), b.read())
    both = tmp_path / "both"
    code, _, err = run(capsys, *words, scene, other, "-o", both, "--format", "tif", "--pca", 2, "--gsd", 0.15)
    assert code == 0, err
    with rasterio.open(both / "scene_features.tif") as a, rasterio.open(both / "coarse_features.tif") as b:
        np.testing.assert_array_equal(a.read(), b.read())
    assert "takes metres above 0, or model" in error_of(
        capsys, *words, scene, "-o", tmp_path / "c.tif", "--gsd", "x"
    )


def test_show_landcover(capsys, tmp_path, write_raster):
    array = np.random.default_rng(2).integers(0, 2, (40, 60)).astype(np.uint8)
    array[:5] = 255
    scene = write_raster("scene.tif", shape=(3, 40, 60))
    classes = write_raster("c.tif", array=array, nodata=255, tags={"CLASS_0": "water", "CLASS_1": "forest"})
    plain = error_of(capsys, "show", "landcover", classes, "-o", tmp_path / "c.png")
    assert "holds no classes" in plain
    with rasterio.open(classes, "r+") as dataset:
        dataset.write_colormap(1, {0: (0, 0, 255, 255), 1: (0, 99, 0, 255)})
    words = ["show", "landcover", classes, "--scene", scene, "-o", tmp_path / "c.png"]
    assert run(capsys, *words)[0] == 0
    with Image.open(tmp_path / "c.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {(0, 0, 255), (0, 99, 0)} <= colours


def test_show_heights(capsys, tmp_path, pairs):
    words = ["show", "heights", pairs[1] / "0.tif", "--scene", pairs[0] / "AAAA_0.tif", "-o"]
    assert run(capsys, *words, tmp_path / "h.png")[0] == 0
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert ".png" in error_of(capsys, *words, tmp_path / "h.jpg")
