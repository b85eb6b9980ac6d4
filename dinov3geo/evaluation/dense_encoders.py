"""Images to feature maps: frozen backbones, and what they must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.inference import for_inference
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.evaluation.dense_sets import DenseImage, DenseSet
from dinov3geo.evaluation.encoders import RandomConvolutions, short_digest
from dinov3geo.evaluation.image_sets import Indexes
from dinov3geo.evaluation.named_encoders import COLOURS, PIXELS, RCF, Input, make_backbone, tell_apart
from dinov3geo.evaluation.peer_encoders import TIMM, TRANSFORMERS
from dinov3geo.features.extract import default_blocks, extract_feature_maps, pixels_per_patch, weights_digest

# Baselines have no patches of their own; they get those that a backbone of this size has.
_PATCH = 16


@dataclass(frozen=True, slots=True)
class Lattice:
    """How an image is laid out in patches.

    Attributes:
        image_scale: see `extract_feature_maps`.
        short_side: the image is resized to it instead, the other side in proportion, both to whole patches.
    """

    image_scale: float = 1.0
    short_side: int | None = None

    def seen_hw(self, size_hw: tuple[int, int], patch: int) -> tuple[int, int] | None:
        """Size that a backbone sees, or None where `image_scale` rules."""
        if self.short_side is None:
            return None
        scale = self.short_side / min(size_hw)
        rows, cols = (max(1, round(length * scale / patch)) * patch for length in size_hw)
        return rows, cols

    def grid(self, size_hw: tuple[int, int], patch: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of patches, and the pixels of the image that they cover."""
        seen = self.seen_hw(size_hw, patch)
        if seen is not None:
            return (seen[0] // patch, seen[1] // patch), size_hw
        side = pixels_per_patch(patch, self.image_scale)
        rows, cols = (-(-length // side) for length in size_hw)
        return (rows, cols), (rows * side, cols * side)


class DenseEncoder(Protocol):
    """What turns images into feature maps.

    Attributes:
        name: for tables.
        patch: side of a patch in pixels as the encoder sees them.
    """

    name: str
    patch: int

    def prepare(self, images: DenseSet, train: Indexes) -> None:
        """Learns what it needs of training images, without their targets."""

    def digest(self) -> str:
        """Changes when the maps would."""

    def __call__(self, image: DenseImage) -> list[Tensor]:
        """Maps [D, h, w] float32 on the CPU; `Lattice.grid` says which pixels they cover."""


class BackboneMaps:
    """Patch features of some blocks of a frozen backbone."""

    def __init__(self, backbone: Backbone, name: str, *, num_maps: int, lattice: Lattice) -> None:
        """Takes a backbone with a card, on the device to compute on."""
        self.name, self.patch = name, backbone.patch_size
        self._backbone, self._view = backbone, for_inference(backbone.eval())
        self._blocks = default_blocks(backbone.num_blocks, num_maps)
        self._lattice = lattice
        self._device = next(backbone.parameters()).device

    def prepare(self, images: DenseSet, train: Indexes) -> None:
        """Checks the bands.

        Raises:
            DataError: the images have others.
        """
        assert self._backbone.card is not None
        bands = self._backbone.card.normalization.bands
        if len(bands) != len(images.bands):
            raise DataError(
                f"{self.name} takes the bands {', '.join(bands)}, but {images.name} gives "
                f"{', '.join(images.bands)}; name the bands, or a sensor and a stem"
            )

    def digest(self) -> str:
        """Of weights, normalisation, blocks and lattice."""
        assert self._backbone.card is not None
        facts = asdict(self._backbone.card.normalization), self._blocks, self._lattice
        return short_digest(weights_digest(self._backbone) + repr(facts))

    @torch.no_grad()
    def __call__(self, image: DenseImage) -> list[Tensor]:
        """See `DenseEncoder`."""
        numbers, valid = image.image[None].to(self._device), image.valid[None].to(self._device)
        size_hw = (numbers.shape[-2], numbers.shape[-1])
        seen_hw, scale = self._lattice.seen_hw(size_hw, self.patch), self._lattice.image_scale
        if seen_hw is not None:
            scale = 1.0
            # Bilinear numbers of holes are no data either.
            valid = F.interpolate(valid[:, None].float(), seen_hw)[:, 0] > 0.5
            numbers = F.interpolate(numbers.float(), seen_hw, mode="bilinear", antialias=True)
        maps = extract_feature_maps(self._view, numbers, valid, blocks=self._blocks, image_scale=scale)
        return [m[0].float().cpu() for m in maps]


class ColourMaps:
    """Mean and standard deviation of each band within each patch."""

    name = "colour statistics"
    patch = _PATCH

    def __init__(self, lattice: Lattice) -> None:
        """Takes the layout."""
        self._lattice = lattice

    def prepare(self, images: DenseSet, train: Indexes) -> None:
        """Nothing to learn."""

    def digest(self) -> str:
        """Of the layout."""
        return short_digest(f"{self.name} {self._lattice}")

    def __call__(self, image: DenseImage) -> list[Tensor]:
        """See `DenseEncoder`."""
        numbers, grid_hw = _laid_out(image, self._lattice)
        mean = F.adaptive_avg_pool2d(numbers, grid_hw)
        square = F.adaptive_avg_pool2d(numbers.square(), grid_hw)
        return [torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()])]


class RandomMaps:
    """Random convolutions (`RandomConvolutions`) averaged over patches."""

    patch = _PATCH

    def __init__(self, lattice: Lattice, *, seed: int) -> None:
        """Takes the layout, and the seed of the filters (at least 1)."""
        self._filters = RandomConvolutions(seed=seed)
        self.name = self._filters.name
        self._lattice = lattice

    def prepare(self, images: DenseSet, train: Indexes) -> None:
        """See `RandomConvolutions.prepare`."""
        self._filters.prepare(images, train)

    def digest(self) -> str:
        """Of filters and layout."""
        return short_digest(f"{self._filters.digest()} {self._lattice}")

    def __call__(self, image: DenseImage) -> list[Tensor]:
        """See `DenseEncoder`."""
        numbers, grid_hw = _laid_out(image, self._lattice)
        return [self._filters.map(numbers, grid_hw)]


def make_dense_encoders(
    names: Sequence[str], seen: Input, *, num_maps: int, lattice: Lattice
) -> list[DenseEncoder]:
    """Encoders in the order of their names, each name once.

    Args:
        names: `rcf`, `colours`, `untrained`, `untrained:VARIANT`, or what `load_backbone` takes.
        seen: bands, sensor, stem, device and seed.
        num_maps: blocks whose features are taken.
        lattice: of the patches.

    Raises:
        UserError: a name, file or band that cannot be used.
    """
    names = list(dict.fromkeys(names))
    encoders: list[DenseEncoder] = []
    for name in names:
        if name.startswith((TIMM, TRANSFORMERS)):
            raise ConfigError(
                f"{name!r} gives one vector per image, but feature maps are needed; convert the weights "
                "(dinov3geo convert) and name the file"
            )
        if name == PIXELS:
            raise ConfigError(f"{name!r} is a baseline of whole images; for maps use {COLOURS!r} or {RCF!r}")
        if name == COLOURS:
            encoders.append(ColourMaps(lattice))
        elif name == RCF:
            encoders.append(RandomMaps(lattice, seed=seen.seed + 1))
        else:
            backbone, shown = make_backbone(name, seen)
            encoders.append(BackboneMaps(backbone, shown, num_maps=num_maps, lattice=lattice))
    tell_apart(encoders, names)
    return encoders


def _laid_out(image: DenseImage, lattice: Lattice) -> tuple[Tensor, tuple[int, int]]:
    """Numbers [C, H', W'] that the grid covers exactly, and its rows and columns."""
    height, width = image.image.shape[-2:]
    grid_hw, covered_hw = lattice.grid((height, width), _PATCH)
    numbers = image.image.float()
    if not image.valid.all():
        # Holes look like the mean of their image: they stand out by nothing.
        known = image.valid if image.valid.any() else torch.ones_like(image.valid)
        means = numbers[:, known].mean(1)
        numbers = torch.where(image.valid, numbers, means[:, None, None])
    right, below = covered_hw[1] - width, covered_hw[0] - height
    return F.pad(numbers[None], (0, right, 0, below), mode="replicate")[0], grid_hw
