"""Images with a class or a quantity per pixel, wherever they come from, one interface for all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from dinov3geo.data.areas import read_polygons
from dinov3geo.data.image_folder import hash_share
from dinov3geo.data.labels import ClassScheme, load_label_pair
from dinov3geo.data.pairs import RasterPair, load_number_pair, match_pairs
from dinov3geo.errors import ConfigError, DataError, RasterError, UnknownNameError
from dinov3geo.evaluation.image_sets import as_tensor, read_image
from dinov3geo.evaluation.sources import open_torchgeo, part_name
from dinov3geo.heads.samples import cell_validity
from dinov3geo.rasters.bands import RGB, choose_bands
from dinov3geo.rasters.reader import RASTER_SUFFIXES
from dinov3geo.rasters.sensors import get_sensor

STEM = r"([^/]+)\.[^./]+$"
_READS = "benchmark"

Specs = str | tuple[str, ...]


class FolderPart(BaseModel):
    """Files of one part of a set: globs relative to the root."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: Specs
    targets: Specs


class Regions(BaseModel):
    """Polygons that say to which part a place belongs; windows whose centre lies in none are left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="anything that GDAL reads, relative to the root")
    column: str = "split"
    parts: Mapping[str, str] = Field(
        default_factory=lambda: {"train": "train", "val": "val", "test": "test"},
        description="our parts and the column's words for them",
    )


class Quantity(BaseModel):
    """What stored numbers mean: number x scale, valid where it lies in [minimum, maximum]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: str = "m"
    scale: float = Field(1.0, gt=0, description="e.g. 0.001 for millimetres in a PNG of 16 bits")
    nodata: tuple[float, ...] = Field((), description="stored numbers that say nothing")
    minimum: float = 0.0
    maximum: float = Field(description="the largest value that is meant, e.g. 10 m for indoor depth")
    slack: float = Field(0.0, ge=0, description="values so far below the minimum are noise and become it")

    @model_validator(mode="after")
    def _has_a_range(self) -> Quantity:
        if self.minimum >= self.maximum:
            raise ValueError(f"minimum {self.minimum:g} must be below maximum {self.maximum:g}")
        return self


