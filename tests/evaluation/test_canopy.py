import collections
import json

import numpy as np
import pytest
import rasterio
import torch

from dinov3geo.backbones import zoo
from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.backbones.zoo import save_backbone
from dinov3geo.cli import main
from dinov3geo.errors import DataError, RasterError
from dinov3geo.evaluation.canopy import evaluate_folds, evaluate_model
from dinov3geo.evaluation.canopy_choice import CHOSEN
from dinov3geo.evaluation.folds import assign_folds
from dinov3geo.heads.canopy import CanopySettings, HeadSettings, fit_canopy, load_canopy_model
from dinov3geo.heads.heights import HeightFitSettings as FitSettings

X, Y = 400_000.0, 3_280_000.0
SETTINGS = CanopySettings(
    views=1, num_maps=1, head=HeadSettings(channels=8, finest=1), fit=FitSettings(epochs=2, batch_pixels=4096)
)
METHODS = [
    "mean",
    "site mean",
    "gradient boosting",
    "gradient boosting (absolute error)",
    "frozen features",
]


@pytest.fixture
def backbone_file(tmp_path, monkeypatch):
    config = VitConfig(24, 2, 2, "mlp", 48, layer_scale=0.5)
    monkeypatch.setitem(zoo.VARIANTS, "vit_test", config)
    torch.manual_seed(0)
    numbers = (1 / 255,) * 3, (0.0,) * 3, (0.4,) * 3, (0.2,) * 3
    card = BackboneCard("vit-test", "vit_test", 16, Normalization(("red", "green", "blue"), *numbers))
    path = tmp_path / "backbone" / "vit.safetensors"
    save_backbone(path, VisionTransformer(config), card)
    return path


@pytest.fixture
def plots(write_raster):
    """Six plots of two sites: A is low, B is tall, and brightness says the rest."""
    for number in range(6):
        site = "AB"[number % 2]
        origin = X + 100 * number, Y
        cells = np.random.default_rng(number).uniform(0, 1, (4, 6))
        image = np.kron(50 + 100 * cells, np.ones((10, 10)))[None].repeat(3, 0).astype(np.uint8)
        heights = (cells * 4 + (20 if site == "B" else 1)).astype(np.float32)
        heights[0, 0] = -9999
        images = write_raster(f"rgb/{site}_{number}.tif", array=image, origin=origin)
        chm = write_raster(f"chm/{number}.tif", array=heights, pixel_size=1.0, origin=origin, nodata=-9999)
    return images.parent, chm.parent


def test_every_method_is_scored_on_all_held_out_cells(plots, backbone_file, tmp_path):
    path = tmp_path / "reports" / "table.json"
    table = evaluate_folds(
        *plots, backbone=backbone_file, folds=3, settings=SETTINGS, block=2, json_path=path, command="typed"
    )
    assert [r.method for r in table.rows if r.site == "all"] == METHODS
    for row in table.rows:
        assert row.scores.count == (6 if row.site == "all" else 3) * 23
        assert row.scores.mae > 0
    assert table.row("site mean").scores.mae < 3 < table.row("mean").scores.mae
    assert table.row("site mean").scores.r2 > 0.9 > table.row("mean").scores.r2
    assert table.row("mean", "A").scores.bias > 5 and table.row("mean", "B").scores.bias < -5
    with pytest.raises(KeyError):
        table.row("oracle")
    report = json.loads(path.read_text())
    assert report["command"] == "typed" and report["plots_per_site"] == {"A": 3, "B": 3}
    assert report["cells"] == 138 and report["folds"] == 3
    assert report["rows"][0] == {
        "method": "mean",
        "site": "all",
        "count": 138,
        "block_r2": pytest.approx(table.row("mean").block_r2),
        "mae": pytest.approx(table.row("mean").scores.mae),
        "rmse": pytest.approx(table.row("mean").scores.rmse),
        "bias": pytest.approx(table.row("mean").scores.bias),
        "r2": pytest.approx(table.row("mean").scores.r2),
        "edge_error": pytest.approx(1),
    }
    last = report["height_bins"]["mean"][-1]
    assert last["low"] == 40 and last["high"] is None and last["mae"] is None
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_equal_seeds_give_equal_tables(plots, backbone_file):
    first, second = (
        evaluate_folds(*plots, backbone=backbone_file, folds=2, seed=4, settings=SETTINGS).to_json()
        for _ in range(2)
    )
    assert first == second


def test_a_saved_model_is_scored(plots, backbone_file, tmp_path):
    fit_canopy(*plots, out=tmp_path / "m", backbone=backbone_file, settings=SETTINGS)
    model = load_canopy_model(tmp_path / "m")
    table = evaluate_model(*plots, model=model, json_path=tmp_path / "table.json")
    assert table.row("model").scores.count == 138
    assert table.row("model").scores.mae == pytest.approx(model.card["training_mae_m"], abs=0.02)
    assert {r.site for r in table.rows} == {"all", "A", "B"}
    assert (tmp_path / "table.json").is_file()


