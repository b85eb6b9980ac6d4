"""A scene in another reference system or pixel size, warped block by block and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from affine import Affine
from rasterio import warp
from rasterio.crs import CRS

from dinov3geo.rasters.blocks import Block, BlockCache, read_through
from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import SceneReader, read_on_grid

_SIDE_HW = (256, 256)


class WarpedScene:
    """Windows of a scene on a lattice of its own in another CRS; a block is warped once, whoever touches it.

    The lattice begins at the scene's upper left corner, in another CRS at the corner that GDAL would give the
    warped file (and torchgeo gives it), so that pixels that only become larger stay aligned.

    Attributes:
        origin_xy: upper left corner of pixel (0, 0).
    """

    def __init__(
        self,
        reader: Callable[[], SceneReader],
        identity: Hashable,
        own: PixelGrid,
        crs: CRS,
        resolution_xy: tuple[float, float],
        resampling: Callable[[PixelGrid, PixelGrid], str],
        cache: BlockCache,
    ) -> None:
        """Keeps how to warp.

        Args:
            reader: gives the open scene; asked only for blocks that are not in the cache.
            identity: of the scene and the bands read from it.
            own: the scene's grid.
            crs: of the lattice.
            resolution_xy: pixel width and height in units of `crs`.
            resampling: from the scene's grid and the wanted one to a key of `RESAMPLINGS`.
            cache: of blocks.
        """
        self._reader = reader
        self._crs = crs
        self._resolution_xy = resolution_xy
        self._resampling = resampling
        self._cache = cache
        self.origin_xy = _corner(own, crs)
        self._number = cache.number((identity, crs.to_wkt(), resolution_xy))

    def pixel_at(self, x: float, y: float) -> tuple[int, int]:
        """Row and column of the pixel whose upper left corner is nearest to a point."""
        width, height = self._resolution_xy
        return round((self.origin_xy[1] - y) / height), round((x - self.origin_xy[0]) / width)

    def grid(self, row: int, col: int, size_hw: tuple[int, int]) -> PixelGrid:
        """Where the pixels of a window lie."""
        width, height = self._resolution_xy
        x, y = self.origin_xy[0] + col * width, self.origin_xy[1] - row * height
        return PixelGrid(self._crs, Affine(width, 0.0, x, 0.0, -height, y), *size_hw)

    def read_at(self, row: int, col: int, size_hw: tuple[int, int]) -> Block:
        """Numbers and mask (None: all data) of a window, which may begin before pixel (0, 0)."""
        return read_through(row, col, size_hw, _SIDE_HW, self._block)

    def _block(self, i: int, j: int) -> Block:
        key = (self._number, i, j)
        block = self._cache.get(key)
        if block is None:
            grid = self.grid(i * _SIDE_HW[0], j * _SIDE_HW[1], _SIDE_HW)
            reader = self._reader()
            numbers, valid = read_on_grid(reader, grid, resampling=self._resampling(reader.info.grid, grid))
            block = numbers, None if valid.all() else valid
            self._cache.put(key, block)
        return block


def _corner(own: PixelGrid, crs: CRS) -> tuple[float, float]:
    xmin, ymin, xmax, ymax = own.bounds
    if own.crs == crs:
        return xmin, ymax
    transform, _, _ = warp.calculate_default_transform(
        own.crs, crs, own.width, own.height, left=xmin, bottom=ymin, right=xmax, top=ymax
    )
    return transform.c, transform.f
