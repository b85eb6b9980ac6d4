"""AdamW with layer-wise learning rates, and clipping per module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.training.distributed import whole

_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
_FIRST_LAYER = ("cls_token", "register_tokens", "mask_token", "patch_embed")


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(BaseModel):
    """AdamW and its groups."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    clip_norm: float | None = Field(3.0, gt=0, description="largest gradient norm of each module")
    layer_decay: float = Field(0.9, gt=0, le=1, description="learning-rate factor per block from the top")
    patch_embed_factor: float = Field(0.2, gt=0, description="extra learning-rate factor of the stem")
    freeze_last_layer_steps: int = Field(0, ge=0, description="steps in which prototypes do not move")


def build_optimizer(student: nn.ModuleDict, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW whose groups carry `lr_factor`, `decay_factor`, `last_layer` and the parameters' `names`.

    Biases, norms and LayerScale are not decayed; class, register and mask tokens are.

    Source: DINOv3 training configurations; layer decay from Bao et al. 2022 (BEiT).
    """
    backbone = student["backbone"]
    # Other architectures have no depth that a decay by layer would follow.
    depth = backbone.num_blocks if isinstance(backbone, VisionTransformer) else 0
    groups: dict[tuple[float, float, bool], tuple[list[str], list[nn.Parameter]]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        key = (
            _lr_factor(name, depth, settings),
            0.0 if _is_undecayed(name) else 1.0,
            name.endswith("prototypes.weight"),
        )
        names, parameters = groups.setdefault(key, ([], []))
        names.append(name)
        parameters.append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "names": names,
                "lr_factor": key[0],
                "decay_factor": key[1],
                "last_layer": key[2],
            }
            for key, (names, parameters) in groups.items()
        ],
        lr=0.0,
        betas=settings.betas,
        eps=1e-8,
        fused=True,
    )


def _lr_factor(name: str, depth: int, settings: OptimizerSettings) -> float:
    if depth == 0:
        return 1.0
    block = _BLOCK.match(name)
    if block is not None:
        layer = int(block[1]) + 1
    elif name.startswith("backbone.") and name.split(".")[1] in _FIRST_LAYER:
        layer = 0
    else:
        layer = depth + 1
    factor = settings.layer_decay ** (depth + 1 - layer)
    return factor * settings.patch_embed_factor if "patch_embed" in name else factor


def _is_undecayed(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last.endswith("bias") or "norm" in name or last in ("scale", "scale1", "scale2")


def set_rates(
    optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float, freeze_last_layer: bool
) -> None:
    """Sets learning rate and weight decay of every group for the coming step."""
    for group in optimizer.param_groups:
        frozen = freeze_last_layer and group["last_layer"]
        group["lr"] = 0.0 if frozen else lr * group["lr_factor"]
        group["weight_decay"] = weight_decay * group["decay_factor"]


def clip_per_module(modules: Iterable[tuple[str, nn.Module]], max_norm: float | None) -> dict[str, Tensor]:
    """Clips each module's gradient to its own norm; returns the norms before clipping, on the device.

    Modules without parameters have none.
    """
    limit = float("inf") if max_norm is None else max_norm
    parts = ((name, list(module.parameters())) for name, module in modules)
    return {name: whole(nn.utils.clip_grad_norm_(part, limit)) for name, part in parts if part}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, for a safetensors file."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}:{name}"] = value
    return tensors
