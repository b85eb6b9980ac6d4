"""Water of one place through the years by the tracker: the NDWI of the first date is the mask.

Command: python benchmarks/water_years.py DATA/naip -o OUT --sensor naip [--backbone NAME|PATH]
[--threshold 0.0] [--pixels]

Writes `first_mask.tif`, a mask per date, an overlay video (as `dinov3geo track` does), and `areas.csv`: the
tracked area of each date beside that of its own NDWI, and their IoU. NDWI = (green - near infrared) /
(green + near infrared), McFeeters 1996; of 8-bit numbers it is an index of brightness, not of reflectance.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dinov3geo.backbones.inference import for_inference
from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone
from dinov3geo.errors import DataError, UserError
from dinov3geo.evaluation.follow import follow
from dinov3geo.evaluation.frames import Frames, patch_encoder, pixel_encoder, read_mask, write_mask
from dinov3geo.evaluation.mask_metrics import region_similarity
from dinov3geo.paths import written_whole
from dinov3geo.rasters.bands import choose_bands
from dinov3geo.rasters.sensors import get_sensor

_WANTED = ("green", "nir")


def ndwi(green: NDArray[np.generic], nir: NDArray[np.generic]) -> NDArray[np.float64]:
    """(green - nir) / (green + nir), 0 where both are 0."""
    one, other = green.astype(np.float64), nir.astype(np.float64)
    total = one + other
    return np.where(total > 0, (one - other) / np.where(total > 0, total, 1), 0.0)


def run(given: argparse.Namespace) -> list[list[str]]:
    """Tracks and checks; gives the rows of `areas.csv`."""
    network = load_backbone(given.backbone)
    assert network.card is not None
    order = None if given.sensor is None else get_sensor(given.sensor).band_names
    normalization, name = network.card.normalization, network.card.name
    frames = Frames(given.folder, bands=normalization.bands, model=name, order=order)
    if frames.grid is None:
        raise DataError(f"{given.folder} holds pictures without a place; expected GeoTIFFs of one place")
    _, guesses = choose_bands(frames.files[0], _WANTED, model="NDWI", order=order)
    if guesses:
        # The first bands would be red and green in most files: an index of something else.
        raise DataError(
            f"{frames.files[0]} does not say which band is green and which near infrared; name its bands, or "
            "the sensor with --sensor, e.g. --sensor naip"
        )
    water = [
        ndwi(*(band.numpy() for band in read())) > given.threshold
        for read in Frames(given.folder, bands=_WANTED, model="NDWI", order=order).readers()
    ]
    if not water[0].any():
        raise DataError(
            f"no pixel of the first date has an NDWI above {given.threshold:g}; lower --threshold"
        )
    first = given.output / "first_mask.tif"
    write_mask(first, water[0].astype(np.uint8), grid=frames.grid)
    encode = (
        pixel_encoder(patch=network.patch_size, short_side=given.short_side)
        if given.pixels
        else patch_encoder(for_inference(network), short_side=given.short_side)
    )
    found = follow(
        frames, first, encode, given.output / "masks", video=given.output / "overlay.gif", frames_per_second=1
    )
    hectares = abs(frames.grid.transform.a * frames.grid.transform.e) / 10_000
    rows = []
    for file, mask_file, truth in zip(frames.files, found.masks, water, strict=True):
        # The tracker may have lost everything, which `read_mask` would refuse.
        mask = read_mask(mask_file) > 0 if _holds_any(mask_file) else np.zeros_like(truth)
        iou = region_similarity(torch.from_numpy(mask), torch.from_numpy(truth))
        areas = (mask.sum() * hectares, truth.sum() * hectares)
        rows.append([file.stem, *(f"{area:.2f}" for area in areas), f"{iou:.3f}"])
    return rows


def _holds_any(path: Path) -> bool:
    try:
        read_mask(path)
    except DataError:
        return False
    return True


def main(words: list[str] | None = None) -> int:
    """Runs the benchmark; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="GeoTIFFs of one place, in the order of their names")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--sensor", help="name or YAML: whose order the bands have in files without names")
    parser.add_argument("--threshold", type=float, default=0.0)
    parser.add_argument("--short-side", type=int, default=480)
    parser.add_argument("--pixels", action="store_true", help="compare raw pixels instead of features")
    given = parser.parse_args(words)
    try:
        rows = run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    header = ["date", "tracked_ha", "ndwi_ha", "iou"]
    with written_whole(given.output / "areas.csv") as temporary, temporary.open("w", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows([header, *rows])
    for row in [header, *rows]:
        print("  ".join(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
