"""Filters and whitening of a `FilterBank` from images, without labels and without a gradient.

Source: Coates and Ng 2012 (Learning feature representations with k-means): patches whitened by their own
covariance, of which some are filters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.device import resolve_device
from dinov3geo.backbones.filter_bank import FilterBank, FilterBankConfig
from dinov3geo.backbones.variants import variant_of
from dinov3geo.backbones.zoo import RUN_EXPORT, save_backbone
from dinov3geo.data.mixture import check_bands, chip_loader, open_sources
from dinov3geo.errors import ConfigError, DataError, RasterError
from dinov3geo.training.journal import commit
from dinov3geo.training.loop import round_outwards
from dinov3geo.training.settings import FilterSettings
from dinov3geo.training.setup import run_normalization

_BATCH = 32
# Chips from which patches are drawn, and chips looked at for one without missing pixels.
_PATCH_CHIPS, _DRAWS_PER_CHIP = 2000, 4
# Directions in which images differ less than this, relative to the widest, are rounding.
_SMALLEST_SHARE = 1e-10

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What was fitted.

    Attributes:
        weights: file of the weights.
        images: chips that the whitening is of.
        explained: share of the variance of the image's responses in the features, after every response was
            brought to unit variance.
    """

    weights: Path
    images: int
    explained: float


def fit_filters(
    settings: FilterSettings,
    out: Path,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    overwrite: bool = False,
) -> FilterResult:
    """Fits a filter bank and writes weights and card.

    Args:
        settings: of the bank.
        out: folder of `backbone.safetensors` and its card.
        progress: told chips done and in all.
        warn: told of files that are left out.
        overwrite: replace weights in `out`.

    Raises:
        RasterError: there are weights already.
        DataError: nothing to read, too few chips without missing pixels, or images that do not differ.
        ConfigError: chips smaller than a filter or a cell.
    """
    weights = check_weights(out, overwrite=overwrite)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    chips = _Chips(settings, warn)
    for_patches = min(settings.images, _PATCH_CHIPS)
    total = for_patches + settings.images

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, total)

    bank = empty_bank(settings, chips.normalization).to(chips.device)
    with torch.no_grad():
        _choose_filters(bank, settings, chips.read(for_patches, tell))
        moments = _Moments(bank.whole.in_features), _Moments(bank.cells.in_features)
        for images in chips.read(settings.images, lambda done: tell(for_patches + done)):
            found = bank.responses(images)
            moments[0].add(bank.describe(found).double())
            moments[1].add(found.sqrt().flatten(2).transpose(1, 2).flatten(0, 1))
        explained = moments[0].whiten(bank.whole)
        moments[1].whiten(bank.cells)
    save_backbone(weights, bank, _card(settings, chips, bank), dtype=getattr(torch, settings.export.dtype))
    return FilterResult(weights, settings.images, explained)


def check_weights(out: Path, *, overwrite: bool) -> Path:
    """The file of weights in a folder, which must be free unless it may be replaced.

    Raises:
        RasterError: it is not.
    """
    weights = out / RUN_EXPORT
    if weights.exists() and not overwrite:
        raise RasterError(f"{weights} exists; choose another --out or allow --overwrite")
    return weights


class _Chips:
    """The run's chips, normalised, without those that miss pixels."""

    def __init__(self, settings: FilterSettings, warn: Callable[[str], None] | None) -> None:
        self.settings = settings
        self.warn = warn
        self.normalization: Normalization = run_normalization(settings)
        self.device = resolve_device(settings.device)
        self.datasets = open_sources(settings.data)
        check_bands(self.datasets, settings.data)

    def read(self, count: int, tell: Callable[[int], None]) -> Iterator[Tensor]:
        """Batches [B, C, S, S] of `count` chips, the same ones every time.

        Raises:
            DataError: too many chips miss pixels.
        """
        loader = chip_loader(
            self.datasets, self.settings.data, batch_size=_BATCH, seed=self.settings.seed, warn=self.warn
        )
        done = looked = 0
        for batch in loader:
            image, valid = batch["image"], batch["valid"]
            if image.ndim == 5:  # two dates
                image, valid = image.flatten(0, 1), valid.flatten(0, 1)
            whole = valid.flatten(1).all(1)
            images = self.normalization(image[whole].to(self.device))[: count - done]
            looked += len(whole)
            if len(images):
                done += len(images)
                yield images
            tell(done)
            if done == count:
                return
            if looked >= _DRAWS_PER_CHIP * count:
                raise DataError(
                    f"only {done} of {looked} chips have no missing pixels, and {count} are wanted; lower "
                    "images or data.chip_size, or keep to scenes with less nodata"
                )


def empty_bank(settings: FilterSettings, normalization: Normalization) -> FilterBank:
    """A bank of the shape that the settings ask for, without numbers yet.

    Raises:
        ConfigError: chips smaller than a filter or a cell.
    """
    largest = max([settings.patch_size, *(kernel.size for kernel in settings.kernels)])
    if settings.data.chip_size < largest:
        raise ConfigError(f"data.chip_size {settings.data.chip_size} is smaller than {largest} pixels")
    return FilterBank(
        FilterBankConfig(
            embed_dim=settings.embed_dim,
            kernels=tuple((kernel.size, kernel.count) for kernel in settings.kernels),
            patch_size=settings.patch_size,
            in_channels=len(normalization.bands),
        )
    )


