"""Large scenes and a small model to measure prediction with.

    python benchmarks/scenes.py big.tif --rows 30000 --cols 30000 --plots DATA/neon_plots/rgb DATA/teak/rgb

A scene is a mosaic of real plots, each turned and mirrored at random, with some holes without data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.windows import Window

from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.vit import VisionTransformer, VitConfig
from dinov3geo.features.extract import apply_view
from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.canopy import CanopyModel, HeadSettings
from dinov3geo.rasters.geotiff import GeoTiffWriter, Layer
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneReader, find_rasters

SIDE = 400
HOLES = 0.03

Bytes = NDArray[np.uint8]


def read_plots(folders: Sequence[str]) -> list[Bytes]:
    """RGB squares [3, SIDE, SIDE] of all rasters that are large enough; pixels without data become 0."""
    plots = []
    for path in find_rasters(folders):
        with SceneReader(path, bands=(1, 2, 3)) as reader:
            if min(reader.info.grid.shape_hw) >= SIDE:
                numbers, valid = reader.read(Window(0, 0, SIDE, SIDE))
                plots.append(np.where(valid, np.maximum(numbers, 1), 0).astype(np.uint8))
    return plots


def mosaic_rows(plots: Sequence[Bytes], rows: int, cols: int, seed: int) -> Iterator[Bytes]:
    """Rows [3, n, cols] of a mosaic, one row of plots at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, rows, SIDE):
        row = np.zeros((3, SIDE, cols + SIDE), dtype=np.uint8)
        for col in range(0, cols, SIDE):
            if rng.random() >= HOLES:
                plot = torch.from_numpy(plots[rng.integers(len(plots))])
                row[:, :, col : col + SIDE] = apply_view(plot, int(rng.integers(8))).numpy()
        yield row[:, : min(SIDE, rows - start), :cols]


def write_scene(path: Path, folders: Sequence[str], rows: int, cols: int, *, seed: int = 0) -> None:
    """Writes a mosaic as a cloud-optimised GeoTIFF: 0.1 m pixels, nodata 0."""
    plots = read_plots(folders)
    place = Affine.translation(400_000, 3_280_000) @ Affine.scale(0.1, -0.1)
    layer = Layer(3, "uint8", 0, band_names=("red", "green", "blue"))
    with GeoTiffWriter(path, PixelGrid(CRS.from_epsg(32617), place, rows, cols), layer) as writer:
        for row in mosaic_rows(plots, rows, cols, seed):
            writer.write(row)


def two_block_model(*, width: int = 192) -> CanopyModel:
    """An untrained canopy model of two blocks: it costs as much as a trained one of its size."""
    torch.manual_seed(0)
    backbone = VisionTransformer(VitConfig(width, 2, width // 64, "mlp", 4 * width, layer_scale=0.5))
    scale, mean, std = (1 / 255,) * 3, (0.45, 0.45, 0.4), (0.2, 0.2, 0.2)
    normalization = Normalization(("red", "green", "blue"), scale, (0.0,) * 3, mean, std)
    backbone.card = BackboneCard("vit-two-blocks", "vit_tiny", 16, normalization, gsd_m=(0.1, 0.1))
    output = OutputSpec("canopy_height", unit="m", minimum=0.0, maximum=60.0)
    head = HeadSettings(kind="dpt").build([width] * 2, output=output)
    for module in (backbone, head):
        module.eval().requires_grad_(False)
    return CanopyModel(backbone, head, (0, 1), 1.0, 1, {"name": "canopy-two-blocks"})


def main(words: Sequence[str] | None = None) -> int:
    """Writes a scene."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--cols", type=int, required=True)
    parser.add_argument("--plots", nargs="+", required=True, help="folders of RGB rasters")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    write_scene(arguments.path, arguments.plots, arguments.rows, arguments.cols, seed=arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
