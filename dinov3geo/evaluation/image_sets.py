"""Labelled images, wherever they come from: folders of classes, tables of files, torchgeo's data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window
from torch import Tensor

from dinov3geo.data.image_folder import IMAGE_SUFFIXES, decode_image, hash_share
from dinov3geo.errors import DataError, GeoreferenceError, RasterError, UnknownNameError
from dinov3geo.rasters.bands import RGB, described_bands, find_bands, find_in_order, name_bands, ordered_bands
from dinov3geo.rasters.reader import RASTER_SUFFIXES, SceneReader

SUFFIXES = (*IMAGE_SUFFIXES, *RASTER_SUFFIXES)
TRAIN, VALIDATION, TEST = "train", "val", "test"
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1

Indexes = NDArray[np.int64]


class Readable(Protocol):
    """Images of any kind, as far as what learns from their pixels alone wants to know them."""

    @property
    def read(self) -> Callable[[int], Tensor]:
        """Gives image i, [C, H, W] in the file's own numbers."""

    @property
    def stamp(self) -> str:
        """Changes when the images do."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images with what they show.

    Attributes:
        name: for tables.
        names: one per image, what the split is drawn by; a file's own name.
        labels: [N] int64 class numbers, or [N, K] bool where an image shows several classes.
        classes: names of the K classes.
        read: gives image i, [C, H, W] in the file's own numbers.
        bands: names of the C bands, or None if nothing is known of them.
        parts: "train", "val" or "test" per image where the set has its own split, else None.
        stamp: changes when the images do.
    """

    name: str
    names: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    read: Callable[[int], Tensor]
    bands: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    stamp: str = ""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes."""
        return self.labels.ndim == 2

    def take(self, indexes: Indexes) -> ImageSet:
        """Some of the images, in that order."""
        chosen = [int(i) for i in indexes]
        read = self.read
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            labels=self.labels[chosen],
            read=lambda i: read(chosen[i]),
            parts=None if self.parts is None else tuple(self.parts[i] for i in chosen),
            stamp=hashlib.sha256(f"{self.stamp} {chosen}".encode()).hexdigest(),
        )

    def limit(self, per_class: int | None) -> ImageSet:
        """At most so many images of each class, those with the smallest hashes of their names.

        Raises:
            DataError: the images show several classes each.
        """
        if per_class is None:
            return self
        if self.multi_label:
            raise DataError(f"{self.name} has several classes per image; they cannot be limited by class")
        order = np.argsort([hash_share(name, salt="limit") for name in self.names], kind="stable")
        labels = self.labels.numpy()[order]
        chosen = [order[labels == k][:per_class] for k in range(len(self.classes))]
        return self.take(np.sort(np.concatenate(chosen)))


@dataclass(frozen=True, slots=True)
class Split:
    """Numbers of the images of each part, increasing."""

    train: Indexes
    validation: Indexes
    test: Indexes

    @property
    def fitted(self) -> Indexes:
        """Training and validation images together, for the fit that is kept."""
        return np.sort(np.concatenate([self.train, self.validation]))


def split_images(
    images: ImageSet, *, test_share: float = TEST_SHARE, validation_share: float = VALIDATION_SHARE
) -> Split:
    """The set's own split, or one by a hash of the names.

    Where the set has no validation part, a share of the training images is held out, again by a hash.

    Args:
        images: to split.
        test_share: of all images, where the set has no split.
        validation_share: of the training images.

    Raises:
        DataError: a part is left without images.
    """
    names = images.names
    if images.parts is None:
        is_test = np.array([hash_share(n) < test_share for n in names])
        parts = np.where(is_test, TEST, TRAIN)
    else:
        parts = np.array(images.parts)
    if not (parts == VALIDATION).any():
        held = np.array([hash_share(n, salt="validation") < validation_share for n in names])
        parts = np.where((parts == TRAIN) & held, VALIDATION, parts)
    split = Split(*(np.flatnonzero(parts == part) for part in (TRAIN, VALIDATION, TEST)))
    for part, indexes in ((TRAIN, split.train), (VALIDATION, split.validation), (TEST, split.test)):
        if not len(indexes):
            raise DataError(
                f"{images.name} has {len(names)} images, and none of them falls into the part {part!r}; "
                "more images or other shares are needed"
            )
    _check_classes(images, split)
    return split


def _check_classes(images: ImageSet, split: Split) -> None:
    """Every class must be seen in training."""
    fitted = images.labels[split.fitted]
    counts = fitted.sum(0) if images.multi_label else torch.bincount(fitted, minlength=len(images.classes))
    empty = [name for name, count in zip(images.classes, counts.tolist(), strict=True) if not count]
    if empty and not images.multi_label:
        raise DataError(
            f"{images.name}: no training image of class {', '.join(empty)}; leave the class out or add images"
        )


def class_folders(
    root: str | Path, *, bands: Sequence[str] | None = None, order: Sequence[str] | None = None
) -> ImageSet:
    """A folder with one sub-folder of images per class, at any depth: JPEG, PNG or rasters.

    Args:
        root: searched recursively; hidden names are skipped.
        bands: to read from rasters, in this order; None for all.
        order: of the bands in the files, see `read_image`.

    Raises:
        RasterError: no such folder.
        DataError: no images, images beside the class folders, or fewer than two classes.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise RasterError(f"no such folder: {root}")
    files = list_images(folder)
    loose = [path.name for path in files if path.parent == folder]
    classes = tuple(sorted({path.parent.name for path in files} - ({folder.name} if loose else set())))
    if loose or len(classes) < 2:
        found = f"{len(loose)} images beside them, e.g. {loose[0]}" if loose else f"{len(classes)} of them"
        raise DataError(f"expected one sub-folder of images per class in {root}, found {found}")
    number = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([number[path.parent.name] for path in files])
    return files_set(folder.name, files, labels, classes, bands=bands, order=order)


