"""What every backbone returns, and what every consumer of features takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Features:
    """Normed output tokens of one backbone block for a batch of images.

    Attributes:
        cls: [B, D], one vector per image.
        registers: [B, R, D]; R is 0 where the backbone has none.
        patches: [B, N, D], row-major over the grid.
        grid_hw: rows and columns of patches, N = h * w.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    grid_hw: tuple[int, int]

    def map(self) -> Tensor:
        """Patch features as an image, [B, D, h, w]."""
        image: Tensor = self.patches.transpose(1, 2).unflatten(2, self.grid_hw)
        return image
