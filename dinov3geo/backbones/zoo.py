"""Names of architectures and of weights; reading and writing of weights with their card."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinov3geo.backbones.card import BackboneCard
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.errors import ConfigError, DataError, UnknownNameError

# Source: DINOv3 paper, table of the model family; tiny is ours (the shape that timm calls ViT-Ti).
VARIANTS: dict[str, VitConfig] = {
    "vit_tiny": VitConfig(192, 12, 3, "mlp", 768),
    "vit_small": VitConfig(384, 12, 6, "mlp", 1536),
    "vit_small_plus": VitConfig(384, 12, 6, "swiglu", 1536),
    "vit_base": VitConfig(768, 12, 12, "mlp", 3072),
    "vit_large": VitConfig(1024, 24, 16, "mlp", 4096),
    "vit_large_plus": VitConfig(1024, 24, 16, "swiglu", 4096),
    "vit_huge_plus": VitConfig(1280, 32, 20, "swiglu", 5120),
    "vit_7b": VitConfig(4096, 40, 32, "swiglu", 8192, qkv_bias=False, local_cls_norm=True),
}

_WEIGHTS_FOLDER = Path(__file__).parent / "weights"
BUNDLED: dict[str, Path] = {"vit-tiny-aerial": _WEIGHTS_FOLDER / "vit_tiny_aerial.safetensors"}
DEFAULT_BACKBONE = "vit-tiny-aerial"
RUN_EXPORT = "backbone.safetensors"


def build_backbone(
    variant: str,
    *,
    in_channels: int = 3,
    patch_size: int = 16,
    drop_path: float = 0.0,
    num_registers: int = 4,
    layer_scale: float = 1e-5,
) -> VisionTransformer:
    """An untrained network of a named shape.

    Args:
        variant: a name in `VARIANTS`.
        in_channels: bands.
        patch_size: pixels.
        drop_path: stochastic depth in training.
        num_registers: register tokens.
        layer_scale: initial factor of every residual branch.

    Raises:
        UnknownNameError: no such variant.
    """
    if variant not in VARIANTS:
        raise UnknownNameError("backbone variant", variant, VARIANTS)
    config = dataclasses.replace(
        VARIANTS[variant],
        in_channels=in_channels,
        patch_size=patch_size,
        drop_path=drop_path,
        num_registers=num_registers,
        layer_scale=layer_scale,
    )
    return VisionTransformer(config)


def load_backbone(name_or_path: str | Path = DEFAULT_BACKBONE) -> VisionTransformer:
    """A frozen backbone with its card, in evaluation mode on the CPU.

    Args:
        name_or_path: a bundled name, the folder of a pretraining run, or a .safetensors file that has
            its card beside it (same name, .json).

    Returns:
        The network; its call takes normalised images (`backbone.card.normalization`).

    Raises:
        UnknownNameError: neither a bundled name nor an existing path.
        ConfigError: the card is missing or incomplete.
        DataError: the weights do not fill the network exactly, or the file is damaged.
    """
    path = locate_weights(name_or_path)
    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        raise ConfigError(
            f"{path} has no card beside it; expected {card_path.name}, written with the weights"
        )
    card = BackboneCard.read(card_path)
    tensors = read_tensors(path)
    registers = tensors.get("register_tokens")
    backbone = build_backbone(
        card.variant,
        in_channels=len(card.normalization.bands),
        patch_size=card.patch_size,
        num_registers=0 if registers is None else registers.shape[1],
    )
    _fill(backbone, tensors, source=path)
    backbone.card = card
    return backbone.eval().requires_grad_(False)


def locate_weights(name_or_path: str | Path) -> Path:
    """The .safetensors file behind a name, a run's folder or a path.

    Raises:
        UnknownNameError: nothing of the kind.
        DataError: a folder without exported weights, or a file of another type.
    """
    bundled = BUNDLED.get(str(name_or_path))
    if bundled is not None:
        return bundled
    path = Path(name_or_path)
    if path.is_dir():
        if (path / RUN_EXPORT).is_file():
            return path / RUN_EXPORT
        raise DataError(f"{path} holds no {RUN_EXPORT}; give the output folder of a `dinov3geo pretrain` run")
    if not path.is_file():
        raise UnknownNameError("backbone", str(name_or_path), BUNDLED)
    if path.suffix != ".safetensors":
        raise DataError(f"{path} is not a .safetensors file; only safetensors weights are read")
    return path


def save_backbone(
    path: Path, backbone: VisionTransformer, card: BackboneCard, *, dtype: torch.dtype = torch.float32
) -> None:
    """Writes weights and card; both appear under their names only when whole.

    Args:
        path: of the .safetensors file; the card gets the suffix .json.
        backbone: in any dtype, on any device.
        card: what a user must know.
        dtype: in which the weights are written; they are read back as float32.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in backbone.state_dict().items()
    }
    write_tensors(path, tensors)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(card.to_json(), encoding="utf-8")
    os.replace(temporary, path.with_suffix(".json"))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file under a temporary name, flushes it to disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        DataError: the file is damaged or of another type.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file ({error}); was it cut short?") from error


def _fill(backbone: VisionTransformer, tensors: dict[str, Tensor], *, source: Path) -> None:
    expected = backbone.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = [n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape]
    if missing or extra or shapes:
        raise DataError(
            f"{source} does not fit the variant in its card: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} not expected {extra[:3]}, {len(shapes)} of another shape {sorted(shapes)[:3]}"
        )
    backbone.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
