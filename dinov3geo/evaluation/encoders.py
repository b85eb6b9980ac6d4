"""Images to vectors: frozen backbones, and what they must beat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.features import Features
from dinov3geo.backbones.inference import for_inference
from dinov3geo.backbones.store import read_tensors, write_tensors
from dinov3geo.errors import DataError
from dinov3geo.evaluation.image_sets import ImageSet, Indexes, Readable, resize_image
from dinov3geo.features.extract import weights_digest

CLS, MEAN_PATCH, CLS_AND_MEAN = "cls", "mean", "cls+mean"
VECTOR = "vector"
DEFAULT_SIZE = 224
_BATCH = 64
_KEY = "features"
_FILTERS_AT_ONCE = 32

Progress = Callable[[int, int], None]


class Encoder(Protocol):
    """What turns images into vectors.

    Attributes:
        name: for tables.
        size: side that images are resized to, or None to see them as they are.
        crop_from: see `resize_image`.
    """

    name: str
    size: int | None
    crop_from: int | None

    def prepare(self, images: ImageSet, train: Indexes) -> None:
        """Learns what it needs of training images, without their labels."""

    def columns(self) -> Mapping[str, slice]:
        """Which columns of a vector are which; the first entry is for neighbours and regressions."""

    def digest(self) -> str:
        """Changes when the vectors would."""

    def __call__(self, numbers: Tensor) -> Tensor:
        """Vectors [B, D] float32 of images [B, C, H, W] float32 in the files' own numbers."""


class BackboneEncoder:
    """A frozen backbone: class token and mean of the patches, both normed."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        name: str | None = None,
        normalization: Normalization | None = None,
        size: int | None = DEFAULT_SIZE,
        crop_from: int | None = None,
    ) -> None:
        """Wraps a backbone.

        Args:
            backbone: in evaluation mode, on the device to compute on.
            name: for tables; None for that of its card.
            normalization: None for that of its card.
            size: see `Encoder`.
            crop_from: see `Encoder`.

        Raises:
            DataError: neither a card nor a normalisation.
        """
        card = backbone.card
        if normalization is None and card is None:
            raise DataError("the backbone has no card, so its normalisation is unknown; use load_backbone")
        self.name = name or ("backbone" if card is None else card.name)
        self.size, self.crop_from = size, crop_from
        self._backbone = backbone
        # Packed weights of this moment: a backbone that is still being trained gets a new encoder each time.
        self._view = for_inference(backbone.eval())
        self._normalization = normalization or card.normalization  # type: ignore[union-attr]
        self._device = next(backbone.parameters()).device
        self._digest: str | None = None

    @property
    def backbone(self) -> Backbone:
        """What it runs."""
        return self._backbone

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the bands that it takes."""
        return self._normalization.bands

    def prepare(self, images: ImageSet, train: Indexes) -> None:
        """Checks that the images have the backbone's bands."""
        check_bands(self.name, self.bands, images)

    def columns(self) -> Mapping[str, slice]:
        """`cls`, `mean` and both."""
        width = self._backbone.embed_dim
        return {CLS: slice(0, width), MEAN_PATCH: slice(width, 2 * width), CLS_AND_MEAN: slice(0, 2 * width)}

    def digest(self) -> str:
        """Of weights, normalisation and size."""
        if self._digest is None:
            parts = (weights_digest(self._backbone), asdict(self._normalization), self.size, self.crop_from)
            self._digest = short_digest(repr(parts))
        return self._digest

    @torch.no_grad()
    def __call__(self, numbers: Tensor) -> Tensor:
        """See `Encoder`."""
        features = self._features(numbers)
        return torch.cat([features.cls, features.patches.mean(1)], dim=1).float().cpu()

    @torch.no_grad()
    def patches(self, numbers: Tensor) -> Tensor:
        """All patches [B, P, D] float16, for heads that look at them one by one; else as the vectors."""
        return self._features(numbers).patches.half().cpu()

    def _features(self, numbers: Tensor) -> Features:
        if numbers.shape[1] != len(self.bands):
            raise DataError(
                f"{self.name} takes {len(self.bands)} bands ({', '.join(self.bands)}), "
                f"but the images have {numbers.shape[1]}"
            )
        features: Features = self._view(self._normalization(numbers.to(self._device)))
        return features


