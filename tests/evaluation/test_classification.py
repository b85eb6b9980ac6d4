"""The protocol end to end on small folders, and on EuroSAT where it is."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3geo import cli
from dinov3geo.backbones.zoo import load_backbone
from dinov3geo.errors import ConfigError, DataError, RasterError
from dinov3geo.evaluation.classification import ClassificationSettings, evaluate_backbone, evaluate_encoder
from dinov3geo.evaluation.encoders import (
    BackboneEncoder,
    ColourStatistics,
    Pixels,
    RandomConvolutions,
    encode,
)
from dinov3geo.evaluation.fewshot import draw_shots, few_shot
from dinov3geo.evaluation.image_sets import (
    class_folders,
    hash_share,
    read_image,
    resize_image,
    split_images,
)
from dinov3geo.evaluation.linear_probe import fit_linear_probes
from dinov3geo.evaluation.named_encoders import Input, make_encoder, make_encoders

CLASSES = ("dark", "light", "striped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for number in range(40):
            pixels = generator.integers(0, 80, (32, 32, 3)) + (100 if name == "light" else 0)
            if name == "striped":
                pixels[::4] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{name}_{number}.png")
    return root


def test_split_is_by_name_and_on_every_machine_the_same(folder):
    images = class_folders(folder)
    assert images.classes == CLASSES and len(images) == 120 and not images.multi_label
    split = split_images(images)
    parts = [set(map(int, p)) for p in (split.train, split.validation, split.test)]
    assert sum(map(len, parts)) == 120 and not set.intersection(*parts)
    assert parts[2] == {i for i, n in enumerate(images.names) if hash_share(n) < 0.2}
    assert hash_share("Forest_1.jpg") == pytest.approx(0.70167, abs=1e-5)
    shares = [hash_share(f"{i}") for i in range(2000)]
    assert abs(np.mean(shares) - 0.5) < 0.02
    limited = images.limit(10)
    assert np.bincount(limited.labels.numpy()).tolist() == [10, 10, 10]
    assert set(limited.names) <= set(images.names)


def test_all_methods_on_all_baselines(folder):
    images = class_folders(folder)
    split = split_images(images)
    settings = ClassificationSettings(
        methods=("knn", "logistic", "linear", "few-shot"),
        ks=(3, 5),
        c_count=5,
        linear_steps=200,
        shots=(1, 5, 1000),
        draws=2,
        resamples=20,
    )
    for encoder in (ColourStatistics(), RandomConvolutions(features=32), Pixels(4)):
        results, notes = evaluate_encoder(encoder, images, split, settings)
        methods = [r.method for r in results]
        assert methods == ["kNN k=3", "kNN k=5", "kNN k=5, plain", "logistic", "linear", "1-shot", "5-shot"]
        assert notes[0].startswith("few-shot 1000 was left out")
        for result in results:
            best = result.scores["accuracy"]
            assert best.low <= best.value <= best.high
        assert results[3].scores["accuracy"].value > 0.5
        assert results[4].scores["accuracy"].value > 0.8


def test_any_backbone_in_one_line(folder):
    found = evaluate_backbone(load_backbone(), folder, size=32, per_class=30)
    assert {"kNN k=20", "logistic"} <= set(found)
    assert found["logistic"].value > 0.8


def test_encoding_is_kept_and_known_by_weights_and_images(folder, tmp_path):
    images = class_folders(folder).limit(4)
    encoder = BackboneEncoder(load_backbone(), size=32)
    first = encode(encoder, images, cache=tmp_path, batch_size=5)
    assert len(list(tmp_path.iterdir())) == 1
    one_by_one = encode(encoder, images, batch_size=1)
    torch.testing.assert_close(first, one_by_one, rtol=1e-4, atol=1e-4)
    (tmp_path / next(tmp_path.iterdir()).name).touch()
    assert torch.equal(encode(encoder, images, cache=tmp_path), first)
    other = make_encoder("untrained", Input(size=32))
    assert other.digest() != encoder.digest()
    again = make_encoder("untrained", Input(size=32))
    assert again.digest() == other.digest()


def test_class_token_and_patches_are_those_of_the_backbone(folder):
    backbone = load_backbone()
    images = class_folders(folder).limit(2)
    encoder = BackboneEncoder(backbone, size=32)
    vectors = encode(encoder, images)
    numbers = torch.stack([images.read(i) for i in range(len(images))])
    features = backbone(backbone.card.normalization(numbers))
    columns = encoder.columns()
    torch.testing.assert_close(vectors[:, columns["cls"]], features.cls, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(vectors[:, columns["mean"]], features.patches.mean(1), rtol=1e-3, atol=1e-3)


def test_linear_probe_finds_the_optimum_of_a_separable_problem():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    features = torch.eye(3)[labels] * 5 + torch.randn(300, 3, generator=generator)
    models = fit_linear_probes(features, labels, num_classes=3, rates=(1e-5, 0.1), steps=300)
    best = models.best(features, labels, lambda s, t: float((s.argmax(1) == t).float().mean()))
    assert best == 1
    assert (models.scores(features, best).argmax(1) == labels).float().mean() > 0.97


def test_linear_probe_steps_as_torch_does():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (64,), generator=generator)
    features = torch.randn(64, 5, generator=generator)
    models = fit_linear_probes(features, labels, num_classes=3, rates=(0.5,), steps=4, batch_size=64)
    again = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    layer.weight.data = torch.randn(3, 5, generator=again) * 0.01
    layer.bias.data.zero_()
    inputs = (features - features.mean(0)) / features.std(0, correction=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5 * 64 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(inputs), labels).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(models.weights[0], layer.weight.detach(), rtol=1e-4, atol=1e-5)


def test_few_shots_are_nested_and_improve():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    features = torch.eye(4)[labels] * 2 + torch.randn(400, 4, generator=generator)
    five, one = (set(draw_shots(labels, n, num_classes=4, seed=3).tolist()) for n in (5, 1))
    assert one < five and len(five) == 20
    train, test = (features[:200], labels[:200]), (features[200:], labels[200:])
    few, many = (few_shot(train, test, num_classes=4, shots=n) for n in (1, 40))
    assert few.accuracy.value < many.accuracy.value
    assert few.deviation > many.deviation
    with pytest.raises(ValueError, match="a class has fewer"):
        few_shot(train, test, num_classes=4, shots=60)


def test_photographs_are_cut_about_the_middle():
    image = torch.zeros(3, 40, 80)
    image[:, :, 40:] = 1
    cut = resize_image(image, 16, crop_from=20)
    assert cut.shape == (3, 16, 16) and cut[:, :, :7].max() < 0.1 and cut[:, :, 9:].min() > 0.9
    assert resize_image(image, 16).shape == (3, 16, 16)
    assert resize_image(image, None).shape == (3, 40, 80)


def test_rasters_with_and_without_place(write_raster, tmp_path):
    names = ("blue", "green", "red", "nir")
    placed = write_raster("a.tif", shape=(4, 20, 20), dtype="uint16", band_names=names)
    everything = read_image(placed)
    numbers = np.random.default_rng(0).integers(1, 200, (3, 20, 20)).astype(np.uint8)
    chosen = read_image(placed, ("red", "green", "blue"))
    torch.testing.assert_close(chosen, everything[[2, 1, 0]])
    plain = write_raster("b.tif", array=everything.numpy().astype(np.uint16), crs=None, band_names=names)
    torch.testing.assert_close(read_image(plain, ("red", "green", "blue")), chosen)
    unnamed = write_raster("c.tif", shape=(4, 20, 20), dtype="uint16")
    with pytest.raises(DataError, match="4 bands"):
        read_image(unnamed, ("nir", "swir1", "swir2"))
    assert read_image(unnamed, names).shape == (4, 20, 20)
    assert read_image(unnamed, ("nir", "red"), order=names).shape == (2, 20, 20)
    for crs in ("EPSG:32617", None):
        blank = write_raster("f.tif", array=numbers, crs=crs, band_names=[])
        ordered = read_image(blank, ("nir", "red"), order=("red", "green", "nir"))
        np.testing.assert_array_equal(ordered, numbers[[2, 0]])
        with pytest.raises(DataError, match="has 3 bands, expected 4"):
            read_image(blank, ("nir", "red"), order=names)
        numbered = write_raster("d.tif", array=numbers, crs=crs, band_names=("B02", "B03", "B04"))
        np.testing.assert_array_equal(read_image(numbered, ("red", "green", "blue")), numbers[::-1])
        other = write_raster("e.tif", array=numbers, crs=crs, band_names=("nir", "blue", "red"))
        with pytest.raises(DataError, match=r"\(nir, blue, red\), expected 3: red, green, blue"):
            read_image(other, ("red", "green", "blue"))


def test_command_writes_table_and_pictures(folder, tmp_path, capsys):
    words = ["classify", "evaluate", folder, "--size", 32, "--per-class", 30, "--out", tmp_path / "out"]
    words += ["--cache", tmp_path, "--set", "c_count=4", "--set", "resamples=10", "--set", "shots=[1]"]
    assert cli.main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    for name in ("vit-tiny-aerial", "untrained", "RCF (512 features, 5x5)", "colour statistics"):
        assert name in out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "table.csv", "table.md", "table.png", "confusion_vit_tiny_aerial.png"} <= files
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["images"]["test"] > 0 and report["settings"]["c_count"] == 4
    assert report["command"].startswith("dinov3geo classify evaluate")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}/none"], "no such folder"),
        (["{folder}/dark"], "images beside them"),
        (["{folder}", "--backbone", "nowhere"], "unknown backbone"),
        (["{folder}", "--backbone", "timm:vit_tiny_patch16_224"], "names no weights"),
        (["{folder}", "--backbone", "transformers:{folder}"], "no config.json"),
        (["{folder}", "--crop-from", "100"], "cannot cut"),
        (["{folder}", "--sensor", "naip"], "say how to adapt the stem"),
        (["{folder}", "--set", "methods=[knnn]"], "methods"),
        (["{folder}", "--sensor", "naip", "--stem", "mean"], "asked for red, green, blue, nir"),
        (["{folder}", "--backbone", "untrained:vit_giga"], "vit_giga"),
    ],
)
def test_bad_input_is_one_line(words, message, folder, capsys, tmp_path):
    given = [word.format(folder=folder) for word in words]
    code = cli.main(["classify", "evaluate", *given, "--cache", str(tmp_path), "--no-baselines"])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and not out and len(lines) == 1 and message in lines[0]


def test_too_few_images_and_damaged_ones(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "one.png")
    with pytest.raises(DataError, match="none of them falls into the part"):
        split_images(class_folders(tmp_path))
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    images = class_folders(tmp_path)
    with pytest.raises(DataError, match="cannot be decoded"):
        encode(ColourStatistics(), images)
    with pytest.raises(RasterError, match="no such folder"):
        class_folders(tmp_path / "none")


def test_two_weights_of_one_name_are_told_apart():
    encoders = make_encoders(["vit-tiny-aerial", "colours", "vit-tiny-aerial", "pixels"], Input(size=32))
    assert [e.name for e in encoders] == ["vit-tiny-aerial", "colour statistics", "pixels"]
    with pytest.raises(ConfigError, match="cannot cut"):
        make_encoders(["colours"], Input(size=None, crop_from=20))


def test_eurosat_harness(data_root):
    folder = data_root / "eurosat"
    if not folder.is_dir():
        pytest.skip("no eurosat/ in the real data")
    images = class_folders(folder).limit(40)
    split = split_images(images)
    settings = ClassificationSettings(methods=("knn", "logistic"), c_count=8, resamples=20)
    results, _ = evaluate_encoder(ColourStatistics(), images, split, settings)
    scores = {r.method: r.scores["accuracy"].value for r in results}
    assert scores["kNN k=5, plain"] > 0.35 and scores["logistic"] > 0.45
