"""Scenes that several tests read."""

import numpy as np
import pytest


@pytest.fixture
def three_zones(write_raster):
    """Three 60 x 60 scenes in as many UTM zones, whose numbers tell scene and place."""
    for number, epsg in enumerate((32616, 32617, 32618)):
        rows, cols = np.mgrid[:60, :60]
        array = np.stack([np.full((60, 60), number + 1), rows + 1, cols + 1]).astype(np.uint8)
        path = write_raster(
            f"zones/{epsg}.tif", array=array, crs=f"EPSG:{epsg}", origin=(400_000, 3_280_000 + number)
        )
    return path.parent
