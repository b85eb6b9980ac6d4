"""Maps of a whole scene as GeoTIFFs: canopy height in metres, and patch features."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dinov3geo import __version__
from dinov3geo.backbones.base import Backbone
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.features.extract import pixels_per_patch
from dinov3geo.features.visualize import fit_pca
from dinov3geo.heads.base import HeightModel
from dinov3geo.paths import check_target
from dinov3geo.predict.checks import (
    ModelInput,
    check_numbers,
    check_picture,
    gsd_warnings,
)
from dinov3geo.predict.preview import write_preview
from dinov3geo.predict.runners import canopy_runner, feature_runner, pca_runner, sample_features
from dinov3geo.predict.stream import Array, Floats, Mask, RunTiles, stream_rows
from dinov3geo.rasters.bands import choose_bands
from dinov3geo.rasters.geotiff import GeoTiffWriter, block_cache
from dinov3geo.rasters.grid import PixelGrid, TilePlan
from dinov3geo.rasters.reader import SceneReader

Progress = Callable[[int, int], None]
"""Called with tiles done and tiles in all."""

MAX_BANDS = 512
"""Of a file of features; a block of a GeoTIFF holds all bands, and whoever reads it holds some blocks."""

# Two rows of blocks, read and written, of a scene 30,000 pixels wide.
_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class PredictionReport:
    """What a canopy-height prediction did.

    Attributes:
        output: the GeoTIFF.
        preview: the PNG, or None.
        seconds: wall time, preview included.
        tiles: tiles run; those without data are not.
        valid_share: valid pixels over all pixels.
        area_km2: ground area of the valid pixels.
        minimum_m: lowest height.
        mean_m: mean height over the valid pixels.
        maximum_m: greatest height.
        warnings: what the user should know, one line each.
    """

    output: Path
    preview: Path | None
    seconds: float
    tiles: int
    valid_share: float
    area_km2: float
    minimum_m: float
    mean_m: float
    maximum_m: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FeatureReport:
    """What a feature extraction did.

    Attributes:
        output: the GeoTIFF.
        seconds: wall time.
        tiles: tiles run for the output; a PCA is fitted on up to 32 tiles before.
        grid_hw: rows and columns of the output.
        dimensions: bands of the output.
        valid_share: valid patches over all patches.
        explained: share of the variance per principal component; empty without PCA.
        warnings: what the user should know, one line each.
    """

    output: Path
    seconds: float
    tiles: int
    grid_hw: tuple[int, int]
    dimensions: int
    valid_share: float
    explained: tuple[float, ...]
    warnings: tuple[str, ...]


def predict_canopy(
    scene: str | Path,
    output: str | Path,
    *,
    model: HeightModel,
    tile: int = 512,
    overlap: int = 128,
    batch_size: int = 4,
    overwrite: bool = False,
    preview: str | Path | None = None,
    progress: Progress | None = None,
    command: str = "",
    model_name: str = "",
) -> PredictionReport:
    """Predicts the canopy height of a scene into a cloud-optimised GeoTIFF.

    The output has the scene's CRS, extent and pixels; heights are float32 metres, pixels without data are
    the head's nodata (-9999). It appears under its name only when whole.

    Args:
        scene: raster file of any size; memory grows with its width only.
        output: GeoTIFF to write.
        model: backbone and head, on the device to compute on.
        tile: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share and are blended over.
        batch_size: tiles per forward pass.
        overwrite: whether an existing output or preview may be replaced.
        preview: PNG to write beside it, or None.
        progress: told about tiles done.
        command: written into the file's tags.
        model_name: likewise, and named in messages; "" for the name in the model's card, or its backbone's.

    Raises:
        RasterError: the scene cannot be read, or the output or preview not written or there already.
        GeoreferenceError: the scene has no usable position.
        DataError: too few bands, numbers of another scale, NaN, or no valid pixel at all.
        ConfigError: tile, overlap or batch size make no sense.
    """
    began = time.perf_counter()
    scene, output = Path(scene), Path(output)
    png = None if preview is None else Path(preview)
    if png is not None:
        check_picture(png, sources=(scene, output), overwrite=overwrite)
    wanted = _canopy_input(model, model_name)
    check_target(output, sources=(scene,), overwrite=overwrite)
    with _prepared(scene, wanted, tile, overlap, batch_size) as job:
        runner = _CountingRunner(canopy_runner(model), len(job.plan), progress)
        spec = model.output
        with GeoTiffWriter(
            output,
            job.grid,
            count=1,
            dtype=spec.dtype,
            nodata=spec.nodata,
            band_names=(spec.name.replace("_", " "),),
            units=spec.unit,
            tags=_tags(wanted.name, command),
            overviews="average",
            overwrite=overwrite,
        ) as writer:
            statistics = _write_rows(writer, job, runner, spec.nodata, batch_size=batch_size)
            statistics.check(scene)
        runner.finish()
    if png is not None:
        write_preview(scene, output, png)
    return PredictionReport(
        output=output,
        preview=png,
        seconds=time.perf_counter() - began,
        tiles=runner.done,
        valid_share=statistics.count / (job.grid.height * job.grid.width),
        area_km2=statistics.count * job.grid.gsd_m**2 / 1e6,
        minimum_m=statistics.minimum,
        mean_m=statistics.total / statistics.count,
        maximum_m=statistics.maximum,
        warnings=job.warnings,
    )


def predict_features(
    scene: str | Path,
    output: str | Path,
    *,
    backbone: Backbone,
    pca: int | None = None,
    image_scale: float = 1.0,
    tile: int = 512,
    overlap: int = 128,
    batch_size: int = 4,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> FeatureReport:
    """Writes the stitched patch features of a scene as a GeoTIFF with one pixel per patch.

    Features are those of the last block, float32, NaN where a patch holds no valid pixel.

    Args:
        scene: raster file.
        output: GeoTIFF to write; its pixels are `patch size / image_scale` scene pixels wide.
        backbone: with a card, on the device to compute on.
        pca: keep this many principal components, fitted on patches from all over the scene; None for all
            dimensions.
        image_scale: the scene is made this many times larger before the backbone sees it.
        tile: side of a tile in pixels, rounded down to whole patches.
        overlap: pixels that neighbouring tiles share, rounded down to whole patches.
        batch_size: tiles per forward pass.
        overwrite: whether an existing output may be replaced.
        progress: told about tiles done.
        command: written into the file's tags.

    Raises:
        RasterError, GeoreferenceError, DataError: as `predict_canopy`.
        ConfigError: likewise, or more than 512 bands.
    """
    began = time.perf_counter()
    scene, output = Path(scene), Path(output)
    wanted = ModelInput.of_backbone(backbone)
    stride = pixels_per_patch(backbone.patch_size, image_scale)
    dimensions = backbone.embed_dim if pca is None else pca
    if dimensions > MAX_BANDS:
        raise ConfigError(
            f"{dimensions} bands are too many for a GeoTIFF, expected at most {MAX_BANDS}; keep the first K "
            "principal components (--pca K)"
        )
    check_target(output, sources=(scene,), overwrite=overwrite)
    with _prepared(scene, wanted, tile, overlap, batch_size, stride=stride) as job:
        features = feature_runner(backbone, image_scale=image_scale)
        names = tuple(f"feature {number}" for number in range(backbone.embed_dim))
        explained: tuple[float, ...] = ()
        if pca is not None:
            sample = sample_features(job.reader, job.plan, features, stride=stride)
            basis = fit_pca(sample, components=pca)
            features = pca_runner(features, basis)
            names = tuple(f"principal component {number}" for number in range(1, pca + 1))
            explained = tuple(float(share) for share in basis.explained)
        runner = _CountingRunner(features, len(job.plan), progress)
        grid = job.grid.coarsen(stride)
        with GeoTiffWriter(
            output,
            grid,
            count=len(names),
            dtype="float32",
            nodata=float("nan"),
            band_names=names,
            tags=_tags(wanted.name, command),
            overviews="average",
            overwrite=overwrite,
        ) as writer:
            statistics = _write_rows(writer, job, runner, float("nan"), batch_size=batch_size)
            statistics.check(scene)
        runner.finish()
    return FeatureReport(
        output=output,
        seconds=time.perf_counter() - began,
        tiles=runner.done,
        grid_hw=grid.shape_hw,
        dimensions=len(names),
        valid_share=statistics.count / (grid.height * grid.width),
        explained=explained,
        warnings=job.warnings,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """An open scene that suits the model, and its tiles."""

    reader: SceneReader
    plan: TilePlan
    stride: int
    warnings: tuple[str, ...]

    @property
    def grid(self) -> PixelGrid:
        """Of the scene."""
        return self.reader.info.grid


@contextmanager
def _prepared(
    scene: Path,
    wanted: ModelInput,
    tile: int,
    overlap: int,
    batch_size: int,
    *,
    stride: int = 1,
) -> Iterator[_Job]:
    """Opens the scene and checks all that can be checked before any work."""
    if batch_size < 1:
        raise ConfigError(f"batch size must be at least 1, got {batch_size}")
    if tile < stride:
        raise ConfigError(f"tile must be at least one patch of {stride} pixels, got {tile}")
    bands, warnings = choose_bands(scene, wanted.normalization.bands, model=wanted.name)
    with block_cache(_CACHE_BYTES), SceneReader(scene, bands=bands) as reader:
        grid = reader.info.grid
        check_numbers(reader, wanted)
        warnings += gsd_warnings(scene, grid.gsd_m, wanted)
        plan = grid.tiles(tile // stride * stride, overlap // stride * stride, stride)
        yield _Job(reader, plan, stride, tuple(warnings))


class _CountingRunner:
    """Runs tiles, counts them and tells the progress."""

    def __init__(self, run: RunTiles, total: int, progress: Progress | None) -> None:
        self.done = 0
        self._run = run
        self._total = total
        self._progress = progress

    def __call__(self, images: Array, valid: Mask) -> Floats:
        outputs = self._run(images, valid)
        self.done += len(images)
        self._tell(self.done)
        return outputs

    def finish(self) -> None:
        """The rest of the tiles held no data."""
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)


@dataclass(slots=True)
class _Statistics:
    """Of the valid outputs so far, over all bands; `count` counts cells."""

    count: int = 0
    total: float = 0.0
    minimum: float = field(default=float("inf"))
    maximum: float = field(default=float("-inf"))

    def add(self, values: Floats) -> None:
        """Adds valid cells [K, N]."""
        if values.size:
            self.count += values.shape[1]
            self.total += float(values.sum(dtype=np.float64))
            self.minimum = min(self.minimum, float(values.min()))
            self.maximum = max(self.maximum, float(values.max()))

    def check(self, scene: Path) -> None:
        """Raises `DataError` unless there was something, and all of it finite."""
        if not self.count:
            raise DataError(f"scene {scene} holds no valid pixel: all of it is nodata; nothing was written")
        if not np.isfinite(self.total):
            raise DataError(f"the model gave NaN or infinity on scene {scene}; its weights may be damaged")


def _write_rows(
    writer: GeoTiffWriter, job: _Job, run: RunTiles, nodata: float, *, batch_size: int
) -> _Statistics:
    """Streams the scene through the model into the writer."""
    statistics = _Statistics()
    strips = stream_rows(
        job.reader, job.plan, run, batch_size=batch_size, num_outputs=writer.count, stride=job.stride
    )
    # Closing ends the reading thread, before an error on its way up closes the reader.
    with closing(strips):
        for window, values, valid in strips:
            statistics.add(values[:, valid])
            values[:, ~valid] = nodata
            writer.write(window, values)
    return statistics


def _canopy_input(model: HeightModel, name: str) -> ModelInput:
    """Bands of the backbone, GSD of the heights' training where the card tells it."""
    backbone = ModelInput.of_backbone(model.backbone)
    gsd = model.card.get("gsd_m")
    return ModelInput(
        name=name or str(model.card.get("name", backbone.name)),
        normalization=backbone.normalization,
        gsd_m=backbone.gsd_m if gsd is None else (float(gsd[0]), float(gsd[1])),
    )


def _tags(model: str, command: str) -> dict[str, str]:
    tags = {"DINOV3GEO_MODEL": model, "DINOV3GEO_VERSION": __version__}
    return {**tags, "DINOV3GEO_COMMAND": command} if command else tags
