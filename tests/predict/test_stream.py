"""The engine against the untiled result and a naive in-memory blend."""

import math
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.windows import Window

from dinov3geo.errors import RasterError
from dinov3geo.predict.stream import OUTPUTS_AHEAD, RowRing, output_shape, prefetched, stream_rows
from dinov3geo.rasters.grid import PixelGrid, TilePlan, blend_weights


class ArrayScene:
    """A scene in memory that counts its reads and refuses windows beyond the edge."""

    def __init__(self, image: np.ndarray, valid: np.ndarray | None = None) -> None:
        self.image = image
        self.valid = np.ones(image.shape[1:], dtype=bool) if valid is None else valid
        self.threads: set[str] = set()

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        self.threads.add(threading.current_thread().name)
        rows, cols = window.toslices()
        assert 0 <= rows.start < rows.stop <= self.image.shape[1]
        assert 0 <= cols.start < cols.stop <= self.image.shape[2]
        return self.image[:, rows, cols].copy(), self.valid[rows, cols].copy()


def random_scene(height: int, width: int, *, bands: int = 2, seed: int = 0, holes: float = 0.0) -> ArrayScene:
    rng = np.random.default_rng(seed)
    image = rng.random((bands, height, width)).astype(np.float32)
    return ArrayScene(image, rng.random((height, width)) >= holes)


def make_plan(height: int, width: int, size: int, overlap: int, multiple: int = 1) -> TilePlan:
    grid = PixelGrid(CRS.from_epsg(32617), Affine(0.1, 0, 4e5, 0, -0.1, 3e6), height, width)
    return grid.tiles(size, overlap, multiple)


