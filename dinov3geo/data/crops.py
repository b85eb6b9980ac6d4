"""Chips to augmented crops, on the device, for any number of bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import kornia.color
import kornia.enhance
import kornia.filters
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dinov3geo.backbones.card import Normalization
from dinov3geo.data.masking import MaskSettings, batch_masks
from dinov3geo.data.ranges import PositiveRange, Probability, ShareRange

_BLUR_KERNEL = (9, 9)
_BLUR_SIGMA = (0.1, 2.0)
# A pixel is valid only if (nearly) all of what was interpolated into it was.
_VALID_SHARE = 0.999


class PhotometrySettings(BaseModel):
    """Colour distortions; probabilities are per crop.

    The three blur and solarize probabilities are for the first global, the second global and the local
    crops. The published DINOv3 models were trained with blur 0, 0.9 and 0.5.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    jitter_probability: Probability = 0.8
    brightness: float = Field(0.4, ge=0, lt=1, description="factor drawn from 1 +- this")
    contrast: float = Field(0.4, ge=0, lt=1)
    saturation: float = Field(0.2, ge=0, lt=1, description="distance of the bands from their mean")
    hue: float = Field(0.1, ge=0, le=0.5, description="turns of the colour circle; three bands only")
    grayscale_probability: Probability = 0.2
    blur_probability: tuple[Probability, Probability, Probability] = (0.0, 0.9, 0.5)
    solarize_probability: tuple[Probability, Probability, Probability] = Field(
        (0.0, 0.2, 0.0), description="red, green and blue only, as is hue"
    )


