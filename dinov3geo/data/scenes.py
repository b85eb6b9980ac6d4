"""Georeferenced scenes as torchgeo data sets: `&`, `|` and torchgeo's samplers work on them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyproj
import torch
from affine import Affine
from numpy.typing import NDArray
from rasterio import warp
from rasterio.enums import Resampling
from rasterio.windows import Window
from torch import Tensor
from torchgeo.datasets import GeoDataset, IntersectionDataset, RasterDataset, UnionDataset

from dinov3geo.data.areas import Area
from dinov3geo.data.catalog import (
    ReaderPool,
    SceneCatalog,
    build_index,
    common_resolution,
    filled_slice,
    own_grid,
    pixels_of,
    same_resolution,
    seconds,
    shared_crs,
)
from dinov3geo.data.sampling import Weights
from dinov3geo.data.scene_files import band_positions, find_scenes, open_scene, scene_paths
from dinov3geo.errors import DataError
from dinov3geo.rasters.blocks import BLOCKS
from dinov3geo.rasters.crs import to_pyproj, to_rasterio
from dinov3geo.rasters.grid import PixelGrid, aligned_window
from dinov3geo.rasters.reader import SceneInfo, read_on_grid
from dinov3geo.rasters.sensors import Sensor, get_sensor
from dinov3geo.rasters.warped import WarpedScene

Sample = dict[str, Tensor]
Query = slice | tuple[slice, ...]
Array = NDArray[Any]
Mask = NDArray[np.bool_]

# From here on a wanted pixel covers so many of the file's that interpolating between four would alias.
_AVERAGE_FROM_RATIO = 1.5


_ALL = slice(None)
_TRUE = torch.tensor(True)


class SceneDataset(RasterDataset):
    """Rasters of one sensor, each read in its own grid.

    The index lies in the CRS that all files share, or in EPSG:6933 (equal-area) if they differ. A query in a
    shared CRS is moved to the nearest whole pixel of the file; otherwise its centre is carried into the
    file's CRS and a window of as many pixels is read around it, moved inside the file where it fits. Pixels
    are resampled only if a `crs` or `res` was asked for that is not the files' own.

    A sample has `image` [C, H, W] (or `mask`, [H, W] if it has one band) in the files' dtype, `valid` [H, W]
    bool, `bounds` [9] (the query, in the CRS of the index) and `transform` [9] (of the pixels read, in the
    file's CRS), both float64. Its size is always what the query asks for; where no file has data, `valid`
    is False. Rows run southwards, also where those of the file do not. Where files overlap, the first in
    the order of the index wins.

    Attributes:
        weights: what a run gives to the sampler of these scenes; a sampler of your own need not heed it.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        sensor: Sensor | str | None = None,
        bands: Sequence[str] | None = None,
        is_image: bool = True,
        transforms: Callable[[Sample], Sample] | None = None,
        res: float | tuple[float, float] | None = None,
        crs: Any = None,  # noqa: ANN401
        allow_mixed_resolution: bool = False,
        time: tuple[str, str] | None = None,
        area: Area | None = None,
    ) -> None:
        """Reads the header of every file.

        Args:
            paths: folder, file, glob, or several of them.
            sensor: record or name; None means "aerial_rgb" for images and every band for masks.
            bands: names of the sensor's bands in the order wanted; None for all.
            is_image: whether samples hold `image` or `mask`.
            transforms: applied to each sample.
            res: pixel size in units of the CRS to resample to; None keeps the files' own.
            crs: CRS to resample to; None keeps the files' own.
            allow_mixed_resolution: read files whose pixel sizes differ by more than 1 % as they are.
            time: first and last date of interest; scenes without a date always count.
            area: ground to keep to; pixels outside are not valid.

        Raises:
            RasterError: no such file, not a raster, truncated.
            GeoreferenceError: no CRS, rotated.
            DataError: no raster found, bands that do not fit, pixel sizes that differ, a date that is none.
            UnknownNameError: no such sensor or band.
        """
        self.paths = cast(Any, paths)
        self.is_image = is_image
        self.transforms = transforms
        self.cache, self.time_series = True, False
        self.sensor = _sensor(sensor, is_image)
        self._describe(bands)
        records = find_scenes(paths, self.sensor, bands, time)
        infos = [record.info for record in records]
        self._infos = {info.path: info for info in infos}
        self._numpy_dtype = np.result_type(*(info.dtype for info in infos))
        self._any_resolution = allow_mixed_resolution or res is not None
        own = shared_crs(infos)
        target = own if crs is None else to_rasterio(crs)
        self._crs_forced = crs is not None and any(info.grid.crs != target for info in infos)
        self._native_res = common_resolution(infos, target, self._any_resolution)
        self._res = self._native_res
        self.area = area
        self.weights: Weights = "area"
        self.index = build_index(infos, [record.interval for record in records], target)
        if area is not None:
            self.index = area.clip(self.index)
        if res is not None:
            self.res = res
        self._readers = self._pool()

    @property
    def files(self) -> list[str]:
        """Sorted paths of all files of the sensor."""
        return [str(path) for path in scene_paths(cast(Any, self.paths), self.sensor)]

    @property
    def gsd_range_m(self) -> tuple[float, float]:
        """Smallest and largest ground sampling distance of the files, metres."""
        sizes = [info.grid.gsd_m for info in self._infos.values()]
        return min(sizes), max(sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers in a sample: what the files hold."""
        return torch.from_numpy(np.empty(0, dtype=self._numpy_dtype)).dtype

    @property
    def resampling(self) -> Resampling:
        """How finer pixels are made where a `crs` or `res` was asked for."""
        return Resampling.bilinear if self.is_image else Resampling.nearest

    @property
    def crs(self) -> pyproj.CRS:
        """CRS of the index and of queries."""
        return cast(pyproj.CRS, self.index.crs)

    @crs.setter
    def crs(self, new_crs: Any) -> None:  # noqa: ANN401
        """Moves the index to another CRS and resamples to it from now on."""
        target = to_rasterio(new_crs)
        if target == self._catalog.crs:
            return
        had_native_res = self._res == self._native_res
        self._native_res = common_resolution(list(self._infos.values()), target, True)
        self._res = self._native_res if had_native_res else self._res
        self._crs_forced = True
        self.index = self.index.to_crs(to_pyproj(target))

    @property
    def res(self) -> tuple[float, float]:
        """Pixel width and height in units of the CRS."""
        return self._res

    @res.setter
    def res(self, new_res: float | tuple[float, float]) -> None:
        """Resamples to this pixel size from now on."""
        self._res = (new_res, new_res) if isinstance(new_res, int | float) else new_res

    def __getitem__(self, index: Query) -> Sample:
        """Reads a query.

        Args:
            index: [xmin:xmax:xres, ymin:ymax:yres, tmin:tmax:step]; what is left out is filled in.

        Returns:
            The sample described at the class.

        Raises:
            IndexError: no file lies there, or less than half a pixel is asked for.
            RasterError: a file is damaged.
            DataError: NaN that no nodata explains.
        """
        place = self.complete(index)
        numbers, valid, grid = self._read(place)
        sample = self._packed(place, numbers, valid, grid)
        return sample if self.transforms is None else self.transforms(sample)

    def __and__(self, other: GeoDataset) -> IntersectionDataset:
        """Images with labels, whichever comes first, become `scene_pairs.ScenePairs`; see there."""
        if isinstance(other, SceneDataset):
            from dinov3geo.data.scene_pairs import ScenePairs  # which itself needs this class

            swapped = other.is_image and not self.is_image
            return ScenePairs(other, self) if swapped else ScenePairs(self, other)
        return super().__and__(other)

    def __or__(self, other: GeoDataset) -> UnionDataset | SceneDataset:  # type: ignore[override]
        """Scenes that are read alike become one `SceneDataset`; others torchgeo's union (which resamples)."""
        if isinstance(other, SceneDataset) and self._reads_like(other):
            return self._joined(other)
        return super().__or__(other)

    def read_query(self, index: Query) -> tuple[Array, Mask, PixelGrid]:
        """Numbers [C, H, W], their mask [H, W] and where they lie; arguments and errors as indexing."""
        numbers, valid, grid = self._read(self.complete(index))
        return numbers, np.ones(grid.shape_hw, dtype=np.bool_) if valid is None else valid, grid

    def _read(self, place: tuple[slice, slice, slice]) -> tuple[Array, Mask | None, PixelGrid]:
        """As `read_query`; the mask is None where every pixel holds data."""
        numbers, valid, grid = self._read_anywhere(place)
        return numbers, self._within(valid, grid), grid

    def _within(self, valid: Mask | None, grid: PixelGrid) -> Mask | None:
        """The mask without what lies outside the area."""
        outside = None if self.area is None else self.area.outside(grid)
        if outside is None:
            return valid
        return ~outside if valid is None else valid & ~outside

    def _read_anywhere(self, place: tuple[slice, slice, slice]) -> tuple[Array, Mask | None, PixelGrid]:
        """As `_read`, without regard to the area."""
        x, y, t = place
        catalog = self._catalog
        bounds = (x.start, y.start, x.stop, y.stop)
        always = t.start is catalog.bounds[2][0] and t.stop is catalog.bounds[2][1]
        rows = catalog.find(bounds, *((None, None) if always else (t.start, t.stop)))[:: t.step]
        if not rows:
            raise IndexError(f"no scene at {bounds} of {self.crs.name}, {t.start} to {t.stop}")
        height, width = pixels_of(x, y)
        resampled = self._crs_forced or not same_resolution((x.step, y.step), self._native_res, 1e-9)
        if not resampled and all(catalog.share_lattice[row] for row in rows):
            line, col, transform = catalog.window(rows[0], x.start, y.stop)
            grid = PixelGrid(catalog.crs, transform, height, width)
            numbers, valid = self._readers.get(catalog.paths[rows[0]]).read_at(line, col, (height, width))
            numbers = numbers.astype(self._numpy_dtype, copy=False)
            if valid is None:
                return numbers, None, grid
            return *self._mosaic(rows[1:], grid, numbers, valid), grid
        if (x.step, y.step) == self._res and resampled:
            return self._read_lattice(rows, x, y, (height, width))
        grid = PixelGrid(catalog.crs, Affine(x.step, 0.0, x.start, 0.0, -y.step, y.stop), height, width)
        if not resampled:
            first, grid = own_grid(catalog, self._infos, rows, grid)
            rows = [first, *(row for row in rows if row != first)]
        return *self._mosaic(rows, grid), grid

    def paths_at(self, index: Query) -> list[str]:
        """Files that a query may read, sorted."""
        x, y, t = self.complete(index)
        rows = self._catalog.find((x.start, y.start, x.stop, y.stop), t.start, t.stop)
        return sorted({str(self._catalog.paths[row]) for row in rows})

    @property
    def infos(self) -> Mapping[Path, SceneInfo]:
        """Headers of the scenes, by path and in order."""
        return self._infos

    def read_window(self, path: Path, row: int, col: int, size_hw: tuple[int, int]) -> tuple[Array, Mask]:
        """Numbers [C, h, w] and mask [h, w] of a window of one scene, in that scene's own pixels.

        Args:
            path: of a scene of the data set.
            row: first row, counted southwards; the window may reach beyond the scene.
            col: first column.
            size_hw: rows and columns.
        """
        grid = self.window_grid(path, row, col, size_hw)
        numbers, valid = self._read_scene(path, grid)
        return numbers, valid if self.area is None else cast(Mask, self._within(valid, grid))

    def window_grid(self, path: Path, row: int, col: int, size_hw: tuple[int, int]) -> PixelGrid:
        """Where the pixels of `read_window` lie."""
        own = self._infos[path].grid.southward()
        return own.window_grid(Window(col, row, size_hw[1], size_hw[0]))

    def read_on(self, grid: PixelGrid, start: Any = None, stop: Any = None) -> tuple[Array, Mask]:  # noqa: ANN401
        """Reads on any grid; pixels where no scene of that time lies are not valid.

        Args:
            grid: the wanted lattice, in any CRS.
            start: first moment, or None for all times.
            stop: last moment.

        Returns:
            Numbers [C, H, W] and their mask [H, W].
        """
        own = self._catalog.crs
        bounds = grid.bounds if grid.crs == own else warp.transform_bounds(grid.crs, own, *grid.bounds)
        numbers, valid = self._mosaic(self._catalog.find(bounds, start, stop), grid)
        return numbers, cast(Mask, self._within(valid, grid))

    def intervals(
        self, bounds: tuple[float, float, float, float], besides: tuple[Any, Any]
    ) -> list[tuple[pd.Timestamp, pd.Timestamp]]:
        """Times of the scenes at a place that do not meet another time, each once, ascending.

        Args:
            bounds: (xmin, ymin, xmax, ymax) in the CRS of the index.
            besides: first and last moment of the other time.
        """
        start, stop = (pd.Timestamp(moment) for moment in besides)
        found = {self.index.index[row] for row in self._catalog.find(bounds, None, None)}
        return sorted((i.left, i.right) for i in found if i.right < start or i.left > stop)

    def sample(self, index: Query, numbers: Array, valid: Mask, grid: PixelGrid) -> Sample:
        """Packs what `read_query` gave into torchgeo's keys."""
        return self._packed(self.complete(index), numbers, valid, grid)

    def _packed(
        self, place: tuple[slice, slice, slice], numbers: Array, valid: Mask | None, grid: PixelGrid
    ) -> Sample:
        x, y, t = place
        times = (seconds(t.start), seconds(t.stop), t.step)
        bounds = (x.start, x.stop, x.step, y.start, y.stop, y.step, *times)
        # Iterating an Affine costs more than reading a chip.
        a = grid.transform
        tensor = torch.from_numpy(numbers)
        return {
            **({"image": tensor} if self.is_image else {"mask": tensor.squeeze(0)}),
            # One True for all pixels: neither made nor sent to another process pixel by pixel.
            "valid": _TRUE.expand(grid.shape_hw) if valid is None else torch.from_numpy(valid),
            "bounds": torch.from_numpy(np.array(bounds, dtype=np.float64)),
            "transform": torch.from_numpy(np.array((a.a, a.b, a.c, a.d, a.e, a.f, 0.0, 0.0, 1.0))),
        }

    def complete(self, index: Query) -> tuple[slice, slice, slice]:
        """Fills in what a query leaves out: the data set's bounds, its resolution, all times."""
        given = (index,) if isinstance(index, slice) else index
        whole_x, whole_y, whole_t = self._catalog.bounds
        x = filled_slice(given[0], whole_x, self._res[0])
        y = filled_slice(given[1] if len(given) > 1 else _ALL, whole_y, self._res[1])
        t = filled_slice(given[2] if len(given) > 2 else _ALL, whole_t, 1)
        if x.stop <= x.start or y.stop <= y.start:
            raise IndexError(f"empty query: x {x.start} to {x.stop}, y {y.start} to {y.stop}")
        return x, y, t

    def __getstate__(self) -> dict[str, Any]:
        """Everything but lookup arrays and warped scenes, which a copy makes again when it needs them."""
        made_again = ("_catalog_of_index", "_warped_scenes")
        return {name: value for name, value in self.__dict__.items() if name not in made_again}

    @property
    def _catalog(self) -> SceneCatalog:
        """Lookup arrays of the present index; whoever splits a data set replaces its index."""
        catalog: SceneCatalog | None = self.__dict__.get("_catalog_of_index")
        if catalog is None or catalog.index is not self.index:
            self.__dict__.pop("_warped_scenes", None)
            catalog = SceneCatalog(self.index, self._infos)
            self.__dict__["_catalog_of_index"] = catalog
        return catalog

    def _mosaic(
        self, rows: Iterable[int], grid: PixelGrid, numbers: Array | None = None, valid: Mask | None = None
    ) -> tuple[Array, Mask]:
        """Adds these rows of the index to what is there already: the first valid pixel wins."""
        valid = np.zeros(grid.shape_hw, dtype=np.bool_) if valid is None else valid
        for path in dict.fromkeys(self._catalog.paths[row] for row in rows):
            if valid.all():
                break
            more, more_valid = self._read_scene(path, grid)
            if numbers is None:
                numbers, valid = more, more_valid
            else:
                new = more_valid & ~valid
                np.copyto(numbers, more, where=new)
                valid |= new
        if numbers is None:
            fill = self._readers.get(next(iter(self._infos))).fill.astype(self._numpy_dtype)
            numbers = np.repeat(fill, grid.height * grid.width).reshape(-1, *grid.shape_hw)
        return numbers, valid

    def _read_lattice(
        self, rows: Sequence[int], x: slice, y: slice, size_hw: tuple[int, int]
    ) -> tuple[Array, Mask | None, PixelGrid]:
        """Reads what is to be resampled, moved to the nearest pixel of each scene's lattice."""
        numbers: Array | None = None
        valid: Mask | None = None
        grid: PixelGrid | None = None
        for path in dict.fromkeys(self._catalog.paths[row] for row in rows):
            scene = self._warped_scene(path)
            row, col = scene.pixel_at(x.start, y.stop)
            more, more_valid = scene.read_at(row, col, size_hw)
            if numbers is None:
                numbers, valid, grid = more, more_valid, scene.grid(row, col, size_hw)
            elif valid is not None:
                np.copyto(numbers, more, where=~valid if more_valid is None else more_valid & ~valid)
                valid = None if more_valid is None else valid | more_valid
            if valid is None:
                break
        assert numbers is not None and grid is not None
        return numbers.astype(self._numpy_dtype, copy=False), valid, grid

    def _warped_scene(self, path: Path) -> WarpedScene:
        """The scene on the lattice of the present CRS and resolution."""
        key = (path, self._res)
        scenes: dict[Any, WarpedScene] = self.__dict__.setdefault("_warped_scenes", {})
        if key not in scenes:
            identity = (str(path), self.is_image, tuple(self.band_indexes or ()), self.sensor)
            reader = functools.partial(self._readers.get, path)
            scenes[key] = WarpedScene(
                reader,
                identity,
                self._infos[path].grid,
                self._catalog.crs,
                self._res,
                self._resampling_to,
                BLOCKS,
            )
        return scenes[key]

    def _read_scene(self, path: Path, grid: PixelGrid) -> tuple[Array, Mask]:
        """Reads one file on a grid, directly wherever its pixels line up."""
        reader = self._readers.get(path)
        own = reader.info.grid.southward()
        window = aligned_window(own, grid)
        if window is None:
            numbers, valid = read_on_grid(
                reader, grid, resampling=self._resampling_to(reader.info.grid, grid)
            )
        elif own == reader.info.grid:
            numbers, valid = reader.read(window)
        else:
            turned = Window(
                window.col_off, own.height - window.row_off - window.height, window.width, window.height
            )
            numbers, valid = (np.flip(array, axis=-2).copy() for array in reader.read(turned))
        return numbers.astype(self._numpy_dtype, copy=False), valid

    def _resampling_to(self, own: PixelGrid, wanted: PixelGrid) -> str:
        """Labels keep their values; images are averaged where they become coarser."""
        if not self.is_image:
            return "nearest"
        return "average" if wanted.gsd_m > _AVERAGE_FROM_RATIO * own.gsd_m else "bilinear"

    def _describe(self, bands: Sequence[str] | None) -> None:
        """Sets what torchgeo wants to know of a sensor."""
        if self.sensor is None:
            if bands is not None:
                raise DataError(f"bands {', '.join(bands)} were asked for without a sensor that names them")
            self.band_indexes = None
            return
        self.filename_glob = self.sensor.filename_glob
        self.filename_regex = self.sensor.filename_regex
        self.date_format = self.sensor.date_format
        self.all_bands = self.sensor.band_names
        self.rgb_bands = self.sensor.rgb_bands
        self.bands = tuple(band.name for band in self.sensor.select(bands))
        self.band_indexes = band_positions(self.sensor, bands)

    def _pool(self) -> ReaderPool:
        """Opens the files of this data set; shares its headers with it."""
        return ReaderPool(functools.partial(open_scene, self._infos, self.sensor, self.band_indexes))

    def _reads_like(self, other: SceneDataset) -> bool:
        """Whether one data set could hold the files of both."""

        def reading(data: SceneDataset) -> tuple[Any, ...]:
            own = data.sensor, data.band_indexes, data.is_image, data.transforms, data._numpy_dtype
            return *own, data.area

        resampled = any(data._crs_forced or data._res != data._native_res for data in (self, other))
        return not resampled and reading(self) == reading(other)

    def _joined(self, other: SceneDataset) -> SceneDataset:
        both = copy.copy(self)
        both._infos = {**self._infos, **other._infos}
        both._readers = both._pool()
        infos = list(both._infos.values())
        both._any_resolution = self._any_resolution or other._any_resolution
        both.paths = cast(Any, [str(path) for path in both._infos])
        target = shared_crs(infos)
        both._native_res = both._res = common_resolution(infos, target, both._any_resolution)
        frames = [data.index.to_crs(to_pyproj(target)) for data in (self, other)]
        both.index = pd.concat(frames)
        return both


def _sensor(sensor: Sensor | str | None, is_image: bool) -> Sensor | None:
    if isinstance(sensor, Sensor):
        return sensor
    if sensor is None and not is_image:
        return None
    return get_sensor(sensor or "aerial_rgb")
