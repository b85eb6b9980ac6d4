"""Frames and masks on disk: photographs of a video, or dates of one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dinov3geo.backbones.base import Backbone
from dinov3geo.errors import DataError, RasterError, UnknownNameError
from dinov3geo.evaluation.image_sets import as_tensor, list_images, read_image
from dinov3geo.paths import written_whole
from dinov3geo.rasters.bands import choose_bands
from dinov3geo.rasters.geotiff import write_geotiff
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import RASTER_SUFFIXES, inspect_scene, read_on_grid

VIDEO_SUFFIXES = (".gif", ".png", ".webp")

Masks = NDArray[np.uint8]


class Frames:
    """The frames of a folder in the order of their names.

    Rasters are read on the grid of the first one, so that dates of one place lie on each other.

    Attributes:
        files: of the frames.
        grid: of georeferenced frames, else None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bands: Sequence[str],
        model: str,
        order: Sequence[str] | None = None,
        start: str | None = None,
    ) -> None:
        """Lists the frames.

        Args:
            folder: of images, looked at without its sub-folders.
            bands: names of the bands to read.
            model: that wants them, for messages.
            order: of the bands in rasters that describe none of them, or None.
            start: name of the frame to begin with, with or without suffix; None for the first.

        Raises:
            RasterError: no such folder.
            UnknownNameError: no frame of this name.
            DataError: fewer than two frames.
        """
        if not folder.is_dir():
            raise RasterError(f"no such folder of frames: {folder}")
        self.files = [path for path in list_images(folder) if path.parent == folder]
        if start is not None:
            names = [path.stem for path in self.files]
            if Path(start).stem not in names:
                raise UnknownNameError("frame", start, [path.name for path in self.files])
            self.files = self.files[names.index(Path(start).stem) :]
        if len(self.files) < 2:
            raise DataError(f"{folder} has {len(self.files)} frames; at least 2 are needed")
        self._bands, self._model, self._order = tuple(bands), model, order
        placed = self.files[0].suffix.lower() in RASTER_SUFFIXES
        self.grid: PixelGrid | None = inspect_scene(self.files[0]).grid if placed else None

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.files)

    def read(self, index: int) -> Tensor:
        """A frame, [C, H, W] in the file's own numbers."""
        path = self.files[index]
        if self.grid is None:
            return read_image(path, self._bands)
        chosen, _ = choose_bands(path, self._bands, model=self._model, order=self._order)
        numbers, _ = read_on_grid(path, self.grid, bands=chosen, resampling="bilinear")
        return as_tensor(numbers)

    def readers(self) -> list[Callable[[], Tensor]]:
        """One function per frame."""
        return [lambda index=index: self.read(index) for index in range(len(self))]  # type: ignore[misc]


def patch_encoder(backbone: Backbone, *, short_side: int | None) -> Callable[[Tensor], Tensor]:
    """A function from a frame to its patch features, [D, h, w].

    Args:
        backbone: with a card.
        short_side: the frame is resized to it, the other side in proportion, both to whole patches; None
            keeps the frame's size.

    Raises:
        DataError: the backbone has no card.
    """
    if backbone.card is None:
        raise DataError("the backbone has no card, so its normalisation is unknown; use load_backbone")
    normalization, patch = backbone.card.normalization, backbone.patch_size
    device = next(backbone.parameters()).device

    @torch.no_grad()
    def encode(numbers: Tensor) -> Tensor:
        image = normalization(numbers[None].to(device))
        height, width = image.shape[-2:]
        scale = 1.0 if short_side is None else short_side / min(height, width)
        size = [max(1, round(side * scale / patch)) * patch for side in (height, width)]
        if size != [height, width]:
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        features: Tensor = backbone(image).map()[0]
        return features

    return encode


