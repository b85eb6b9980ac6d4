"""Where the labelled images of a benchmark come from, as a configuration says it."""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dinov3geo.backbones.card import Normalization
from dinov3geo.errors import ConfigError, DataError, RasterError, UnknownNameError
from dinov3geo.evaluation.image_sets import (
    TEST,
    TRAIN,
    VALIDATION,
    ImageSet,
    Indexes,
    Readable,
    as_tensor,
    class_folders,
    files_set,
)
from dinov3geo.rasters.sensors import get_sensor

_PARTS = {"train": TRAIN, "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "test": TEST}
_MEASURED_IMAGES = 500


class TableSource(BaseModel):
    """A table of files: JSON (a list of objects) or CSV, in the folder of the images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="of the table, relative to the root")
    image: str = Field("file", description="column of the images' names, relative to the root")
    label: str = Field("label", description="column of the class, or of a list of classes")
    separator: str = Field(";", min_length=1, description="between several classes in a CSV cell")
    split: str | None = Field(None, description="column that says train, validation or test")
    where: Mapping[str, str] = Field(default_factory=dict, description="columns that must hold a value")
    several: bool = Field(False, description="whether an image may have several classes")


class Source(BaseModel):
    """Labelled images; give one of folder, table and torchgeo."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path = Field(description="folder of the images, or torchgeo's root")
    kind: Literal["folder", "table", "torchgeo"] = "folder"
    table: TableSource | None = None
    dataset: str | None = Field(None, description="class in torchgeo.datasets")
    arguments: Mapping[str, Any] = Field(default_factory=dict, description="of the class, beside root")
    splits: Mapping[str, str] = Field(
        default_factory=lambda: {"train": "train", "val": "val", "test": "test"},
        description="our parts and torchgeo's names for them",
    )
    classes: tuple[str, ...] | None = Field(None, description="names, in the order of the numbers")
    sensor: str | None = Field(None, description="name or YAML file: bands of the files and statistics")
    bands: tuple[str, ...] | None = Field(None, description="to use, of the sensor's or the files'")
    statistics: Literal["sensor", "train"] = "sensor"
    per_class: int | None = Field(None, ge=1)


def load_source(source: Source, *, name: str) -> ImageSet:
    """The images of a source.

    Args:
        source: as configured.
        name: for tables.

    Raises:
        UserError: a folder, table, class or band that cannot be used.
    """
    order = None if source.sensor is None else get_sensor(source.sensor).band_names
    bands = source.bands or order
    if order is not None and bands is not None:
        get_sensor(source.sensor or "").select(bands)
    if source.kind == "table":
        images = _from_table(source, name, bands, order)
    elif source.kind == "torchgeo":
        images = _from_torchgeo(source, name, bands)
    else:
        images = class_folders(source.root, bands=bands, order=order)
    return images.limit(source.per_class)


def measure(images: Readable, indexes: Indexes, bands: Sequence[str] | None) -> Normalization:
    """Mean and deviation of each band over training images.

    Args:
        images: to look at.
        indexes: of the training images, of which at most 500 are read.
        bands: names; "band1", ... where nothing is known of them.
    """
    step = max(1, len(indexes) // _MEASURED_IMAGES)
    count = 0.0
    total = square = torch.zeros(1, dtype=torch.float64)
    for index in indexes[::step]:
        pixels = images.read(int(index)).double().flatten(1)
        total, square = total + pixels.sum(1), square + pixels.square().sum(1)
        count += pixels.shape[1]
    mean = total / count
    deviation = (square / count - mean.square()).clamp_min(0).sqrt()
    names = tuple(bands or (f"band{k + 1}" for k in range(len(mean))))
    ones, zeros = (1.0,) * len(names), (0.0,) * len(names)
    spread = tuple(float(d) if d > 0 else 1.0 for d in deviation)
    return Normalization(names, ones, zeros, tuple(map(float, mean)), spread)


def _from_table(
    source: Source, name: str, bands: Sequence[str] | None, order: Sequence[str] | None
) -> ImageSet:
    table = source.table
    if table is None:
        raise ConfigError("a source of kind table needs the key table: {file: ..., label: ...}")
    path = source.root / table.file
    rows = [row for row in _read_table(path) if all(str(row.get(k)) == v for k, v in table.where.items())]
    for column in (table.image, table.label, *([table.split] if table.split else [])):
        if rows and column not in rows[0]:
            raise UnknownNameError(f"column of {path}", column, rows[0])
    if not rows:
        raise DataError(f"{path} has no row where {dict(table.where)}")
    found = [_names(row[table.label], table) for row in rows]
    classes = source.classes or tuple(sorted({name for names in found for name in names}))
    for names in found:
        for label in names:
            if label not in classes:
                raise UnknownNameError(f"class in {path}", label, classes)
    files = [source.root / str(row[table.image]) for row in rows]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise RasterError(f"{path} names {len(missing)} files that do not exist, e.g. {missing[0]}")
    parts = None if table.split is None else [part_name(str(row[table.split]), path) for row in rows]
    return files_set(
        name,
        files,
        _labels(found, classes, table.several, path),
        classes,
        bands=bands,
        order=order,
        parts=parts,
    )


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RasterError(f"cannot read the table {path}: {error.strerror or error}") from error
    if path.suffix.lower() == ".csv":
        return list(csv.DictReader(text.splitlines()))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is neither CSV nor JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects, one per image")
    return rows


def _names(cell: object, table: TableSource) -> list[str]:
    if isinstance(cell, list):
        names = [str(name) for name in cell]
    else:
        names = [part.strip() for part in str(cell).split(table.separator)] if table.several else [str(cell)]
    # Where one class is wanted of a list, the first one counts: lists run from the commonest.
    return names if table.several else names[:1]


def _labels(found: Sequence[Sequence[str]], classes: Sequence[str], several: bool, path: Path) -> Tensor:
    number = {name: k for k, name in enumerate(classes)}
    if several:
        labels = torch.zeros(len(found), len(classes), dtype=torch.bool)
        for row, names in enumerate(found):
            for name in names:
                labels[row, number[name]] = True
        return labels
    if any(not names for names in found):
        raise DataError(f"{path}: an image has no class")
    return torch.tensor([number[names[0]] for names in found])


def part_name(text: str, where: object) -> str:
    """Our name of a part: train, val or test.

    Raises:
        UnknownNameError: another word.
    """
    if text.lower() not in _PARTS:
        raise UnknownNameError(f"part in {where}", text, _PARTS)
    return _PARTS[text.lower()]


def open_torchgeo(
    dataset: str | None, root: Path, splits: Mapping[str, str], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Torchgeo's data sets of each part.

    Args:
        dataset: class in `torchgeo.datasets`.
        root: where its files are.
        splits: our parts and torchgeo's names for them.
        arguments: further ones of the class.

    Raises:
        UnknownNameError: no such class.
        DataError: its files are not there.
        ConfigError: it takes other arguments.
    """
    import torchgeo.datasets

    made: Any = getattr(torchgeo.datasets, dataset or "", None)
    if not inspect.isclass(made):
        valid = [n for n in torchgeo.datasets.__all__ if inspect.isclass(getattr(torchgeo.datasets, n))]
        raise UnknownNameError("torchgeo data set", str(dataset), valid)
    make = cast(Callable[..., Any], made)
    sets: dict[str, Any] = {}
    for part, their_name in splits.items():
        try:
            sets[part] = make(root=root, split=their_name, **arguments)
        except (torchgeo.datasets.DatasetNotFoundError, OSError) as error:
            raise DataError(f"torchgeo's {dataset} is not in {root}: {error}") from error
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"torchgeo's {dataset} cannot be opened so: {error}") from error
    return sets


def _from_torchgeo(source: Source, name: str, bands: Sequence[str] | None) -> ImageSet:
    opened = open_torchgeo(source.dataset, source.root, source.splits, source.arguments)
    sets = list(opened.values())
    parts = [part_name(part, source.root) for part, found in opened.items() for _ in range(len(found))]
    places = [(number, index) for number, found in enumerate(sets) for index in range(len(found))]
    labels = torch.stack([torch.as_tensor(_label(sets[n][i], source)) for n, i in places])
    labels = labels.bool() if labels.ndim == 2 else labels.long()
    count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    classes = source.classes or tuple(map(str, getattr(sets[0], "classes", range(count))))
    if len(classes) < count:
        raise DataError(f"{name} has {count} classes, but {len(classes)} names are given")

    def read(index: int) -> Tensor:
        number, place = places[index]
        image = sets[number][place]["image"]
        return as_tensor(image.numpy()) if image.dtype != torch.uint8 else image

    stamp = repr((source.model_dump(mode="json"), len(places), str(source.root.resolve())))
    return ImageSet(
        name,
        tuple(f"{parts[k]}/{k}" for k in range(len(places))),
        labels,
        classes,
        read,
        bands=None if bands is None else tuple(bands),
        parts=tuple(parts),
        stamp=hashlib.sha256(stamp.encode()).hexdigest(),
    )


def _label(sample: Mapping[str, Any], source: Source) -> Any:  # noqa: ANN401 (a tensor or a number)
    if "label" not in sample:
        raise DataError(
            f"torchgeo's {source.dataset} gives {', '.join(sample)}, no label; whole-image classes are needed"
        )
    return sample["label"]