def list_images(folder: Path) -> list[Path]:
    """Sorted image files below a folder.

    Raises:
        DataError: there are none.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"no image found in {folder}; expected files named *{', *'.join(SUFFIXES)}")
    return files


def files_set(
    name: str,
    files: Sequence[Path],
    labels: Tensor,
    classes: Sequence[str],
    *,
    bands: Sequence[str] | None = None,
    order: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
) -> ImageSet:
    """Images that are files.

    Args:
        name: for tables.
        files: of the images.
        labels: [N] int64 or [N, K] bool.
        classes: names of the K classes.
        bands: of rasters, in this order.
        order: of the bands in the files, where these do not name them.
        parts: of the set's own split.
    """
    paths = list(files)
    wanted = None if bands is None else tuple(bands)
    states = ((path.resolve(), path.stat()) for path in paths)
    stamp = hashlib.sha256(repr([(str(p), s.st_size, s.st_mtime_ns) for p, s in states]).encode())
    stamp.update(repr((wanted, None if order is None else tuple(order))).encode())
    is_rgb = wanted is None and all(path.suffix.lower() in IMAGE_SUFFIXES for path in paths)
    return ImageSet(
        name,
        tuple(path.name for path in paths),
        labels,
        tuple(classes),
        lambda i: read_image(paths[i], wanted, order=order),
        bands=RGB if is_rgb else wanted,
        parts=None if parts is None else tuple(parts),
        stamp=stamp.hexdigest(),
    )


def read_image(
    path: Path, bands: Sequence[str] | None = None, *, order: Sequence[str] | None = None
) -> Tensor:
    """An image as numbers, [C, H, W] in the file's dtype; pixels without data are 0 or the nodata number.

    Args:
        path: JPEG, PNG or raster, with or without a georeference.
        bands: names to read in this order. Where a raster names no bands, it must have just as many, and
            they are taken to stand in this order; one that names others is refused. None for all.
        order: of the bands in a raster that describes none of them, e.g. that of its sensor; it wins over
            the file's colours, alpha included.

    Raises:
        RasterError: no such file, or damaged.
        DataError: bands that the file does not have.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if bands is not None and tuple(bands) != RGB:
            raise DataError(f"{path} is a picture of red, green, blue, asked for {', '.join(bands)}")
        return torch.from_numpy(np.array(decode_image(path))).permute(2, 0, 1)
    try:
        with SceneReader(path) as reader:
            chosen = None if bands is None else _positions(path, reader, bands, order)
            if chosen is not None and chosen != reader.bands:
                with SceneReader(reader.info, bands=chosen) as other:
                    return _whole(other)
            return _whole(reader)
    except GeoreferenceError:
        return _read_plain(path, bands, order)