def test_folds_are_balanced_within_each_site():
    sites = ["A"] * 11 + ["B"] * 6 + ["C"] * 2
    groups = [str(i) for i in range(19)]
    folds = assign_folds(groups, sites, 5, seed=0)
    for site, size in (("A", 11), ("B", 6), ("C", 2)):
        counts = collections.Counter(f for f, s in zip(folds, sites, strict=True) if s == site)
        assert sum(counts.values()) == size and max(counts.values()) <= -(-size // 5)
    totals = collections.Counter(folds)
    assert set(totals) == set(range(5)) and max(totals.values()) - min(totals.values()) <= 1
    assert folds == assign_folds(groups, sites, 5, seed=0) != assign_folds(groups, sites, 5, seed=1)


def test_plots_of_one_group_share_a_fold():
    folds = assign_folds(["a", "b", "a", "c", "b"], ["S"] * 5, 3, seed=0)
    assert folds[0] == folds[2] and folds[1] == folds[4] and len(set(folds)) == 3


@pytest.mark.parametrize("folds", [1, 4])
def test_impossible_numbers_of_folds_are_refused(folds):
    with pytest.raises(DataError, match="3 separate plots allow 2 to 3"):
        assign_folds(["a", "b", "c"], ["S"] * 3, folds, seed=0)


def test_a_report_that_cannot_be_written_says_so(plots, backbone_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RasterError, match="cannot be written"):
        evaluate_folds(
            *plots, backbone=backbone_file, folds=2, settings=SETTINGS, json_path=tmp_path / "file" / "t.json"
        )


def test_heights_without_any_value_are_refused(plots, backbone_file, write_raster):
    empty = write_raster(
        "empty.tif", array=np.full((4, 6), -9999, np.float32), pixel_size=1.0, origin=(X, Y), nodata=-9999
    )
    with pytest.raises(DataError, match="all of it nodata"):
        evaluate_folds(plots[0], empty, backbone=backbone_file, settings=SETTINGS)


VARIANTS = """
variants:
  plain: {num_maps: 1, head: {kind: context, components: 8}, fit: {epochs: 2}}
  all of it:
    {num_maps: 1, colours: true, register_cells: 1, head: {kind: context, components: 8, members: 2, bins: 8},
     fit: {epochs: 2, silog_share: 0.5, edge_weight: 0.1, tall_share: 0.3}}
"""


def test_variants_across_sites_with_shifts_go_on_where_they_were(plots, backbone_file, tmp_path, capsys):
    (tmp_path / "variants.yaml").write_text(VARIANTS)
    words = ["canopy", "evaluate", "--images", str(plots[0]), "--heights", str(plots[1]), "--across-sites"]
    words += ["--variants", f"{tmp_path}/variants.yaml", "--register", "2", "--block", "2"]
    words += ["--backbone", str(backbone_file), "--cache", f"{tmp_path}/cache", "--out", f"{tmp_path}/r"]
    assert main(words) == 0
    assert "all of it" in capsys.readouterr().out
    report = json.loads((tmp_path / "r" / "results.json").read_text())
    assert report["held_out"] == "sites" and report["folds"] == 2
    rows = {(row["method"], row["site"]): row for row in report["rows"]}
    assert rows["plain", "all"]["count"] == 138 and 0 <= rows["all of it", "all"]["edge_error"] <= 1
    # Site A is low and B is tall: held out, each is taken for the other.
    assert rows["mean", "A"]["bias"] > 15 and rows["mean", "B"]["bias"] < -15
    assert len(report["registration"]["plots"]) == 6 and set(report["registration"]["sites"]) == {"A", "B"}
    for name in ("results.md", "calibration.png", "bias.png"):
        assert (tmp_path / "r" / name).stat().st_size > 100
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "r" / "parts").iterdir()}
    assert len(kept) == 4
    next(iter(kept)).unlink()
    assert main(words) == 0
    assert sum(p.stat().st_mtime_ns != time for p, time in kept.items()) == 1
    assert json.loads((tmp_path / "r" / "results.json").read_text())["rows"] == report["rows"]


CHOICES = """
variants:
  nothing learnt: {num_maps: 1, head: {kind: context, dropout: 0}, fit: {epochs: 1, learning_rate: 1.0e-6}}
  learnt: {num_maps: 1, head: {kind: context, dropout: 0}, fit: {epochs: 120}}
"""


