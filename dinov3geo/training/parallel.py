"""Memory and speed of the forward pass: recomputation, compilation, replication, sharding.

None of it changes what a parameter is called: checkpoints of all layouts have the same names.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dinov3geo.backbones.convnext import ConvNext
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.training.distributed import World
from dinov3geo.training.recipe import Recipe

# One graph per crop size, with and without gradients; several sizes come with a mixture of resolutions.
_MAX_GRAPHS = 64


class ParallelSettings(BaseModel):
    """How a step is laid out over memory and processes; the result stays the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["replicate", "shard"] = Field(
        "replicate", description="every process holds all weights (DDP), or its part (FSDP2, block by block)"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations of the student's blocks computed again in the backward pass: none, all but "
        "matrix products and attention, or all",
    )
    compile: bool = Field(False, description="compile every transformer block")


def prepare(recipe: Recipe, settings: ParallelSettings, world: World, *, precision: str) -> StudentCall:
    """Lays a recipe out over memory and processes.

    Args:
        recipe: on its device; changed in place.
        settings: what is wanted.
        world: the processes.
        precision: `"bfloat16"` gathers and computes sharded weights in it; gradients are summed in float32.

    Returns:
        What to call in place of the recipe's own student pass.
    """
    if settings.recompute != "none":
        for block in _blocks(recipe.student["backbone"]):
            _recompute(block, selective=settings.recompute == "selective")
    if settings.compile:
        for backbone in (recipe.student["backbone"], recipe.teacher["backbone"], recipe.anchor):
            _compile(backbone)
    if world.group is None:
        return StudentCall(recipe.student_pass)
    if settings.layout == "shard":
        _shard_all(recipe, world, precision)
        return StudentCall(recipe.student_pass, sharded=True)
    # Without crops of a kind, what serves only them has no gradient.
    replicated = nn.parallel.DistributedDataParallel(
        recipe.student_pass, process_group=world.group, gradient_as_bucket_view=True
    )
    return StudentCall(replicated)


def prepare_frozen(
    modules: Sequence[nn.Module], settings: ParallelSettings, world: World, *, precision: str
) -> None:
    """Lays networks that never learn out over memory and processes, in place; see `prepare`."""
    if settings.compile:
        for module in modules:
            _compile(module)
    if world.group is not None and settings.layout == "shard":
        shard = _sharding(modules[0], world, precision)
        for module in modules:
            _shard_module(module, shard, at_once=True)


def _compile(backbone: nn.Module | None) -> None:
    torch._dynamo.config.recompile_limit = _MAX_GRAPHS
    for block in _blocks(backbone):
        block.forward = torch.compile(block.forward, dynamic=False)


class StudentCall:
    """The student's pass in the layout of the run.

    Attributes:
        module: to call.
        sharded: whether parameters are parts of tensors.
    """

    def __init__(self, module: nn.Module, *, sharded: bool = False) -> None:
        """Keeps the module."""
        self.module = module
        self.sharded = sharded

    def __call__(self, *arguments: Any) -> Any:  # noqa: ANN401 (those of the student pass)
        """Runs the pass."""
        return self.module(*arguments)

    @contextlib.contextmanager
    def gathering(self, *, last: bool) -> Iterator[None]:
        """Gradients of all but the last part of an accumulated step stay in the process."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif isinstance(self.module, nn.parallel.DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
        else:
            yield


def _blocks(backbone: nn.Module | None) -> list[nn.Module]:
    """What repeats in a backbone: the unit of recomputation, compilation and sharding."""
    if backbone is None:
        return []
    if isinstance(backbone, VisionTransformer):
        return list(backbone.blocks)
    if isinstance(backbone, ConvNext):
        return [block for stage in backbone.stages for block in stage.children()]
    return []


def _recompute(block: nn.Module, *, selective: bool) -> None:
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    block.forward = functools.partial(checkpoint, block.forward, **options)


_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(_context: object, operator: object, *_arguments: object, **_options: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _sharding(module: nn.Module, world: World, precision: str) -> Callable[..., Any]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert world.group is not None
    # Features are views of the normed tokens; nothing is written into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    device = next(module.parameters()).device.type
    mesh = DeviceMesh.from_group(world.group, device)
    low = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    return functools.partial(fully_shard, mesh=mesh, mp_policy=policy)


def _shard_all(recipe: Recipe, world: World, precision: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    shard = _sharding(recipe, world, precision)
    for frozen in recipe.teacher.children():
        _shard_module(frozen, shard, at_once=True)
    if recipe.anchor is not None:
        _shard_module(recipe.anchor, shard, at_once=True)
    for trained in recipe.student.children():
        _shard_module(trained, shard, at_once=None)
    # Targets and losses stay float32: networks round their own inputs.
    shard(recipe.student_pass, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def _shard_module(module: nn.Module, shard: Callable[..., Any], *, at_once: bool | None) -> None:
    """Shards block by block.

    A module without a backward pass must fall back to its parts `at_once` after every forward: the moving
    average is written into the parts, and a whole kept from the last step would be out of date.
    """
    for block in _blocks(module):
        shard(block, reshard_after_forward=at_once)
    shard(module, reshard_after_forward=at_once)