class DenseSource(BaseModel):
    """Where images and their masks (`classes`) or maps of a quantity (`quantity`) are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path = Field(description="folder that everything else is relative to, or torchgeo's root")
    kind: Literal["pairs", "folder", "torchgeo"] = Field(
        "folder", description="matched by georeference, by file name, or a data set of torchgeo"
    )
    images: Specs = Field("image", description="of pairs: folders or globs")
    targets: Specs = Field("mask", description="of pairs: folders or globs")
    regions: Regions | None = Field(None, description="of pairs: which place belongs to which part")
    parts: Mapping[str, FolderPart] = Field(
        default_factory=dict, description="of folders: train, val, test; `all` is split by a hash"
    )
    image_key: str = Field(STEM, description="regular expression whose groups name an image")
    target_key: str = Field(STEM, description="likewise of its mask; equal names belong together")
    dataset: str | None = Field(None, description="class in torchgeo.datasets")
    arguments: Mapping[str, Any] = Field(default_factory=dict, description="of the class, beside root")
    splits: Mapping[str, str] = Field(
        default_factory=lambda: {"train": "train", "val": "val", "test": "test"},
        description="our parts and torchgeo's names for them",
    )
    target_name: str = Field("mask", description="key of torchgeo's samples")
    classes: ClassScheme | None = None
    quantity: Quantity | None = None
    sensor: str | None = Field(None, description="name or YAML file: bands of the files and statistics")
    bands: tuple[str, ...] | None = Field(None, description="to use, of the sensor's or the files'")
    statistics: Literal["sensor", "train"] = "sensor"
    limit: int | None = Field(None, ge=1, description="images of each part, by a hash of their names")

    @model_validator(mode="after")
    def _one_meaning(self) -> DenseSource:
        if (self.classes is None) == (self.quantity is None):
            raise ValueError("give either classes or quantity: what the numbers of the targets mean")
        return self


@dataclass(frozen=True, slots=True)
class DenseImage:
    """One image with its targets.

    Attributes:
        image: [C, H, W] in the file's own numbers.
        valid: [H, W] bool, where the image holds data.
        target: [H / k, W / k] uint8 classes or float32 quantity.
        known: [H / k, W / k] bool, where the target counts.
        factor: k, pixels per target cell.
    """

    image: Tensor
    valid: Tensor
    target: Tensor
    known: Tensor
    factor: int = 1


@dataclass(frozen=True, slots=True)
class DenseSet:
    """Images with targets.

    Attributes:
        name: for tables.
        names: one per image.
        groups: images of one group lie on one place and never on both sides of a split.
        load: gives image i.
        classes: K names, empty for a quantity.
        bands: names of the bands that `load` gives.
        parts: "train", "val" or "test" per image, where the set has its own split.
        stamp: changes when the files do.
    """

    name: str
    names: tuple[str, ...]
    groups: tuple[str, ...]
    load: Callable[[int], DenseImage]
    classes: tuple[str, ...]
    bands: tuple[str, ...]
    parts: tuple[str, ...] | None
    stamp: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def read(self, index: int) -> Tensor:
        """[C, H, W] of image i."""
        return self.load(index).image

    def limit(self, count: int | None) -> DenseSet:
        """At most so many images of each part, those with the smallest hashes of their names."""
        if count is None:
            return self
        order = np.argsort([hash_share(name, salt="limit") for name in self.names], kind="stable")
        parts = np.array(self.parts or ("",) * len(self))
        kept = np.concatenate([order[parts[order] == part][:count] for part in sorted(set(parts))])
        chosen = sorted(int(i) for i in kept)
        load = self.load
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            groups=tuple(self.groups[i] for i in chosen),
            load=lambda i: load(chosen[i]),
            parts=None if self.parts is None else tuple(self.parts[i] for i in chosen),
            stamp=_digest((self.stamp, chosen)),
        )


def load_dense_set(source: DenseSource, *, name: str, max_window: int) -> DenseSet:
    """The images of a source.

    Args:
        source: as configured.
        name: for tables.
        max_window: largest side of a window of a georeferenced pair, pixels.

    Raises:
        UserError: a folder, file, band or class that cannot be used.
    """
    bands = source_bands(source)
    if source.kind == "pairs":
        found = _pairs_set(source, name, bands, max_window)
    elif source.kind == "torchgeo":
        found = _torchgeo_set(source, name, bands)
    else:
        found = _folder_set(source, name, bands)
    return found.limit(source.limit)


def source_bands(source: DenseSource) -> tuple[str, ...]:
    """Names of the bands that are read: those named, else all of the sensor's, else red, green, blue.

    Raises:
        UserError: no such sensor or band.
    """
    if source.sensor is None:
        return source.bands or RGB
    return tuple(band.name for band in get_sensor(source.sensor).select(source.bands))


def decode_target(numbers: NDArray[Any], source: DenseSource, where: object) -> tuple[Tensor, Tensor]:
    """Stored numbers as classes or as a quantity.

    Args:
        numbers: [h, w].
        source: that says what they mean.
        where: named in messages.

    Returns:
        [h, w] uint8 or float32, and [h, w] bool where they count.

    Raises:
        DataError: a number that no class names.
    """
    if source.classes is not None:
        encoded = source.classes.encode(numbers, np.ones(numbers.shape, dtype=bool), where)
        return torch.from_numpy(encoded.classes), torch.from_numpy(encoded.valid)
    quantity = source.quantity
    assert quantity is not None
    values = numbers.astype(np.float32) * np.float32(quantity.scale)
    with np.errstate(invalid="ignore"):
        known = np.isfinite(values) & (values >= quantity.minimum - quantity.slack)
        known &= values <= quantity.maximum
    known &= ~np.isin(numbers, quantity.nodata)
    values = np.where(known, values.clip(min=quantity.minimum), 0).astype(np.float32)
    return torch.from_numpy(values), torch.from_numpy(known)


def read_numbers(path: Path) -> NDArray[Any]:
    """The numbers of a mask or map, [h, w]; a colour picture gives red x 65536 + green x 256 + blue.

    Raises:
        RasterError: no such file, or damaged.
        DataError: not one number per pixel.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            numbers: NDArray[Any] = np.load(path, allow_pickle=False)
        elif suffix in RASTER_SUFFIXES:
            numbers = read_image(path).numpy()
            numbers = numbers[0] if len(numbers) == 1 else numbers
        else:
            with Image.open(path) as opened:
                single = opened.mode in ("P", "L", "1", "F") or opened.mode.startswith("I")
                numbers = np.array(opened if single else opened.convert("RGB"))
            if numbers.ndim == 3:
                numbers = (numbers.astype(np.int64) * np.array([65536, 256, 1])).sum(2)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RasterError(f"cannot read the target {path}: {error}") from error
    if numbers.ndim != 2:
        raise DataError(f"{path} holds numbers of shape {list(numbers.shape)}, expected one per pixel")
    return numbers


