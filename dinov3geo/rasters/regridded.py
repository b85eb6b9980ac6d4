"""A scene seen at another pixel size: windows of another lattice of its reference system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rasterio.windows import Window

from dinov3geo.rasters.grid import PixelGrid
from dinov3geo.rasters.reader import Array, Mask, SceneReader, read_on_grid


class RegriddedScene:
    """Reads windows of any grid as `SceneReader` reads those of the scene's own; a context manager.

    Pixels are averaged where they become larger along an axis, and interpolated where they become smaller;
    those without data never flow into others. Where the grid is the scene's own, windows are read as they
    are. A window has the same numbers whatever else is read.
    """

    def __init__(self, scene: str | Path, grid: PixelGrid, *, bands: Sequence[int] | None = None) -> None:
        """Opens the file.

        Args:
            scene: raster file.
            grid: whose windows are read; it has the scene's CRS.
            bands: 1-based indexes in the order wanted; None for all bands but alpha.

        Raises:
            RasterError, GeoreferenceError, DataError: as `SceneReader`.
        """
        self._reader = SceneReader(scene, bands=bands)
        self._grid = grid
        sizes = zip(grid.resolution_xy, self._reader.info.grid.resolution_xy, strict=True)
        self._resampling = "average" if any(wanted > own for wanted, own in sizes) else "bilinear"

    def __enter__(self) -> Self:
        """Returns the reader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self._reader.close()

    def read(self, window: Window) -> tuple[Array, Mask]:
        """Numbers [C, h, w] in the file's dtype and where they come from data [h, w]; see `SceneReader.read`.

        Args:
            window: in pixels of the grid; it may reach beyond the edge.
        """
        return read_on_grid(self._reader, self._grid.window_grid(window), resampling=self._resampling)