@pytest.mark.parametrize("how", [["--folds", "3"], ["--across-sites"]])
def test_a_choice_within_folds_is_scored_on_what_it_never_saw(how, plots, backbone_file, tmp_path, capsys):
    (tmp_path / "variants.yaml").write_text(CHOICES)

    def evaluate(name):
        words = [
            "canopy",
            "evaluate",
            "--images",
            str(plots[0]),
            "--heights",
            str(plots[1]),
            "--choose",
            *how,
        ]
        words += ["--variants", f"{tmp_path}/variants.yaml", "--backbone", str(backbone_file), "--out", name]
        assert main([*words, "--cache", f"{tmp_path}/cache"]) == 0
        return json.loads((tmp_path / name / "results.json").read_text())

    report = evaluate(str(tmp_path / "a"))
    assert "chosen" in capsys.readouterr().out and "| fold |" in (tmp_path / "a" / "results.md").read_text()
    choices, rows = report["choices"], {r["method"]: r for r in report["rows"] if r["site"] == "all"}
    assert len(choices) == report["folds"]
    for choice in choices:
        assert choice["mae_m"][choice["chosen"]] == min(choice["mae_m"].values()) > 0
    if how[0] == "--folds":
        # Every fold trains on both sites, so learning pays, and the choice is the same everywhere.
        assert {choice["chosen"] for choice in choices} == {"learnt"}
        assert rows[CHOSEN] == {**rows["learnt"], "method": CHOSEN}
    # Other heights in one plot change what every fold but its own is chosen by.
    with rasterio.open(plots[1] / "0.tif", "r+") as opened:
        heights = opened.read()
        opened.write(np.where(heights > 0, heights + 7, heights))
    changed = evaluate(str(tmp_path / "b"))["choices"]
    assert sum(new == old for new, old in zip(changed, choices, strict=True)) == 1


@pytest.mark.parametrize("name", ["mean", CHOSEN])
def test_a_variant_has_a_name_of_its_own(plots, backbone_file, tmp_path, capsys, name):
    (tmp_path / "v.yaml").write_text(f"variants: {{{name}: {{}}}}\n")
    words = ["canopy", "evaluate", "--images", str(plots[0]), "--heights", str(plots[1]), "--folds", "2"]
    assert main([*words, "--variants", f"{tmp_path}/v.yaml", "--backbone", str(backbone_file)]) == 2
    assert "the name of another row" in capsys.readouterr().err


def test_plots_without_heights_take_no_part_in_a_choice(plots, backbone_file, tmp_path):
    # With both of these a part of some fold would leave nothing to fit on.
    for number in (1, 2):
        with rasterio.open(plots[1] / f"{number}.tif", "r+") as opened:
            opened.write(np.full(opened.read().shape, -9999, np.float32))
    variants = {"one": SETTINGS, "two": SETTINGS.model_copy(update={"views": 2})}
    found = evaluate_folds(
        *plots, backbone=backbone_file, folds=3, settings=SETTINGS, variants=variants, choose=True
    )
    assert len(found.details["choices"]) == 3 and found.row(CHOSEN).scores.count == 4 * 23


def test_settings_come_from_a_file(plots, backbone_file, tmp_path):
    (tmp_path / "c.yaml").write_text("{num_maps: 1, head: {channels: 6}, fit: {epochs: 2}}\n")
    words = ["--images", str(plots[0]), "--heights", str(plots[1]), "--config", f"{tmp_path}/c.yaml"]
    words += ["--backbone", str(backbone_file), "--cache", f"{tmp_path}/cache", "--seed", "3"]
    report = tmp_path / "r.json"
    assert main(["canopy", "evaluate", *words, "--folds", "2", "--json", str(report)]) == 0
    assert main(["canopy", "fit", *words, "--epochs", "1", "--out", f"{tmp_path}/m"]) == 0
    used = json.loads(report.read_text())["settings"]["frozen features"]
    fitted = json.loads((tmp_path / "m" / "card.json").read_text())["settings"]
    for settings, epochs in ((used, 2), (fitted, 1)):
        assert (settings["head"]["channels"], settings["fit"]["epochs"]) == (6, epochs)
        assert settings["fit"]["seed"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--across-sites", "--folds", "2"], "leave out --folds"),
        (["--register", "2"], "go with --folds"),
        (["--folds", "2", "--variants", "v.yaml", "--epochs", "3"], "--set and --epochs"),
        (["--folds", "2", "--variants", "v.yaml", "--config", "c.yaml"], "leave out --config, --set"),
        (["--folds", "2", "--choose"], "give a file of them"),
        (["--config", "c.yaml"], "go with --folds"),
        (["--folds", "2", "--variants", "missing.yaml"], "cannot read configuration missing.yaml"),
    ],
)
def test_options_that_do_not_go_together_end_in_one_line(plots, capsys, words, message):
    assert main(["canopy", "evaluate", "--images", str(plots[0]), "--heights", str(plots[1]), *words]) == 2
    assert message in capsys.readouterr().err


def test_one_site_cannot_be_held_out(plots, backbone_file):
    images = [path for path in plots[0].iterdir() if path.name.startswith("A")]
    with pytest.raises(DataError, match="all plots are of the site 'A'"):
        evaluate_folds(images, plots[1], backbone=backbone_file, settings=SETTINGS, across_sites=True)