class ColourStatistics:
    """Mean, standard deviation, minimum and maximum of each band."""

    name = "colour statistics"
    size: int | None = None
    crop_from: int | None = None

    def prepare(self, images: ImageSet, train: Indexes) -> None:
        """Nothing to learn."""

    def columns(self) -> Mapping[str, slice]:
        """The whole vector."""
        return {VECTOR: slice(None)}

    def digest(self) -> str:
        """Always the same."""
        return short_digest(self.name)

    def __call__(self, numbers: Tensor) -> Tensor:
        """See `Encoder`."""
        pixels = numbers.flatten(2)
        parts = (pixels.mean(2), pixels.std(2), pixels.amin(2), pixels.amax(2))
        return torch.cat(parts, dim=1)


class Pixels:
    """The image itself, made small: what a representation has to beat."""

    name = "pixels"
    crop_from: int | None = None

    def __init__(self, size: int = 32) -> None:
        """Sets the side that images are brought to."""
        self.size: int | None = size

    def prepare(self, images: ImageSet, train: Indexes) -> None:
        """Nothing to learn."""

    def columns(self) -> Mapping[str, slice]:
        """The whole vector."""
        return {VECTOR: slice(None)}

    def digest(self) -> str:
        """Differs with the side."""
        return short_digest(f"{self.name} {self.size}")

    def __call__(self, numbers: Tensor) -> Tensor:
        """See `Encoder`."""
        return numbers.flatten(1)


