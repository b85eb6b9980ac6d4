"""Boxes of objects in images: CSV as DeepForest has it, COCO's JSON, and XML files as DIOR has them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from dinov3geo.data.image_folder import IMAGE_SUFFIXES, decode_image
from dinov3geo.data.pairs import overlap_groups
from dinov3geo.errors import DataError, RasterError
from dinov3geo.rasters.bands import RGB, choose_bands
from dinov3geo.rasters.reader import RASTER_SUFFIXES, SceneReader, inspect_scene

CSV_COLUMNS = ("image_path", "xmin", "ymin", "xmax", "ymax", "label")
_SIDES = CSV_COLUMNS[1:5]

Row = tuple[str, tuple[float, float, float, float] | None, str]


@dataclass(frozen=True, slots=True)
class BoxedImage:
    """One image with its objects.

    Attributes:
        path: of the image.
        boxes: [N, 4] float32 xmin, ymin, xmax, ymax in pixels from the upper left corner; N may be 0.
        labels: [N] int64 positions of classes.
    """

    path: Path
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BoxSet:
    """Images with boxes.

    Attributes:
        images: sorted by path.
        classes: names in order.
    """

    images: tuple[BoxedImage, ...]
    classes: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of boxes."""
        return sum(len(image.boxes) for image in self.images)

    @property
    def counts(self) -> dict[str, int]:
        """Number of boxes of each class."""
        labels = np.concatenate([image.labels for image in self.images])
        return dict(zip(self.classes, np.bincount(labels, minlength=len(self.classes)).tolist(), strict=True))


def load_boxes(
    annotations: Path, images: Path | None = None, *, classes: Sequence[str] | None = None
) -> BoxSet:
    """Reads annotations of any of the three kinds.

    Args:
        annotations: a .csv (columns image_path, xmin, ymin, xmax, ymax, label), a COCO .json, or a folder of
            .xml files, one per image.
        images: folder of the images; None for that of the annotations.
        classes: names in the order wanted; None for those found, sorted (COCO: in the order of their ids).

    Raises:
        RasterError: a file or image is not there.
        DataError: a file of another form, an empty box, an unknown class, or no box at all.
    """
    if annotations.is_dir():
        rows, found = list(_xml_rows(annotations)), None
    elif annotations.suffix.lower() == ".json":
        rows, found = _coco_rows(annotations)
    elif annotations.suffix.lower() == ".csv":
        rows, found = list(_csv_rows(annotations)), None
    else:
        raise DataError(f"{annotations}: expected a .csv, a COCO .json, or a folder of .xml files")
    names = tuple(classes or found or sorted({label for _, box, label in rows if box is not None}))
    unknown = sorted({label for _, box, label in rows if box is not None} - set(names))
    if unknown:
        raise DataError(f"{annotations} has boxes of {', '.join(unknown)}; known are {', '.join(names)}")
    folder = images or (annotations if annotations.is_dir() else annotations.parent)
    grouped: dict[str, list[tuple[tuple[float, float, float, float], str]]] = {}
    for name, box, label in rows:
        own = grouped.setdefault(name, [])
        if box is not None:
            own.append((box, label))
    missing = [name for name in grouped if not (folder / name).is_file()]
    if missing:
        raise RasterError(
            f"{annotations} names {len(missing)} images that are not in {folder}, e.g. {missing[0]}"
        )
    made = [_boxed(folder / name, own, names, annotations) for name, own in sorted(grouped.items())]
    if not any(len(image.boxes) for image in made):
        raise DataError(f"{annotations} holds no box of {len(made)} images")
    return BoxSet(tuple(made), names)


def box_groups(images: Sequence[BoxedImage]) -> list[str]:
    """A name per image, shared by rasters that overlap on the ground; a picture stands for itself.

    Raises:
        RasterError, GeoreferenceError: a raster cannot be opened, or lies nowhere.
    """
    rasters = [image.path for image in images if image.path.suffix.lower() in RASTER_SUFFIXES]
    names = dict(zip(rasters, overlap_groups([inspect_scene(path) for path in rasters]), strict=True))
    return [names.get(image.path, str(image.path)) for image in images]


