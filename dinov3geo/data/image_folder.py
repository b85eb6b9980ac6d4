"""Folders of ordinary images, cut to chips of one size."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dinov3geo.data.indexed import IndexedChips
from dinov3geo.errors import DataError, RasterError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_HASH_VALUES = 2**64


class ImageFolder(IndexedChips):
    """All JPEG and PNG files below a folder, hidden ones left out.

    A sample has `image` [3, S, S] uint8 and `valid` [S, S] bool (all True), so that images go through the
    same crops as scenes; with `labels` also `label` [] int64, the position of its folder's name in `classes`.

    Attributes:
        files: sorted paths.
        classes: sorted names of the folders that directly hold images.
    """

    noun = "images"

    def __init__(
        self, root: str | Path, *, chip_size: int, labels: bool = False, hold_out: float = 0.0
    ) -> None:
        """Lists the files.

        Args:
            root: folder, searched recursively.
            chip_size: side S of the samples in pixels: the shorter side of an image is resized to it
                (antialiased), the longer one cut about the centre.
            labels: whether samples have a label.
            hold_out: share of the images that is left out, see `hash_share`: the test part of evaluations
                that split by file name.

        Raises:
            RasterError: no such folder.
            DataError: no image in it, or a chip without pixels.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise RasterError(f"no such folder: {root}")
        if chip_size < 1:
            raise DataError(f"a chip needs at least 1 pixel, got chip_size {chip_size}")
        # Follows links to folders and skips hidden names.
        below = map(Path, glob.iglob(f"{glob.escape(str(self.root))}/**/*", recursive=True))
        self.files = sorted(p for p in below if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not self.files:
            raise DataError(f"no image found in {root}; expected files named *{', *'.join(IMAGE_SUFFIXES)}")
        self.files = [path for path in self.files if hash_share(path.name) >= hold_out]
        if not self.files:
            raise DataError(f"hold_out {hold_out:g} leaves no image of {root}; lower it or add images")
        self.classes = sorted({path.parent.name for path in self.files})
        self._class_indexes = {name: index for index, name in enumerate(self.classes)}
        self._chip_size = chip_size
        self._labels = labels

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    @property
    def band_count(self) -> int:
        """Red, green and blue."""
        return 3

    def place(self, index: int) -> str:
        """The file."""
        return str(self.files[index])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Reads one image.

        Raises:
            DataError: the file is damaged or no image.
        """
        path = self.files[index]
        image = torch.from_numpy(fit_image(decode_image(path), self._chip_size)).permute(2, 0, 1)
        sample = {"image": image, "valid": torch.ones(image.shape[1:], dtype=torch.bool)}
        if self._labels:
            sample["label"] = torch.tensor(self._class_indexes[path.parent.name])
        return sample


def hash_share(name: str, *, salt: str = "") -> float:
    """A number in [0, 1) that depends on the name alone, the same on every machine."""
    digest = hashlib.sha256(f"{salt}{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / _HASH_VALUES


def decode_image(source: Path | IO[bytes], name: str | None = None) -> Image.Image:
    """The image upright in 8-bit RGB.

    Args:
        source: file, or its bytes.
        name: for messages; the path if None.

    Raises:
        DataError: it is damaged or no image.
    """
    try:
        with Image.open(source) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):
                # Pillow clips 16-bit numbers instead of scaling them.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{name or source} cannot be decoded as JPEG or PNG: {error}") from error


def fit_image(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resizes the shorter side to `size` and cuts the longer one about the centre, [S, S, 3]."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.array(image)