class RandomConvolutions:
    """MOSAIKS by torchgeo's `RCF`: patches of training images, whitened, as filters.

    Source: Rolf et al. 2021, doi 10.1038/s41467-021-24638-z.
    """

    crop_from: int | None = None
    size: int | None = None

    def __init__(self, *, features: int = 512, kernel_size: int = 5, seed: int = 1) -> None:
        """Sets the shape; the filters come with `prepare`.

        Args:
            features: length of the vector, even.
            kernel_size: side of the filters in pixels.
            seed: of the patches, at least 1: torchgeo takes 0 for no seed.
        """
        self.name = f"RCF ({features} features, {kernel_size}x{kernel_size})"
        self._shape = features, kernel_size, seed
        self._model: torch.nn.Module | None = None
        self._scale = torch.ones(1)
        self._digest = ""

    def prepare(self, images: Readable, train: Indexes) -> None:
        """Draws the filters from training images scaled to [0, 1] by the largest number among them."""
        from torchgeo.models import RCF

        features, kernel_size, seed = self._shape
        chosen = train[np.random.default_rng(seed).permutation(len(train))[: features // 2]]
        pictures = [images.read(int(i)).float() for i in chosen]
        self._scale = torch.stack([p.amax((1, 2)) for p in pictures]).amax(0).clamp_min(1e-12)[:, None, None]
        smallest = min(min(p.shape[1:]) for p in pictures)
        if smallest <= kernel_size:
            raise DataError(f"RCF needs images larger than {kernel_size} pixels, got {smallest}")
        # torchgeo wants images of one size: the corner that all of them have.
        patches = _Samples([(p / self._scale)[:, :smallest, :smallest] for p in pictures])
        channels = len(pictures[0])
        self._model = RCF(
            channels, features, kernel_size, seed=seed, mode="empirical", dataset=cast(Any, patches)
        )
        self._digest = short_digest(f"{self.name} {seed} {images.stamp} {chosen.tolist()}")

    def columns(self) -> Mapping[str, slice]:
        """The whole vector."""
        return {VECTOR: slice(None)}

    def digest(self) -> str:
        """Of the shape, and of the images that gave the filters."""
        return self._digest

    def __call__(self, numbers: Tensor) -> Tensor:
        """See `Encoder`."""
        vectors: Tensor = self._prepared()(numbers / self._scale).clone()
        return vectors

    @torch.no_grad()
    def map(self, numbers: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """Responses of the filters averaged over the cells of a grid, [D, h, w].

        Args:
            numbers: [C, H, W].
            grid_hw: h and w.
        """
        model: Any = self._prepared()
        reach = self._shape[1] // 2
        image = F.pad((numbers / self._scale)[None], (reach,) * 4, mode="replicate")
        # Some filters at a time: all responses of a large image would fill the memory.
        pooled = []
        for weights, biases in zip(
            model.weights.split(_FILTERS_AT_ONCE), model.biases.split(_FILTERS_AT_ONCE), strict=True
        ):
            found = F.conv2d(image, weights, biases)
            pooled.append([F.adaptive_avg_pool2d(F.relu(sign * found), grid_hw)[0] for sign in (1, -1)])
        return torch.cat([half for halves in zip(*pooled, strict=True) for half in halves])

    def _prepared(self) -> torch.nn.Module:
        if self._model is None:
            raise RuntimeError("prepare() comes before the first image")
        return self._model


class _Samples:
    """What torchgeo's RCF asks of a data set."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self._images[index]}


def check_bands(name: str, bands: Sequence[str], images: ImageSet) -> None:
    """Makes sure that images have the bands that a model takes, as far as their bands are known.

    Raises:
        DataError: they have others.
    """
    if images.bands is not None and tuple(images.bands) != tuple(bands):
        raise DataError(
            f"{name} takes the bands {', '.join(bands)}, but {images.name} gives "
            f"{', '.join(images.bands)}; name the bands, or a sensor and a stem"
        )


def encode(
    encoder: Encoder,
    images: ImageSet,
    *,
    cache: Path | None = None,
    batch_size: int = _BATCH,
    progress: Progress | None = None,
) -> Tensor:
    """Vectors of all images, [N, D] float32 on the CPU.

    Args:
        encoder: prepared.
        images: to look at; neighbours in the list that have one size are encoded together.
        cache: folder of vectors kept from earlier calls, or None.
        batch_size: images at a time.
        progress: called with how many images are done.

    Raises:
        DataError: an image that cannot be read or has other bands than the encoder takes.
    """
    kept = None
    if cache is not None:
        kept = cache / f"{short_digest(encoder.digest() + images.stamp)}.safetensors"
        if kept.is_file():
            return read_tensors(kept)[_KEY]
    done = [encoder(batch) for batch in _batches(encoder, images, batch_size, progress)]
    vectors = torch.cat(done).float().contiguous()
    if not torch.isfinite(vectors).all():
        raise DataError(f"{encoder.name} gives vectors that are not finite for {images.name}")
    if kept is not None:
        write_tensors(kept, {_KEY: vectors})
    return vectors


def encode_patches(
    encoder: BackboneEncoder,
    images: ImageSet,
    *,
    cache: Path | None = None,
    batch_size: int = _BATCH,
    progress: Progress | None = None,
) -> Tensor:
    """Patches of all images, [N, P, D] float16 on the CPU; arguments and errors as in `encode`.

    Raises:
        DataError: images of different sizes, which have different numbers of patches.
    """
    kept = None
    if cache is not None:
        kept = cache / f"{short_digest('patches ' + encoder.digest() + images.stamp)}.safetensors"
        if kept.is_file():
            return read_tensors(kept)[_KEY]
    done = [encoder.patches(batch) for batch in _batches(encoder, images, batch_size, progress)]
    if len({part.shape[1] for part in done}) > 1:
        raise DataError(f"{images.name} has images of different sizes; attention pooling needs one size")
    patches = torch.cat(done).contiguous()
    if kept is not None:
        write_tensors(kept, {_KEY: patches})
    return patches


def _batches(
    encoder: Encoder, images: ImageSet, batch_size: int, progress: Progress | None
) -> Iterator[Tensor]:
    """Images [B, C, H, W] in their order; those of a batch have one size."""
    batch: list[Tensor] = []
    for index in range(len(images)):
        image = resize_image(images.read(index), encoder.size, crop_from=encoder.crop_from)
        if batch and (image.shape != batch[0].shape or len(batch) == batch_size):
            yield torch.stack(batch)
            batch = []
            if progress is not None:
                progress(index, len(images))
        batch.append(image)
    yield torch.stack(batch)


def short_digest(text: str) -> str:
    """A name for a text: equal names mean equal texts."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
