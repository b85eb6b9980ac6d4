"""The page in a real browser: layers, opacity, numbers and similar patches on click."""

import io
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio import warp
from rasterio.crs import CRS

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytest.importorskip("rio_tiler")

from dinov3geo.viewer.layers import open_layers  # noqa: E402
from dinov3geo.viewer.server import Viewer, ViewerServer  # noqa: E402
from dinov3geo.viewer.similarity import SimilarityLayer  # noqa: E402

# Software rendering: a machine without a screen has no graphics.
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
IDLE = "() => new Promise(done => viewerMap.once('idle', done).triggerRepaint())"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, playwright's own or that of the system."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            running = playwright.chromium.launch(executable_path=found, args=FLAGS)
        except sync_api.Error as error:
            pytest.skip(f"no Chromium that starts: {str(error).splitlines()[0]}")
        yield running
        running.close()


@pytest.fixture
def page(browser, files, store) -> Iterator[Any]:
    viewer = Viewer(open_layers([files.heights, files.scene]), SimilarityLayer(store))
    with ViewerServer(viewer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        tab = browser.new_page(viewport={"width": 900, "height": 600})
        trouble: list[str] = []
        asked: list[str] = []
        tab.on("pageerror", lambda error: trouble.append(str(error)))
        tab.on("console", lambda said: trouble.append(said.text) if said.type == "error" else None)
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(server.url)
        tab.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        tab.evaluate(IDLE)
        yield tab
        tab.close()
        server.shutdown()
        thread.join()
        # What the server refuses (422), the page shows as a message; that is no fault of it.
        assert not [text for text in trouble if "status of 422" not in text]
        assert all(url.startswith((server.url, "blob:", "data:")) for url in asked)


def screen(page: Any) -> np.ndarray:
    """What the map shows, [h, w, 3]."""
    page.evaluate(IDLE)
    return np.asarray(Image.open(io.BytesIO(page.locator("#map canvas").screenshot())).convert("RGB"), float)


def place_of(page: Any, row: float, col: float) -> tuple[float, float]:
    """Where the middle of a pixel of the heights lies on the page."""
    x, y = 400_000 + 0.5 * (col + 0.5), 3_280_000 - 0.5 * (row + 0.5)
    (lon,), (lat,) = warp.transform(CRS.from_epsg(32617), CRS.from_epsg(4326), [x], [y])
    return tuple(
        page.evaluate(
            "([lon, lat]) => { const box = document.getElementById('map').getBoundingClientRect();"
            "const at = viewerMap.project([lon, lat]); return [at.x + box.x, at.y + box.y]; }",
            [lon, lat],
        )
    )


def test_the_map_is_shown_and_opacity_moves_it(page):
    names = page.locator(".layer > label").all_inner_texts()
    assert [name.strip() for name in names] == ["heights.tif: canopy height", "scene.tif"]
    assert page.locator(".legend .ends").first.inner_text().split() == ["0", "25"]
    heights = screen(page)
    slider = page.locator("[data-layer='0'] input[type=range]")
    slider.fill("0")
    scene = screen(page)
    slider.fill("50")
    between = screen(page)
    assert page.locator("[data-layer='0'] output").inner_text() == "50%"
    middle = (slice(100, 250), slice(320, 460))  # the upper half, where the map holds data
    assert np.abs(heights[middle] - scene[middle]).mean() > 30
    np.testing.assert_allclose(between[middle], (heights[middle] + scene[middle]) / 2, atol=3)
    page.locator("[data-layer='0'] input[type=checkbox]").uncheck()
    slider.fill("100")
    np.testing.assert_array_equal(screen(page), scene)


def test_pixels_without_data_are_transparent(page):
    x, y = (round(k) for k in place_of(page, 48, 16))
    box = page.locator("#map").bounding_box()
    row, col = y - round(box["y"]), x - round(box["x"])
    with_map = screen(page)[row, col]
    page.locator("[data-layer='0'] input[type=checkbox]").uncheck()
    np.testing.assert_array_equal(screen(page)[row, col], with_map)


def test_a_click_prints_the_number_of_the_pixel(page, files):
    for row, col in [(3, 5), (20, 61), (40, 50)]:
        number = files.array[row, col]
        page.mouse.click(*place_of(page, row, col))
        page.locator("#values tr[data-layer='0']", has_text=str(number)).wait_for()
        shown = page.locator("#values tr[data-layer='0'] td").nth(1).inner_text()
        assert np.float32(shown) == number
        x, y = 400_000 + 0.5 * (col + 0.5), 3_280_000 - 0.5 * (row + 0.5)
        with rasterio.open(files.heights) as dataset:
            assert np.float32(shown) == next(dataset.sample([(x, y)]))[0]
        gdal = shutil.which("gdallocationinfo")
        if gdal is not None:
            words = [gdal, "-valonly", "-geoloc", str(files.heights), str(x), str(y)]
            said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            assert np.float32(said) == np.float32(shown)


def test_clicks_beside_data_say_so(page):
    page.mouse.click(*place_of(page, 50, 10))
    page.locator("#values tr").first.wait_for()
    assert page.locator("#values tr[data-layer='0'] td").nth(1).inner_text() == "no data"
    page.mouse.click(*place_of(page, 10, -3))
    page.locator("#values tr[data-layer='0']", has_text="outside").wait_for()


def test_a_second_click_draws_similar_patches(page, features):
    before = screen(page)
    page.locator("input[value=similarity]").check()
    page.mouse.click(*place_of(page, 20, 20))  # 4 m patches: row 2, column 2
    page.locator("[data-layer=similarity]").wait_for()
    assert "row 2, column 2" in page.locator("#message").inner_text()
    assert np.abs(screen(page) - before).mean() > 10
    # Another click replaces the layer; one on a hole is told and leaves it.
    page.mouse.click(*place_of(page, 4, 4))
    page.locator("#message", has_text="row 0, column 0").wait_for()
    page.mouse.click(*place_of(page, 60, 10))
    page.locator("#message.error", has_text="no data").wait_for()
    assert page.locator("[data-layer=similarity]").count() == 1
