"""Land cover of a scene: the most probable class per pixel, how sure it is, and polygons with their area."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import geopandas
import numpy as np
import pyproj
import rasterio
import rasterio.features
from rasterio.errors import RasterioError
from shapely.geometry import shape

from dinov3geo.errors import ConfigError, RasterError
from dinov3geo.paths import check_target
from dinov3geo.predict.batches import batch_that_fits
from dinov3geo.predict.encodings import Encoding, class_encoding, entropy_encoding, probability_encoding
from dinov3geo.predict.engines import Progress, check_engine, write_maps
from dinov3geo.predict.jobs import file_tags, model_facts, model_input, prepare
from dinov3geo.predict.pixel_size import PixelSize
from dinov3geo.predict.runners import ClassModel, class_runner
from dinov3geo.predict.sidecars import class_names

VECTOR_SUFFIXES = (".gpkg", ".parquet")


@dataclass(frozen=True, slots=True)
class LandcoverReport:
    """What a land-cover prediction did.

    Attributes:
        output: the GeoTIFF of classes.
        seconds: wall time.
        tiles: tiles run.
        valid_share: valid pixels over all pixels.
        warnings: what the user should know, one line each.
    """

    output: Path
    seconds: float
    tiles: int
    valid_share: float
    warnings: tuple[str, ...]


def predict_landcover(
    scene: str | Path,
    output: str | Path,
    *,
    model: ClassModel,
    uncertainty: str | Path | None = None,
    probabilities: str | Path | None = None,
    gsd: PixelSize = None,
    tile: int = 512,
    overlap: int = 128,
    batch_size: int | None = None,
    precision: str = "auto",
    compiled: bool = False,
    engine: str = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "",
    model_name: str = "",
) -> LandcoverReport:
    """Predicts the land cover of a scene into a cloud-optimised GeoTIFF of classes.

    Probabilities of overlapping tiles are blended before the class is chosen. The output is uint8 with a
    colour table, names of the classes in its tags and nodata 255.

    Args:
        scene: raster file of any size.
        output: GeoTIFF of classes to write.
        model: backbone and class probabilities, on the device to compute on.
        uncertainty: GeoTIFF of the entropy of the probabilities to write, 0 (sure) to 100 percent, or None.
        probabilities: GeoTIFF of the probabilities in percent to write, one band per class, or None.
        gsd: see `predict_canopy`.
        tile: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share and are blended over.
        batch_size: tiles per forward pass; None for as many as suit the device.
        precision: see `predict_canopy`.
        compiled: likewise.
        engine: see `predict_canopy`.
        overwrite: whether existing outputs may be replaced.
        progress: told about tiles done.
        command: written into the files' tags.
        model_name: likewise, and named in messages; "" for the name in the backbone's card.

    Raises:
        RasterError, GeoreferenceError, DataError, ConfigError: as `predict_canopy`; also a model without
            class names.
    """
    began = time.perf_counter()
    scene, output = Path(scene), Path(output)
    check_engine(engine)
    names = model.output.class_names
    wanted = model_input(model, model_name)
    tags = file_tags(wanted.name, command)
    outputs: list[tuple[Path, Encoding]] = [(output, class_encoding(model.output, tags=tags))]
    if uncertainty is not None:
        outputs.append((Path(uncertainty), entropy_encoding(len(names), tags=tags)))
    if probabilities is not None:
        outputs.append((Path(probabilities), probability_encoding(names, tags=tags)))
    if len({path.resolve() for path, _ in outputs}) < len(outputs):
        raise ConfigError("classes, uncertainty and probabilities need names of their own")
    for path, _ in outputs:
        check_target(path, sources=(scene,), overwrite=overwrite)
    batch_size = batch_that_fits(model.backbone, tile) if batch_size is None else batch_size
    job = prepare(scene, wanted, tile, overlap, batch_size, gsd=gsd)
    make_runner = functools.partial(class_runner, model, precision=precision, compiled=compiled)
    make_runner()  # raises for settings that make no sense
    outcome = write_maps(
        outputs,
        job.task(make_runner, len(names)),
        job.grid,
        job={**model_facts(model), "precision": precision, "compiled": compiled},
        engine=engine,
        overwrite=overwrite,
        progress=progress,
    )
    statistics = outcome.statistics
    return LandcoverReport(
        output,
        time.perf_counter() - began,
        outcome.tiles,
        statistics.count[0] / statistics.pixels,
        job.warnings,
    )


def write_polygons(
    classes: str | Path, output: str | Path, *, min_area_m2: float = 0.0, overwrite: bool = False
) -> int:
    """Turns a map of classes into polygons with class, name and area.

    Pixels that touch at a side belong to one polygon. Areas are those on the ellipsoid.

    Args:
        classes: GeoTIFF that `predict_landcover` wrote.
        output: `.gpkg` or `.parquet` (GeoParquet).
        min_area_m2: smaller polygons are left out.
        overwrite: whether an existing output may be replaced.

    Returns:
        Number of polygons.

    Raises:
        ConfigError: another suffix.
        RasterError: the map cannot be read or the output not written.
    """
    classes, output = Path(classes), Path(output)
    if output.suffix.lower() not in VECTOR_SUFFIXES:
        raise ConfigError(
            f"cannot write {output}: expected a name that ends in {' or '.join(VECTOR_SUFFIXES)}"
        )
    check_target(output, sources=(classes,), overwrite=overwrite)
    names = class_names(classes)
    try:
        with rasterio.open(classes) as dataset:
            crs = dataset.crs
            # GDAL goes through the raster row by row and keeps the polygons that are still open.
            found = [
                (shape(geometry), int(value))
                for geometry, value in rasterio.features.shapes(rasterio.band(dataset, 1))
                if dataset.nodata is None or value != dataset.nodata
            ]
    except RasterioError as error:
        raise RasterError(f"cannot read {classes}: {error}") from error
    numbers = [number for _, number in found]
    frame = geopandas.GeoDataFrame(
        {
            "class": np.array(numbers, dtype=np.int32),
            "name": [names[number] if number < len(names) else "" for number in numbers],
        },
        geometry=[geometry for geometry, _ in found],
        crs=crs,
    )
    ellipsoid = pyproj.Geod(ellps="WGS84")
    frame["area_m2"] = [
        abs(ellipsoid.geometry_area_perimeter(geometry)[0]) for geometry in frame.geometry.to_crs(4326)
    ]
    frame = frame[frame["area_m2"] >= min_area_m2].reset_index(drop=True)
    write_vector(frame, output)
    return len(frame)


def write_vector(frame: geopandas.GeoDataFrame, output: Path) -> None:
    """Writes a GeoPackage, or GeoParquet for `.parquet`, under a temporary name and renames it.

    Raises:
        RasterError: it cannot be written.
    """
    temporary = output.with_name(f".tmp_{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix.lower() == ".parquet":
            frame.to_parquet(temporary)
        else:
            frame.to_file(temporary, driver="GPKG", layer=output.stem)
        temporary.replace(output)
    except (OSError, ImportError) as error:
        raise RasterError(f"cannot write {output}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
