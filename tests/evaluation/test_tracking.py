"""Labels that spread, against loops; scores of masks against definitions; the command on a small video."""

import math

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from PIL import Image

from dinov3geo import cli
from dinov3geo.errors import DataError
from dinov3geo.evaluation import tracking
from dinov3geo.evaluation.frames import pixel_encoder, read_mask, write_mask
from dinov3geo.evaluation.mask_metrics import boundary_f, boundary_map, j_and_f, region_similarity
from dinov3geo.evaluation.tracking import PatchFrame, TrackSettings, mask_shares, propagate, sharpen, track


@pytest.mark.parametrize("chunk", [1 << 24, 50])
def test_spreading_equals_a_loop(chunk, monkeypatch):
    monkeypatch.setattr(tracking, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    height, width, labels = 5, 6, 3
    settings = TrackSettings(neighbourhood=2, top=4, temperature=0.2)
    context = [
        PatchFrame(
            F.normalize(torch.randn(height, width, 8, generator=generator), dim=-1),
            torch.rand(labels, height, width, generator=generator).softmax(0),
        )
        for _ in range(3)
    ]
    features = F.normalize(torch.randn(height, width, 8, generator=generator), dim=-1)
    found = propagate(context, features, settings)
    for row in range(height):
        for col in range(width):
            near = [
                (float(features[row, col] @ frame.features[r, c]), frame.shares[:, r, c])
                for frame in context
                for r in range(height)
                for c in range(width)
                if math.hypot(r - row, c - col) <= 2
            ]
            best = sorted(near, key=lambda pair: -pair[0])[:4]
            weights = torch.tensor([pair[0] / 0.2 for pair in best]).softmax(0)
            expected = sum(w * shares for w, (_, shares) in zip(weights, best, strict=True))
            torch.testing.assert_close(found[:, row, col], expected, rtol=1e-4, atol=1e-5)


def test_shares_are_means_over_patches():
    mask = torch.zeros(8, 8, dtype=torch.long)
    mask[:4, :2] = 1
    shares = mask_shares(mask, 2, (2, 2))
    torch.testing.assert_close(shares[1], torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="labels must be"):
        mask_shares(mask, 1, (2, 2))


def test_faded_objects_keep_their_place():
    shares = torch.zeros(2, 4, 4)
    shares[0], shares[1, 1, 1] = 0.6, 0.4
    shares[0, 1, 1] = 0.55
    assert sharpen(shares, (4, 4))[1, 1] == 1 and sharpen(shares, (4, 4))[3, 3] == 0


def test_scores_of_masks():
    one, two = torch.zeros(40, 40, dtype=torch.bool), torch.zeros(40, 40, dtype=torch.bool)
    one[10:20, 10:20], two[10:20, 15:25] = True, True
    assert region_similarity(one, two) == pytest.approx(50 / 150)
    assert region_similarity(one, one) == boundary_f(one, one) == 1
    empty = torch.zeros_like(one)
    assert region_similarity(empty, empty) == boundary_f(empty, empty) == 1
    assert boundary_f(one, empty) == boundary_f(empty, one) == 0
    for share in (0.001, 0.05, 0.12):
        reach = math.ceil(share * math.hypot(40, 40))
        places = [torch.nonzero(boundary_map(mask)).float() for mask in (one, two)]
        distance = torch.cdist(places[0], places[1])
        precision = (distance.amin(1) <= reach).float().mean()
        recall = (distance.amin(0) <= reach).float().mean()
        expected = 2 * precision * recall / (precision + recall)
        assert boundary_f(one, two, bound_share=share) == pytest.approx(float(expected), abs=1e-6)
    labels = one.long() + 2 * (two & ~one).long()
    assert j_and_f(labels, labels) == (1, 1)
    with pytest.raises(ValueError, match="nothing to compare"):
        j_and_f(labels, labels * 0)


def test_boundary_is_where_a_neighbour_differs():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 9, generator=generator) < 0.5
    found = boundary_map(mask)
    for r in range(7):
        for c in range(9):
            r1, c1 = min(r + 1, 6), min(c + 1, 8)
            others = (mask[r, c1], mask[r1, c], mask[r1, c1])
            assert found[r, c] == any(mask[r, c] != other for other in others)


def moving_square(step):
    pixels = np.random.default_rng(5).integers(90, 110, (64, 96, 3)).astype(np.uint8)
    texture = np.random.default_rng(6).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    pixels[16:40, 8 + 8 * step : 32 + 8 * step] = texture
    mask = np.zeros((64, 96), np.uint8)
    mask[16:40, 8 + 8 * step : 32 + 8 * step] = 3
    return pixels, mask