def _pairs_set(source: DenseSource, name: str, bands: Sequence[str], max_window: int) -> DenseSet:
    images, targets = (
        [str(source.root / spec) for spec in ((specs,) if isinstance(specs, str) else specs)]
        for specs in (source.images, source.targets)
    )
    what = "height raster" if source.classes is None else "mask"
    pairs = match_pairs(images, targets, max_size=max_window, what=what).pairs
    parts: list[str] | None = None
    if source.regions is not None:
        pairs, parts = _within_regions(pairs, source.root, source.regions)

    def load(index: int) -> DenseImage:
        return _load_raster_pair(pairs[index], source, bands)

    files = {path: path.stat() for pair in pairs for path in (pair.image, pair.target)}
    facts = [(str(p.image), str(p.target), str(p.window)) for p in pairs]
    states = [(str(path), state.st_size, state.st_mtime_ns) for path, state in files.items()]
    names = [f"{p.image.name} {p.window.row_off} {p.window.col_off}" for p in pairs]
    stamp = (parts, facts, states, _meaning(source), tuple(bands))
    return _make_set(source, name, bands, load, names, [p.group for p in pairs], parts, stamp)


def _load_raster_pair(pair: RasterPair, source: DenseSource, bands: Sequence[str]) -> DenseImage:
    chosen, _ = choose_bands(pair.image, bands, model=_READS)
    if source.classes is not None:
        arrays = load_label_pair(pair, source.classes, bands=chosen)
        target, known = torch.from_numpy(arrays.target), arrays.target_valid
    else:
        arrays = load_number_pair(pair, bands=chosen)
        target, meant = decode_target(arrays.target, source, pair.target)
        known = arrays.target_valid & meant.numpy()
    return DenseImage(
        as_tensor(arrays.image),
        torch.from_numpy(arrays.valid),
        target,
        torch.from_numpy(known & cell_validity(arrays, pair.factor)),
        pair.factor,
    )


def _within_regions(
    pairs: Sequence[RasterPair], root: Path, regions: Regions
) -> tuple[tuple[RasterPair, ...], list[str]]:
    """Pairs whose centre lies in a polygon, and the part that it names."""
    path = root / regions.file
    table = read_polygons(path)
    if regions.column not in table:
        raise UnknownNameError(f"column of {path}", regions.column, list(table.columns))
    words = {word: part_name(part, path) for part, word in regions.parts.items()}
    by_crs = {crs: table.to_crs(crs) for crs in {pair.grid.crs.to_wkt() for pair in pairs}}
    kept, parts = [], []
    for pair in pairs:
        own = by_crs[pair.grid.crs.to_wkt()]
        x, y = pair.grid.transform @ (pair.grid.width / 2, pair.grid.height / 2)
        found = own[regions.column][own.contains(shapely.Point(x, y))]
        word = str(found.iloc[0]) if len(found) else ""
        if word in words:
            kept.append(pair)
            parts.append(words[word])
    if not kept:
        raise DataError(
            f"no window of {len(pairs)} has its centre in a region of {path} whose {regions.column} is "
            f"{', '.join(words)}"
        )
    return tuple(kept), parts


def _folder_set(source: DenseSource, name: str, bands: Sequence[str]) -> DenseSet:
    if not source.parts:
        raise ConfigError(
            f"{name}: a source of kind folder needs the key parts: {{train: {{images: GLOB, targets: GLOB}}}}"
        )
    files: list[tuple[Path, Path]] = []
    parts: list[str] = []
    for part, globs in source.parts.items():
        found = match_names(source.root, globs, source.image_key, source.target_key, name=part)
        files += found
        parts += ["" if part == "all" else part_name(part, source.root)] * len(found)
    if "" in parts and set(parts) != {""}:
        raise ConfigError(f"{name}: the part `all` is split by a hash; it cannot stand beside other parts")
    own = None if bands == RGB and source.sensor is None and source.bands is None else tuple(bands)
    order = None if source.sensor is None else get_sensor(source.sensor).band_names

    def load(index: int) -> DenseImage:
        image_file, target_file = files[index]
        if image_file.suffix.lower() in RASTER_SUFFIXES:
            image = read_image(image_file, tuple(bands), order=order)
        else:
            image = read_image(image_file, own, order=order)
        target, known = decode_target(read_numbers(target_file), source, target_file)
        return _whole(image, target, known, image_file)

    states = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for pair in files for p in pair]
    names = [str(image.relative_to(source.root)) for image, _ in files]
    stamp = (states, _meaning(source), tuple(bands))
    return _make_set(source, name, bands, load, names, names, None if "" in parts else parts, stamp)