def per_pixel(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Two outputs that depend on nothing but the pixel itself."""
    return np.stack([images[:, 0] * 2 - images[:, 1], images[:, 1] ** 2], axis=1)


def with_context(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """An output that depends on the whole tile and on the place in it, as a network's does."""
    level = images.mean(axis=(1, 2, 3), keepdims=True)
    slope = np.linspace(0, 1, images.shape[3], dtype=np.float32)
    return (images[:, :1] + 3 * level) * (1 + slope)


def cell_means(stride: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The mean of each cell; cells that reach beyond the tile are filled up with its edge pixels."""

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        height, width = (math.ceil(size / stride) for size in images.shape[2:])
        padding = (height * stride - images.shape[2], width * stride - images.shape[3])
        padded = np.pad(images, ((0, 0), (0, 0), (0, padding[0]), (0, padding[1])), mode="edge")
        cells = padded.reshape(*images.shape[:2], height, stride, width, stride)
        return cells.mean(axis=(3, 5)).astype(np.float32)

    return run


def collect(
    scene: ArrayScene, plan: TilePlan, run: Callable, *, outputs: int, batch: int = 3, stride: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """All strips put together; checks that every row comes once, in order, over the whole width."""
    height, width = output_shape(plan, stride)
    values = np.full((outputs, height, width), np.inf, dtype=np.float32)
    valid = np.zeros((height, width), dtype=bool)
    next_row = 0
    for window, strip, mask in stream_rows(
        scene, plan, run, batch_size=batch, stride=stride, num_outputs=outputs
    ):
        assert (window.row_off, window.col_off, window.width) == (next_row, 0, width)
        assert strip.shape == (outputs, window.height, width)
        assert strip.dtype == np.float32
        next_row += window.height
        values[:, window.row_off : next_row] = strip
        valid[window.row_off : next_row] = mask
    assert next_row == height
    return values, valid


def naive_blend(scene: ArrayScene, plan: TilePlan, run: Callable, *, outputs: int) -> np.ndarray:
    """The same weighted mean with the whole scene in memory, in float64, tile by tile."""
    sums = np.zeros((outputs, *scene.image.shape[1:]))
    total = np.zeros(scene.image.shape[1:])
    weights = blend_weights(plan.size_hw, plan.overlap)
    for window in plan.windows():
        rows, cols = window.toslices()
        tile, valid = scene.image[:, rows, cols], scene.valid[rows, cols]
        sums[:, rows, cols] += run(tile[None], valid[None])[0].astype(np.float64) * weights
        total[rows, cols] += weights
    return np.where(scene.valid, sums / total, np.nan)


sides = st.one_of(st.integers(1, 60), st.sampled_from([1, 2, 31, 37, 53, 59]))


@st.composite
def plans(draw: st.DrawFn) -> TilePlan:
    size = draw(st.integers(1, 40))
    return make_plan(draw(sides), draw(sides), size, draw(st.integers(0, size - 1)))


@settings(max_examples=60, deadline=None)
@given(plan=plans(), batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_per_pixel_function_gives_the_untiled_result(plan: TilePlan, batch: int, seed: int) -> None:
    scene = random_scene(*output_shape(plan, 1), seed=seed, holes=0.2)
    values, valid = collect(scene, plan, per_pixel, outputs=2, batch=batch)
    np.testing.assert_array_equal(valid, scene.valid)
    whole = per_pixel(scene.image[None], scene.valid[None])[0]
    np.testing.assert_array_equal(values[:, valid], whole[:, valid])
    assert np.isnan(values[:, ~valid]).all()


@settings(max_examples=60, deadline=None)
@given(plan=plans(), batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_tiles_with_context_are_blended_as_in_memory(plan: TilePlan, batch: int, seed: int) -> None:
    scene = random_scene(*output_shape(plan, 1), seed=seed, holes=0.05)
    values, valid = collect(scene, plan, with_context, outputs=1, batch=batch)
    np.testing.assert_array_equal(valid, scene.valid)
    np.testing.assert_allclose(values, naive_blend(scene, plan, with_context, outputs=1), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    height=sides,
    width=sides,
    stride=st.integers(1, 8),
    cells=st.integers(1, 6),
    overlap=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_a_stride_gives_the_untiled_cells(
    height: int, width: int, stride: int, cells: int, overlap: int, seed: int
) -> None:
    plan = make_plan(height, width, cells * stride, min(overlap, cells - 1) * stride, stride)
    scene = random_scene(height, width, seed=seed, holes=0.9)
    run = cell_means(stride)
    values, valid = collect(scene, plan, run, outputs=2, stride=stride)
    whole = run(scene.image[None], scene.valid[None])[0]
    naive_valid = np.array(
        [
            [scene.valid[r : r + stride, c : c + stride].any() for c in range(0, width, stride)]
            for r in range(0, height, stride)
        ]
    )
    np.testing.assert_array_equal(valid, naive_valid)
    np.testing.assert_allclose(values[:, valid], whole[:, valid], atol=1e-6)


def test_nan_outputs_of_pixels_without_data_spoil_no_neighbour() -> None:
    scene = random_scene(20, 20, holes=0.3)
    plan = make_plan(20, 20, 8, 4)

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return np.where(valid[:, None], images[:, :1], np.nan).astype(np.float32)

    values, valid = collect(scene, plan, run, outputs=1)
    np.testing.assert_allclose(values[0][valid], scene.image[0][valid], atol=1e-6)


def test_tiles_without_data_are_not_run_even_if_whole_rows_of_tiles_are_empty() -> None:
    scene = random_scene(100, 12)
    scene.valid[10:83] = False
    plan = make_plan(100, 12, 8, 2)
    seen: list[bool] = []

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        seen.extend(valid.any(axis=(1, 2)))
        return images[:, :1]

    values, valid = collect(scene, plan, run, outputs=1)
    assert all(seen)
    assert 0 < len(seen) < len(plan)
    np.testing.assert_array_equal(valid, scene.valid)
    np.testing.assert_allclose(values[0][valid], scene.image[0][valid], atol=1e-6)


def test_a_scene_without_any_data_yields_invalid_rows_and_runs_nothing() -> None:
    scene = random_scene(30, 10, holes=1.1)

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        raise AssertionError("nothing to run")

    values, valid = collect(scene, make_plan(30, 10, 8, 2), run, outputs=1)
    assert not valid.any()
    assert np.isnan(values).all()


def test_the_ring_is_one_tile_high_whatever_the_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    class SpiedRing(RowRing):
        def __init__(self, num_outputs: int, height: int, width: int, first_row: int) -> None:
            super().__init__(num_outputs, height, width, first_row)
            shapes.append((self.means.shape, self.weights.shape, self.valid.shape))

    monkeypatch.setattr("dinov3geo.predict.stream.RowRing", SpiedRing)
    for height in (40, 400):
        strips = stream_rows(
            random_scene(height, 50), make_plan(height, 50, 16, 4), per_pixel, batch_size=2, num_outputs=2
        )
        assert max(strip.shape[1] for _, strip, _ in strips) <= 16
    assert shapes == [((2, 16, 50), (16, 50), (16, 50))] * 2


def test_the_ring_refuses_rows_that_have_left_it() -> None:
    ring = RowRing(1, 4, 5)
    list(ring.take(3))
    block = np.ones((1, 2, 5), dtype=np.float32)
    with pytest.raises(AssertionError):
        ring.add(2, 0, block, block[0], block[0] > 0)


def test_rows_come_as_soon_as_they_are_finished() -> None:
    scene = random_scene(64, 8)
    rows_read: list[int] = []

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        rows_read.append(len(rows_read))
        return images[:, :1]

    strips = stream_rows(scene, make_plan(64, 8, 8, 4), run, batch_size=1, num_outputs=1)
    window, _, _ = next(strips)
    assert (window.row_off, window.height) == (0, 4)
    assert 2 <= len(rows_read) <= 2 + OUTPUTS_AHEAD + 1
    strips.close()


def test_readers_and_model_run_in_threads_of_their_own_that_end_with_the_iterator() -> None:
    scenes = [random_scene(64, 64) for _ in range(3)]
    models: set[str] = set()

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        models.add(threading.current_thread().name)
        return per_pixel(images, valid)

    before = threading.active_count()
    strips = stream_rows(scenes, make_plan(64, 64, 8, 4), run, batch_size=2, num_outputs=2)
    next(strips)
    assert threading.active_count() <= before + 4
    list(strips)
    assert threading.active_count() == before
    readers = set().union(*(scene.threads for scene in scenes))
    assert 1 <= len(readers) <= 3 and len(models) == 1
    assert len({threading.current_thread().name} | readers | models) == len(readers) + 2


def test_closing_early_ends_all_threads() -> None:
    before = threading.active_count()
    strips = stream_rows(
        random_scene(64, 64), make_plan(64, 64, 8, 4), per_pixel, batch_size=2, num_outputs=2
    )
    next(strips)
    strips.close()
    assert threading.active_count() == before


def test_reading_computing_and_writing_overlap() -> None:
    """Each step takes 10 ms for a batch of two tiles; one after another they take three times as long."""

    class SlowScene(ArrayScene):
        def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
            time.sleep(0.005)
            return super().read(window)

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        return images[:, :1]

    scene = SlowScene(random_scene(320, 16).image)
    began = time.perf_counter()
    for _ in stream_rows(scene, make_plan(320, 16, 8, 0), run, batch_size=2, num_outputs=1):
        time.sleep(0.01)
    assert time.perf_counter() - began < 0.8 * 3 * 0.01 * 40


@settings(max_examples=60, deadline=None)
@given(
    plan=plans(), batch=st.integers(1, 5), cut=st.floats(0, 1), end=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_any_range_of_rows_is_computed_from_the_same_batches(
    plan: TilePlan, batch: int, cut: float, end: float, seed: int
) -> None:
    """The outputs here depend on all tiles of the batch, so they betray any other composition."""
    height, width = output_shape(plan, 1)
    scene = random_scene(height, width, seed=seed, holes=0.97)

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return images[:, :1] + np.float32(images.mean()) * len(images)

    first, stop = sorted((round(cut * height), round(end * height)))
    whole, whole_valid = collect(scene, plan, run, outputs=1, batch=batch)
    row = first
    for window, values, valid in stream_rows(
        scene, plan, run, batch_size=batch, num_outputs=1, rows=(first, stop)
    ):
        assert window.row_off == row
        row += window.height
        np.testing.assert_array_equal(values, whole[:, window.row_off : row])
        np.testing.assert_array_equal(valid, whole_valid[window.row_off : row])
    assert row == stop


def test_a_range_of_rows_runs_only_the_tiles_that_it_needs() -> None:
    scene = random_scene(800, 16)
    ran: list[int] = []

    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        ran.append(len(images))
        return images[:, :1]

    plan = make_plan(800, 16, 16, 4)
    rows = (600, 640)
    list(stream_rows(scene, plan, run, batch_size=1, num_outputs=1, rows=rows))
    assert sum(ran) == sum(start < 640 and start + 16 > 600 for start in plan.row_starts)


def test_an_error_of_the_reader_arrives_at_the_caller_after_the_rows_before_it() -> None:
    class BrokenScene(ArrayScene):
        def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
            if window.row_off >= 24:
                raise RasterError("scene.tif is truncated")
            return super().read(window)

    scene = BrokenScene(random_scene(64, 16).image)
    before = threading.active_count()
    rows = 0
    with pytest.raises(RasterError, match="truncated"):
        for window, _, _ in stream_rows(
            scene, make_plan(64, 16, 8, 0), per_pixel, batch_size=2, num_outputs=2
        ):
            rows += window.height
    assert rows == 16
    assert threading.active_count() == before


def test_an_error_of_the_model_ends_the_thread() -> None:
    def run(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
        raise RuntimeError("out of memory")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_rows(random_scene(64, 16), make_plan(64, 16, 8, 0), run, batch_size=1, num_outputs=1))
    assert threading.active_count() == before


def test_prefetching_is_bounded_and_keeps_the_order() -> None:
    made: list[int] = []

    def numbers() -> object:
        for number in range(10):
            made.append(number)
            yield number

    items = prefetched(numbers(), depth=3)
    assert next(items) == 0
    time.sleep(0.05)
    assert len(made) <= 4
    assert list(items) == list(range(1, 10))


@pytest.mark.parametrize(
    ("plan", "stride", "batch", "message"),
    [
        (TilePlan((10, 10), (0, 10), (0,), 0), 4, 1, "multiples of the stride"),
        (TilePlan((8, 8), (0, 6, 12), (0,), 2), 4, 1, "multiples of the stride"),
        (TilePlan((8, 8), (0,), (0,), 2), 0, 1, "stride"),
        (TilePlan((8, 8), (0,), (0,), 2), 1, 0, "batch_size"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: TilePlan, stride: int, batch: int, message: str) -> None:
    scene = random_scene(*output_shape(plan, 1))
    with pytest.raises(ValueError, match=message):
        next(stream_rows(scene, plan, per_pixel, batch_size=batch, num_outputs=2, stride=stride))


def test_a_model_of_another_output_shape_is_refused() -> None:
    scene = random_scene(8, 8)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 8, 8\), expected \(1, 1, 8, 8\)"):
        next(stream_rows(scene, make_plan(8, 8, 8, 0), per_pixel, batch_size=1, num_outputs=1))
