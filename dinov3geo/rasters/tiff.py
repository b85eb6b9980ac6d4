"""Finds TIFF files whose end is missing, from their directories alone: nothing is decoded.

GDAL opens a file that has lost its end. If the last bytes held tags it even forgets the georeference without
an error, and a user would look for a CRS where a copy was broken off.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rasterio.io import DatasetReader

# Bytes per value of the field types 1-18 (TIFF 6.0, section 2; BigTIFF adds 16-18).
_TYPE_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
# A loop of directories would never end.
_MAX_DIRECTORIES = 256


def missing_bytes(path: Path, dataset: DatasetReader) -> int:
    """How many bytes a TIFF's tags and last block reach beyond the end of the file, at least; 0 if none."""
    if dataset.driver not in ("GTiff", "COG"):
        return 0
    with path.open("rb") as file:
        needed = max([_block_end(dataset), *_tag_ends(file)])
    return max(needed - path.stat().st_size, 0)


def _block_end(dataset: DatasetReader) -> int:
    """Where the lower right block of the last band ends; 0 if it was never written (a sparse file)."""
    block_height, block_width = dataset.block_shapes[-1]
    x, y = (dataset.width - 1) // block_width, (dataset.height - 1) // block_height
    offset, size = (
        dataset.get_tag_item(f"BLOCK_{what}_{x}_{y}", "TIFF", bidx=dataset.count)
        for what in ("OFFSET", "SIZE")
    )
    return 0 if offset is None or size is None else int(offset) + int(size)


def _tag_ends(file: BinaryIO) -> Iterator[int]:
    """Yields where the values of each tag of each directory end."""
    header = file.read(16)
    order = "<" if header[:2] == b"II" else ">"
    if struct.unpack(f"{order}H", header[2:4])[0] == 43:
        count_code, pointer_code, start = "Q", "Q", header[8:16]
    else:
        count_code, pointer_code, start = "H", "I", header[4:8]
    pointer_size = struct.calcsize(pointer_code)
    entry = struct.Struct(f"{order}HH{pointer_code}{pointer_size}s")
    (directory,) = struct.unpack(f"{order}{pointer_code}", start)
    for _ in range(_MAX_DIRECTORIES):
        if directory == 0:
            return
        file.seek(directory)
        count_bytes = file.read(struct.calcsize(count_code))
        end = directory + len(count_bytes)
        if len(count_bytes) == struct.calcsize(count_code):
            end += struct.unpack(f"{order}{count_code}", count_bytes)[0] * entry.size
        entries = file.read(max(end - file.tell(), 0))
        pointer = file.read(pointer_size)
        if len(pointer) < pointer_size:
            yield end + pointer_size
            return
        for _, kind, count, value in entry.iter_unpack(entries):
            size = count * (_TYPE_SIZES[kind] if kind < len(_TYPE_SIZES) else 0)
            if size > pointer_size:
                yield struct.unpack(f"{order}{pointer_code}", value)[0] + size
        (directory,) = struct.unpack(f"{order}{pointer_code}", pointer)