def match_names(
    root: Path, part: FolderPart, image_key: str, target_key: str, *, name: str, drops_images: bool = False
) -> list[tuple[Path, Path]]:
    """Images with the targets of the same name.

    Args:
        root: that the globs are relative to.
        part: globs.
        image_key: regular expression, searched in the path below the root, whose groups name an image.
        target_key: likewise of a target.
        name: of the part, for messages.
        drops_images: images without a target are left out instead of being an error.

    Raises:
        RasterError: no file.
        DataError: a file without a partner, or two of one name.
        ConfigError: not a regular expression.
    """
    images = _named_files(root, part.images, image_key)
    targets = _named_files(root, part.targets, target_key)
    if drops_images:
        images = {key: path for key, path in images.items() if key in targets}
    for one, other, what in ((images, targets, "target"), (targets, images, "image")):
        alone = sorted(set(one) - set(other))
        if alone:
            raise DataError(
                f"part {name!r} of {root}: {len(alone)} of {len(one)} files have no {what} of the same name, "
                f"e.g. {one[alone[0]].name} ({alone[0]!r}); check images, targets and their keys"
            )
    return [(images[key], targets[key]) for key in sorted(images)]


def _named_files(root: Path, globs: Specs, pattern: str) -> dict[str, Path]:
    try:
        key = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error
    found: dict[str, Path] = {}
    for glob in (globs,) if isinstance(globs, str) else globs:
        for path in sorted(root.glob(glob)):
            match = key.search(path.relative_to(root).as_posix()) if path.is_file() else None
            if match is None:
                continue
            name = "/".join(match.groups()) if key.groups else match.group()
            if name in found:
                raise DataError(
                    f"{found[name]} and {path} have one name ({name!r}); change the key {pattern!r}"
                )
            found[name] = path
    if not found:
        raise RasterError(f"no file of {root} matches {globs!r} and {pattern!r}")
    return found


def _torchgeo_set(source: DenseSource, name: str, bands: Sequence[str]) -> DenseSet:
    sets = open_torchgeo(source.dataset, source.root, source.splits, source.arguments)
    places = [(part, index) for part, opened in sets.items() for index in range(len(opened))]

    def load(index: int) -> DenseImage:
        part, place = places[index]
        sample = cast(Mapping[str, Any], sets[part][place])
        for key in ("image", source.target_name):
            if key not in sample:
                raise UnknownNameError(f"key of torchgeo's {source.dataset}", key, list(sample))
        target, known = decode_target(
            sample[source.target_name].squeeze().numpy(), source, f"{source.dataset} {part} {place}"
        )
        image = sample["image"]
        numbers = image if image.dtype == torch.uint8 else as_tensor(image.numpy())
        return _whole(numbers, target, known, f"{source.dataset} {part} {place}")

    names = [f"{part}/{index}" for part, index in places]
    parts = [part_name(part, source.root) for part, _ in places]
    stamp = (source.model_dump(mode="json"), len(places), str(source.root.resolve()))
    return _make_set(source, name, bands, load, names, names, parts, stamp)


def _make_set(
    source: DenseSource,
    name: str,
    bands: Sequence[str],
    load: Callable[[int], DenseImage],
    names: Sequence[str],
    groups: Sequence[str],
    parts: Sequence[str] | None,
    stamp: object,
) -> DenseSet:
    """A set of what a source holds; see `DenseSet`, `stamp` being whatever changes when the files do."""
    classes = () if source.classes is None else source.classes.names
    own_parts = None if parts is None else tuple(parts)
    return DenseSet(name, tuple(names), tuple(groups), load, classes, tuple(bands), own_parts, _digest(stamp))


def _whole(image: Tensor, target: Tensor, known: Tensor, where: object) -> DenseImage:
    if image.shape[-2:] != target.shape:
        raise DataError(
            f"{where} has {list(image.shape[-2:])} pixels, its target {list(target.shape)}; expected the same"
        )
    return DenseImage(image, torch.ones(target.shape, dtype=torch.bool), target, known)


def _meaning(source: DenseSource) -> tuple[str, str]:
    return repr(source.classes), repr(source.quantity)


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()
