"""Decoded blocks of rasters, kept in a number of bytes that is never exceeded.

Neighbouring chips touch the same blocks. GDAL keeps decoded blocks as well, but hands them out band by band
through a lock; copying windows out of whole blocks of all bands is several times faster.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = NDArray[np.bool_]
# Numbers [C, h, w] and the mask [h, w], or None where every pixel holds data.
Block = tuple[Array, Mask | None]

DEFAULT_LIMIT_BYTES = 512 * 2**20
# Strips and small blocks are read in groups of at least so many pixels each way.
_SMALLEST_SIDE = 256
# A block larger than this share of the limit would push out everything else.
_LARGEST_SHARE = 0.25


class BlockCache:
    """The blocks used last; those used longest ago make room. One per process; not for several threads."""

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        """Starts empty.

        Args:
            limit_bytes: of all blocks together; 0 keeps none.
        """
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._blocks: OrderedDict[Hashable, Block] = OrderedDict()
        self._numbers: dict[Hashable, int] = {}

    def get(self, key: Hashable) -> Block | None:
        """The block of a key, if it is there."""
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def put(self, key: Hashable, block: Block) -> None:
        """Keeps a block, which nobody may write to from now on."""
        size = _size(block)
        self._make_room(self.limit_bytes - size)
        if size <= self.limit_bytes:
            self._blocks[key] = block
            self.used_bytes += size

    def number(self, identity: Hashable) -> int:
        """A short name for what blocks belong to, e.g. a file and its bands: numbers hash faster."""
        return self._numbers.setdefault(identity, len(self._numbers))

    def clear(self) -> None:
        """Forgets every block."""
        self._make_room(0)

    def _make_room(self, wanted_bytes: int) -> None:
        while self._blocks and self.used_bytes > wanted_bytes:
            self.used_bytes -= _size(self._blocks.popitem(last=False)[1])


#: The cache of this process.
BLOCKS = BlockCache()


def block_side(length: int, block: int) -> int:
    """Side of the squares that are kept: whole blocks of the file, at least some hundred pixels.

    Args:
        length: of the raster along the axis.
        block: of the file's own blocks along it.
    """
    return min(block * max(1, -(-_SMALLEST_SIDE // block)), length)


def worth_keeping(side_hw: tuple[int, int], bytes_per_pixel: int, cache: BlockCache) -> bool:
    """Whether blocks of this size fit a cache several times over."""
    return math.prod(side_hw) * bytes_per_pixel <= _LARGEST_SHARE * cache.limit_bytes


def read_through(
    top: int,
    left: int,
    size_hw: tuple[int, int],
    side_hw: tuple[int, int],
    block: Callable[[int, int], Block],
) -> Block:
    """Puts a window together from the blocks it touches.

    Args:
        top: first row of the window, which lies inside the raster.
        left: first column.
        size_hw: rows and columns of the window.
        side_hw: of the blocks.
        block: gives the block of a row and column of blocks.

    Returns:
        Numbers [C, h, w], the caller's own, and mask [h, w] or None.
    """
    (height, width), (side_h, side_w) = size_hw, side_hw
    bottom, right = top + height, left + width
    numbers: Array | None = None
    valid: Mask | None = None
    for i in range(top // side_h, (bottom - 1) // side_h + 1):
        row = i * side_h
        row0, row1 = max(top, row), min(bottom, row + side_h)
        to_rows, from_rows = slice(row0 - top, row1 - top), slice(row0 - row, row1 - row)
        for j in range(left // side_w, (right - 1) // side_w + 1):
            col = j * side_w
            col0, col1 = max(left, col), min(right, col + side_w)
            part, part_valid = block(i, j)
            if numbers is None:
                numbers = np.empty((len(part), height, width), dtype=part.dtype)
            numbers[:, to_rows, col0 - left : col1 - left] = part[:, from_rows, col0 - col : col1 - col]
            if part_valid is not None:
                valid = np.ones((height, width), dtype=np.bool_) if valid is None else valid
                valid[to_rows, col0 - left : col1 - left] = part_valid[from_rows, col0 - col : col1 - col]
    assert numbers is not None
    return numbers, valid


def _size(block: Block) -> int:
    numbers, valid = block
    return numbers.nbytes + (0 if valid is None else valid.nbytes)