class CropSettings(BaseModel):
    """Sizes are in pixels, scales are shares of the chip's area."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    global_size: int = Field(224, gt=0)
    global_scale: ShareRange = (0.32, 1.0)
    local_size: int = Field(96, gt=0)
    local_scale: ShareRange = (0.05, 0.32)
    local_count: int = Field(8, ge=0)
    gram_size: int | None = Field(None, gt=0, description="side of the gram teacher's crops")
    gram_distortions: bool = Field(False, description="the gram teacher sees the colour distortions too")
    aspect: PositiveRange = (3 / 4, 4 / 3)
    flips: bool = Field(True, description="horizontal flips, and vertical ones for nadir images")
    turns: bool = Field(True, description="right-angle turns; for nadir images only")
    photometry: PhotometrySettings = PhotometrySettings()


@dataclass(frozen=True, slots=True)
class CropBatch:
    """One training batch, normalised; V = 2 global crops per image.

    Attributes:
        global_crops: [V, B, C, H, W].
        local_crops: [L, B, C, h, w]; L may be 0.
        gram_crops: [V, B, C, H', W'] with the geometry of the global crops, or None.
        patch_masks: [V * B, N] bool, view-major: what iBOT hides from the student.
        patch_valid: [V * B, N] bool, patches whose every pixel holds data.
    """

    global_crops: Tensor
    local_crops: Tensor
    gram_crops: Tensor | None
    patch_masks: Tensor
    patch_valid: Tensor

    def of_images(self, images: slice) -> CropBatch:
        """The crops of some of the B images."""
        views, batch = self.global_crops.shape[:2]

        def rows(tensor: Tensor) -> Tensor:
            own: Tensor = tensor.unflatten(0, (views, batch))[:, images].flatten(0, 1)
            return own

        return CropBatch(
            self.global_crops[:, images],
            self.local_crops[:, images],
            None if self.gram_crops is None else self.gram_crops[:, images],
            rows(self.patch_masks),
            rows(self.patch_valid),
        )


def draw_boxes(
    count: int, scale: tuple[float, float], aspect: tuple[float, float], *, generator: torch.Generator
) -> Tensor:
    """Random boxes in a square chip.

    Returns:
        [count, 4] as centre row, centre column, height, width in (0, 1) of the chip's side.

    Source: area uniform in `scale`, aspect log-uniform, as in torchvision's RandomResizedCrop; a side
    longer than the chip is cut instead of drawn again.
    """
    area, shape, top, left = torch.rand(4, count, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * area
    low, high = math.log(aspect[0]), math.log(aspect[1])
    root = torch.exp((low + (high - low) * shape) / 2)
    height, width = (area.sqrt() / root).clamp_max(1), (area.sqrt() * root).clamp_max(1)
    return torch.stack([height / 2 + top * (1 - height), width / 2 + left * (1 - width), height, width], 1)


def draw_symmetries(count: int, settings: CropSettings, *, nadir: bool, generator: torch.Generator) -> Tensor:
    """Random flips and turns as 2 x 2 matrices of (column, row) directions, [count, 2, 2]."""
    flip_x, flip_y, turn = torch.rand(3, count, generator=generator)
    sign_x = torch.where(flip_x < 0.5, -1.0, 1.0) if settings.flips else torch.ones(count)
    sign_y = torch.where(flip_y < 0.5, -1.0, 1.0) if settings.flips and nadir else torch.ones(count)
    matrix = torch.diag_embed(torch.stack([sign_x, sign_y], 1))
    if settings.turns and nadir:
        # With both flips drawn, a quarter turn reaches all eight symmetries of the square.
        quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        matrix = torch.where((turn < 0.5)[:, None, None], matrix @ quarter, matrix)
    return matrix


@dataclass(frozen=True, slots=True)
class Share:
    """Which images of a step this process holds: number `rank`, `rank + world_size`, ...

    Everything random is drawn for all images of the step, so that an image gets the same crops and the same
    mask however many processes share the work.
    """

    rank: int = 0
    world_size: int = 1

    def of(self, drawn: Tensor, groups: int = 1) -> Tensor:
        """Own part of numbers drawn for all images: [groups * images, ...] -> [groups * own, ...]."""
        own: Tensor = drawn.unflatten(0, (groups, -1))[:, self.rank :: self.world_size].flatten(0, 1)
        return own


def density_of(boxes: Tensor, chip_size: int, size: int) -> int:
    """How many times more densely than its pixels a crop must be sampled for the largest of its boxes."""
    return max(1, math.ceil(float(boxes[:, 2:].max()) * chip_size / size - 0.25))


def cut(chips: Tensor, boxes: Tensor, symmetries: Tensor, size: int, density: int | None = None) -> Tensor:
    """Resamples a box of each chip to a square.

    Bilinear; where a box is larger than the output it is sampled more densely and averaged, so that fine
    texture does not alias.

    Args:
        chips: [B, C, S, S] float.
        boxes: [B, 4], see `draw_boxes`.
        symmetries: [B, 2, 2], see `draw_symmetries`.
        size: of the output in pixels.
        density: see `density_of`; that of the given boxes if None.

    Returns:
        [B, C, size, size].
    """
    density = density or density_of(boxes, chips.shape[-1], size)
    half = boxes[:, [3, 2]]  # half extent in grid_sample's (-1, 1) units equals the full extent in (0, 1)
    centre = boxes[:, [1, 0]] * 2 - 1
    theta = torch.cat([half[:, :, None] * symmetries, centre[:, :, None]], dim=2).to(chips)
    grid = F.affine_grid(theta, [*chips.shape[:2], size * density, size * density], align_corners=False)
    crops = F.grid_sample(chips, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(crops, density) if density > 1 else crops


def _cut_with_data(
    layers: Tensor, boxes: Tensor, symmetries: Tensor, size: int, density: int
) -> tuple[Tensor, Tensor]:
    """`cut`, but a crop without one valid pixel shows its whole chip instead.

    A blank crop would be a member of Sinkhorn-Knopp, DINO and KoLeo that says nothing of the ground.

    Args:
        layers: [B, C + 1, S, S], the last layer is the valid share.
        boxes: [B, 4].
        symmetries: [B, 2, 2].
        size: of the output.
        density: see `density_of`.

    Returns:
        Crops [B, C + 1, size, size] and the boxes used.
    """
    crops = cut(layers, boxes, symmetries, size, density)
    blank = crops[:, -1].amax((1, 2)) <= _VALID_SHARE
    if not bool(blank.any()):
        return crops, boxes
    chosen = blank.cpu()
    boxes = torch.where(chosen[:, None], torch.tensor([0.5, 0.5, 1.0, 1.0]), boxes)
    whole = cut(layers[blank], boxes[chosen], symmetries[chosen], size)
    return _replace(crops, blank, whole), boxes


def distort(
    images: Tensor,
    settings: PhotometrySettings,
    view: int,
    *,
    generator: torch.Generator,
    rgb: bool,
    share: Share | None = None,
    groups: int = 1,
) -> Tensor:
    """Random colour distortions.

    Args:
        images: [B, C, H, W] in physical units, which need not lie in [0, 1].
        settings: probabilities and ranges.
        view: 0 first global, 1 second global, 2 local: chooses blur and solarize probabilities.
        generator: on the CPU, so that every device draws the same.
        rgb: the bands are red, green and blue in [0, 1], for which hue and solarize have a meaning.
        share: the images are this part of those drawn for; all of them if None.
        groups: crops per image, group-major.

    Returns:
        As images.
    """
    share = share or Share()
    bands = images.shape[1]

    def drawn(rows: int) -> Tensor:
        numbers = torch.rand(rows, len(images) * share.world_size, generator=generator)
        return share.of(numbers.T, groups).T

    chance, *draws = drawn(5)
    jitter = chance < settings.jitter_probability
    ranges = (settings.brightness, settings.contrast, settings.saturation)
    brightness, contrast, saturation = (
        torch.where(jitter, 1 + (2 * draw - 1) * span, 1.0).to(images)
        for draw, span in zip(draws, ranges, strict=False)
    )
    # kornia's own brightness and contrast clamp to [0, 1]: decibels or kelvins would become constants.
    images = images * brightness[:, None, None, None]
    mean = _grey(images, rgb=rgb).mean((2, 3), keepdim=True)
    images = mean + (images - mean) * contrast[:, None, None, None]
    if bands > 1:
        grey = _grey(images, rgb=rgb)
        images = grey + (images - grey) * saturation[:, None, None, None]
    if rgb and settings.hue > 0 and bool(jitter.any()):
        shift = ((2 * draws[3] - 1) * settings.hue * 2 * math.pi)[jitter].to(images)
        images = _replace(images, jitter, kornia.enhance.adjust_hue(images[jitter].clamp(0, 1), shift))
    chance_grey, chance_blur, chance_solarize, sigma = drawn(4)
    chosen = chance_grey < settings.grayscale_probability
    if bands > 1 and bool(chosen.any()):
        images = _replace(images, chosen, _grey(images[chosen], rgb=rgb).expand(-1, bands, -1, -1))
    chosen = chance_blur < settings.blur_probability[view]
    if bool(chosen.any()):
        width = (_BLUR_SIGMA[0] + (_BLUR_SIGMA[1] - _BLUR_SIGMA[0]) * sigma)[chosen].to(images)
        blurred = kornia.filters.gaussian_blur2d(images[chosen], _BLUR_KERNEL, width[:, None].expand(-1, 2))
        images = _replace(images, chosen, blurred)
    chosen = chance_solarize < settings.solarize_probability[view]
    if rgb and bool(chosen.any()):
        images = _replace(images, chosen, kornia.enhance.solarize(images[chosen].clamp(0, 1), 0.5))
    return images


def _grey(images: Tensor, *, rgb: bool) -> Tensor:
    if rgb:
        return kornia.color.rgb_to_grayscale(images)
    return images.mean(1, keepdim=True)


def _replace(images: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    return images.index_copy(0, chosen.nonzero()[:, 0].to(images.device), values.to(images.dtype))


def _dates(numbers: Tensor, valid: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Chips and masks of each date."""
    if numbers.ndim == 4:
        return [(numbers, valid)]
    return list(zip(numbers.unbind(1), valid.unbind(1), strict=True))


