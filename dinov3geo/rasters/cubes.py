"""Zarr stores and NetCDF files through xarray and rioxarray: every time step is a scene.

GDAL reads them as well where it was built so, but knows neither the names of bands nor of dimensions.
"""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Interleaving, MaskFlags
from rasterio.windows import Window

from dinov3geo.errors import (
    ConfigError,
    DataError,
    GeoreferenceError,
    RasterError,
    UnknownNameError,
    one_line,
)

CUBE_SUFFIXES = (".zarr", ".nc", ".nc4")
_MARK = "#"
_ADDRESS = re.compile(
    r"(?P<file>.+\.(?:zarr|nc|nc4))#(?P<variables>[^()\[\]]+)(?:\((?P<bands>[^()]+)\))?\[(?P<step>\d+)\]",
    re.DOTALL | re.IGNORECASE,
)
# Steps between coordinates differ by less than this share of a pixel where they are a regular grid.
_REGULAR = 1e-3
_KEPT_OPEN = 8

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Address:
    """One scene of a cube.

    Attributes:
        file: store or file.
        variables: whose numbers are read; several are the bands.
        bands: labels along the dimension of bands of a single variable, in the order read; None for all.
        step: number along the dimension of time.
    """

    file: Path
    variables: tuple[str, ...]
    bands: tuple[str, ...] | None
    step: int

    def path(self) -> Path:
        bands = "" if self.bands is None else f"({','.join(self.bands)})"
        return Path(f"{self.file}{_MARK}{','.join(self.variables)}{bands}[{self.step}]")


def named_cubes(spec: str | Path) -> list[tuple[Path, str]]:
    """Files and variable ("" for whichever there is) where a text or glob names cubes, else nothing."""
    name, _, variable = str(spec).partition(_MARK)
    path = Path(name).expanduser()
    if path.suffix.lower() not in CUBE_SUFFIXES or _ADDRESS.fullmatch(str(spec)):
        return []
    if path.exists():
        return [(path, variable)]
    return [(Path(found), variable) for found in sorted(glob.glob(str(path), recursive=True))]


def cube_scenes(file: Path, variable: str, wanted: Sequence[Sequence[str]]) -> list[Path]:
    """One path for each time step of a cube, which `SceneReader` opens.

    Args:
        file: Zarr store or NetCDF file.
        variable: to read; "" where there is one with rows and columns, or where all are bands of their own.
        wanted: for each band the names that it may have in the cube, in the order that they are read; where
            the cube has none of them, all its bands count by position. Empty: all bands.

    Raises:
        RasterError: no cube.
        DataError: nothing in it has rows and columns, several variables do, or a band is missing.
        UnknownNameError: no such variable.
        ConfigError: xarray or rioxarray is not installed.
    """
    dataset = _dataset(file)
    rasters = [str(name) for name, array in dataset.data_vars.items() if _has_rows(array)]
    if variable and variable not in rasters:
        raise UnknownNameError(f"variable of {file}", variable, rasters)
    names = [variable] if variable else rasters
    if not names:
        raise DataError(
            f"{file} holds no variable with x and y; it holds {', '.join(map(str, dataset)) or 'none'}"
        )
    several = len(names) > 1
    if several and any(_band_dimension(dataset[name]) for name in names):
        raise DataError(
            f"{file} holds several variables with bands ({', '.join(names)}); name one, e.g. "
            f"{file.name}{_MARK}{names[0]}"
        )
    labels = names if several else _band_names(dataset[names[0]])
    chosen = _choose(labels, wanted, file)
    times = _time_dimension(dataset[names[0]])
    count = 1 if times is None else dataset.sizes[times]
    variables = tuple(chosen or names) if several else tuple(names)
    bands = None if several or chosen is None else tuple(chosen)
    return [_Address(file, variables, bands, step).path() for step in range(count)]


def open_cube(path: Path) -> CubeScene | None:
    """The scene that a path of `cube_scenes` names; None for other paths."""
    match = _ADDRESS.fullmatch(str(path))
    if match is None:
        return None
    bands = match["bands"]
    variables = tuple(match["variables"].split(","))
    labels = None if bands is None else tuple(bands.split(","))
    return CubeScene(_Address(Path(match["file"]), variables, labels, int(match["step"])))


