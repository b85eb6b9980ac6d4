"""Places and queries of scenes on a grid of half metres."""

import rasterio

# Pixels of half a metre: their corners are exact in binary, so torchgeo's own arithmetic is, too.
HALF_METRE = 0.5
ORIGIN = (400_000.0, 3_280_000.0)


def read(path):
    """All numbers of a raster."""
    with rasterio.open(path) as dataset:
        return dataset.read()


def query(left, top, width, height=None, pixel=HALF_METRE, origin=ORIGIN):
    """A query in pixels from the origin."""
    x, y = origin[0] + left * pixel, origin[1] - top * pixel
    return slice(x, x + width * pixel), slice(y - (height or width) * pixel, y)