def read_box_image(path: Path, bands: Sequence[str], *, model: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The whole image, [C, H, W] in its own numbers, and [H, W] where it holds data.

    Args:
        path: JPEG, PNG or raster.
        bands: that the model takes, in its order.
        model: its name, for messages.

    Raises:
        RasterError: no such file, or damaged.
        DataError: other bands.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if len(bands) != len(RGB):
            raise DataError(f"{path} is a picture of red, green, blue; {model} takes {', '.join(bands)}")
        numbers = np.array(decode_image(path)).transpose(2, 0, 1)
        return numbers, np.ones(numbers.shape[1:], dtype=bool)
    chosen, _ = choose_bands(path, bands, model=model)
    with SceneReader(path, bands=chosen) as reader:
        height, width = reader.info.grid.shape_hw
        return reader.read(Window(0, 0, width, height))


def is_image(path: Path) -> bool:
    """Whether a file's suffix is that of a picture or raster."""
    return path.suffix.lower() in (*IMAGE_SUFFIXES, *RASTER_SUFFIXES)


def clip_boxes(
    boxes: NDArray[np.float32], window_xyxy: tuple[int, int, int, int], *, min_share: float = 0.4
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes as a window of the image shows them.

    Args:
        boxes: [N, 4] in pixels of the image.
        window_xyxy: the window in these pixels.
        min_share: of a box's area that must lie in the window.

    Returns:
        [M, 4] in pixels of the window, and [N] which of the boxes they are.
    """
    x0, y0, x1, y1 = window_xyxy
    low, high = np.array([x0, y0, x0, y0], np.float32), np.array([x1, y1, x1, y1], np.float32)
    inside = boxes.clip(low, high)
    areas, whole = (
        (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        for b in (inside.astype(np.float64), boxes.astype(np.float64))
    )
    kept = areas >= min_share * whole
    kept &= areas > 0
    return (inside - low)[kept], kept


def _boxed(
    path: Path,
    found: Sequence[tuple[tuple[float, float, float, float], str]],
    classes: Sequence[str],
    where: Path,
) -> BoxedImage:
    boxes = np.array([box for box, _ in found], dtype=np.float32).reshape(-1, 4)
    bad = ~(np.isfinite(boxes).all(1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    bad |= (boxes < 0).any(1)
    if bad.any():
        raise DataError(
            f"{where}: {path.name} has the box {boxes[bad][0].tolist()}, expected xmin < xmax and "
            "ymin < ymax, none below 0"
        )
    return BoxedImage(
        path, boxes, np.array([list(classes).index(label) for _, label in found], dtype=np.int64)
    )


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RasterError(f"cannot read the annotations {path}: {error}") from error
    table = list(csv.DictReader(lines))
    missing = [name for name in CSV_COLUMNS if not table or name not in table[0]]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; expected {', '.join(CSV_COLUMNS)}")
    for number, row in enumerate(table, start=2):
        try:
            x0, y0, x1, y1 = (float(row[side]) for side in _SIDES)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: a side is no number ({error})") from error
        # DeepForest writes an image without objects as a row of zeros.
        empty = (x0, y0, x1, y1) == (0, 0, 0, 0)
        yield row["image_path"], None if empty else (x0, y0, x1, y1), row["label"]


def _coco_rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        kinds = {kind["id"]: str(kind["name"]) for kind in content["categories"]}
        rows: list[Row] = [(name, None, "") for name in files.values()]
        for one in content["annotations"]:
            if one.get("iscrowd"):
                continue
            x, y, width, height = (float(side) for side in one["bbox"])
            rows.append((files[one["image_id"]], (x, y, x + width, y + height), kinds[one["category_id"]]))
    except OSError as error:
        raise RasterError(f"cannot read the annotations {path}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no COCO file (images, categories, annotations): {error!r}") from error
    return rows, tuple(kinds[key] for key in sorted(kinds))


def _xml_rows(folder: Path) -> Iterator[Row]:
    files = sorted(folder.glob("*.xml"))
    if not files:
        raise RasterError(f"{folder} holds no .xml file of annotations")
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
            name = root.findtext("filename") or ""
            boxes = [(_xml_sides(one), one.findtext("name") or "") for one in root.iter("object")]
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise DataError(f"{file} is no annotation in Pascal VOC's form: {error}") from error
        if not name:
            raise DataError(f"{file} names no image (filename)")
        yield name, None, ""
        for box, label in boxes:
            yield name, box, label


def _xml_sides(one: ElementTree.Element) -> tuple[float, float, float, float]:
    box = one.find("bndbox")
    sides: Mapping[str, str | None] = {side: None if box is None else box.findtext(side) for side in _SIDES}
    x0, y0, x1, y1 = (math.nan if text is None else float(text) for text in sides.values())
    return x0, y0, x1, y1