class CubeScene:
    """One time step of a cube with as much of rasterio's `DatasetReader` as `SceneReader` uses.

    Numbers are those stored: scale and offset are the sensor's business. `_FillValue` or `missing_value` is
    nodata, and NaN is where numbers are fractions and nothing is declared.
    """

    driver = "xarray"
    gcps: tuple[list[Any], None] = ([], None)

    def __init__(self, address: _Address) -> None:
        """Finds variables, bands and position.

        Raises:
            GeoreferenceError: no reference system, or coordinates that are no regular grid.
            DataError: bands of several types or shapes.
        """
        dataset = _dataset(address.file)
        self.name = str(address.path())
        parts = [self._layers(dataset[name], address) for name in address.variables]
        self._layers_of = [layer for part in parts for layer in part]
        first = self._layers_of[0]
        kinds = {(layer.dtype, layer.shape) for layer in self._layers_of}
        if len(kinds) > 1:
            listed = ", ".join(sorted(f"{dtype} {shape}" for dtype, shape in kinds))
            raise DataError(f"the bands of {self.name} differ in type or shape: {listed}; name one variable")
        self.shape: tuple[int, int] = first.shape
        self.height, self.width = self.shape
        self.count = len(self._layers_of)
        self.dtypes = (first.dtype.name,) * self.count
        self.nodatavals = tuple(_nodata(layer) for layer in self._layers_of)
        self.descriptions = self._names(dataset, address)
        self.colorinterp = (ColorInterp.undefined,) * self.count
        self.interleaving = Interleaving.band
        self.mask_flag_enums = ([MaskFlags.nodata],) * self.count
        self.block_shapes = [_chunk(dataset[address.variables[0]], first)] * self.count
        self.crs = _crs(dataset, dataset[address.variables[0]], self.name)
        self.transform = _transform(first, self.name)
        self.moment = _moment(dataset[address.variables[0]], address.step)

    def __enter__(self) -> Self:
        """Returns the scene."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the scene."""
        self.close()

    def close(self) -> None:
        """Does nothing: open stores are shared by the scenes of a process, and few."""

    def read(self, indexes: int | list[int], *, window: Window, out_dtype: Any = None) -> Array:  # noqa: ANN401
        """Numbers [C, h, w], or [h, w] of one index; see rasterio.

        Raises:
            RasterError: the store is damaged.
        """
        row, col = int(window.row_off), int(window.col_off)
        rows, cols = slice(row, row + int(window.height)), slice(col, col + int(window.width))
        wanted = [indexes] if isinstance(indexes, int) else indexes
        try:
            numbers = [np.asarray(self._layers_of[index - 1][rows, cols].values) for index in wanted]
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise RasterError(f"cannot read {self.name}: {one_line(str(error))}") from error
        stacked = np.stack(numbers).astype(out_dtype or self.dtypes[0], copy=False)
        return stacked[0] if isinstance(indexes, int) else stacked

    def _layers(self, array: Any, address: _Address) -> list[Any]:  # noqa: ANN401 (of xarray)
        """The bands of a variable, each with rows and columns only."""
        y, x = _axes(array)
        time, band = _time_dimension(array), _band_dimension(array)
        if time is not None:
            if address.step >= array.sizes[time]:
                raise DataError(
                    f"{address.file} has {array.sizes[time]} time steps, {self.name} is none of them"
                )
            array = array.isel({time: address.step})
        if band is None:
            return [array.transpose(y, x)]
        names = _band_names(array)
        wanted = names if address.bands is None else address.bands
        return [array.isel({band: names.index(name)}).transpose(y, x) for name in wanted]

    def _names(self, dataset: Any, address: _Address) -> tuple[str, ...]:  # noqa: ANN401
        if len(address.variables) > 1:
            return address.variables
        return address.bands or tuple(_band_names(dataset[address.variables[0]]))


