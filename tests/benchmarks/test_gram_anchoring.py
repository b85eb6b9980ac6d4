"""The study of Gram anchoring runs, is taken up again, and its numbers mean what they say."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gram_anchoring, gram_probes, gram_report

CLASSES = "classes:\n  - {name: dark, values: 1}\n  - {name: bright, values: 2}\n"
SIDE = 64


@pytest.fixture
def words(tmp_path, write_raster):
    random = np.random.default_rng(0)
    for label, level in (("forest", 60), ("sand", 190)):
        folder = tmp_path / "eurosat" / label
        folder.mkdir(parents=True)
        for number in range(40):
            pixels = random.normal(level, 30, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}_{number}.png")
    for place in range(3):
        mask = np.where(np.arange(SIDE) < SIDE // 2, 1, 2)[None].repeat(SIDE, 0).astype(np.uint8)
        image = (mask * 80 + random.integers(0, 40, (3, SIDE, SIDE))).astype(np.uint8)
        where = {"pixel_size": 10.0, "origin": (400_000.0 + 5_000 * place, 4_000_000.0)}
        write_raster(f"tiles/image/{place}.tif", array=image, **where)
        write_raster(f"tiles/mask/{place}.tif", array=mask, **where)
    (tmp_path / "classes.yaml").write_text(CLASSES)
    return [
        *("--eurosat", f"{tmp_path}/eurosat", "--tiles", f"{tmp_path}/tiles"),
        *("--classes", f"{tmp_path}/classes.yaml", "--smoke"),
        *("--work", f"{tmp_path}/work", "--out", f"{tmp_path}/results"),
    ]


def rows_of(folder):
    rows = json.loads((folder / "results" / "results.json").read_text())["rows"]
    return {(r["run"], r["seed"], r["step"], r["metric"]): r["value"] for r in rows}


def test_a_study_that_was_stopped_goes_on_to_the_same_numbers(words, tmp_path, monkeypatch, capsys):
    assert gram_anchoring.main(words) == 0
    whole = rows_of(tmp_path)
    runs = {key[0] for key in whole}
    assert runs == {"trunk", "no_gram", "gram_2", "gram_4", "gram_2_2x"}
    assert {key[1] for key in whole} == {1, 2}
    assert {key[2] for key in whole if key[0] == "trunk"} == {0, 2, 4}
    assert {key[2] for key in whole if key[0] == "gram_2"} == {6}
    table = capsys.readouterr().out
    assert "Gram, anchor of step 2, 2x resolution" in table and "untrained" in table
    assert all(
        (tmp_path / "results" / name).stat().st_size for name in ("curves.png", "curves.csv", "table.md")
    )
    # Every anchor asks for something else of the same images.
    asked = {key[0]: value for key, value in whole.items() if key[1:] == (1, 6, "gram")}
    assert set(asked) == {"gram_2", "gram_4", "gram_2_2x"} and len(set(asked.values())) == 3

    measure, calls = gram_probes.Probe.measure, []

    def interrupted(probe, *arguments):
        calls.append(arguments)
        if len(calls) in (2, 6):  # within the trunk, and in the last step of an arm
            signal.raise_signal(signal.SIGTERM)
        return measure(probe, *arguments)

    monkeypatch.setattr(gram_probes.Probe, "measure", interrupted)
    again = [word.replace("/work", "/work2") for word in words]
    (tmp_path / "results" / "results.json").unlink()
    for made in (2, 6):
        assert gram_anchoring.main(again) == 0
        assert "goes on from here" in capsys.readouterr().err
        assert len(calls) == made and not (tmp_path / "results" / "results.json").exists()
    assert gram_anchoring.main(again) == 0
    assert rows_of(tmp_path) == whole


def test_no_run_sees_images_of_the_scores(words, tmp_path):
    study = gram_anchoring.make_study(options := gram_anchoring.parse(words))
    gram_anchoring.prepare(study, options)
    shares = [gram_anchoring.hash_share(path.name) for path in (tmp_path / "work/images").rglob("*.png")]
    assert 40 < len(shares) < 80 and min(shares) >= 0.2
    assert not any(0.3 <= share < 0.4 for share in shares)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "schedules.lr={peak: 1.0e-3, end: 0.0}"], "cosine_steps"),
        (["--set", "steps=5"], "step 5 has no checkpoint"),
    ],
)
def test_a_study_whose_arms_would_differ_otherwise_is_refused(words, more, said, capsys):
    assert gram_anchoring.main([*words, *more]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_folder_is_one_line(words, tmp_path, capsys):
    assert gram_anchoring.main([*words, "--eurosat", f"{tmp_path}/nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_arms_that_share_an_anchor_are_told_apart():
    arms = gram_anchoring.choose_arms([2, 8], fine=8)
    assert [(a.anchor, a.scale) for a in arms] == [(None, 1), (2, 1), (8, 1), (8, 2)]
    assert len({a.name for a in arms}) == len({a.label for a in arms}) == 4


def test_noise_tells_smooth_similarities_from_speckle():
    ramp = torch.linspace(0, 1, 8)
    smooth = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), -1).flatten(0, 1)
    smooth = torch.nn.functional.normalize(torch.cat([smooth, torch.ones(64, 1)], 1), dim=-1)[None]
    rough = torch.nn.functional.normalize(
        torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    quiet, loud = (gram_probes.similarity_noise(p, (8, 8)) for p in (smooth, rough))
    assert quiet < 0.05 and loud > 0.8


def test_pair_error_is_zero_for_features_that_are_the_classes_and_half_for_chance():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (20, 64), generator=random)
    assert gram_probes.pair_error(torch.nn.functional.one_hot(labels, 2).float(), labels) < 1e-9
    noise = torch.nn.functional.normalize(torch.randn(20, 64, 16, generator=random), dim=-1)
    assert gram_probes.pair_error(noise, labels) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(gram_probes.DataError, match="no chip"):
        gram_probes.pair_error(noise, torch.zeros_like(labels))


def test_mosaics_hold_every_image_once_with_its_class():
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 4, 4)
    mosaics = gram_probes.make_mosaics(
        gram_probes.LabelledSet(images, torch.arange(8), 8), "abcdefgh", count=9, patch=2
    )
    assert mosaics.images.shape == (2, 3, 8, 8) and mosaics.labels.shape == (2, 16)
    cells = mosaics.images[:, 0, ::2, ::2].flatten(1)
    assert torch.equal(cells.long(), mosaics.labels) and len(cells.unique()) == 8


def test_linear_segmentation_finds_rare_classes():
    random = torch.Generator().manual_seed(0)
    labels = (torch.arange(2000) % 50 == 0).long()
    features = torch.randn(2000, 4, generator=random) + 6 * labels[:, None]
    found = gram_probes.linear_classes(features[:1000], labels[:1000], features[1000:], 2)
    assert torch.equal(found, labels[1000:])


def test_estimates_hold_students_interval():
    estimate = gram_report.Estimate.of([0.1, 0.2, 0.3])
    assert str(estimate) == "0.200 ± 0.248" and estimate.signed() == "+0.200 ± 0.248"
    assert str(gram_report.Estimate.of([0.5])) == "0.500"
