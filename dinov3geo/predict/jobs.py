"""A scene that suits a model, cut into tiles: what every product starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dinov3geo import __version__
from dinov3geo.errors import ConfigError
from dinov3geo.features.extract import weights_digest
from dinov3geo.heads.base import HeightModel
from dinov3geo.predict.checks import ModelInput, check_numbers, gsd_warnings
from dinov3geo.predict.engines import CACHE_BYTES, TileTask
from dinov3geo.predict.pixel_size import PixelSize, seen_grid
from dinov3geo.predict.runners import ClassModel, sample_features
from dinov3geo.predict.stream import Floats, RunTiles
from dinov3geo.rasters.bands import choose_bands
from dinov3geo.rasters.geotiff import block_cache
from dinov3geo.rasters.grid import PixelGrid, TilePlan
from dinov3geo.rasters.reader import SceneReader, inspect_scene
from dinov3geo.rasters.regridded import RegriddedScene


@dataclass(frozen=True, slots=True)
class SceneJob:
    """A scene that suits the model, and its tiles.

    Attributes:
        scene: raster file.
        bands: 1-based indexes in the model's order.
        grid: on which the model sees the scene, its own unless another pixel size was asked for.
        plan: tiles of the grid.
        stride: pixels of the grid per output cell.
        batch_size: tiles per call of the model.
        warnings: what the user should know, one line each.
    """

    scene: Path
    bands: tuple[int, ...]
    grid: PixelGrid
    plan: TilePlan
    stride: int
    batch_size: int
    warnings: tuple[str, ...]

    @property
    def cells(self) -> PixelGrid:
        """Grid of the output."""
        return self.grid.coarsen(self.stride)

    def task(self, make_runner: Callable[[], RunTiles], outputs: int) -> TileTask:
        """What to compute with a model that gives so many values per cell."""
        return TileTask(
            self.scene, self.bands, self.grid, self.plan, self.stride, self.batch_size, outputs, make_runner
        )

    def sample(self, features: RunTiles, *, max_tiles: int = 32, max_patches: int = 20_000) -> Floats:
        """Features [N, D] of patches drawn from all over the scene; raises `DataError` if it is empty."""
        with block_cache(CACHE_BYTES), RegriddedScene(self.scene, self.grid, bands=self.bands) as reader:
            return sample_features(
                reader,
                self.plan,
                features,
                stride=self.stride,
                max_tiles=max_tiles,
                max_patches=max_patches,
            )


def prepare(
    scene: Path,
    wanted: ModelInput,
    tile: int,
    overlap: int,
    batch_size: int,
    *,
    stride: int = 1,
    gsd: PixelSize = None,
) -> SceneJob:
    """Checks all that can be checked before any work.

    Args:
        scene: raster file.
        wanted: what the model takes.
        tile: side of a tile in pixels, rounded down to whole cells.
        overlap: pixels that neighbouring tiles share, rounded down to whole cells.
        batch_size: tiles per call of the model.
        stride: pixels that the model sees per output cell.
        gsd: their size in metres, "model" for the nearest of its training, None for the scene's own.

    Raises:
        ConfigError: tile, batch size or pixel size make no sense.
        DataError: too few bands, numbers of another scale, NaN, tiles that never advance.
        RasterError, GeoreferenceError: the scene cannot be used.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size must be at least 1, got {batch_size}")
    if tile < stride:
        raise ConfigError(f"tile must be at least one patch of {stride} pixels, got {tile}")
    bands, warnings = choose_bands(scene, wanted.normalization.bands, model=wanted.name)
    with block_cache(CACHE_BYTES), SceneReader(scene, bands=bands) as reader:
        own = reader.info.grid
        grid = seen_grid(scene, own, gsd, wanted)
        check_numbers(reader, wanted)
    warnings += gsd_warnings(scene, own.gsd_m, grid.gsd_m, wanted)
    plan = grid.tiles(tile // stride * stride, overlap // stride * stride, stride)
    return SceneJob(scene, bands, grid, plan, stride, batch_size, tuple(warnings))


def count_tiles(
    scene: Path, tile: int, overlap: int, *, seen: tuple[PixelSize, ModelInput] | None = None
) -> int:
    """About how many tiles a scene is cut into, which is how long it takes beside others.

    Args:
        scene: raster file.
        tile: as `prepare`.
        overlap: likewise.
        seen: pixel size and what the model takes, where the size need not be the scene's own.

    Raises:
        RasterError, GeoreferenceError: the scene cannot be used.
        DataError: tiles that never advance.
        ConfigError: a pixel size that makes no sense.
    """
    grid = inspect_scene(scene).grid
    if seen is not None:
        grid = seen_grid(scene, grid, *seen)
    return len(grid.tiles(tile, overlap))


def model_input(model: HeightModel | ClassModel, name: str = "") -> ModelInput:
    """Bands of the backbone, GSD of the head's training where the card tells it."""
    backbone = ModelInput.of_backbone(model.backbone)
    gsd = model.card.get("gsd_m")
    return ModelInput(
        name=name or str(model.card.get("name", backbone.name)),
        normalization=backbone.normalization,
        gsd_m=backbone.gsd_m if gsd is None else (float(gsd[0]), float(gsd[1])),
    )


def model_facts(model: object) -> dict[str, object]:
    """Everything in a model that its outputs depend on: digests of its modules, and its plain settings."""
    if isinstance(model, nn.Module):
        return {"weights": weights_digest(model)}
    facts: dict[str, object] = {}
    for name, value in vars(model).items():
        if isinstance(value, nn.Module):
            facts[name] = weights_digest(value)
        elif name != "card":
            facts[name] = repr(value)
    return facts


def file_tags(model: str, command: str) -> dict[str, str]:
    """Tags of a file that a model made."""
    tags = {"DINOV3GEO_MODEL": model, "DINOV3GEO_VERSION": __version__}
    return {**tags, "DINOV3GEO_COMMAND": command} if command else tags