class CropMaker:
    """Turns chips into a `CropBatch`; the same seed gives the same crops."""

    def __init__(
        self,
        settings: CropSettings,
        masks: MaskSettings,
        normalization: Normalization,
        *,
        patch_size: int,
        nadir: bool,
    ) -> None:
        """Keeps the settings.

        Args:
            settings: sizes, scales and distortions.
            masks: iBOT shares.
            normalization: from stored numbers to physical units to network input.
            patch_size: pixels; must divide every crop size.
            nadir: the images look straight down, so that every flip and right-angle turn is as likely.

        Raises:
            ValueError: a crop size is not a multiple of the patch size.
        """
        for name in ("global_size", "local_size", "gram_size"):
            size = getattr(settings, name)
            if size is not None and size % patch_size:
                low = max(size // patch_size, 1) * patch_size
                raise ValueError(
                    f"crops.{name} {size} is not a multiple of patch_size {patch_size}; "
                    f"use {low} or {low + patch_size}"
                )
        self.settings = settings
        self.masks = masks
        self.normalization = normalization
        self.patch_size = patch_size
        self.nadir = nadir
        self.rgb = normalization.bands == ("red", "green", "blue")

    def __call__(self, numbers: Tensor, valid: Tensor, *, seed: int, share: Share | None = None) -> CropBatch:
        """Makes the crops of one batch.

        Args:
            numbers: [B, C, S, S] chips in the file's own dtype, on the device; or [B, 2, C, S, S], the same
                places on two dates.
            valid: [B, S, S] (or [B, 2, S, S]) bool; pixels without data reach the result only as 0.
            seed: of this batch.
            share: the part of the step's chips that these are; all of them if None.

        Returns:
            Crops on the chips' device.
        """
        share = share or Share()
        generator = torch.Generator().manual_seed(seed)
        # Of two dates each global crop shows one, and the local crops show them in turn.
        dates = [self._layers(*date) for date in _dates(numbers, valid)]
        views, valids, gram = [], [], []
        for view in range(2):
            layers = dates[view % len(dates)]
            size = self.settings.global_size
            drawn = self._geometry(len(layers) * share.world_size, self.settings.global_scale, generator)
            boxes, symmetries = (share.of(tensor) for tensor in drawn)
            density = density_of(drawn[0], layers.shape[-1], size)
            cropped, boxes = _cut_with_data(layers, boxes, symmetries, size, density)
            views.append(self._finish(cropped, view, generator, share))
            valids.append(cropped[:, -1] > _VALID_SHARE)
            if self.settings.gram_size is not None:
                density = density_of(drawn[0], layers.shape[-1], self.settings.gram_size)
                gram.append(self._gram(layers, boxes, symmetries, density, view, generator, share))
        patch_valid, patch_masks = self._patches(torch.cat(valids), seed, share)
        return CropBatch(
            global_crops=torch.stack(views),
            local_crops=self._locals(dates, generator, share),
            gram_crops=torch.stack(gram) if gram else None,
            patch_masks=patch_masks,
            patch_valid=patch_valid,
        )

    def _layers(self, numbers: Tensor, valid: Tensor) -> Tensor:
        """[B, C + 1, S, S] physical numbers and, last, the valid share."""
        chips = self._physical(numbers, valid)
        return torch.cat([chips, valid[:, None].to(chips)], dim=1)

    def _physical(self, numbers: Tensor, valid: Tensor) -> Tensor:
        norm = self.normalization
        scale, offset, mean = (
            torch.tensor(values, device=numbers.device, dtype=torch.float32)[:, None, None]
            for values in (norm.scale, norm.offset, norm.mean)
        )
        # Filled before anything is averaged: a nodata number must not reach contrast, blur or resampling.
        return torch.where(valid[:, None], numbers.float() * scale + offset, mean)

    def _geometry(
        self, count: int, scale: tuple[float, float], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        boxes = draw_boxes(count, scale, self.settings.aspect, generator=generator)
        return boxes, draw_symmetries(count, self.settings, nadir=self.nadir, generator=generator)

    def _normalize(self, images: Tensor, valid_share: Tensor) -> Tensor:
        norm = self.normalization
        mean, std = (
            torch.tensor(values, device=images.device, dtype=torch.float32)[:, None, None]
            for values in (norm.mean, norm.std)
        )
        return torch.where(valid_share[:, None] > _VALID_SHARE, (images - mean) / std, 0.0)

    def _finish(
        self, layers: Tensor, view: int, generator: torch.Generator, share: Share, groups: int = 1
    ) -> Tensor:
        images = distort(
            layers[:, :-1],
            self.settings.photometry,
            view,
            generator=generator,
            rgb=self.rgb,
            share=share,
            groups=groups,
        )
        return self._normalize(images, layers[:, -1])

    def _gram(
        self,
        layers: Tensor,
        boxes: Tensor,
        symmetries: Tensor,
        density: int,
        view: int,
        generator: torch.Generator,
        share: Share,
    ) -> Tensor:
        assert self.settings.gram_size is not None
        cropped = cut(layers, boxes, symmetries, self.settings.gram_size, density)
        if self.settings.gram_distortions:
            return self._finish(cropped, view, generator, share)
        return self._normalize(cropped[:, :-1], cropped[:, -1])

    def _locals(self, dates: Sequence[Tensor], generator: torch.Generator, share: Share) -> Tensor:
        count, size, layers = self.settings.local_count, self.settings.local_size, dates[0]
        if count == 0:
            return layers.new_zeros(0, len(layers), layers.shape[1] - 1, size, size)
        everyone = count * len(layers) * share.world_size
        boxes, symmetries = self._geometry(everyone, self.settings.local_scale, generator)
        crops = [
            _cut_with_data(
                dates[number % len(dates)],
                share.of(box),
                share.of(symmetry),
                size,
                density_of(box, layers.shape[-1], size),
            )[0]
            for number, (box, symmetry) in enumerate(
                zip(boxes.chunk(count), symmetries.chunk(count), strict=True)
            )
        ]
        finished = self._finish(torch.cat(crops), 2, generator, share, groups=count)
        grouped: Tensor = finished.unflatten(0, (count, len(layers)))
        return grouped

    def _patches(self, valid: Tensor, seed: int, share: Share) -> tuple[Tensor, Tensor]:
        side = self.settings.global_size // self.patch_size
        covered = F.avg_pool2d(valid[:, None].float(), self.patch_size)
        patch_valid = (covered > 1 - 1e-6).flatten(1)  # [V * B, N]
        everyone = torch.arange(len(valid) * share.world_size)
        masks = batch_masks(
            patch_valid.cpu().numpy(),
            (side, side),
            self.masks,
            seed=seed,
            images=share.of(everyone, groups=2).tolist(),
            num_images=len(everyone),
        )
        return patch_valid, torch.from_numpy(masks).to(valid.device)