def pixel_encoder(*, patch: int = 16, short_side: int | None) -> Callable[[Tensor], Tensor]:
    """What features must beat: the pixels of each patch themselves, centred; arguments as above."""

    def encode(numbers: Tensor) -> Tensor:
        image = numbers[None].float()
        height, width = image.shape[-2:]
        scale = 1.0 if short_side is None else short_side / min(height, width)
        size = [max(1, round(side * scale / patch)) * patch for side in (height, width)]
        if size != [height, width]:
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        pixels = F.unfold(image - image.mean((2, 3), keepdim=True), patch, stride=patch)
        vectors: Tensor = pixels[0].unflatten(1, (size[0] // patch, size[1] // patch))
        return vectors

    return encode


def read_mask(path: Path) -> Masks:
    """Labels of a mask, [H, W] uint8, 0 for the background.

    Palette and grey pictures, and rasters of one band, give their numbers; in a colour picture black is the
    background and every other colour an object, in the order of the colours.

    Raises:
        RasterError: no such file.
        DataError: no picture, no object, or more than 255.
    """
    if not path.is_file():
        raise RasterError(f"no such mask: {path}")
    if path.suffix.lower() in RASTER_SUFFIXES:
        numbers = read_image(path)[0].numpy()
    else:
        try:
            with Image.open(path) as opened:
                numbers = np.array(opened if opened.mode in ("P", "L", "1", "I") else opened.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise DataError(f"{path} cannot be decoded as a mask: {error}") from error
    if numbers.ndim == 3:
        codes = (numbers.astype(np.int64) * np.array([65536, 256, 1])).sum(2)
        numbers = np.searchsorted(np.unique(np.append(codes, 0)), codes)
    if numbers.min() < 0 or numbers.max() > 255:
        raise DataError(f"{path} has labels up to {numbers.max()}; at most 255 objects can be followed")
    if not numbers.any():
        raise DataError(f"{path} holds no object: all of it is 0, the background")
    return numbers.astype(np.uint8)


def write_mask(path: Path, mask: Masks, *, grid: PixelGrid | None = None) -> None:
    """Writes a mask as a palette PNG, or as a GeoTIFF where it has a place.

    Raises:
        RasterError: it cannot be written.
    """
    if grid is not None:
        colours = {k: (int(r), int(g), int(b)) for k, (r, g, b) in enumerate(_palette())}
        write_geotiff(
            path,
            mask,
            grid,
            nodata=None,
            band_names=("object",),
            overviews="mode",
            colours=colours,
            overwrite=True,
        )
        return
    picture = Image.frombytes("P", mask.shape[::-1], mask.tobytes())
    picture.putpalette(_palette().ravel().tolist())
    with written_whole(path) as temporary:
        picture.save(temporary, format="PNG")


def overlay(frame: Tensor, mask: Masks, *, strength: float = 0.5) -> Image.Image:
    """A frame with its objects coloured.

    Args:
        frame: [C, H, W], of which the first three bands are shown (or the first one as grey).
        mask: [H, W] labels.
        strength: of the colours.
    """
    shown = frame.float()[:3] if len(frame) >= 3 else frame.float()[:1].expand(3, -1, -1)
    picture = shown.permute(1, 2, 0).numpy()
    if frame.dtype != torch.uint8:
        low, high = np.percentile(picture, [2, 98])
        picture = (picture - low) / max(high - low, 1e-12) * 255
    picture = picture.clip(0, 255)
    objects = mask > 0
    colours = _palette()[mask]
    picture[objects] = picture[objects] * (1 - strength) + colours[objects] * strength
    return Image.fromarray(picture.astype(np.uint8))


def write_video(path: Path, pictures: Sequence[Image.Image], *, frames_per_second: float) -> None:
    """Writes a moving picture: GIF, animated PNG or WebP by the suffix.

    Raises:
        RasterError: it cannot be written.
    """
    with written_whole(path) as temporary:
        pictures[0].save(
            temporary,
            save_all=True,
            append_images=list(pictures[1:]),
            duration=round(1000 / frames_per_second),
            loop=0,
        )


def _palette() -> Masks:
    """[256, 3]: black, then colours that are easily told apart, again and again."""
    colours = np.array(matplotlib.colormaps["tab10"].colors)  # type: ignore[attr-defined]
    # Red first: most things on the ground are not.
    order = [3, 0, 1, 2, 4, 5, 6, 8, 9, 7]
    many = np.tile((colours[order] * 255).round().astype(np.uint8), (26, 1))[:255]
    return np.concatenate([np.zeros((1, 3), np.uint8), many])