def _positions(
    path: Path, reader: SceneReader, bands: Sequence[str], order: Sequence[str] | None
) -> tuple[int, ...]:
    found = None if order is None else ordered_bands(reader.info, bands, order)
    found = found or find_bands(reader.info, bands)
    if found is not None:
        return found
    described = described_bands(reader.info, bands)
    if any(described) or len(reader.bands) != len(bands):
        raise _other_bands(path, described if any(described) else [""] * len(reader.bands), bands)
    return reader.bands


def _whole(reader: SceneReader) -> Tensor:
    height, width = reader.info.grid.shape_hw
    numbers, _ = reader.read(Window(0, 0, width, height))
    return as_tensor(numbers)


def _read_plain(path: Path, bands: Sequence[str] | None, order: Sequence[str] | None) -> Tensor:
    """A raster without a georeference: image tiles of benchmarks often have none."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as opened:
                texts = opened.descriptions
                chosen = None if bands is None else _plain_positions(path, texts, bands, order)
                return as_tensor(opened.read(chosen))
    except RasterioError as error:
        raise RasterError(f"cannot read {path}: damaged or truncated ({error})") from error


def _plain_positions(
    path: Path, descriptions: Sequence[str | None], bands: Sequence[str], order: Sequence[str] | None
) -> list[int]:
    names = name_bands(descriptions, bands)
    if order is not None and not any(names):
        return list(find_in_order(path, len(names), bands, order))
    if all(name.lower() in names for name in bands):
        return [names.index(name.lower()) + 1 for name in bands]
    if any(names) or len(bands) != len(names):
        raise _other_bands(path, names, bands)
    return list(range(1, len(names) + 1))


def _other_bands(path: Path, names: Sequence[str], wanted: Sequence[str]) -> DataError:
    listed = ", ".join(name or "unnamed" for name in names)
    return DataError(
        f"{path} has {len(names)} bands ({listed}), expected {len(wanted)}: {', '.join(wanted)}; "
        "name or reorder them"
    )


def as_tensor(numbers: NDArray[np.generic]) -> Tensor:
    """A tensor of the numbers; types that torch computes nothing with become float32."""
    if numbers.dtype in (np.uint8, np.int16, np.float32):
        return torch.from_numpy(np.ascontiguousarray(numbers))
    return torch.from_numpy(numbers.astype(np.float32))


def resize_image(numbers: Tensor, size: int | None, *, crop_from: int | None = None) -> Tensor:
    """An image at the size that an encoder wants, [C, size, size] float32.

    Args:
        numbers: [C, H, W].
        size: side in pixels; None leaves the image as it is.
        crop_from: the shorter side is made this long and the middle is cut out, as for photographs; None
            resizes the whole image, as for chips seen from above.

    Raises:
        ValueError: a crop larger than what it is cut from.
    """
    image = numbers.float()
    if size is None or image.shape[-2:] == (size, size):
        return image
    height, width = image.shape[-2:]
    if crop_from is None:
        return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
    if crop_from < size:
        raise ValueError(f"cannot cut {size} pixels out of {crop_from}")
    scale = crop_from / min(height, width)
    larger = round(height * scale), round(width * scale)
    image = F.interpolate(image[None], larger, mode="bilinear", antialias=True)[0]
    top, left = (larger[0] - size) // 2, (larger[1] - size) // 2
    return image[:, top : top + size, left : left + size]


def find_class(name: str, classes: Sequence[str], *, where: str) -> int:
    """The number of a class.

    Raises:
        UnknownNameError: the configuration names no such class.
    """
    if name not in classes:
        raise UnknownNameError(f"class in {where}", name, classes)
    return list(classes).index(name)
