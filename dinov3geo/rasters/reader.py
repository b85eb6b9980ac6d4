"""Reads windows of rasters, always together with a mask of the pixels that hold data."""

from __future__ import annotations

import glob
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, Interleaving, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from dinov3geo.errors import DataError, RasterError
from dinov3geo.rasters.blocks import Block, BlockCache, block_side, read_through, worth_keeping
from dinov3geo.rasters.cubes import open_cube
from dinov3geo.rasters.grid import PixelGrid, aligned_window
from dinov3geo.rasters.lists import gdal_address, listed_rasters
from dinov3geo.rasters.sensor import Quality
from dinov3geo.rasters.stac import split_spec, stac_rasters
from dinov3geo.rasters.tiff import missing_bytes
from dinov3geo.rasters.warping import RESAMPLINGS, warp_onto

Array = NDArray[Any]
Mask = NDArray[np.bool_]

RASTER_SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2")
# Of an open GeoTIFF: its tags and GDAL's own records (measured), and offset and length of every block.
_HANDLE_BYTES, _BYTES_PER_BLOCK = 96 * 2**10, 16


@dataclass(frozen=True, slots=True)
class SceneInfo:
    """What a raster's header says.

    Attributes:
        path: the file.
        grid: its georeferenced lattice.
        num_bands: bands in the file, alpha included.
        dtype: numpy name of the first band's numbers.
        nodata: declared number per band, None where there is none.
        band_names: descriptions per band, "" where there is none.
        colours: colour interpretation per band, e.g. "red", "gray", "alpha", "undefined".
        source: what GDAL opens where that is not the file itself, e.g. the text of a virtual raster.
        moment: when it was seen, ISO 8601, where the file itself says so.
    """

    path: Path
    grid: PixelGrid
    num_bands: int
    dtype: str
    nodata: tuple[float | None, ...]
    band_names: tuple[str, ...]
    colours: tuple[str, ...]
    source: str | None = None
    moment: str | None = None


def find_rasters(spec: str | Path | Sequence[str | Path]) -> list[Path]:
    """Lists raster files.

    Args:
        spec: a folder (searched recursively for *.tif, *.tiff, *.vrt, *.jp2 in any case; hidden files are
            skipped), a file (any name), a glob such as `plots/**/*_rgb.tif`, a list (see
            `lists.listed_rasters`), a STAC document (`items.json` or, as STAC-GeoParquet, `items.parquet`;
            `items.json#visual` for one asset of each item), an address, or a sequence of these.

    Returns:
        Sorted paths without duplicates, at least one.

    Raises:
        RasterError: a named file or folder does not exist.
        DataError: nothing was found, or a STAC document that does not tell which rasters are meant.
    """
    specs = [spec] if isinstance(spec, str | Path) else list(spec)
    found = sorted({path for item in specs for path in _find(item)})
    if not found:
        listed = ", ".join(str(item) for item in specs) or "an empty list"
        raise DataError(
            f"no raster found in {listed}; expected a file, folder or glob of "
            f"{', '.join(RASTER_SUFFIXES)} files"
        )
    return found


def inspect_scene(path: str | Path) -> SceneInfo:
    """Reads a raster's header and checks that it can be used.

    Raises:
        RasterError: no such file, not a raster, or truncated.
        GeoreferenceError: no CRS, no affine transform, rotated or sheared.
    """
    with _open(Path(path)) as dataset:
        return _info(Path(path), dataset)


