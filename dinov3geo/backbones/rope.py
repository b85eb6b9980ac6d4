"""Two-dimensional rotary position embedding on relative patch coordinates.

Source: Siméoni et al. 2025 (DINOv3), section on RoPE with box jittering. Coordinates run from -1 to 1
whatever the size of the image, so one set of weights serves any resolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TABLES_KEPT = 16


def patch_coordinates(grid_hw: tuple[int, int], *, device: torch.device) -> Tensor:
    """Centres of the patches, each axis scaled to (-1, 1) by its own length.

    Returns:
        [N, 2] float32 in (row, column) order, row-major.
    """
    rows, cols = (
        (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size * 2 - 1 for size in grid_hw
    )
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).flatten(0, 1)


def rotation_periods(head_dim: int, base: float, *, rounded: bool, device: torch.device) -> Tensor:
    """Period of each rotating channel pair of one axis.

    Args:
        head_dim: channels per attention head, a multiple of 4.
        base: ratio of the longest period to the shortest.
        rounded: round to bfloat16, which is what the official training code stored.
        device: of the result.

    Returns:
        [head_dim / 4] float32.
    """
    exponents = torch.arange(head_dim // 4, device=device, dtype=torch.float32) * 4 / head_dim
    periods = torch.pow(torch.tensor(base, device=device, dtype=torch.float32), exponents)
    return periods.bfloat16().float() if rounded else periods


class RotaryEmbedding:
    """Rotation tables for the patches of one attention head.

    Tables for evaluation are cached per grid and device; in training every call moves and scales the
    coordinates anew, so that the network meets boxes of several places and sizes.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 100.0,
        rescale: float | None = 2.0,
        shift: float | None = None,
        jitter: float | None = None,
        rounded_periods: bool = False,
    ) -> None:
        """Keeps the settings.

        In training every call moves the coordinates: first a shift per axis, then a jitter per axis, then one
        rescaling of both. None switches each off.

        Args:
            head_dim: channels per attention head, a multiple of 4.
            base: ratio of the longest to the shortest period.
            rescale: coordinates are multiplied by exp(U(-ln r, ln r)).
            shift: U(-s, s) is added.
            jitter: coordinates are multiplied by exp(U(-ln j, ln j)).
            rounded_periods: see `rotation_periods`.

        Raises:
            ValueError: if head_dim is not a multiple of 4.
        """
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 for 2-D RoPE, got {head_dim}")
        self.head_dim = head_dim
        self.base = base
        self.rescale = rescale
        self.shift = shift
        self.jitter = jitter
        self.rounded_periods = rounded_periods
        self._cache: dict[tuple[tuple[int, int], int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def draws(self) -> bool:
        """Whether the coordinates move in training."""
        return not (self.rescale is None and self.shift is None and self.jitter is None)

    def tables(
        self, grid_hw: tuple[int, int], *, num_prefix: int, training: bool, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosine and signed-sine tables for prefix tokens and patches.

        Args:
            grid_hw: rows and columns of patches.
            num_prefix: CLS and registers in front of the patches; they are not rotated.
            training: whether to draw a coordinate scale.
            like: tensor whose device and dtype the tables take.

        Returns:
            cos and sin, each [num_prefix + N, head_dim]; the first half of sin is negative, so that
            `x * cos + half_swap(x) * sin` is the rotation.
        """
        if training and self.draws:
            return self._build(grid_hw, num_prefix, like, draw=True)
        if _is_traced():
            # Sizes may be symbols there, and tables of a cache would become constants of one size.
            return self._build(grid_hw, num_prefix, like, draw=False)
        key = (grid_hw, num_prefix, like.device, like.dtype)
        if key not in self._cache:
            if len(self._cache) >= _TABLES_KEPT:
                self._cache.pop(next(iter(self._cache)))
            # A table made under inference_mode could not be used in a later training step.
            with torch.inference_mode(False):
                self._cache[key] = self._build(grid_hw, num_prefix, like, draw=False)
        return self._cache[key]

    def _build(
        self, grid_hw: tuple[int, int], num_prefix: int, like: Tensor, *, draw: bool
    ) -> tuple[Tensor, Tensor]:
        coordinates = patch_coordinates(grid_hw, device=like.device)
        if draw:
            coordinates = self._move(coordinates)
        periods = rotation_periods(self.head_dim, self.base, rounded=self.rounded_periods, device=like.device)
        angles = (2 * math.pi * coordinates[:, :, None] / periods).flatten(1)  # [N, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        prefix_cos, prefix_sin = (
            cos.new_ones(num_prefix, cos.shape[1]),
            sin.new_zeros(num_prefix, cos.shape[1]),
        )
        cos, sin = torch.cat([prefix_cos, cos]), torch.cat([prefix_sin, sin])
        return torch.cat([cos, cos], 1).to(like.dtype), torch.cat([-sin, sin], 1).to(like.dtype)

    def _move(self, coordinates: Tensor) -> Tensor:
        def drawn(span: float, count: int) -> Tensor:
            return torch.empty(count, device=coordinates.device).uniform_(-span, span)

        if self.shift is not None:
            coordinates = coordinates + drawn(self.shift, 2)
        if self.jitter is not None:
            coordinates = coordinates * drawn(math.log(self.jitter), 2).exp()
        if self.rescale is not None:
            coordinates = coordinates * drawn(math.log(self.rescale), 1).exp()
        return coordinates


def _is_traced() -> bool:
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_compiling() or bool(tracing)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel j with channel j + D/2.

    Args:
        x: [..., N, head_dim].
        cos: [N, head_dim].
        sin: [N, head_dim] with a negative first half.

    Returns:
        As x.
    """
    first, second = x.chunk(2, dim=-1)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x * cos + torch.cat([second, first], dim=-1) * sin
    # Without gradients the sum is built in place: half the time, no copy of the swapped halves.
    half = first.shape[-1]
    rotated = x * cos
    rotated[..., :half].addcmul_(second, sin[..., :half])
    rotated[..., half:].addcmul_(first, sin[..., half:])
    return rotated
