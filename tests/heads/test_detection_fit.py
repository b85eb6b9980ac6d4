"""Fits of detectors: stopped early by what is kept out, the best weights kept, taken up again after a cut."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3geo.data.boxes import box_groups, load_boxes
from dinov3geo.heads import epochs
from dinov3geo.heads.detection import DetectionHead, DetectionSettings, object_classes
from dinov3geo.heads.detection_fit import BoxSample, BoxView, fit_boxes, score_windows
from tests.command_line import run

HEADER = "image_path,xmin,ymin,xmax,ymax,label\n"
SETTINGS = ("views=2", "num_maps=1", "head.convs=1", "head.channels=32", "fit.epochs=5", "fit.batch_size=2")


class Killed(BaseException):
    """Stands for Ctrl-C."""


@pytest.fixture
def saves_each_epoch(monkeypatch):
    monkeypatch.setattr(epochs, "SECONDS_BETWEEN_SAVES", 0.0)


def samples(count, seed=0):
    """Windows of 8 x 8 patches whose first channel is 1 under a square object, in two views."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        views = []
        for _ in range(2):
            maps = 0.1 * torch.randn(4, 8, 8, generator=generator)
            row, col = torch.randint(0, 4, (2,), generator=generator).tolist()
            maps[0, row : row + 4, col : col + 4] = 1
            box = torch.tensor([[col, row, col + 4, row + 4]]) * 16.0
            views.append(BoxView((maps,), box, torch.zeros(1, dtype=torch.long), (128, 128)))
        found.append(BoxSample(tuple(views), f"place{number}"))
    return found


def fit(state_file=None, *, stop_after=None, **changes):
    fit_settings = {"epochs": 6, "batch_size": 2, "learning_rate": 5e-3} | changes
    settings = DetectionSettings.model_validate(
        {"head": {"channels": 32, "convs": 1}, "fit": fit_settings, "min_score": 0.0}
    )
    torch.manual_seed(0)
    head = DetectionHead([4], output=object_classes(["square"]), patch=16, settings=settings)

    def progress(stage, done, total):
        if done == stop_after:
            raise Killed

    held = samples(2, seed=1)
    result = fit_boxes(head, samples(5), settings.fit, held=held, progress=progress, state_file=state_file)
    return head, result, held


@pytest.mark.parametrize("monitor", ["loss", "map"])
def test_a_killed_fit_ends_in_the_same_bits(monitor, tmp_path, saves_each_epoch):
    whole, expected, _ = fit(monitor=monitor)
    for stop_after in (2, 4):
        with pytest.raises(Killed):
            fit(tmp_path / "state", monitor=monitor, stop_after=stop_after)
    found, result, _ = fit(tmp_path / "state", monitor=monitor)
    assert result.resumed_epoch == 3 and not list(tmp_path.iterdir())
    assert (result.losses, result.validation_errors) == (expected.losses, expected.validation_errors)
    assert result.best_epoch == expected.best_epoch
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in found.state_dict().items())


def test_another_fit_begins_anew(tmp_path, saves_each_epoch):
    with pytest.raises(Killed):
        fit(tmp_path / "state", stop_after=3)
    assert fit(tmp_path / "state", learning_rate=4e-3)[1].resumed_epoch == 0


@pytest.mark.parametrize("monitor", ["loss", "map"])
def test_the_best_epoch_is_kept_and_patience_ends_the_fit(monitor):
    # At so high a rate the first epochs are not the worst, and nothing improves for long.
    head, result, held = fit(monitor=monitor, epochs=40, patience=2, learning_rate=0.05, warmup_share=0.0)
    errors = result.validation_errors
    assert len(errors) == len(result.losses) == result.best_epoch + 3 < 40
    assert errors[result.best_epoch] == min(errors)
    if monitor == "map":
        assert 1 - score_windows(head, held).map == errors[result.best_epoch]
    else:
        with torch.no_grad():
            views = [sample.views[0] for sample in held]
            losses = [head.losses([v.maps[0][None]], [v.boxes], [v.labels]) for v in views]
        assert float(np.mean([float(loss) for loss in losses])) == errors[result.best_epoch]


