"""The only writer of georeferenced files: windows in, cloud-optimised GeoTIFF out, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import DTypeLike, NDArray
from rasterio.env import get_gdal_config, set_gdal_config
from rasterio.errors import RasterioError
from rasterio.io import DatasetWriter
from rasterio.windows import Window

from dinov3geo.errors import DataError, RasterError
from dinov3geo.paths import check_free
from dinov3geo.rasters.grid import PixelGrid

Overviews = Literal["average", "mode", "nearest"]

# Blocks hold all bands side by side: one of 192 bands of float32 takes 12 MiB.
_BLOCK, _BLOCK_OF_MANY_BANDS, _FEW_BANDS = 512, 128, 4
# A copy needs no more than some rows of blocks.
_CACHE_BYTES = 128 * 2**20


class GeoTiffWriter:
    """Writes a raster window by window; a context manager.

    Windows go to an uncompressed tiled GeoTIFF in a hidden folder beside the output. When the block ends
    without an error it is copied to a COG (DEFLATE, overviews, blocks of 512 pixels or, beyond 4 bands, 128),
    which then takes the output's name; after an error nothing is left.

    Rasters whose rows run northwards keep their grid (see `write`).
    """

    def __init__(
        self,
        path: str | Path,
        grid: PixelGrid,
        *,
        count: int,
        dtype: DTypeLike,
        nodata: float | None,
        band_names: Sequence[str] = (),
        units: str = "",
        tags: Mapping[str, str] | None = None,
        overviews: Overviews = "average",
        overwrite: bool = False,
    ) -> None:
        """Checks the arguments; files are made on entering the context.

        Args:
            path: output; missing folders are made.
            grid: where the raster lies.
            count: bands.
            dtype: of the stored numbers.
            nodata: number at pixels without data, or None.
            band_names: one per band, or none.
            units: of all bands, e.g. "m".
            tags: metadata of the file.
            overviews: how they are computed: "average" for measurements, "mode" or "nearest" for classes.
            overwrite: whether an existing output may be replaced.

        Raises:
            RasterError: the output exists (and overwrite is off) or is a folder.
            DataError: nodata does not fit dtype, or not one name per band.
        """
        self.path = Path(path)
        self.grid = grid
        self.count = count
        self.dtype = np.dtype(dtype)
        self._tags = dict(tags or {})
        self._names = tuple(band_names)
        self._units = units
        self._nodata = nodata
        self._overviews = overviews
        self._overwrite = overwrite
        if self._names and len(self._names) != count:
            raise DataError(f"{path}: {len(self._names)} band names for {count} bands, expected one per band")
        if nodata is not None and not _fits(nodata, self.dtype):
            raise DataError(f"{path}: nodata {nodata} does not fit numbers of type {self.dtype}")
        self._block = _BLOCK if count <= _FEW_BANDS else _BLOCK_OF_MANY_BANDS
        check_free(self.path, overwrite=overwrite)
        self._dataset: DatasetWriter | None = None
        self._folder: Path | None = None
        self._made_folders: list[Path] = []

    def __enter__(self) -> Self:
        """Makes the temporary file.

        Raises:
            RasterError: the output's folder cannot be made or written to.
        """
        try:
            with _errors(self.path):
                self._make_folders()
                self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
                self._dataset = rasterio.open(self._folder / "windows.tif", "w", **self._profile())
                self._describe(self._dataset)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the output, or removes everything after an error.

        Raises:
            RasterError: the output cannot be written.
        """
        if kind is not None:
            self._abandon()
            return
        try:
            with _errors(self.path):
                self._finish()
        except BaseException:
            self._abandon()
            raise

    def write(self, window: Window, array: NDArray[Any]) -> None:
        """Writes one window.

        Args:
            window: whole pixels inside the grid; row 0 is the grid's first row, whichever way rows run.
            array: [C, h, w]; numbers of another type are cast if that loses no kind (not float to integer).

        Raises:
            DataError: the array's shape or type does not fit.
            RasterError: the disk refuses.
        """
        if self._dataset is None:
            raise RuntimeError("GeoTiffWriter.write outside of its with block")
        expected = (self.count, round(window.height), round(window.width))
        if array.shape != expected:
            raise DataError(f"{self.path}: window of shape {expected} expected, got {array.shape}")
        if not np.can_cast(array.dtype, self.dtype, casting="same_kind"):
            raise DataError(f"{self.path}: numbers of type {self.dtype} expected, got {array.dtype}")
        rows = window.row_off >= 0 and window.row_off + window.height <= self.grid.height
        cols = window.col_off >= 0 and window.col_off + window.width <= self.grid.width
        if not (rows and cols):
            raise DataError(f"{self.path}: {window} reaches beyond the raster of {self.grid.shape_hw} pixels")
        with _errors(self.path):
            self._dataset.write(array.astype(self.dtype, copy=False), window=window)

    def _profile(self) -> dict[str, Any]:
        """Creation options of the temporary file: uncompressed, so that a block may be written again."""
        return {
            "driver": "GTiff",
            "crs": self.grid.crs,
            "transform": self.grid.transform,
            "height": self.grid.height,
            "width": self.grid.width,
            "count": self.count,
            "dtype": self.dtype.name,
            "nodata": self._nodata,
            "tiled": True,
            "blockxsize": self._block,
            "blockysize": self._block,
            "interleave": "pixel" if self.count <= _FEW_BANDS else "band",
            "bigtiff": "IF_SAFER",
        }

    def _describe(self, dataset: DatasetWriter) -> None:
        dataset.update_tags(**self._tags)
        if self._units:
            dataset.units = (self._units,) * self.count
        for band, name in enumerate(self._names, start=1):
            dataset.set_band_description(band, name)

    def _finish(self) -> None:
        """Copies the windows to a COG and gives it the output's name."""
        assert self._dataset is not None and self._folder is not None
        self._dataset.close()
        final = self._folder / self.path.name
        with block_cache(_CACHE_BYTES):
            rasterio.shutil.copy(
                self._folder / "windows.tif",
                final,
                driver="COG",
                COMPRESS="DEFLATE",
                PREDICTOR="YES",
                BLOCKSIZE=str(self._block),
                OVERVIEWS="AUTO",
                OVERVIEW_RESAMPLING=self._overviews.upper(),
                BIGTIFF="IF_SAFER",
                NUM_THREADS="ALL_CPUS",
            )
        check_free(self.path, overwrite=self._overwrite)
        os.replace(final, self.path)
        shutil.rmtree(self._folder)

    def _make_folders(self) -> None:
        """Makes the output's missing folders and remembers them, to take them away after an error."""
        missing = [p for p in (self.path.parent, *self.path.parent.parents) if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            self._made_folders.append(folder)

    def _abandon(self) -> None:
        """Removes everything this writer made."""
        if self._dataset is not None and not self._dataset.closed:
            try:
                self._dataset.close()
            except RasterioError:
                pass  # flushing may fail again on the disk that failed before; the file goes anyway
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        for folder in reversed(self._made_folders):
            try:
                folder.rmdir()
            except OSError:
                break  # somebody else has put something there


def write_geotiff(
    path: str | Path,
    array: NDArray[Any],
    grid: PixelGrid,
    *,
    nodata: float | None,
    band_names: Sequence[str] = (),
    units: str = "",
    tags: Mapping[str, str] | None = None,
    overviews: Overviews = "average",
    overwrite: bool = False,
) -> None:
    """Writes a whole array [C, H, W] (or [H, W]) at once; arguments and errors as `GeoTiffWriter`."""
    bands = array[None] if array.ndim == 2 else array
    with GeoTiffWriter(
        path,
        grid,
        count=bands.shape[0],
        dtype=bands.dtype,
        nodata=nodata,
        band_names=band_names,
        units=units,
        tags=tags,
        overviews=overviews,
        overwrite=overwrite,
    ) as writer:
        writer.write(Window(0, 0, grid.width, grid.height), bands)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Re-raises what GDAL and the file system say, with the output's name."""
    try:
        yield
    except RasterError:
        raise
    except PermissionError as error:
        raise RasterError(f"cannot write {path}: the folder is not writable ({error.strerror})") from error
    except (OSError, RasterioError) as error:
        raise RasterError(f"cannot write {path}: {error}") from error


@contextmanager
def block_cache(limit_bytes: int) -> Iterator[None]:
    """Caps GDAL's block cache meanwhile; long scenes would fill it, by default 5 % of the machine's memory.

    `rasterio.Env` would set the cap but not set it back.
    """
    before = get_gdal_config("GDAL_CACHEMAX")
    set_gdal_config("GDAL_CACHEMAX", min(before, limit_bytes))
    try:
        yield
    finally:
        set_gdal_config("GDAL_CACHEMAX", before)


def _fits(number: float, dtype: np.dtype[Any]) -> bool:
    """Whether a number of this type can equal `number`."""
    if np.issubdtype(dtype, np.floating):
        return True
    limits = np.iinfo(dtype)
    return np.isfinite(number) and number == int(number) and limits.min <= number <= limits.max
