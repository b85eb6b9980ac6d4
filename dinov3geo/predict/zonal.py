"""Statistics of a map within polygons, with pixels on the border counted by the share that lies inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import geopandas
import rasterio
from rasterio.errors import RasterioError

from dinov3geo.errors import ConfigError, DataError, GeoreferenceError, RasterError, UnknownNameError
from dinov3geo.paths import check_target
from dinov3geo.predict.landcover import write_vector
from dinov3geo.predict.sidecars import class_names

STATISTICS = ("count", "mean", "min", "max", "median", "stdev", "sum", "majority", "variety")
DEFAULT_STATISTICS = ("count", "mean", "stdev", "min", "max")
OUTPUT_SUFFIXES = (".gpkg", ".parquet", ".csv")


def zonal_statistics(
    raster: str | Path, zones: str | Path, *, statistics: Sequence[str] = ()
) -> geopandas.GeoDataFrame:
    """Statistics of a raster's values within each polygon of a vector file.

    Args:
        raster: map; its scale is applied, pixels without data do not count.
        zones: vector file of polygons in any CRS; they are taken to that of the raster.
        statistics: names in `STATISTICS`; none for the usual ones. A map of classes gives instead the area of
            each class, so it takes none.

    Returns:
        The zones in the raster's CRS with one column per statistic (`mean`, ...; with several bands
        `band_1_mean`, ...), or for classes `area_NAME` in square metres of the raster's CRS.

    Raises:
        ConfigError: exactextract is not installed, or statistics were asked of a map of classes.
        UnknownNameError: no such statistic.
        DataError: no polygons.
        GeoreferenceError: zones without CRS.
        RasterError: a file cannot be read.
    """
    for name in statistics:
        if name not in STATISTICS:
            raise UnknownNameError("statistic", name, STATISTICS)
    try:
        from exactextract import exact_extract
    except ImportError as error:
        raise ConfigError(
            "zonal statistics need exactextract; install it: pip install 'dinov3geo[zonal]'"
        ) from error
    frame = _read_zones(Path(zones))
    names = class_names(Path(raster))
    if names and statistics:
        raise ConfigError(
            f"{raster} is a map of classes: it gives the area of each class, no other statistics"
        )
    try:
        with rasterio.open(raster) as dataset:
            frame = frame.to_crs(dataset.crs)
            pixel_area = abs(dataset.transform.a * dataset.transform.e)
    except RasterioError as error:
        raise RasterError(f"cannot read {raster}: {error}") from error
    wanted = ["count", "frac", "unique"] if names else list(statistics or DEFAULT_STATISTICS)
    found = exact_extract(str(raster), frame[["geometry"]], wanted, output="pandas")
    if names:
        for number, name in enumerate(names):
            shares = [
                dict(zip(values, parts, strict=True)).get(number, 0.0)
                for values, parts in zip(found["unique"], found["frac"], strict=True)
            ]
            frame[f"area_{name}"] = found["count"].to_numpy() * shares * pixel_area
        return frame
    for column in found.columns:  # in the map's unit: exactextract applies the scale of the file
        frame[column] = found[column].to_numpy()
    return frame


def write_zonal_statistics(
    raster: str | Path,
    zones: str | Path,
    output: str | Path,
    *,
    statistics: Sequence[str] = (),
    overwrite: bool = False,
) -> int:
    """Writes `zonal_statistics` as GeoPackage, GeoParquet, or CSV without the polygons.

    Returns:
        Number of zones.

    Raises:
        ConfigError, DataError, GeoreferenceError, RasterError: as `zonal_statistics`; also another suffix, or
            an output that exists.
    """
    output = Path(output)
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        listed = ", ".join(OUTPUT_SUFFIXES)
        raise ConfigError(f"cannot write {output}: expected a name that ends in one of {listed}")
    check_target(output, sources=(Path(raster), Path(zones)), overwrite=overwrite)
    frame = zonal_statistics(raster, zones, statistics=statistics)
    if output.suffix.lower() == ".csv":
        try:
            frame.drop(columns="geometry").to_csv(output, index=False)
        except OSError as error:
            raise RasterError(f"cannot write {output}: {error.strerror or error}") from error
    else:
        write_vector(frame, output)
    return len(frame)


def _read_zones(path: Path) -> geopandas.GeoDataFrame:
    if not path.exists():
        raise RasterError(f"no such file: {path}")
    try:
        frame = geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)
    except (RuntimeError, OSError, ValueError) as error:
        raise RasterError(f"{path} cannot be read as a vector file: {error}") from error
    if not isinstance(frame, geopandas.GeoDataFrame) or not len(frame):
        raise DataError(f"{path} holds no polygons")
    if frame.crs is None:
        raise GeoreferenceError(f"{path} has no coordinate reference system; assign it, e.g. ogr2ogr -a_srs")
    if not frame.geom_type.isin(["Polygon", "MultiPolygon"]).all():
        kinds = ", ".join(sorted(set(frame.geom_type.dropna())))
        raise DataError(f"{path} holds {kinds or 'empty geometries'}, expected polygons only")
    return frame