class SceneReader:
    """Reads windows of one raster in its own grid; a context manager that keeps the file open.

    Not for use by several threads or processes at once: open one reader in each.
    """

    def __init__(
        self,
        scene: str | Path | SceneInfo,
        *,
        bands: Sequence[int] | None = None,
        nodata: float | None = None,
        quality: tuple[int, Quality] | None = None,
        cache: BlockCache | None = None,
    ) -> None:
        """Opens the file.

        Args:
            scene: raster file, or its header, which then is not looked at again.
            bands: 1-based indexes in the order wanted; None for all bands but alpha.
            nodata: number that means "no data" if the file declares none.
            quality: 1-based index of a band of quality bits, and which of them make a pixel invalid.
            cache: keeps decoded blocks for windows to come; None reads every window from the file.

        Raises:
            RasterError: no such file, not a raster, or truncated.
            GeoreferenceError: no CRS, no affine transform, rotated or sheared.
            DataError: a band that the file does not have.
        """
        known = scene if isinstance(scene, SceneInfo) else None
        self.path = known.path if known is not None else Path(cast(str | Path, scene))
        self._quality = quality
        self._dataset = _open(self.path, None if known is None else known.source)
        try:
            self.info = known or _info(self.path, self._dataset)
            self._fallback = nodata
            self.selecting(bands)
            self._shape_hw = self.info.grid.shape_hw
            self._cache = None if cache is None else self._usable(cache)
            #: About what the open file holds in memory beside decoded blocks that a cache keeps.
            self.open_bytes = self._handle_bytes()
        except BaseException:
            self._dataset.close()
            raise

    def __enter__(self) -> Self:
        """Returns the reader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._dataset.close()

    def _handle_bytes(self) -> int:
        height, width = self._dataset.block_shapes[0]
        blocks = -(-self._shape_hw[0] // height) * -(-self._shape_hw[1] // width)
        layers = self.info.num_bands if self._dataset.interleaving is Interleaving.pixel else 1
        # The block read last, as it was stored and decoded.
        buffers = 2 * height * width * layers * np.dtype(self.info.dtype).itemsize
        return int(_HANDLE_BYTES + _BYTES_PER_BLOCK * blocks * self.info.num_bands + buffers)

    def selecting(self, bands: Sequence[int] | None) -> Self:
        """This reader, giving other bands from now on.

        Args:
            bands: 1-based indexes in the order wanted; None for all bands but alpha.

        Raises:
            DataError: a band that the file does not have.
        """
        self.bands = self._select(bands)
        self._dtype = np.result_type(*(self._dataset.dtypes[band - 1] for band in self.bands))
        self._numbers = self._nodata_numbers(self._fallback)
        self._mask_bands, self._alpha_bands = self._mask_sources()
        return self

    @property
    def fill(self) -> Array:
        """[C] numbers in the file's dtype that stand at pixels without data: nodata where finite, else 0."""
        numbers = [0.0 if n is None or not np.isfinite(n) else n for n in self._numbers]
        return np.array(numbers, dtype=self._dtype)

    def read(self, window: Window) -> tuple[Array, Mask]:
        """Reads a window of whole pixels, which may reach beyond the edge.

        Args:
            window: in pixels of `info.grid`.

        Returns:
            Numbers [C, h, w] in the file's dtype, and [h, w] True where they are data: inside the raster, not
            masked by a mask or alpha band, and not equal to nodata in all selected bands at once. Pixels
            without data are always finite.

        Raises:
            RasterError: the file is damaged or truncated there.
            DataError: NaN or infinity that neither nodata nor a mask explains.
        """
        size_hw = round(window.height), round(window.width)
        numbers, valid = self.read_at(round(window.row_off), round(window.col_off), size_hw)
        return numbers, np.ones(size_hw, dtype=np.bool_) if valid is None else valid

    def read_at(self, row: int, col: int, size_hw: tuple[int, int]) -> Block:
        """As `read`, for a window given in numbers; the mask is None where every pixel holds data."""
        height, width = size_hw
        row0, row1 = max(row, 0), min(row + height, self._shape_hw[0])
        col0, col1 = max(col, 0), min(col + width, self._shape_hw[1])
        if row1 <= row0 or col1 <= col0:
            return self._blank(height, width), np.zeros(size_hw, dtype=np.bool_)
        numbers, valid = self._read_inside(row0, col0, (row1 - row0, col1 - col0))
        if (row1 - row0, col1 - col0) == size_hw:
            return numbers, valid
        padded, padded_valid = self._blank(height, width), np.zeros(size_hw, dtype=np.bool_)
        here = (slice(row0 - row, row1 - row), slice(col0 - col, col1 - col))
        padded[:, *here] = numbers
        padded_valid[here] = True if valid is None else valid
        return padded, padded_valid

    def _usable(self, cache: BlockCache) -> BlockCache | None:
        """The cache, if blocks of this file fit it."""
        own, shape = self._dataset.block_shapes[0], self.info.grid.shape_hw
        self._side_hw = (block_side(shape[0], own[0]), block_side(shape[1], own[1]))
        what = (str(self.path), self.info.source, self.bands, self._numbers, self._quality)
        self._number = cache.number(what)
        bytes_per_pixel = len(self.bands) * self._dtype.itemsize + 1
        return cache if worth_keeping(self._side_hw, bytes_per_pixel, cache) else None

    def _blank(self, height: int, width: int) -> Array:
        blank = np.empty((len(self.bands), height, width), dtype=self._dtype)
        blank[:] = self.fill[:, None, None]
        return blank

    def _read_inside(self, row: int, col: int, size_hw: tuple[int, int]) -> Block:
        """Reads a window that lies inside the raster, through the cache if there is one."""
        if self._cache is None:
            return self._decode(Window(col, row, size_hw[1], size_hw[0]))
        return read_through(row, col, size_hw, self._side_hw, self._block)

    def _block(self, i: int, j: int) -> Block:
        """A block out of the cache, decoded if it is not there."""
        assert self._cache is not None
        key = (self._number, i, j)
        block = self._cache.get(key)
        if block is None:
            (side_h, side_w), (height, width) = self._side_hw, self._shape_hw
            row, col = i * side_h, j * side_w
            block = self._decode(Window(col, row, min(side_w, width - col), min(side_h, height - row)))
            self._cache.put(key, block)
        return block

    def _decode(self, window: Window) -> Block:
        """Reads a window that lies inside the raster from the file."""
        try:
            numbers: Array = self._dataset.read(list(self.bands), window=window, out_dtype=self._dtype)
            valid: Mask | None = None
            for band in self._mask_bands:
                valid = _both(valid, self._dataset.read_masks(band, window=window) > 0)
            for band in self._alpha_bands:
                valid = _both(valid, self._dataset.read(band, window=window) > 0)
            if self._quality is not None:
                band, rule = self._quality
                valid = _both(valid, rule.valid(self._dataset.read(band, window=window)))
        except RasterioError as error:
            raise RasterError(
                f"cannot read {self.path} at {_where(window)}: damaged or truncated ({error})"
            ) from error
        if None not in self._numbers:
            valid = _both(valid, ~self._is_nodata(numbers))
        if np.issubdtype(numbers.dtype, np.floating):
            self._settle_non_finite(numbers, valid, window)
        return numbers, None if valid is None or valid.all() else valid

    def _is_nodata(self, numbers: Array) -> Mask:
        """[h, w] True where all bands equal their nodata, or where a declared NaN stands in any band."""
        missing = np.ones(numbers.shape[1:], dtype=np.bool_)
        some_nan = np.zeros_like(missing)
        for band, number in zip(numbers, self._numbers, strict=True):
            assert number is not None
            if math.isnan(number):
                is_nan = np.isnan(band)
                some_nan |= is_nan
                missing &= is_nan
            else:
                missing &= band == numbers.dtype.type(number)
        return missing | some_nan

    def _settle_non_finite(self, numbers: Array, valid: Mask | None, window: Window) -> None:
        """Replaces NaN where there is no data; raises where there should be data."""
        strange = ~np.isfinite(numbers)
        if not strange.any():
            return
        unexplained = strange if valid is None else strange & valid
        if unexplained.any():
            _, row, col = np.argwhere(unexplained)[0]
            raise DataError(
                f"{self.path} holds NaN or infinity ({int(unexplained.any(axis=0).sum())} pixels at "
                f"{_where(window)}, first at row {row + window.row_off}, column {col + window.col_off}) but "
                f"declares nodata {self._numbers[0]}; set nodata=nan, "
                "e.g. gdal_edit -a_nodata nan FILE"
            )
        np.copyto(numbers, self.fill[:, None, None], where=strange)

    def _select(self, bands: Sequence[int] | None) -> tuple[int, ...]:
        count = self.info.num_bands
        if bands is None:
            interpretation = self._dataset.colorinterp
            data = tuple(i for i in range(1, count + 1) if interpretation[i - 1] != ColorInterp.alpha)
            return data or tuple(range(1, count + 1))
        if not bands or min(bands) < 1 or max(bands) > count:
            raise DataError(
                f"{self.path} has {count} band{'s' * (count != 1)}; bands {tuple(bands)} were asked for"
            )
        return tuple(bands)

    def _nodata_numbers(self, fallback: float | None) -> tuple[float | None, ...]:
        """Nodata per selected band, None where no stored number can equal it."""
        declared = [self.info.nodata[band - 1] for band in self.bands]
        numbers = declared if any(n is not None for n in declared) else [fallback] * len(declared)
        return tuple(n if n is not None and _representable(n, self._dtype) else None for n in numbers)

    def _mask_sources(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bands whose GDAL mask counts, and alpha bands that are not read as data."""
        flags = self._dataset.mask_flag_enums
        masks = []
        for band in self.bands:
            own = flags[band - 1]
            if MaskFlags.all_valid in own or MaskFlags.nodata in own or MaskFlags.alpha in own:
                continue
            masks.append(band)
            if MaskFlags.per_dataset in own:
                break
        alpha = [
            i
            for i, meaning in enumerate(self._dataset.colorinterp, start=1)
            if meaning == ColorInterp.alpha and i not in self.bands
        ]
        return tuple(masks), tuple(alpha)


def read_on_grid(
    source: str | Path | SceneReader,
    grid: PixelGrid,
    *,
    bands: Sequence[int] | None = None,
    resampling: str = "nearest",
    nodata: float | None = None,
) -> tuple[Array, Mask]:
    """Reads a raster on another grid; warps only where the two grids do not line up.

    Pixels without data never flow into the result: bilinear and average weigh valid source pixels only.

    Args:
        source: raster file, or an open reader (whose bands and nodata then hold).
        grid: the wanted lattice.
        bands: 1-based indexes; None for all but alpha.
        resampling: "nearest", "bilinear" (valid where most of the weight is valid) or "average" (of all valid
            pixels under the wanted one, for going coarser). Averages of whole numbers are rounded.
        nodata: number that means "no data" if the file declares none.

    Returns:
        Numbers [C, h, w] in the file's dtype and [h, w] True where they come from valid pixels.

    Raises:
        RasterError, GeoreferenceError, DataError: as `SceneReader`; also an unknown resampling, or no
            transformation between the two CRS.
    """
    if resampling not in RESAMPLINGS:
        raise DataError(f"unknown resampling {resampling!r}; valid names: {', '.join(sorted(RESAMPLINGS))}")
    if not isinstance(source, SceneReader):
        with SceneReader(source, bands=bands, nodata=nodata) as reader:
            return read_on_grid(reader, grid, resampling=resampling)
    window = aligned_window(source.info.grid, grid)
    if window is not None:
        return source.read(window)
    return warp_onto(source.read, source.info.grid, grid, resampling, source.fill)


def _find(spec: str | Path) -> list[Path]:
    """Rasters that one file, folder, glob, address or STAC document names."""
    address = gdal_address(spec)
    if address is not None:
        return [Path(address)]
    document = split_spec(spec)
    if document is not None:
        return stac_rasters(*document)
    path = Path(spec).expanduser()
    listed = listed_rasters(path)
    if listed is not None:
        return listed
    if path.is_file():
        return [path]
    if path.is_dir():
        # Follows links to folders and skips hidden names.
        candidates = map(Path, glob.iglob(f"{glob.escape(str(path))}/**/*", recursive=True))
        return [p for p in candidates if p.suffix.lower() in RASTER_SUFFIXES and p.is_file()]
    if not glob.has_magic(str(path)):
        raise RasterError(f"no such file or folder: {spec}")
    matches = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
    # A pattern that names a suffix ("*.img") is taken at its word.
    if glob.has_magic(path.suffix) or not path.suffix:
        matches = [p for p in matches if p.suffix.lower() in RASTER_SUFFIXES]
    return matches


def _open(path: Path, source: str | None = None) -> DatasetReader:
    """Opens a raster with errors that a user understands."""
    cube = open_cube(path)
    if cube is not None:
        return cast(DatasetReader, cube)
    address = gdal_address(path)
    if source is None and address is None and not path.exists():
        raise RasterError(f"no such file: {path}")
    if path.is_dir():
        raise RasterError(f"{path} is a folder, expected a raster file")
    try:
        with warnings.catch_warnings():
            # A missing position is an error of ours with a better message.
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            if address is None:
                dataset = rasterio.open(source or path)
            else:
                # Nobody asks a server for all that lies beside the file.
                with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
                    dataset = rasterio.open(source or address)
    except RasterioIOError as error:
        raise RasterError(
            f"{path} cannot be opened as a raster ({error}); expected a GeoTIFF or the like"
        ) from error
    if dataset.count == 0:
        dataset.close()
        raise RasterError(f"{path} has no bands, expected a raster (is it a container of several?)")
    return dataset


def _info(path: Path, dataset: DatasetReader) -> SceneInfo:
    # First of all: a file that has lost its end may have lost its georeference with it.
    missing = 0 if gdal_address(path) is not None else missing_bytes(path, dataset)
    if missing:
        raise RasterError(
            f"{path} is truncated: at least {missing} bytes are missing at its end; copy it again"
        )
    return SceneInfo(
        path=path,
        grid=PixelGrid.from_dataset(dataset),
        num_bands=dataset.count,
        dtype=dataset.dtypes[0],
        nodata=tuple(dataset.nodatavals),
        band_names=tuple(text or "" for text in dataset.descriptions),
        colours=tuple(meaning.name for meaning in dataset.colorinterp),
        moment=getattr(dataset, "moment", None),
    )


def _both(one: Mask | None, other: Mask) -> Mask:
    return other if one is None else one & other


def _representable(number: float, dtype: np.dtype[Any]) -> bool:
    """Whether a pixel of this dtype can equal the number."""
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return math.isfinite(number) and number == int(number) and limits.min <= number <= limits.max
    return True


def _where(window: Window) -> str:
    row, col = int(window.row_off), int(window.col_off)
    return f"rows {row}-{row + int(window.height) - 1}, columns {col}-{col + int(window.width) - 1}"