def test_a_textured_square_is_followed():
    frames = [torch.from_numpy(moving_square(k)[0]).permute(2, 0, 1) for k in range(4)]
    start = torch.from_numpy(moving_square(0)[1].astype(np.int64))
    masks = list(
        track(
            [lambda f=f: f for f in frames],
            start,
            pixel_encoder(patch=8, short_side=None),
            num_labels=4,
        )
    )
    assert torch.equal(masks[0], start)
    truth = torch.from_numpy(moving_square(3)[1] == 3)
    assert region_similarity(masks[3] == 3, truth) > 0.7
    assert set(masks[3].unique().tolist()) <= {0, 3}
    wrong = [lambda: frames[0], lambda: frames[1][:, :40]]
    with pytest.raises(DataError, match="frame 2 has 40 x 96"):
        list(track(wrong, start, pixel_encoder(patch=8, short_side=None), num_labels=4))


@pytest.fixture
def video(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "truth").mkdir()
    for step in range(4):
        pixels, mask = moving_square(step)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{step:03d}.png")
        write_mask(tmp_path / "truth" / f"{step:03d}.png", mask)
    return tmp_path


def test_command_writes_masks_video_and_scores(video, capsys):
    words = ["track", video / "frames", "--first-mask", video / "truth" / "000.png", "-o", video / "out"]
    words += ["--truth", video / "truth", "--short-side", "128", "--there-and-back", "--video", "png"]
    assert cli.main([str(w) for w in words]) == 0
    out = capsys.readouterr().out
    assert "there and back" in out and "J&F" in out
    assert sorted(p.name for p in (video / "out").iterdir()) == [
        "000.png",
        "001.png",
        "002.png",
        "003.png",
        "overlay.png",
        "scores.csv",
    ]
    np.testing.assert_array_equal(read_mask(video / "out" / "000.png"), moving_square(0)[1])
    with Image.open(video / "out" / "overlay.png") as opened:
        assert opened.n_frames == 4 and opened.size == (96, 64)
    assert cli.main([str(w) for w in words]) == 2
    assert "not empty" in capsys.readouterr().err


def test_dates_of_one_place_are_followed_on_the_grid_of_the_first(write_raster, tmp_path):
    for step, shift in ((0, 0), (1, 2)):
        pixels = moving_square(0)[0].transpose(2, 0, 1)
        # The second date begins two pixels further west.
        origin = (400_000.0 - 0.1 * shift, 3_280_000.0)
        write_raster(f"dates/{2010 + step}.tif", array=np.roll(pixels, shift, axis=2), origin=origin)
    mask = tmp_path / "mask.png"
    write_mask(mask, moving_square(0)[1])
    words = ["track", tmp_path / "dates", "--first-mask", mask, "-o", tmp_path / "out", "--video", "gif"]
    assert cli.main([str(w) for w in [*words, "--short-side", "128"]]) == 0
    with (
        rasterio.open(tmp_path / "out" / "2011.tif") as after,
        rasterio.open(tmp_path / "dates" / "2010.tif") as first,
    ):
        assert after.transform == first.transform and after.crs == first.crs
        found = torch.from_numpy(after.read(1) == 3)
    assert region_similarity(found, torch.from_numpy(moving_square(0)[1] == 3)) > 0.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--first-mask": "none.png"}, "no such mask"),
        ({"folder": "none"}, "no such folder of frames"),
        ({"--video": "mp4"}, "valid names: gif, png, webp, none"),
        ({"--truth": "."}, "no mask named like a later frame"),
        ({"--start": "007"}, "unknown frame '007'"),
        ({"--start": "003"}, "at least 2 are needed"),
        ({"--first-mask": "black.png"}, "holds no object"),
    ],
)
def test_bad_input_is_one_line(video, change, message, capsys):
    Image.new("L", (96, 64)).save(video / "black.png")
    options = {"--first-mask": "truth/000.png"}
    given = {k: v for k, v in change.items() if k != "folder"}
    options |= given
    words = ["track", str(video / change.get("folder", "frames")), "-o", str(video / "out")]
    for key, value in options.items():
        words += [key, value if key in ("--video", "--start") else str(video / value)]
    code = cli.main(words)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(err) == 1 and message in err[0]
    assert not (video / "out").exists()


def test_colour_masks_are_numbered_by_their_colours(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[0, 0], picture[1, 1] = (0, 0, 200), (10, 0, 0)
    Image.fromarray(picture).save(tmp_path / "m.png")
    found = read_mask(tmp_path / "m.png")
    assert found[0, 0] == 1 and found[1, 1] == 2 and found.sum() == 3