@pytest.fixture
def squares(tmp_path):
    """Six pictures of a bright square each, and their boxes."""
    generator = np.random.default_rng(0)
    lines = [HEADER]
    for number in range(6):
        pixels = generator.integers(0, 60, (96, 96, 3))
        row, col = generator.integers(0, 56, 2)
        pixels[row : row + 40, col : col + 40] += 180
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{col},{row},{col + 40},{row + 40},square\n")
    (tmp_path / "boxes.csv").write_text("".join(lines))
    return tmp_path / "boxes.csv"


def words_of(boxes, out, *changes):
    sets = [word for change in (*SETTINGS, *changes) for word in ("--set", change)]
    return ["detect", "fit", boxes, "--out", out, "--cache", boxes.parent / "cache", *sets]


def test_the_same_command_goes_on_with_an_interrupted_fit(
    squares, tmp_path, capsys, monkeypatch, saves_each_epoch
):
    share = "fit.validation_share=0.3"
    code, out, err = run(capsys, *words_of(squares, tmp_path / "whole", share))
    assert code == 0, err
    assert "of 2 boxes in 2 windows kept out" in out
    losses, calls = DetectionHead.losses, []

    def interrupted(*arguments):
        calls.append(1)
        # An epoch is two steps and the loss of two windows.
        if len(calls) == 4 * 3 + 1:
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(DetectionHead, "losses", interrupted)
    words = words_of(squares, tmp_path / "cut", share)
    assert run(capsys, *words)[0] == 130
    assert (tmp_path / ".cut.fit").is_file() and not (tmp_path / "cut").exists()
    code, out, err = run(capsys, *words)
    assert code == 0 and "went on after epoch 3 of a fit that was cut off" in err
    assert not (tmp_path / ".cut.fit").exists()
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    assert (whole / "head.safetensors").read_bytes() == (cut / "head.safetensors").read_bytes()
    fits = [json.loads((folder / "card.json").read_text())["fit"] for folder in (whole, cut)]
    assert fits[0] == fits[1] and fits[0]["held_out"]["windows"] == 2
    assert fits[0]["validation_errors"][fits[0]["best_epoch"] - 1] == min(fits[0]["validation_errors"])


def test_what_cannot_be_kept_out_is_one_line(squares, tmp_path, capsys, monkeypatch):
    one = tmp_path / "one.csv"
    one.write_text("".join(squares.read_text().splitlines(keepends=True)[:2]))
    words = words_of(one, tmp_path / "m", "fit.validation_share=0.3")
    for more in ((), ("--dry-run",)):
        code, out, err = run(capsys, *words, *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "leaves none of 1 separate places to train on" in err
    code, out, err = run(capsys, *words_of(squares, tmp_path / "m", "fit.validation_share=0.3"), "--dry-run")
    assert code == 0 and "kept out" in out
    empty = tmp_path / "empty.csv"
    rows = squares.read_text().splitlines(keepends=True)
    empty.write_text("".join([*rows[:2], *(f"{number}.png,0,0,0,0,square\n" for number in range(1, 6))]))
    code, out, err = run(capsys, *words_of(empty, tmp_path / "m", "fit.validation_share=0.3"))
    assert code == 2 and "part shows a box; change fit.validation_share" in err
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    code, out, err = run(capsys, *words_of(squares, tmp_path / "m", "fit.validation_share=0.3"))
    assert (code, out) == (2, "") and "pip install 'dinov3geo[detect]'" in err
    assert not (tmp_path / "m").exists()


def test_rasters_that_overlap_are_one_place(write_raster, tmp_path):
    lines = [HEADER]
    for number, east in enumerate((0, 5, 100)):
        write_raster(f"{number}.tif", shape=(3, 32, 32), origin=(400_000 + east, 0), pixel_size=1)
        lines.append(f"{number}.tif,1,1,9,9,tree\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    (tmp_path / "b.csv").write_text("".join([*lines, "p.png,1,1,9,9,tree\n"]))
    groups = box_groups(load_boxes(tmp_path / "b.csv").images)
    assert groups[0] == groups[1] and len(set(groups)) == 3
