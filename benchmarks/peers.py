"""How other libraries predict a scene: the same model, tiles and overlap, each in the way its users do it.

Each function reads a scene, runs a model and writes a GeoTIFF. They are written after the libraries' own
documentation; what they lack (nodata, overviews) is not added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from torch import Tensor, nn

from dinov3geo.heads.canopy import CanopyModel


def predict_with_torchgeo(scene: Path, output: Path, model: CanopyModel, tile: int, overlap: int) -> None:
    """A loop over torchgeo's `GriddedPatchSampler`, merged in memory with linear weights."""
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import GriddedPatchSampler

    class Scene(RasterDataset):
        filename_glob = scene.name
        is_image = True

    data = Scene(paths=str(scene.parent))
    sampler = GriddedPatchSampler(data, size=tile, stride=tile - overlap)
    loader = DataLoader(data, batch_size=4, sampler=sampler, collate_fn=stack_samples)
    with rasterio.open(scene) as source:
        profile, place = source.profile, source.transform
    height, width = profile["height"], profile["width"]
    total = np.zeros((height, width), dtype=np.float32)
    weights = np.zeros((height, width), dtype=np.float32)
    ramp = np.minimum(np.minimum(np.arange(tile) + 1, tile - np.arange(tile)) / max(overlap, 1), 1)
    weight = np.outer(ramp, ramp).astype(np.float32)
    for batch in loader:
        with torch.inference_mode():
            heights = model.predict(batch["image"])[:, 0].numpy()
        for values, transform in zip(heights, batch["transform"], strict=True):
            x, y = float(transform[2]), float(transform[5])
            col, row = (round(offset) for offset in ~place @ (x, y))
            rows, cols = (
                slice(max(start, 0), min(start + tile, end)) for start, end in ((row, height), (col, width))
            )
            inside = (
                slice(rows.start - row, rows.stop - row),
                slice(cols.start - col, cols.stop - col),
            )
            total[rows, cols] += values[inside] * weight[inside]
            weights[rows, cols] += weight[inside]
    _write(output, total / np.maximum(weights, 1e-6), profile)


def predict_with_terratorch(scene: Path, output: Path, model: CanopyModel, tile: int, overlap: int) -> None:
    """The whole image as a tensor through terratorch's `tiled_inference`."""
    from terratorch.tasks.tiled_inference import tiled_inference

    with rasterio.open(scene) as source:
        profile, image = source.profile, source.read()

    def forward(images: Tensor, **_: Any) -> Tensor:  # noqa: ANN401 (terratorch's own arguments)
        with torch.inference_mode():
            return model.predict(images)

    heights = tiled_inference(
        forward,
        torch.from_numpy(image)[None].float(),
        crop=tile,
        stride=tile - overlap,
        delta=0,
        batch_size=4,
        padding=False,
    )
    assert heights is not None
    _write(output, heights.reshape(profile["height"], profile["width"]).numpy(), profile)


def predict_with_geoai(scene: Path, output: Path, model: CanopyModel, tile: int, overlap: int) -> None:
    """The function `predict_geotiff` of geoai with its default blending."""
    from geoai.inference import predict_geotiff

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model.backbone, model.head

        def forward(self, images: Tensor) -> Tensor:
            return model.predict(images)

    predict_geotiff(
        Network(),
        str(scene),
        str(output),
        tile_size=tile,
        overlap=overlap,
        batch_size=4,
        preprocess_fn=lambda image: image,
        device="cpu",
        verbose=False,
    )


def _write(output: Path, heights: np.ndarray[Any, Any], profile: dict[str, Any]) -> None:
    """One band of float32 in the scene's profile, as the tutorials write it."""
    with rasterio.open(output, "w", **{**profile, "count": 1, "dtype": "float32"}) as target:
        target.write(heights.astype(np.float32), 1)
