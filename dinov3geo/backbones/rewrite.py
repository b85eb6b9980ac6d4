"""Checkpoints rewritten in another dialect, with the files that its own library wants."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinov3geo.backbones.card import Normalization, SensorLike
from dinov3geo.backbones.convert import DIALECTS, from_ours, to_ours
from dinov3geo.backbones.convnext import ConvNextConfig
from dinov3geo.backbones.store import (
    HF_CONFIG,
    HF_PROCESSOR,
    HF_WEIGHTS,
    PICKLES,
    write_checkpoint,
    write_tensors,
    write_text,
)
from dinov3geo.backbones.variants import Config, build_network
from dinov3geo.backbones.vit import VitConfig
from dinov3geo.backbones.zoo import OpenedCheckpoint, check_complete, open_checkpoint
from dinov3geo.errors import ConfigError, DataError, RasterError, UnknownNameError

# Names of timm's models with query and value biases; the 7B network has none.
TIMM_NAMES = {
    "vit_tiny": "vit_tiny_patch16_dinov3_qkvb",
    "vit_small": "vit_small_patch16_dinov3_qkvb",
    "vit_small_plus": "vit_small_plus_patch16_dinov3_qkvb",
    "vit_base": "vit_base_patch16_dinov3_qkvb",
    "vit_large": "vit_large_patch16_dinov3_qkvb",
    "vit_huge_plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "vit_7b": "vit_7b_patch16_dinov3",
    "convnext_tiny": "convnext_tiny",
    "convnext_small": "convnext_small",
    "convnext_base": "convnext_base",
    "convnext_large": "convnext_large",
}


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """What was written.

    Attributes:
        output: file or folder.
        source_dialect: what the input was recognised as.
        variant: name of the architecture.
        bands: that the weights take.
        tensors: number of tensors written.
        lost: what the new dialect has no place for.
        opens_with: the call that opens the output.
    """

    output: Path
    source_dialect: str
    variant: str
    bands: tuple[str, ...]
    tensors: int
    lost: tuple[str, ...]
    opens_with: str


def rewrite_checkpoint(
    name_or_path: str | Path,
    output: Path,
    dialect: str,
    *,
    bands: Sequence[str] | None = None,
    sensor: SensorLike | None = None,
    normalization: Normalization | str | None = None,
    stem: str | None = None,
    overwrite: bool = False,
) -> RewriteReport:
    """Converts a checkpoint, checks the result against its source, and writes it.

    Args:
        name_or_path: and the keywords, as in `zoo.load_backbone`.
        output: a .pth file for `official`, a folder for `hf`, a .safetensors file for `timm` and `ours`.
        dialect: one of `DIALECTS`.
        bands: in the order of the images to come.
        sensor: gives the statistics of the bands.
        normalization: statistics or their name.
        stem: how to adapt the first convolution to other bands.
        overwrite: replace an existing output.

    Raises:
        UserError: as `load_backbone`; a dialect or file name that does not fit; an existing output.
    """
    _check_output(output, dialect, overwrite=overwrite)
    opened = open_checkpoint(name_or_path, bands=bands, sensor=sensor, normalization=normalization, stem=stem)
    if dialect == "timm" and opened.card.variant not in TIMM_NAMES:
        raise UnknownNameError("timm counterpart of", opened.card.variant, TIMM_NAMES)
    with torch.device("meta"):
        expected = build_network(opened.config).state_dict()
    check_complete(expected, opened.tensors, source=opened.path)
    theirs = from_ours(opened.tensors, opened.config, dialect)
    theirs = {name: tensor.contiguous() for name, tensor in theirs.items()}
    lost = _compare(opened, to_ours(theirs).tensors)
    if (
        isinstance(opened.config, VitConfig)
        and opened.config.rope_rounded_periods
        and dialect in ("hf", "timm")
    ):
        lost += ("rounding of the rotation periods (outputs move by some 3e-4)",)
    _write(output, dialect, theirs, opened)
    return RewriteReport(
        output=output,
        source_dialect=opened.dialect,
        variant=opened.card.variant,
        bands=opened.card.normalization.bands,
        tensors=len(theirs),
        lost=(*opened.dropped, *lost),
        opens_with=_opens_with(output, dialect, opened),
    )


def _compare(opened: OpenedCheckpoint, back: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """What does not come back from the new dialect.

    Raises:
        DataError: a tensor comes back changed, so the output would be wrong.
    """
    lost = []
    for name, tensor in opened.tensors.items():
        if name not in back or (name == "mask_token" and not torch.equal(back[name], tensor)):
            lost.append(name)
        elif not torch.equal(back[name].nan_to_num(), tensor.nan_to_num()):
            raise DataError(
                f"tensor {name} of {opened.path} does not survive the conversion; nothing written"
            )
    return tuple(lost)


def _check_output(output: Path, dialect: str, *, overwrite: bool) -> None:
    if dialect not in DIALECTS:
        raise UnknownNameError("dialect", dialect, DIALECTS)
    suffix = output.suffix
    wanted = {"official": PICKLES, "timm": (".safetensors",), "ours": (".safetensors",)}.get(dialect)
    if wanted is not None and suffix not in wanted:
        raise ConfigError(f"{dialect} weights go into a file *{' or *'.join(wanted)}, got {output}")
    if dialect == "hf" and (suffix in (".safetensors", *PICKLES) or output.is_file()):
        raise ConfigError(f"hf weights go into a folder, got the file {output}")
    written = [output, output.with_suffix(".json")] if dialect == "ours" else [output]
    for path in written:
        if path.exists() and not overwrite:
            raise RasterError(f"{path} exists; give another name or allow overwriting")
    if dialect != "hf" and output.is_dir():
        raise ConfigError(f"{dialect} weights go into a file, got the folder {output}")
    if dialect == "hf" and output.is_dir() and any(output.iterdir()) and not (output / HF_CONFIG).is_file():
        raise RasterError(f"{output} is no Hugging Face model, so it is not overwritten")


def _write(output: Path, dialect: str, theirs: dict[str, torch.Tensor], opened: OpenedCheckpoint) -> None:
    try:
        if dialect == "official":
            write_checkpoint(output, theirs)
        elif dialect == "hf":
            _write_folder(output, theirs, opened)
        else:
            write_tensors(output, theirs, metadata={"format": "pt"})
        if dialect == "ours":
            write_text(output.with_suffix(".json"), opened.card.to_json())
    except OSError as error:
        raise RasterError(f"{output} cannot be written ({error.strerror or error})") from error


def _write_folder(output: Path, theirs: dict[str, torch.Tensor], opened: OpenedCheckpoint) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        write_tensors(staging / HF_WEIGHTS, theirs, metadata={"format": "pt"})
        write_text(staging / HF_CONFIG, _as_json(hf_config(opened.config)))
        write_text(staging / HF_PROCESSOR, _as_json(hf_processor(opened.card.normalization)))
        staging.chmod(0o755)
        if output.exists():
            retired = staging.with_name(staging.name + ".old")
            os.replace(output, retired)
            os.replace(staging, output)
            shutil.rmtree(retired)
        else:
            os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _as_json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"


def hf_config(config: Config) -> dict[str, Any]:
    """The config.json of a transformers model of this shape."""
    if isinstance(config, ConvNextConfig):
        return {
            "architectures": ["DINOv3ConvNextModel"],
            "model_type": "dinov3_convnext",
            "num_channels": config.in_channels,
            "hidden_sizes": list(config.dims),
            "depths": list(config.depths),
            "hidden_act": "gelu",
            "layer_norm_eps": config.norm_eps,
            "image_size": 224,
        }
    assert isinstance(config, VitConfig)  # other networks were refused by `from_ours`
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "num_channels": config.in_channels,
        "patch_size": config.patch_size,
        "image_size": 224,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_register_tokens": config.num_registers,
        "use_gated_mlp": config.ffn == "swiglu",
        "hidden_act": "silu" if config.ffn == "swiglu" else "gelu",
        "query_bias": config.qkv_bias,
        "key_bias": False,
        "value_bias": config.qkv_bias,
        "proj_bias": True,
        "mlp_bias": True,
        "layer_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "pos_embed_rescale": config.rope_rescale,
    }


def hf_processor(normalization: Normalization) -> dict[str, Any]:
    """The preprocessor_config.json with the same statistics: (x * factor - mean) / std."""
    bands = list(
        zip(normalization.scale, normalization.offset, normalization.mean, normalization.std, strict=True)
    )
    plain = len({scale for scale, *_ in bands}) == 1 and not any(offset for _, offset, *_ in bands)
    factor = bands[0][0] if plain else 1.0
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": factor,
        "do_normalize": True,
        "bands": list(normalization.bands),
        "image_mean": [mean if plain else (mean - offset) / scale for scale, offset, mean, _ in bands],
        "image_std": [std if plain else std / scale for scale, _, _, std in bands],
    }


def _opens_with(output: Path, dialect: str, opened: OpenedCheckpoint) -> str:
    if dialect == "hf":
        return f"transformers.AutoModel.from_pretrained({str(output)!r})"
    if dialect == "timm":
        extra = "" if opened.config.in_channels == 3 else f", in_chans={opened.config.in_channels}"
        if isinstance(opened.config, VitConfig):
            extra += "" if opened.config.patch_size == 16 else f", patch_size={opened.config.patch_size}"
            extra += (
                "" if opened.config.num_registers == 4 else f", num_reg_tokens={opened.config.num_registers}"
            )
        name = TIMM_NAMES[opened.card.variant]
        return f"timm.create_model({name!r}, num_classes=0{extra}, checkpoint_path={str(output)!r})"
    if dialect == "official":
        return f"torch.load({str(output)!r}, weights_only=True)"
    return f"dinov3geo.load_backbone({str(output)!r})"
