"""Where pixels lie: a raster's grid, its windows, tile plans and blend weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyproj
from affine import Affine
from numpy.typing import NDArray
from pyproj.exceptions import CRSError
from rasterio import warp
from rasterio.crs import CRS
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from dinov3geo.errors import DataError, GeoreferenceError

# Ellipsoid WGS 84: semi-major axis [m] and first eccentricity squared.
_SEMI_MAJOR_M = 6378137.0
_ECCENTRICITY_SQUARED = 6.69437999014e-3
# A shear below this many pixels over the whole raster is a rounding error of whoever wrote the file.
_SHEAR_TOLERANCE_PX = 1e-3
# Offsets and sizes that differ from whole pixels by less than this are rounding errors, too.
_ALIGNMENT_TOLERANCE_PX = 1e-3

# One object for all rasters of a reference system: telling two apart again and again is slow.
_SHARED: dict[str, CRS] = {}


@dataclass(frozen=True, slots=True)
class PixelGrid:
    """The georeferenced lattice of a raster or of a window of it.

    Rows may run southwards (`transform.e < 0`, the usual case) or northwards ("south-up", `e > 0`), and
    pixels need not be square; columns always run eastwards.

    Attributes:
        crs: coordinate reference system.
        transform: from (column, row) of pixel corners to (x, y) in the CRS.
        height: rows.
        width: columns.
    """

    crs: CRS
    transform: Affine
    height: int
    width: int

    @classmethod
    def from_dataset(cls, dataset: DatasetReader | WarpedVRT | Any) -> PixelGrid:  # noqa: ANN401
        """Reads the grid of an open raster, of rasterio or with the same attributes.

        Raises:
            GeoreferenceError: the raster has no CRS, no affine transform (ground control points alone do
                not count), a local CRS that no registry knows, or is rotated, sheared or mirrored east to
                west.
        """
        name, transform = dataset.name, dataset.transform
        if transform.is_identity and dataset.gcps[0]:
            raise GeoreferenceError(
                f"{name} is placed by ground control points only, expected an affine transform; "
                "warp it first, e.g. gdalwarp IN OUT"
            )
        if dataset.crs is None:
            raise GeoreferenceError(
                f"{name} has no coordinate reference system; assign it, e.g. gdal_edit -a_srs EPSG:32617 FILE"
            )
        if transform.is_identity:
            raise GeoreferenceError(
                f"{name} has a coordinate reference system but no position (identity transform); "
                "assign it, e.g. gdal_edit -a_ullr"
            )
        upright = _upright(transform, dataset.height, dataset.width, name)
        crs = _terrestrial(dataset.crs, name)
        return cls(_SHARED.setdefault(crs.to_wkt(), crs), upright, *dataset.shape)

    @property
    def shape_hw(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height, self.width

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(xmin, ymin, xmax, ymax) in CRS units, whichever way the rows run."""
        x0, y0 = self.transform.c, self.transform.f
        x1, y1 = self.transform @ (self.width, self.height)
        return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)

    @property
    def resolution_xy(self) -> tuple[float, float]:
        """Pixel width and height in CRS units, both positive."""
        return abs(self.transform.a), abs(self.transform.e)

    @property
    def gsd_m(self) -> float:
        """Ground sampling distance in metres at the centre: geometric mean of pixel width and height.

        Degrees are converted at the centre's latitude on WGS 84; Web Mercator, whose metres grow with
        latitude, is corrected by its cosine; other projected systems count as true to scale.
        """
        x_size, y_size = self.resolution_xy
        x_metres, y_metres = self._metres_per_unit()
        return math.sqrt(x_size * x_metres * y_size * y_metres)

    def _metres_per_unit(self) -> tuple[float, float]:
        """Metres on the ground per unit of x and of y at the centre."""
        if self.crs.is_geographic:
            x_metres, y_metres = _metres_per_degree(self._center_xy()[1])
            radians_factor = self.crs.units_factor[1]
            degrees = math.degrees(radians_factor) if radians_factor else 1.0
            return x_metres * degrees, y_metres * degrees
        metres = float(self.crs.linear_units_factor[1])
        if self.crs.to_epsg() == 3857:
            x, y = self._center_xy()
            latitude = warp.transform(self.crs, CRS.from_epsg(4326), [x], [y])[1][0]
            metres *= math.cos(math.radians(latitude))
        return metres, metres

    def _center_xy(self) -> tuple[float, float]:
        xmin, ymin, xmax, ymax = self.bounds
        return (xmin + xmax) / 2, (ymin + ymax) / 2

    def window_grid(self, window: Window) -> PixelGrid:
        """The grid of a window of whole pixels; the window may reach beyond the edge."""
        corner = Affine.translation(window.col_off, window.row_off)
        return PixelGrid(self.crs, self.transform @ corner, round(window.height), round(window.width))

    def coarsen(self, factor: int) -> PixelGrid:
        """A grid of the same corner whose pixels are `factor` times as wide and high.

        Sizes are rounded up, so the last row and column may reach beyond the edge.

        Raises:
            DataError: factor below 1.
        """
        if factor < 1:
            raise DataError(f"a grid can be coarsened by a whole factor of 1 or more, got {factor}")
        height, width = -(-self.height // factor), -(-self.width // factor)
        return PixelGrid(self.crs, self.transform @ Affine.scale(factor), height, width)

    def at_gsd(self, gsd_m: float) -> PixelGrid:
        """A grid of the same corner that covers this one with pixels of a size on the ground.

        Pixels are square on the ground at the centre, in degrees and Web Mercator, too. The last row and
        column may reach beyond the edge.

        Args:
            gsd_m: width and height of a pixel at the centre in metres, see the property `gsd_m`.

        Raises:
            DataError: a size that is no positive number.
        """
        if not (math.isfinite(gsd_m) and gsd_m > 0):
            raise DataError(f"pixels need a size above 0 m, got {gsd_m}")
        x_metres, y_metres = self._metres_per_unit()
        x_factor, y_factor = (
            gsd_m / metres / size
            for metres, size in zip((x_metres, y_metres), self.resolution_xy, strict=True)
        )
        height, width = (
            max(math.ceil(length / factor - _ALIGNMENT_TOLERANCE_PX), 1)
            for length, factor in ((self.height, y_factor), (self.width, x_factor))
        )
        return PixelGrid(self.crs, self.transform @ Affine.scale(x_factor, y_factor), height, width)

    def southward(self) -> PixelGrid:
        """The same pixels with rows counted from the north, whichever way they run in the file."""
        if self.transform.e < 0:
            return self
        turned = self.transform @ Affine.translation(0, self.height) @ Affine.scale(1, -1)
        return PixelGrid(self.crs, turned, self.height, self.width)

    def tiles(self, size: int, overlap: int, multiple: int = 1) -> TilePlan:
        """Plans tiles of one size that cover every pixel.

        Args:
            size: side of a tile in pixels; shortened to the raster where that is smaller.
            overlap: pixels that neighbours share at least.
            multiple: all starts but the last of an axis are multiples of this many pixels.

        Raises:
            DataError: a size, overlap or multiple that allows no plan.
        """
        if size < 1 or overlap < 0 or multiple < 1:
            raise DataError(
                f"tiles need size >= 1, overlap >= 0 and multiple >= 1, got {size}, {overlap} and {multiple}"
            )
        stride = (size - overlap) // multiple * multiple
        if stride < 1:
            raise DataError(
                f"tiles of {size} pixels with overlap {overlap} (starts at multiples of {multiple}) never "
                f"advance; choose an overlap of at most {max(size - multiple, 0)}"
            )
        return TilePlan(
            size_hw=(min(size, self.height), min(size, self.width)),
            row_starts=_starts(self.height, size, stride),
            col_starts=_starts(self.width, size, stride),
            overlap=overlap,
        )


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tiles of one size over a raster: all inside it, every pixel covered, the last flush with the edge.

    Attributes:
        size_hw: rows and columns of every tile.
        row_starts: first row of each row of tiles, ascending.
        col_starts: first column of each column of tiles, ascending.
        overlap: pixels that neighbours share at least.
    """

    size_hw: tuple[int, int]
    row_starts: tuple[int, ...]
    col_starts: tuple[int, ...]
    overlap: int

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.row_starts) * len(self.col_starts)

    def windows(self) -> Iterator[Window]:
        """Yields the tiles row by row."""
        height, width = self.size_hw
        for row in self.row_starts:
            for col in self.col_starts:
                yield Window(col, row, width, height)


def aligned_window(own: PixelGrid, wanted: PixelGrid) -> Window | None:
    """The window of `own` that is `wanted`, or None unless both have one CRS and their pixels coincide."""
    if own.crs != wanted.crs:
        return None
    relative = ~own.transform @ wanted.transform
    drift = max(
        abs(relative.a - 1.0) * wanted.width,
        abs(relative.e - 1.0) * wanted.height,
        abs(relative.c - round(relative.c)),
        abs(relative.f - round(relative.f)),
    )
    if drift > _ALIGNMENT_TOLERANCE_PX:
        return None
    return Window(round(relative.c), round(relative.f), wanted.width, wanted.height)


def blend_weights(size_hw: tuple[int, int], overlap: int) -> NDArray[np.float32]:
    """Weights to average overlapping tiles with: 1 inside, smooth ramps of `overlap` pixels at the borders.

    The ramps are sin^2, so two tiles that overlap by exactly `overlap` pixels have weights that add up to 1.

    Args:
        size_hw: rows and columns of a tile.
        overlap: width of the ramps in pixels.

    Returns:
        [h, w] float32, all > 0.

    Raises:
        DataError: negative overlap or empty tile.
    """
    if overlap < 0 or min(size_hw) < 1:
        raise DataError(f"blend weights need a tile of >= 1 pixel and overlap >= 0, got {size_hw}, {overlap}")
    rows, cols = (_ramp(length, overlap) for length in size_hw)
    weights: NDArray[np.float32] = np.outer(rows, cols).astype(np.float32)
    return weights


def _ramp(length: int, overlap: int) -> NDArray[np.float64]:
    """[length] weights along one axis."""
    if overlap == 0:
        return np.ones(length)
    position = np.arange(length) + 0.5
    from_border = np.minimum(np.minimum(position, length - position) / overlap, 1.0)
    ramp: NDArray[np.float64] = np.sin(from_border * (math.pi / 2)) ** 2
    return ramp


def _starts(length: int, size: int, stride: int) -> tuple[int, ...]:
    """First pixels of tiles along one axis."""
    last = max(length - size, 0)
    return (*range(0, last, stride), last)


def _upright(transform: Affine, height: int, width: int, name: str) -> Affine:
    """The transform without rounding errors in its shear terms; raises if it is not axis-aligned."""
    shear_px = max(
        abs(transform.b) * height / (abs(transform.a) or 1e-300),
        abs(transform.d) * width / (abs(transform.e) or 1e-300),
    )
    if shear_px > _SHEAR_TOLERANCE_PX:
        raise GeoreferenceError(
            f"{name} is rotated or sheared (transform {tuple(transform)[:6]}), expected rows and columns "
            "along the axes of its CRS; warp it first, e.g. gdalwarp IN OUT"
        )
    if transform.a <= 0 or transform.e == 0:
        raise GeoreferenceError(
            f"{name} is mirrored or flat (transform {tuple(transform)[:6]}), expected columns that run "
            "eastwards; warp it first, e.g. gdalwarp IN OUT"
        )
    return Affine(transform.a, 0.0, transform.c, 0.0, transform.e, transform.f)


def _terrestrial(crs: CRS, name: str) -> CRS:
    """The CRS itself, or for a local one the registered CRS of exactly its name.

    Some writers leave out the code and keep only the name ("RGF93 v1 / Lambert-93" in the masks of FLAIR);
    GDAL then sees a local system that cannot be transformed.
    """
    if crs.is_projected or crs.is_geographic:
        return crs
    local = pyproj.CRS.from_wkt(crs.to_wkt())
    try:
        registered = pyproj.CRS.from_user_input(local.name)
    except CRSError:
        registered = local
    if registered.name == local.name and (registered.is_projected or registered.is_geographic):
        return CRS.from_wkt(registered.to_wkt())
    raise GeoreferenceError(
        f"{name} lies in a local coordinate system ({local.name!r}) without a place on Earth; "
        "assign the right one, e.g. gdal_edit -a_srs EPSG:32617 FILE"
    )


def _metres_per_degree(latitude: float) -> tuple[float, float]:
    """Length of one degree of longitude and of latitude on WGS 84 [m]."""
    phi = math.radians(max(min(latitude, 90.0), -90.0))
    curvature = 1.0 - _ECCENTRICITY_SQUARED * math.sin(phi) ** 2
    along_parallel = _SEMI_MAJOR_M * math.cos(phi) / math.sqrt(curvature)
    along_meridian = _SEMI_MAJOR_M * (1.0 - _ECCENTRICITY_SQUARED) / curvature**1.5
    return math.radians(along_parallel), math.radians(along_meridian)