def _choose_filters(bank: FilterBank, settings: FilterSettings, batches: Iterator[Tensor]) -> None:
    """Fills the filters: whitened patches of unit length, folded into kernels for plain images."""
    generator = torch.Generator().manual_seed(settings.seed)
    per_chip = -(-settings.patches // min(settings.images, _PATCH_CHIPS))
    drawn: list[list[Tensor]] = [[] for _ in settings.kernels]
    for images in batches:
        for number, kernel in enumerate(settings.kernels):
            drawn[number].append(_draw_patches(images, kernel.size, per_chip, generator))
    for group, kernel, parts in zip(bank.filters, settings.kernels, drawn, strict=True):
        patches = torch.cat(parts).cpu().double()
        mean = patches.mean(0)
        variance, axes = torch.linalg.eigh(torch.cov(patches.T))
        whitening = (axes * (variance.clamp_min(0) + settings.ridge).rsqrt()) @ axes.T
        order = torch.randperm(len(patches), generator=generator)[: kernel.count]
        if len(order) < kernel.count:
            raise DataError(f"{kernel.count} filters need as many patches, got {len(order)}; raise patches")
        chosen = torch.nn.functional.normalize((patches[order] - mean) @ whitening, dim=1)
        weight = chosen @ whitening
        group.weight.copy_(weight.view_as(group.weight))  # type: ignore[operator]
        group.bias.copy_(-(weight @ mean))  # type: ignore[operator]
        group.threshold.fill_(settings.threshold)  # type: ignore[operator]


def _draw_patches(images: Tensor, side: int, per_chip: int, generator: torch.Generator) -> Tensor:
    """Patches [B * per_chip, C * side * side] at random places."""
    count, _, height, width = images.shape
    rows, columns = (
        torch.randint(length - side + 1, (count, per_chip), generator=generator) for length in (height, width)
    )
    reach = torch.arange(side)
    image = torch.arange(count)[:, None, None, None]
    y = (rows[..., None] + reach)[..., :, None]
    x = (columns[..., None] + reach)[..., None, :]
    found = images[image.to(images.device), :, y.to(images.device), x.to(images.device)]  # [B, n, k, k, C]
    return found.permute(0, 1, 4, 2, 3).flatten(0, 1).flatten(1)


class _Moments:
    """Mean and covariance of vectors that come in parts."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Adds [N, F]; products are summed in the vectors' own precision within a part.

        The many cells take half the time in float32; the few images, in float64, tell rounding from variance.
        """
        vectors = vectors.cpu()
        self.count += len(vectors)
        self.total += vectors.double().sum(0)
        self.products += (vectors.T @ vectors).double()

    def whiten(self, linear: torch.nn.Linear) -> float:
        """Makes a layer of the principal components of what was added, each of unit variance.

        Every response is brought to unit variance first: filters differ in how often they answer.

        Returns:
            Share of the variance in the layer's directions.

        Raises:
            DataError: there are fewer directions than the layer has.
        """
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        spread = covariance.diagonal().clamp_min(0).sqrt()
        usable = spread > 1e-6 * spread.max()
        inverse = torch.where(usable, 1 / spread.where(usable, torch.ones_like(spread)), 0.0)
        variance, axes = torch.linalg.eigh(covariance * torch.outer(inverse, inverse))
        width = linear.out_features
        variance, axes = variance.flip(0), axes.flip(1)
        if not bool(variance[width - 1] > _SMALLEST_SHARE * variance[0]):
            there = int((variance > _SMALLEST_SHARE * variance[0].clamp_min(1e-300)).sum())
            if there == 0:
                raise DataError(
                    "no filter answers differently from image to image: they are all alike, or threshold is "
                    "too high"
                )
            raise DataError(
                f"the images differ in {there} directions, {width} are wanted: lower embed_dim to {there}, "
                "or give more or other images"
            )
        weight = (axes[:, :width] * variance[:width].rsqrt()).T * inverse
        linear.weight.copy_(weight)
        linear.bias.copy_(-(weight @ mean))
        return float(variance[:width].sum() / variance.clamp_min(0).sum())


def _card(settings: FilterSettings, chips: _Chips, bank: FilterBank) -> BackboneCard:
    sizes = [size for size in (dataset.gsd_range_m for dataset in chips.datasets) if size is not None]
    export = settings.export
    return BackboneCard(
        name=settings.name,
        variant=variant_of(bank.config),
        patch_size=settings.patch_size,
        normalization=chips.normalization,
        gsd_m=export.gsd_m or round_outwards(sizes),
        trained_on=export.trained_on or tuple(source.path for source in settings.data.sources),
        licence=export.licence,
        notes=export.notes,
        recipe={
            "commit": commit(),
            "settings": settings.model_dump(mode="json", exclude={"data": {"root"}, "export": True}),
        },
    )
