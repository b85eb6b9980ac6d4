"""Tracking from files to files: frames and a mask in, masks, an overlay and scores out."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov3geo.errors import DataError, RasterError
from dinov3geo.evaluation.frames import Frames, Masks, overlay, read_mask, write_mask, write_video
from dinov3geo.evaluation.mask_metrics import boundary_f, region_similarity
from dinov3geo.evaluation.tracking import TrackSettings, track
from dinov3geo.paths import written_whole

BACK = "there and back"


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """J and F of one object in one frame; `name` is the frame's, or `BACK`."""

    name: str
    object: int
    j: float
    f: float


@dataclass(frozen=True, slots=True)
class Followed:
    """What `follow` wrote.

    Attributes:
        folder: of the masks.
        masks: one per frame.
        video: the overlay, or None.
        objects: labels in the first mask.
        scores: of objects that have a true mask.
        seconds: it took.
    """

    folder: Path
    masks: tuple[Path, ...]
    video: Path | None
    objects: tuple[int, ...]
    scores: tuple[ObjectScore, ...]
    seconds: float


def follow(
    frames: Frames,
    first_mask: Path,
    encode: Callable[[Tensor], Tensor],
    folder: Path,
    *,
    settings: TrackSettings | None = None,
    truth: Path | None = None,
    there_and_back: bool = False,
    video: Path | None = None,
    frames_per_second: float = 6.0,
    progress: Callable[[int, int], None] | None = None,
) -> Followed:
    """Follows the objects of a mask through frames and writes a mask per frame.

    Args:
        frames: to go through, in order.
        first_mask: of the first of them.
        encode: features [D, h, w] of a frame.
        folder: for the masks, named like the frames; `scores.csv` where there is something to score.
        settings: of the tracker.
        truth: folder of true masks named like the frames, for any of the frames after the first.
        there_and_back: also follow the last mask back, and score it where it began. Nothing of the first
            mask is known on the way back; a tracker that loses the object does not find back.
        video: moving picture to write, or None.
        frames_per_second: of the picture.
        progress: called with how many frames are done.

    Raises:
        UserError: a file that cannot be used or written.
    """
    began = time.monotonic()
    given = read_mask(first_mask)
    truths = {} if truth is None else _true_masks(truth, frames)
    labels = int(given.max()) + 1
    readers = frames.readers()
    legs = 2 if there_and_back else 1

    def told(leg: int) -> Callable[[int, int], None]:
        return lambda done, total: progress(leg * total + done, legs * total) if progress else None

    start = torch.from_numpy(given.astype(np.int64))
    masks, written = [], []
    for file, mask in zip(
        frames.files,
        track(readers, start, encode, num_labels=labels, settings=settings, progress=told(0)),
        strict=True,
    ):
        masks.append(mask.numpy().astype(np.uint8))
        target = folder / f"{file.stem}{'.png' if frames.grid is None else '.tif'}"
        write_mask(target, masks[-1], grid=frames.grid)
        written.append(target)
    objects = tuple(int(k) for k in np.unique(given) if k)
    scores = [
        score
        for file, mask in zip(frames.files[1:], masks[1:], strict=True)
        for score in _score(file.name, mask, truths.get(file.stem), objects)
    ]
    if there_and_back:
        last = torch.from_numpy(masks[-1].astype(np.int64))
        *_, back = track(readers[::-1], last, encode, num_labels=labels, settings=settings, progress=told(1))
        scores += _score(BACK, back.numpy().astype(np.uint8), given, objects)
    if video is not None:
        pictures = [overlay(read(), mask) for read, mask in zip(readers, masks, strict=True)]
        write_video(video, pictures, frames_per_second=frames_per_second)
    if scores:
        _write_scores(folder / "scores.csv", scores)
    seconds = time.monotonic() - began
    return Followed(folder, tuple(written), video, objects, tuple(scores), seconds)


def _true_masks(folder: Path, frames: Frames) -> dict[str, Masks]:
    """Masks of a folder by the names of the frames that have one."""
    if not folder.is_dir():
        raise RasterError(f"no such folder of true masks: {folder}")
    names = {file.stem for file in frames.files[1:]}
    found = {
        path.stem: read_mask(path)
        for path in sorted(folder.iterdir())
        if path.stem in names and path.suffix.lower() in (".png", ".tif", ".tiff")
    }
    if not found:
        raise DataError(f"{folder} has no mask named like a later frame, e.g. {sorted(names)[0]}.png")
    return found


def _score(name: str, mask: Masks, truth: Masks | None, objects: tuple[int, ...]) -> list[ObjectScore]:
    """Scores of the objects that a true mask shows; a mask of other objects says nothing of these."""
    if truth is None:
        return []
    if truth.shape != mask.shape:
        raise DataError(f"the true mask of {name} has {truth.shape} pixels, the frame {mask.shape}")
    pairs = [(k, torch.from_numpy(mask == k), torch.from_numpy(truth == k)) for k in objects if k in truth]
    return [ObjectScore(name, k, region_similarity(m, t), boundary_f(m, t)) for k, m, t in pairs]


def _write_scores(path: Path, scores: list[ObjectScore]) -> None:
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["frame", "object", "J", "F"])
        writer.writerows([s.name, s.object, f"{s.j:.4f}", f"{s.f:.4f}"] for s in scores)
