"""Lays out cloud-optimised GeoTIFFs from blocks that are compressed already.

GDAL compresses strips of a raster (each a small TIFF file of its own) and encodes the tags of the whole one
in a template without pixels. Here the bytes of the blocks are put together with these tags: nothing is
decoded or compressed a second time, so finishing a raster costs no more than copying it.

Layout: header, GDAL's structural metadata, the directories from full resolution to the coarsest overview,
then the blocks, the coarsest overview first (TIFF 6.0; BigTIFF; GDAL's driver "COG").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

# Format codes of the field types 1-18 (TIFF 6.0, section 2; BigTIFF adds 16-18).
_CODES = " BsHI8bBhi8fdIxxQqQ"
_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
_LONG, _LONG8 = 4, 16

_SUBFILE, _WIDTH, _HEIGHT, _OFFSETS, _SIZES_TAG = 254, 256, 257, 324, 325
_SAMPLES, _PLANAR = 277, 284
# What an overview needs of the template: how its blocks are encoded, colours and nodata.
_OVERVIEW_TAGS = frozenset({258, 259, 262, 277, 284, 317, 320, 322, 323, 338, 339, 42113})
_ENCODING_TAGS = _OVERVIEW_TAGS - {262, 320, 42113}
# A classic TIFF counts to 4 GiB; this much is left for its directories.
_CLASSIC_LIMIT = 2**32 - 2**26
# Each block stands between its size and a repetition of its last bytes, as GDAL writes COGs: a reader over a
# network then needs no table of sizes and notices blocks that another program has replaced.
_STRUCTURE = (
    b"LAYOUT=IFDS_BEFORE_DATA\nBLOCK_ORDER=ROW_MAJOR\nBLOCK_LEADER=SIZE_AS_UINT4\n"
    b"BLOCK_TRAILER=LAST_4_BYTES_REPEATED\n%sKNOWN_INCOMPATIBLE_EDITION=NO\n "
)
_LEADER, _TRAILER = 4, 4


@dataclass(frozen=True, slots=True)
class Tag:
    """One entry of a TIFF directory.

    Attributes:
        number: of the tag.
        kind: field type.
        count: values.
        data: their bytes, little-endian.
    """

    number: int
    kind: int
    count: int
    data: bytes

    def values(self) -> tuple[int, ...]:
        """The values of a tag of whole numbers."""
        return struct.unpack(f"<{self.count}{_CODES[self.kind]}", self.data)


@dataclass(frozen=True, slots=True)
class Level:
    """The full resolution or an overview of a raster.

    Attributes:
        height: rows.
        width: columns.
        strips: TIFF files of one row of blocks each, top to bottom.
    """

    height: int
    width: int
    strips: tuple[Path, ...]


def read_tags(file: BinaryIO) -> dict[int, Tag]:
    """The first directory of a little-endian TIFF, classic or BigTIFF.

    Args:
        file: open for reading.

    Raises:
        ValueError: not such a file.
    """
    header = file.read(16)
    if header[:4] == b"II*\0":
        counter, entry, (start,) = "<H", struct.Struct("<HHI4s"), struct.unpack("<I", header[4:8])
    elif header[:4] == b"II+\0":
        counter, entry, (start,) = "<Q", struct.Struct("<HHQ8s"), struct.unpack("<Q", header[8:16])
    else:
        raise ValueError("not a little-endian TIFF")
    file.seek(start)
    (count,) = struct.unpack(counter, file.read(struct.calcsize(counter)))
    entries = [entry.unpack(file.read(entry.size)) for _ in range(count)]
    tags = {}
    for number, kind, values, inline in entries:
        size, room = _SIZES[kind] * values, len(inline)
        data = inline[:size]
        if size > room:
            file.seek(int.from_bytes(inline, "little"))
            data = file.read(size)
        tags[number] = Tag(number, kind, values, data)
    return tags


def write_cog(target: Path, template: Path, levels: Sequence[Level]) -> None:
    """Writes the raster.

    Args:
        target: file to write.
        template: TIFF without blocks whose tags are those of the full resolution.
        levels: full resolution first, each coarser than the one before.

    Raises:
        OSError: the disk refuses.
        ValueError: template or strips are no TIFF files of one encoding.
    """
    with template.open("rb") as file:
        tags = read_tags(file)
    planes = _planes(tags)
    blocks = [_Blocks.of(level, tags) for level in levels]
    tables = [block.sizes(planes) for block in blocks]
    big = sum(sum(sizes) for sizes in tables) > _CLASSIC_LIMIT
    content = _STRUCTURE % (b"INTERLEAVE=BAND\n" if planes > 1 else b"")
    structure = b"GDAL_STRUCTURAL_METADATA_SIZE=%06d bytes\n" % len(content) + content
    first = (16 if big else 8) + len(structure)
    first += first % 2
    # The size of a directory does not depend on the offsets in it: lay out first, fill in afterwards.
    empty = [[0] * len(sizes) for sizes in tables]
    directories = _directories(tags, levels, empty, tables, first, big=big)
    position = first + sum(map(len, directories))
    offsets: list[list[int]] = [[] for _ in levels]
    for index in reversed(range(len(levels))):
        for size in tables[index]:
            offsets[index].append(position + _LEADER)
            position += _LEADER + size + _TRAILER
    directories = _directories(tags, levels, offsets, tables, first, big=big)
    with target.open("wb") as file:
        header = (
            struct.pack("<2sHHHQ", b"II", 43, 8, 0, first) if big else struct.pack("<2sHI", b"II", 42, first)
        )
        file.write((header + structure).ljust(first, b"\0"))
        file.writelines(directories)
        for block in reversed(blocks):
            for plane in range(planes):
                block.copy(plane, planes, file)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Where the blocks of a level lie in its strips.

    Attributes:
        strips: the files.
        tables: per strip the offset and size of each block, plane by plane.
    """

    strips: tuple[Path, ...]
    tables: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, level: Level, template: dict[int, Tag]) -> Self:
        """Reads the tables; raises `ValueError` for a strip of another encoding."""
        tables = []
        for strip in level.strips:
            with strip.open("rb") as file:
                tags = read_tags(file)
            if any(tags[n].data != template[n].data for n in _ENCODING_TAGS & tags.keys()):
                raise ValueError(f"{strip} is encoded in another way than the raster")
            tables.append(tuple(zip(tags[_OFFSETS].values(), tags[_SIZES_TAG].values(), strict=True)))
        return cls(level.strips, tuple(tables))

    def of_plane(self, plane: int, planes: int) -> Iterator[tuple[Path, tuple[tuple[int, int], ...]]]:
        """Strips with their blocks of one plane."""
        for strip, table in zip(self.strips, self.tables, strict=True):
            across = len(table) // planes
            yield strip, table[plane * across : (plane + 1) * across]

    def sizes(self, planes: int) -> list[int]:
        """Bytes of each block in the order of the final table: planes, rows, columns."""
        rows = (row for plane in range(planes) for _, row in self.of_plane(plane, planes))
        return [size for row in rows for _, size in row]

    def copy(self, plane: int, planes: int, target: BinaryIO) -> None:
        """Appends the blocks of a plane."""
        for strip, row in self.of_plane(plane, planes):
            with strip.open("rb") as file:
                for offset, size in row:
                    file.seek(offset)
                    block = file.read(size)
                    target.write(struct.pack("<I", size) + block + block[-_TRAILER:])


