"""`dinov3geo curate` end to end: from scenes or images to a table that a training reads."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dinov3geo.cli import main

pytest.importorskip("pyarrow")


@pytest.fixture
def pool(write_raster, tmp_path):
    """Two scenes of smooth and rough ground, one with a hole, in two zones."""
    rng = np.random.default_rng(0)
    smooth = np.repeat(rng.integers(60, 200, (3, 6, 8)), 16, axis=1).repeat(16, axis=2).astype("uint8")
    rough = rng.integers(1, 255, (3, 96, 80)).astype("uint8")
    smooth[:, :40, :40] = 0
    write_raster("pool/a.tif", array=smooth, nodata=0)
    write_raster("pool/b.tif", array=rough, crs="EPSG:32611")
    return tmp_path / "pool"


def curate(pool, output, *more):
    return main(["curate", str(pool), "-o", str(output), "--chip-size", "32", *map(str, more)])


def test_scenes_to_a_table_that_training_reads(pool, tmp_path, capsys):
    import geopandas

    output = tmp_path / "out" / "chosen.parquet"
    assert curate(pool, output, "--count", 6, "--levels", "6,2") == 0
    assert "6 evenly" in capsys.readouterr().out
    assert [p.name for p in output.parent.iterdir()] == ["chosen.parquet"]
    frame = geopandas.read_parquet(output)
    assert len(frame) == 6 and set(frame.path) <= {"a.tif", "b.tif"} and frame.crs.to_epsg() in (4326, None)
    assert all(len(path) == 2 for path in frame.cluster) and (frame.weight >= 1).all()
    from dinov3geo.data.mixture import DataSettings, SourceSettings, chip_loader, open_sources
    from dinov3geo.data.scenes import SceneDataset

    settings = DataSettings(
        root=pool, chip_size=32, workers=0, sources=(SourceSettings(chips=output, mixed_resolution=True),)
    )
    (dataset,) = open_sources(settings)
    batch = next(iter(chip_loader([dataset], settings, batch_size=6, seed=0)))
    scenes = SceneDataset(pool, sensor="aerial_rgb")
    known = {str(p.name): p for p in scenes.infos}
    expected = [
        scenes.read_window(known[row.path], row.row, row.col, (32, 32))[0].tobytes()
        for row in frame.itertuples()
    ]
    drawn = {image.numpy().tobytes() for image in batch["image"]}
    assert drawn <= set(expected)
    # What the table says of the ground is where the chip lies.
    first = frame.iloc[0]
    grid = scenes.window_grid(known[first.path], first.row, first.col, (32, 32))
    own = frame.geometry.iloc[:1].set_crs(4326, allow_override=True).to_crs(grid.crs.to_wkt())
    np.testing.assert_allclose(own.total_bounds, grid.bounds, atol=0.02)


def test_a_run_that_was_cut_off_goes_on(pool, tmp_path, monkeypatch):
    from dinov3geo.curation import embedding, pipeline

    whole, resumed = tmp_path / "whole.parquet", tmp_path / "resumed.parquet"
    assert curate(pool, whole, "--count", 5, "--batch-size", 4) == 0
    real = embedding.VectorFile.append
    calls = []

    def failing(self, vectors):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        real(self, vectors)

    monkeypatch.setattr(embedding.VectorFile, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        pipeline.curate(
            pipeline.PoolSettings(str(pool), chip_size=32),
            pipeline.ChoiceSettings(5),
            resumed,
            backbone=_starter(),
            batch_size=4,
        )
    assert not resumed.exists()
    monkeypatch.setattr(embedding.VectorFile, "append", lambda self, v: (calls.append(2), real(self, v)))
    assert curate(pool, resumed, "--count", 5, "--batch-size", 4) == 0
    # 33 chips in batches of four: eight after those that were there (of nine).
    assert calls.count(2) == -(-_count(pool) // 4) - 2
    assert _rows(whole) == _rows(resumed)


def _starter():
    from dinov3geo import load_backbone

    return load_backbone("vit-tiny-aerial")


def _count(pool):
    from dinov3geo.data.grid_chips import GridChips
    from dinov3geo.data.scenes import SceneDataset

    return len(GridChips(SceneDataset(pool, sensor="aerial_rgb"), chip_size=32))


def _rows(path):
    from dinov3geo.data.chosen import read_chosen

    table = read_chosen(path)
    return table.paths, table.places.tolist(), table.clusters.tolist(), table.weights.tolist()


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3)).astype("uint8")).save(folder / f"{number:02}.png")
    shutil.copy(folder / "03.png", folder / "99.png")
    (tmp_path / "wanted").mkdir()
    shutil.copy(folder / "05.png", tmp_path / "wanted" / "x.png")
    return folder


def test_copies_go_and_neighbours_of_seeds_come(photos, tmp_path, capsys):
    from dinov3geo.data.chosen import read_chosen

    output = tmp_path / "t.parquet"
    more = ("--kind", "images", "--levels", "1", "--duplicates", "0.99999")
    assert curate(photos, output, *more, "--count", 99) == 0
    assert "1 left out" in capsys.readouterr().out
    assert "99.png" not in read_chosen(output).paths
    seeds = ("--seeds", tmp_path / "wanted", "--neighbours", 1, "--overwrite")
    assert curate(photos, output, *more, *seeds) == 0
    assert read_chosen(output).paths == ("05.png",)
    assert read_chosen(output).origins == ("retrieved",)


def test_images_of_a_table_are_drawn_by_weight(photos, tmp_path):
    import pyarrow
    import pyarrow.parquet

    from dinov3geo.data.mixture import DataSettings, SourceSettings, chip_loader, locate_chips, open_sources

    table = tmp_path / "t.parquet"
    columns = {"path": ["00.png", "01.png", "02.png", "03.png"], "weight": [3.0, 1.0, 0.0, 0.0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    source = SourceSettings(kind="images", chips=table)
    settings = DataSettings(root=photos, chip_size=32, workers=0, sources=(source,))
    datasets = open_sources(settings)
    assert len(datasets[0]) == 4
    named = locate_chips(datasets, settings, batch_size=40, seed=0, start=0)
    counts = {name: sum(name in place for place in named) for name in columns["path"]}
    assert counts == {"00.png": 30, "01.png": 10, "02.png": 0, "03.png": 0}
    assert next(iter(chip_loader(datasets, settings, batch_size=4, seed=0)))["image"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--levels", "2,5"), "levels must be falling"),
        (("--levels", "two"), "whole numbers"),
        (("--levels", "500"), "do not suffice for 500 clusters"),
        (("--kind", "photos"), "unknown kind 'photos'"),
        (("--assign", "gpu"), "unknown assign"),
        (("--backbone", "vit-tiny-areal"), "vit-tiny-aerial"),
        (("--seeds", "nowhere"), "no such file or folder: nowhere"),
        (("--sensor", "sentinel2_l1c"), "is named '*_B*'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(more, message, pool, tmp_path, capsys):
    output = tmp_path / "o" / "t.parquet"
    assert curate(pool, output, *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and message in lines[0]
    assert not output.exists()


def test_a_table_of_other_scenes_is_refused(pool, tmp_path):
    from dinov3geo.data.mixture import DataSettings, SourceSettings, open_sources
    from dinov3geo.errors import DataError

    output = tmp_path / "t.parquet"
    assert curate(pool, output, "--count", 3, "--levels", "2") == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(pool / "a.tif", elsewhere / "other.tif")
    settings = DataSettings(root=elsewhere, chip_size=32, sources=(SourceSettings(chips=output),))
    with pytest.raises(DataError, match="not among the 1 files"):
        open_sources(settings)
    broken = tmp_path / "broken.parquet"
    broken.write_text(json.dumps({}))
    changed = settings.model_copy(update={"sources": (SourceSettings(chips=broken),)})
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_sources(changed)
