"""What every backbone has in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dinov3geo.backbones.card import BackboneCard
from dinov3geo.backbones.features import Features


class Backbone(nn.Module):
    """A network that turns images into `Features`.

    Attributes:
        card: what is known of the weights, or None for weights that nobody described.
    """

    card: BackboneCard | None = None

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width D of the output tokens."""

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Pixels per cell of the output grid: side of a patch, or total stride."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """How many outputs `intermediate` can give: transformer blocks, or stages."""

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Bands of an input image."""

    @property
    def block_dims(self) -> tuple[int, ...]:
        """Width of what `intermediate` gives for each block."""
        return (self.embed_dim,) * self.num_blocks

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Features of the last block.

        Args:
            images: [B, C, H, W], normalised, any size; the right and lower edge is padded by
                replication to a multiple of `patch_size`.

        Returns:
            Normed features, N = ceil(H / p) * ceil(W / p).

        Raises:
            ValueError: the images have another number of bands than the network.
        """

    @abstractmethod
    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Features of several blocks.

        Args:
            images: as in `forward`.
            blocks: increasing 0-based block numbers.

        Returns:
            One `Features` per requested block.

        Raises:
            ValueError: a block number that the network does not have, or not increasing.
        """

    def _fit(self, images: Tensor) -> Tensor:
        """Checks the bands and pads the images to whole patches."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"expected images [B, {self.in_channels}, H, W], got {list(images.shape)}; "
                f"the backbone has {self.in_channels} input bands"
            )
        pad_bottom, pad_right = (-images.shape[2]) % self.patch_size, (-images.shape[3]) % self.patch_size
        if pad_bottom or pad_right:
            images = F.pad(images, (0, pad_right, 0, pad_bottom), mode="replicate")
        return images

    def _check_blocks(self, blocks: Sequence[int]) -> list[int]:
        wanted = list(blocks)
        if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] >= self.num_blocks:
            raise ValueError(f"blocks must increase within 0..{self.num_blocks - 1}, got {wanted}")
        return wanted