def _planes(tags: dict[int, Tag]) -> int:
    """Blocks that lie at one place: one per band if bands are stored apart."""
    return tags[_SAMPLES].values()[0] if tags[_PLANAR].values()[0] == 2 else 1


def _directories(
    tags: dict[int, Tag],
    levels: Sequence[Level],
    offsets: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
    first: int,
    *,
    big: bool,
) -> list[bytes]:
    """All directories with their values, chained; the first one lies at `first`."""
    found = []
    position = first
    for index, level in enumerate(levels):
        own = _level_tags(tags, level, offsets[index], sizes[index], overview=index > 0, big=big)
        directory = _directory(own, position, last=index == len(levels) - 1, big=big)
        position += len(directory)
        found.append(directory)
    return found


def _level_tags(
    tags: dict[int, Tag],
    level: Level,
    offsets: Sequence[int],
    sizes: Sequence[int],
    *,
    overview: bool,
    big: bool,
) -> list[Tag]:
    """Entries of one directory, ascending."""
    kept = {n: tag for n, tag in tags.items() if not overview or n in _OVERVIEW_TAGS}
    kept[_WIDTH] = _whole(_WIDTH, [level.width])
    kept[_HEIGHT] = _whole(_HEIGHT, [level.height])
    kept[_OFFSETS] = _whole(_OFFSETS, offsets, big=big)
    kept[_SIZES_TAG] = _whole(_SIZES_TAG, sizes)
    if overview:
        kept[_SUBFILE] = _whole(_SUBFILE, [1])
    return [kept[number] for number in sorted(kept)]


def _whole(number: int, values: Sequence[int], *, big: bool = False) -> Tag:
    code, kind = ("Q", _LONG8) if big else ("I", _LONG)
    return Tag(number, kind, len(values), struct.pack(f"<{len(values)}{code}", *values))


def _directory(tags: Sequence[Tag], position: int, *, last: bool, big: bool) -> bytes:
    """One directory at a position of the file, followed by the values that do not fit into it."""
    counter, pointer, room = ("<Q", "<Q", 8) if big else ("<H", "<I", 4)
    entry = struct.Struct("<HHQ8s" if big else "<HHI4s")
    after = position + struct.calcsize(counter) + entry.size * len(tags) + room
    entries, values = [], []
    for tag, place in zip(tags, _value_places(tags, after, room), strict=True):
        inline = tag.data if place is None else struct.pack(pointer, place)
        entries.append(entry.pack(tag.number, tag.kind, tag.count, inline.ljust(room, b"\0")))
        if place is not None:
            values.append(tag.data + b"\0" * (len(tag.data) % 2))
    body = b"".join(values)
    end = after + len(body)
    chain = struct.pack(pointer, 0 if last else end)
    return struct.pack(counter, len(tags)) + b"".join(entries) + chain + body


def _value_places(tags: Sequence[Tag], start: int, room: int) -> Iterator[int | None]:
    """Where the values of each tag lie, None if within the entry."""
    for tag in tags:
        if len(tag.data) <= room:
            yield None
        else:
            yield start
            start += len(tag.data) + len(tag.data) % 2
