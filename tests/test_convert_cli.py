"""`dinov3geo convert` and `dinov3geo export`, end to end."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import NORMALIZATIONS, BackboneCard
from dinov3geo.backbones.export import export_backbone
from dinov3geo.backbones.vit import VitConfig
from dinov3geo.backbones.zoo import build_backbone, build_network, load_backbone, save_backbone
from dinov3geo.commands.convert import convert
from dinov3geo.commands.export import ONNX_PACKAGES, export, onnx_runner
from dinov3geo.errors import ConfigError, DataError, RasterError, UnknownNameError

app = typer.Typer()
app.command("convert")(convert)
app.command("export")(export)


def run(*words: object) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module", params=["vit_tiny", "convnext_tiny"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    backbone = build_backbone(request.param, layer_scale=0.3)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_backbone(
        path, backbone, BackboneCard("w", request.param, backbone.patch_size, NORMALIZATIONS["sat"])
    )
    return path


def features(backbone: Backbone, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = backbone(image)
    return torch.cat([found.cls[:, None], found.registers, found.patches], dim=1)


def test_every_dialect_and_back(ours: Path, tmp_path: Path) -> None:
    outputs = {
        "official": tmp_path / "o.pth",
        "hf": tmp_path / "h",
        "timm": tmp_path / "t.safetensors",
        "ours": tmp_path / "back.safetensors",
    }
    source = ours
    for dialect, output in outputs.items():
        assert run("convert", source, output, "--to", dialect, "--normalization", "sat").exit_code == 0
        source = output
    start, end = load_file(ours), load_file(outputs["ours"])
    assert start.keys() == end.keys()
    assert all(torch.equal(end[name], tensor) for name, tensor in start.items() if name != "mask_token")
    assert load_backbone(source).card.normalization == NORMALIZATIONS["sat"]
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("bands", [3, 4])
def test_transformers_opens_the_folder(ours: Path, tmp_path: Path, bands: int) -> None:
    transformers = pytest.importorskip("transformers")
    extra = ["--sensor", "naip", "--stem", "mean"] if bands == 4 else []
    result = run("convert", ours, tmp_path / "hf", "--to", "hf", *extra)
    assert "AutoModel" in result.stdout
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    image = torch.randn(1, bands, 64, 96)
    with torch.no_grad():
        expected = model(image).last_hidden_state
    loaded = load_backbone(tmp_path / "hf")
    assert loaded.card.normalization == (NORMALIZATIONS["sat"] if bands == 3 else _statistics(4))
    found = features(loaded, image)
    assert float((found - expected).abs().max()) < 1e-5


def _statistics(bands: int) -> object:
    from dinov3geo.backbones.card import Normalization
    from dinov3geo.rasters.sensors import get_sensor

    return "web" if bands == 3 else Normalization.of_bands(get_sensor("naip").bands)


@pytest.mark.parametrize("bands", [3, 4])
def test_timm_opens_the_file(ours: Path, tmp_path: Path, bands: int) -> None:
    timm = pytest.importorskip("timm")
    extra = ["--sensor", "naip", "--stem", "mean"] if bands == 4 else []
    result = run("convert", ours, tmp_path / "t.safetensors", "--to", "timm", *extra)
    call = next(line for line in result.stdout.splitlines() if line.startswith("open with"))
    model = eval(call.removeprefix("open with").strip(), {"timm": timm}).eval()
    image = torch.randn(1, bands, 256, 256)
    loaded = load_backbone(tmp_path / "t.safetensors", normalization=_statistics(bands))
    with torch.no_grad():
        expected = model.forward_features(image)
    found = features(loaded, image)
    if expected.ndim == 4:  # ConvNeXt: the map before its norm
        with torch.no_grad():
            expected, found = model.forward_head(expected), found[:, 0]
    assert float((found - expected).abs().max()) < 1e-5


def test_official_tensors_only(ours: Path, tmp_path: Path) -> None:
    run("convert", ours, tmp_path / "o.pth", "--to", "official")
    tensors = torch.load(tmp_path / "o.pth", weights_only=True)
    if "storage_tokens" in tensors:
        assert tensors["mask_token"].shape == (1, 192)
        assert not tensors["blocks.0.attn.qkv.bias_mask"][192:384].any()
    else:
        assert torch.equal(tensors["norms.3.weight"], tensors["norm.weight"])


@pytest.mark.parametrize(
    ("output", "dialect", "error", "message"),
    [
        ("o.safetensors", "official", ConfigError, r"\.pth"),
        ("o.pth", "timm", ConfigError, r"\.safetensors"),
        ("o.safetensors", "hf", ConfigError, "folder"),
        ("o.pth", "keras", UnknownNameError, "hf, official, ours, timm"),
    ],
)
def test_outputs_that_do_not_fit(
    ours: Path, tmp_path: Path, output: str, dialect: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run("convert", ours, tmp_path / output, "--to", dialect)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(ours: Path, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    run("convert", ours, output, "--to", "hf")
    with pytest.raises(RasterError, match="exists"):
        run("convert", ours, output, "--to", "hf")
    assert run("convert", ours, output, "--to", "hf", "--overwrite").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    with pytest.raises(RasterError, match="not overwritten"):
        run("convert", ours, tmp_path / "mine", "--to", "hf", "--overwrite")


def test_a_file_where_the_card_belongs_is_kept(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text("mine")
    with pytest.raises(RasterError, match=r"w\.json exists"):
        run("convert", ours, tmp_path / "w.safetensors", "--to", "ours")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ConfigError, match="into a file, got the folder"):
        run("convert", ours, tmp_path / "folder.pth", "--to", "official", "--overwrite")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ConfigError, match="into a file, got the folder"):
        run("export", ours, tmp_path / "folder.pt", "--format", "torchscript", "--overwrite")


@pytest.mark.parametrize("dialect", ["official", "timm"])
def test_four_bands_come_back(ours: Path, tmp_path: Path, dialect: str) -> None:
    start, there, back = (tmp_path / name for name in ("a.safetensors", "b", "c.safetensors"))
    there = there.with_suffix(".pth" if dialect == "official" else ".safetensors")
    run("convert", ours, start, "--to", "ours", "--sensor", "naip", "--stem", "mean")
    run("convert", start, there, "--to", dialect)
    with pytest.raises(ConfigError, match="name a sensor with these 4 bands"):
        run("convert", there, back, "--to", "ours")
    run("convert", there, back, "--to", "ours", "--sensor", "naip")
    first, last = load_file(start), load_file(back)
    assert all(torch.equal(last[name], tensor) for name, tensor in first.items() if name != "mask_token")
    assert load_backbone(back).card.normalization == load_backbone(start).card.normalization


def test_four_bands_without_saying_how(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mean or zero"):
        run("convert", ours, tmp_path / "w.safetensors", "--to", "ours", "--sensor", "naip")


FORMATS = [pytest.param("exported-program", ".pt2", marks=pytest.mark.slow), ("torchscript", ".pt")]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("file_format", "suffix"), FORMATS)
def test_exported_file_equals_the_network_at_other_sizes(
    ours: Path, tmp_path: Path, file_format: str, suffix: str
) -> None:
    output = tmp_path / f"net{suffix}"
    result = run("export", ours, output, "--format", file_format, "--size", 64, 96, "--dynamic")
    assert result.stdout.count("differs by at most") == 3
    loaded = load_backbone(ours)
    image = torch.randn(1, 3, 130, 63)
    with torch.no_grad():
        program = torch.jit.load(output) if suffix == ".pt" else torch.export.load(output).module()
        assert float((program(image)[2] - loaded(image).patches).abs().max()) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.skipif(any(find_spec(name) is None for name in ONNX_PACKAGES), reason="needs ONNX packages")
@pytest.mark.slow
def test_onnx_file_of_a_whole_network(ours: Path, tmp_path: Path) -> None:
    result = run("export", ours, tmp_path / "n.onnx", "--format", "onnx", "--size", 96, 130, "--dynamic")
    assert result.stdout.count("differs by at most") == 3
    check_onnx(tmp_path / "n.onnx", load_backbone(ours))


@pytest.mark.skipif(any(find_spec(name) is None for name in ONNX_PACKAGES), reason="needs ONNX packages")
def test_one_dynamic_onnx_file_serves_all_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = VitConfig(64, 2, 1, "swiglu", 96, layer_scale=0.3)
    backbone = build_network(shape).eval()
    report = export_backbone(
        backbone, tmp_path / "n.onnx", "onnx", size_hw=(96, 130), dynamic=True, run=onnx_runner()
    )
    assert max(report.differences.values()) < 1e-5
    check_onnx(tmp_path / "n.onnx", backbone)


def check_onnx(output: Path, loaded: Backbone) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 224, 224), (2, 3, 250, 330), (1, 3, 33, 71)):
        image = torch.randn(shape)
        with torch.no_grad():
            expected = loaded(image)
        cls, registers, patches = map(torch.from_numpy, session.run(None, {"images": image.numpy()}))
        assert registers.shape == expected.registers.shape
        assert float((cls - expected.cls).abs().max()) < 1e-3
        assert float((patches - expected.patches).abs().max()) < 1e-3
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_weights_beyond_the_limit_of_onnx_are_refused_at_once(tmp_path: Path) -> None:
    with torch.device("meta"):
        huge = build_backbone("vit_huge_plus").eval()
    with pytest.raises(ConfigError, match=r"take 3\.4 GB; export them as exported-program"):
        export_backbone(huge, tmp_path / "n.onnx", "onnx", size_hw=(64, 64), dynamic=False, run=lambda *_: [])


@pytest.mark.skipif(all(find_spec(name) for name in ONNX_PACKAGES), reason="the ONNX packages are there")
def test_missing_onnx_packages_are_named(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install"):
        run("export", ours, tmp_path / "net.onnx", "--format", "onnx")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_an_export_that_differs_is_not_kept(ours: Path, tmp_path: Path) -> None:
    def wrong(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return [output + 0.1 for output in torch.jit.load(path)(images)]

    output = tmp_path / "net.pt"
    with pytest.raises(DataError, match="differs from the network by 0.1"):
        export_backbone(
            load_backbone(ours), output, "torchscript", size_hw=(64, 64), dynamic=False, run=wrong
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("net.pt2", "--format", "torchscript"), ConfigError, r"end in \.pt"),
        (("net.pt", "--format", "torchscript", "--size", 60, 64), ConfigError, "whole patches"),
        (("net.pt", "--format", "torchscript", "--size", 8, 64, "--dynamic"), ConfigError, "17 to|33 to"),
        (("net.pt", "--format", "tflite"), UnknownNameError, "torchscript"),
    ],
)
def test_exports_that_cannot_be(
    ours: Path, tmp_path: Path, words: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run("export", ours, tmp_path / str(words[0]), *words[1:])
