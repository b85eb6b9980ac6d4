"""Maps of a whole scene as GeoTIFFs: canopy height in metres, land cover, and patch features."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov3geo.backbones.base import Backbone
from dinov3geo.errors import ConfigError, DataError, EmptySceneError
from dinov3geo.features.extract import pixels_per_patch
from dinov3geo.features.facts import FeatureFacts
from dinov3geo.features.store import STORED, StoredType
from dinov3geo.features.visualize import PcaBasis, fit_pca
from dinov3geo.heads.base import HeightModel
from dinov3geo.paths import check_target
from dinov3geo.predict.batches import batch_that_fits
from dinov3geo.predict.checks import ModelInput, check_picture
from dinov3geo.predict.encodings import feature_encoding, height_encoding
from dinov3geo.predict.engines import Progress, check_engine, write_map
from dinov3geo.predict.jobs import file_tags, model_facts, model_input, prepare
from dinov3geo.predict.pixel_size import PixelSize
from dinov3geo.predict.preview import write_preview
from dinov3geo.predict.runners import canopy_runner, feature_runner, pca_runner
from dinov3geo.predict.stores import WRITERS, write_store
from dinov3geo.predict.stream import Floats, RunTiles

_SAMPLED_TILES, _SAMPLED_PATCHES = 64, 20_000

MAX_BANDS = 512
"""Of a file of features; a block of a GeoTIFF holds all bands, and whoever reads it holds some blocks."""


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
        output: the file or store.
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
    gsd: PixelSize = None,
    tile: int = 512,
    overlap: int = 128,
    batch_size: int | None = None,
    integer: str | None = None,
    uncertainty: bool = False,
    precision: str = "auto",
    compiled: bool = False,
    engine: str = "local",
    overwrite: bool = False,
    preview: str | Path | None = None,
    progress: Progress | None = None,
    command: str = "",
    model_name: str = "",
) -> PredictionReport:
    """Predicts the canopy height of a scene into a cloud-optimised GeoTIFF.

    The output has the scene's CRS, extent and pixels (or pixels of `gsd`, which cover it from the same
    corner); heights are float32 metres, pixels without data are the head's nodata (-9999). It appears under
    its name only when whole; a run that was killed goes on where it was when it is started again, and ends in
    the same bytes.

    Args:
        scene: raster file of any size; memory grows with its width only.
        output: GeoTIFF to write.
        model: backbone and head, on the device to compute on.
        gsd: pixel size in metres at which the model sees the scene and the map is written; "model" for the
            nearest one that the model was trained at, None for the scene's own. Pixels are averaged where
            they become larger, interpolated where they become smaller, and square on the ground at the
            scene's centre, in degrees, too.
        tile: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share and are blended over.
        batch_size: tiles per forward pass; None for as many as suit the device.
        integer: "dm" for decimetres as uint16 or "m" for metres as uint8 (nodata is their largest number).
        uncertainty: write a second band, the standard deviation over four flips and turns [m]; takes four
            times as long.
        precision: "auto" (bfloat16 on a GPU that gains from it), "float32" or "bfloat16".
        compiled: let torch.compile fuse what lies within each block; the first tiles then take long.
        engine: "local", or "ray" for the workers of a Ray cluster.
        overwrite: whether an existing output or preview may be replaced.
        preview: PNG to write beside it, or None.
        progress: told about tiles done.
        command: written into the file's tags.
        model_name: likewise, and named in messages; "" for the name in the model's card, or its backbone's.

    Raises:
        RasterError: the scene cannot be read, or the output or preview not written or there already.
        GeoreferenceError: the scene has no usable position.
        DataError: too few bands, numbers of another scale, NaN, or no valid pixel at all.
        ConfigError: tile, overlap, batch size, pixel size, integer or precision make no sense.
    """
    began = time.perf_counter()
    scene, output = Path(scene), Path(output)
    png = None if preview is None else Path(preview)
    check_engine(engine)
    if png is not None:
        check_picture(png, sources=(scene, output), overwrite=overwrite)
    wanted = model_input(model, model_name)
    check_target(output, sources=(scene,), overwrite=overwrite)
    encoding = height_encoding(
        model.output, integer=integer, uncertainty=uncertainty, tags=file_tags(wanted.name, command)
    )
    make_runner = functools.partial(
        canopy_runner, model, spread=uncertainty, precision=precision, compiled=compiled
    )
    make_runner()  # raises for settings that make no sense
    batch_size = batch_that_fits(model.backbone, tile) if batch_size is None else batch_size
    job = prepare(scene, wanted, tile, overlap, batch_size, gsd=gsd)
    facts = {**model_facts(model), "uncertainty": uncertainty, "precision": precision, "compiled": compiled}
    outcome = write_map(
        output,
        job.task(make_runner, encoding.inputs),
        job.grid,
        encoding,
        job=facts,
        engine=engine,
        overwrite=overwrite,
        progress=progress,
    )
    if png is not None:
        write_preview(scene, output, png)
    statistics, step = outcome.statistics, encoding.layer.scale
    count = statistics.count[0]
    return PredictionReport(
        output=output,
        preview=png,
        seconds=time.perf_counter() - began,
        tiles=outcome.tiles,
        valid_share=count / statistics.pixels,
        area_km2=count * job.grid.gsd_m**2 / 1e6,
        minimum_m=statistics.minimum[0] * step,
        mean_m=statistics.total[0] * step / count,
        maximum_m=statistics.maximum[0] * step,
        warnings=job.warnings,
    )


def predict_features(
    scene: str | Path,
    output: str | Path,
    *,
    backbone: Backbone,
    pca: int | None = None,
    dtype: str = "float32",
    image_scale: float = 1.0,
    gsd: PixelSize = None,
    tile: int = 512,
    overlap: int = 128,
    batch_size: int | None = None,
    compiled: bool = False,
    sample: Floats | None = None,
    engine: str = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "",
    source: str | Path | None = None,
) -> FeatureReport:
    """Writes the stitched patch features of a scene, one cell per patch.

    Features are those of the last block; where a patch holds no valid pixel there is no data. A run that was
    killed goes on where it was when it is started again.

    Args:
        scene: raster file.
        output: GeoTIFF, Zarr store (`.zarr`) or GeoParquet table (`.parquet`) to write; its cells are
            `patch size / image_scale` scene pixels wide.
        backbone: with a card, on the device to compute on.
        pca: keep this many principal components, fitted on patches from all over the scene; None for all
            dimensions.
        dtype: "float32"; "int8" with a scale; in stores also "float16".
        image_scale: the scene is made this many times larger before the backbone sees it.
        gsd: as `predict_canopy`; cells follow it.
        tile: side of a tile in pixels, rounded down to whole patches.
        overlap: pixels that neighbouring tiles share, rounded down to whole patches.
        batch_size: tiles per forward pass; None for as many as suit the device.
        compiled: see `predict_canopy`.
        sample: [N, D] features that components and the scale of 8-bit numbers are fitted on, the same for
            all scenes of a set (`sample_scenes`); None for patches of this scene.
        engine: see `predict_canopy`.
        overwrite: whether an existing output may be replaced.
        progress: told about tiles done.
        command: written into the file's tags.
        source: name or path of the backbone's weights, written there too: a model that is fitted from the
            features finds them by it.

    Raises:
        RasterError, GeoreferenceError, DataError: as `predict_canopy`.
        ConfigError: likewise, more than 512 bands, a type that the file cannot hold, or a store whose package
            is not installed.
    """
    began = time.perf_counter()
    scene, output = Path(scene), Path(output)
    check_engine(engine)
    wanted = ModelInput.of_backbone(backbone)
    stride = pixels_per_patch(backbone.patch_size, image_scale)
    is_store = output.suffix.lower() in WRITERS
    _check_features(output, backbone.embed_dim if pca is None else pca, dtype, is_store=is_store)
    if output.suffix.lower() != ".zarr":
        check_target(output, sources=(scene,), overwrite=overwrite)
    if batch_size is None:
        batch_size = batch_that_fits(backbone, tile, image_scale=image_scale)
    job = prepare(scene, wanted, tile, overlap, batch_size, stride=stride, gsd=gsd)
    make_features = functools.partial(feature_runner, backbone, image_scale=image_scale, compiled=compiled)
    names = tuple(f"feature {number}" for number in range(backbone.embed_dim))
    make_runner: Callable[[], RunTiles] = make_features
    explained: tuple[float, ...] = ()
    if sample is None and (pca is not None or dtype == "int8"):
        sample = job.sample(make_features())
    sample = np.zeros((1, 1), np.float32) if sample is None else np.ascontiguousarray(sample)
    about = FeatureFacts.of(
        backbone, source=source, image_scale=image_scale, scene_hw=job.grid.shape_hw, components=pca
    )
    facts = {
        "weights": about.weights,
        "pca": pca,
        "image_scale": image_scale,
        "compiled": compiled,
        "sample": hashlib.sha256(sample.tobytes()).hexdigest(),
    }
    if pca is not None:
        basis = fit_pca(sample, components=pca)
        sample = basis.project(sample)
        make_runner = functools.partial(_pca_of, make_features, basis)
        names = tuple(f"principal component {number}" for number in range(1, pca + 1))
        explained = tuple(float(share) for share in basis.explained)
    stored = StoredType.fitted(dtype, sample)
    tags = file_tags(wanted.name, command) | about.tags
    task = job.task(make_runner, len(names))
    if is_store:
        store = functools.partial(write_store, output, task, job.cells, names, stored, attributes=tags)
        tiles, patches = store(job=facts, engine=engine, overwrite=overwrite, progress=progress)
    else:
        encoding = feature_encoding(names, stored, tags=tags)
        write = functools.partial(write_map, output, task, job.cells, encoding)
        outcome = write(job=facts, engine=engine, overwrite=overwrite, progress=progress)
        tiles, patches = outcome.tiles, outcome.statistics.count[0]
    return FeatureReport(
        output=output,
        seconds=time.perf_counter() - began,
        tiles=tiles,
        grid_hw=job.cells.shape_hw,
        dimensions=len(names),
        valid_share=patches / (job.cells.height * job.cells.width),
        explained=explained,
        warnings=job.warnings,
    )


def sample_scenes(
    scenes: Sequence[Path],
    backbone: Backbone,
    *,
    image_scale: float = 1.0,
    gsd: PixelSize = None,
    tile: int = 512,
    overlap: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Floats, tuple[Path, ...]]:
    """Features of patches from all over a set of scenes, for components that mean the same in all of them.

    Args:
        scenes: raster files.
        backbone: with a card, on the device to compute on.
        image_scale: as `predict_features`.
        gsd: likewise.
        tile: likewise.
        overlap: likewise.
        progress: told about scenes done.

    Returns:
        [N, D], N at most 20,000, about as many from each scene, and the scenes without a valid pixel.

    Raises:
        DataError: none of the scenes holds a valid pixel.
        RasterError, GeoreferenceError, ConfigError: as `predict_features`.
    """
    wanted, stride = ModelInput.of_backbone(backbone), pixels_per_patch(backbone.patch_size, image_scale)
    features = feature_runner(backbone, image_scale=image_scale)
    tiles, patches = (-(-limit // len(scenes)) for limit in (_SAMPLED_TILES, _SAMPLED_PATCHES))
    found: list[Floats] = []
    empty: list[Path] = []
    for number, scene in enumerate(scenes, start=1):
        job = prepare(scene, wanted, tile, overlap, 1, stride=stride, gsd=gsd)
        try:
            found.append(job.sample(features, max_tiles=tiles, max_patches=patches))
        except EmptySceneError:
            empty.append(scene)
        if progress is not None:
            progress(number, len(scenes))
    if not found:
        raise DataError(f"none of the {len(scenes)} scenes holds a valid pixel: all of them are nodata")
    return np.concatenate(found), tuple(empty)


def _check_features(output: Path, dimensions: int, dtype: str, *, is_store: bool) -> None:
    """Raises `ConfigError` for features that the output cannot hold."""
    if dtype not in STORED:
        raise ConfigError(f"unknown type of features {dtype!r}; valid names: {', '.join(STORED)}")
    if is_store:
        return
    if dtype == "float16":
        raise ConfigError(
            f"{output}: GeoTIFFs hold float32 or int8 features; float16 goes into .zarr or .parquet"
        )
    if dimensions > MAX_BANDS:
        raise ConfigError(
            f"{dimensions} bands are too many for a GeoTIFF, expected at most {MAX_BANDS}; keep the first K "
            "principal components (--pca K), or write a .zarr"
        )


def _pca_of(make_features: Callable[[], RunTiles], basis: PcaBasis) -> RunTiles:
    return pca_runner(make_features(), basis)