@functools.lru_cache(maxsize=_KEPT_OPEN)
def _opened(path: str, stamp: int, process: int) -> Any:  # noqa: ANN401
    """An open cube, which scenes of one process share (the last two arguments only tell cubes apart)."""
    try:
        import rioxarray  # noqa: F401 (adds `.rio`)
        import xarray
    except ImportError as error:
        raise ConfigError(
            "Zarr and NetCDF scenes need xarray and rioxarray; install them: pip install 'dinov3geo[cubes]'"
        ) from error
    engine = "zarr" if path.lower().endswith(".zarr") else None
    try:
        return xarray.open_dataset(
            path, engine=engine, mask_and_scale=False, decode_coords="all", cache=False
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
        raise RasterError(
            f"{path} cannot be opened by xarray ({one_line(str(error))[:300]}); expected a Zarr group or a "
            "NetCDF file (version 4 needs h5netcdf or netCDF4)"
        ) from error


def _dataset(file: Path) -> Any:  # noqa: ANN401
    try:
        stamp = file.stat().st_mtime_ns
    except OSError as error:
        raise RasterError(f"no such file: {file}") from error
    return _opened(str(file), stamp, os.getpid())


def _axes(array: Any) -> tuple[str, str]:  # noqa: ANN401
    """Names of the dimensions of rows and columns."""
    return array.rio.y_dim, array.rio.x_dim


def _has_rows(array: Any) -> bool:  # noqa: ANN401
    from rioxarray.exceptions import MissingSpatialDimensionError

    try:
        return set(_axes(array)) <= set(array.dims)
    except MissingSpatialDimensionError:
        return False


def _time_dimension(array: Any) -> str | None:  # noqa: ANN401
    """The dimension whose coordinates are dates, or that is called time."""
    for name in array.dims:
        dated = name in array.coords and np.issubdtype(array.coords[name].dtype, np.datetime64)
        if dated or name in ("time", "t"):
            return str(name)
    return None


def _band_dimension(array: Any) -> str | None:  # noqa: ANN401
    """The dimension that is neither time nor rows nor columns."""
    others = [str(name) for name in array.dims if name not in (*_axes(array), _time_dimension(array))]
    if len(others) > 1:
        raise DataError(
            f"variable {array.name} has the dimensions {', '.join(map(str, array.dims))}; expected rows, "
            "columns and at most one of time and one of bands"
        )
    return others[0] if others else None


def _band_names(array: Any) -> list[str]:  # noqa: ANN401
    """Labels of the bands, or the variable's own name."""
    band = _band_dimension(array)
    if band is None:
        return [str(array.name)]
    if band in array.coords:
        return [str(label) for label in array.coords[band].values.tolist()]
    return [str(number) for number in range(1, array.sizes[band] + 1)]


def _choose(labels: Sequence[str], wanted: Sequence[Sequence[str]], file: Path) -> list[str] | None:
    """The label of each wanted band; None where the cube does not call its bands by these names."""
    found = [next((name for name in names if name in labels), None) for names in wanted]
    if all(name is None for name in found):
        return None
    missing = [names[0] for names, name in zip(wanted, found, strict=True) if name is None]
    if missing:
        raise DataError(f"{file} lacks band {', '.join(missing)}; it has {', '.join(labels)}")
    return [name for name in found if name is not None]


def _nodata(array: Any) -> float | None:  # noqa: ANN401
    for key in ("_FillValue", "missing_value"):
        if key in array.attrs:
            return float(array.attrs[key])
    return float("nan") if np.issubdtype(array.dtype, np.floating) else None


def _chunk(array: Any, layer: Any) -> tuple[int, int]:  # noqa: ANN401
    """Rows and columns that are decoded at once."""
    preferred = array.encoding.get("preferred_chunks") or {}
    y, x = layer.dims
    return int(preferred.get(y, layer.sizes[y])), int(preferred.get(x, layer.sizes[x]))


def _crs(dataset: Any, array: Any, name: str) -> CRS:  # noqa: ANN401
    found = array.rio.crs
    if found is None:
        # Whoever writes with `encoding=` loses the variable's mark that leads to the reference system.
        texts = {v.attrs["crs_wkt"] for v in dataset.variables.values() if "crs_wkt" in v.attrs}
        found = CRS.from_wkt(texts.pop()) if len(texts) == 1 else None
    if found is None:
        raise GeoreferenceError(
            f"{name} has no coordinate reference system; write it with rioxarray, e.g. "
            'dataset.rio.write_crs("EPSG:32617")'
        )
    return CRS.from_wkt(found.to_wkt())


def _transform(layer: Any, name: str) -> Affine:  # noqa: ANN401
    """From the coordinates of pixel centres."""
    steps = []
    for axis in (layer.dims[1], layer.dims[0]):
        values = (
            np.asarray(layer.coords[axis].values, dtype=np.float64) if axis in layer.coords else np.empty(0)
        )
        if len(values) < 2:
            raise GeoreferenceError(f"{name} needs coordinates of at least two pixels along {axis}")
        step = (values[-1] - values[0]) / (len(values) - 1)
        if step == 0 or not np.allclose(np.diff(values), step, rtol=0, atol=_REGULAR * abs(step)):
            raise GeoreferenceError(
                f"the coordinates of {name} along {axis} are no regular grid; resample it first"
            )
        steps.append((values[0] - step / 2, step))
    (left, width), (top, height) = steps
    return Affine(width, 0.0, left, 0.0, height, top)


def _moment(array: Any, step: int) -> str | None:  # noqa: ANN401
    """When a step was seen, as ISO text; None if the cube does not say."""
    time = _time_dimension(array)
    if time is None or time not in array.coords:
        return None
    value = array.coords[time].values[step]
    return str(value) if np.issubdtype(value.dtype, np.datetime64) else None
