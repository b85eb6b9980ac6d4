"""The server of the web map: what it answers, to whom, and the command around it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

from dinov3geo.cli import main
from dinov3geo.errors import ConfigError

pytest.importorskip("rio_tiler")

from dinov3geo.viewer.layers import open_layers  # noqa: E402
from dinov3geo.viewer.server import HOST, PAGE_FILES, Viewer, ViewerServer  # noqa: E402
from dinov3geo.viewer.similarity import SimilarityLayer  # noqa: E402


@pytest.fixture
def viewer(files, store) -> Viewer:
    return Viewer(open_layers([files.scene, files.heights]), SimilarityLayer(store))


@pytest.fixture
def server(viewer) -> Iterator[ViewerServer]:
    with ViewerServer(viewer) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server: ViewerServer, path: str, host: str | None = None) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=20)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers["Content-Type"], body


def test_page_layers_tiles_and_numbers(server):
    status, kind, body = get(server, "/")
    assert status == HTTPStatus.OK and kind.startswith("text/html") and b"viewer.mjs" in body
    described = json.loads(get(server, "/layers.json")[2])
    assert [layer["kind"] for layer in described["layers"]] == ["image", "values"]
    assert described["similarity"] is True
    west, south, east, north = described["bounds"]
    place = f"lon={(west + east) / 2}&lat={(south * 0.4 + north * 0.6)}"
    values = json.loads(get(server, f"/value?{place}")[2])
    assert [value["name"] for value in values] == ["heights.tif: canopy height", "scene.tif"]
    similar = json.loads(get(server, f"/similarity?{place}")[2])
    row, col = similar["key"].split("_")
    for address in ("/tiles/0/3/2/3.png", f"/similarity/{row}/{col}/3/2/3.png"):
        status, kind, body = get(server, address)
        assert (status, kind, body[:4]) == (HTTPStatus.OK, "image/png", b"\x89PNG")


def test_features_alone_can_be_looked_at(store):
    described = json.loads(Viewer([], SimilarityLayer(store)).answer("/layers.json").body)
    west, south, east, north = described["bounds"]
    assert west < east and south < north and described["layers"] == []


@pytest.mark.parametrize(
    ("address", "status", "words"),
    [
        ("/tiles/9/3/2/3.png", 404, "nothing at"),
        ("/tiles/0/3/2/9.png", 400, "no such tile"),
        ("/tiles/0/-1/0/0.png", 400, "no such tile"),
        ("/tiles/0/99/0/0.png", 400, "no such tile"),
        ("/tiles/0/a/0/0.png", 400, "invalid literal"),
        ("/value?lon=1", 400, "expected"),
        ("/value?lon=nan&lat=2", 400, "degrees"),
        ("/value?lon=1&lat=x", 400, "could not convert"),
        ("/similarity?lon=0&lat=0", 422, "outside"),
        ("/similarity/99/0/3/2/3.png", 422, "no cell"),
        ("/../server.py", 404, "nothing at"),
        ("/page/index.html", 404, "nothing at"),
        ("/%2e%2e/server.py", 404, "nothing at"),
    ],
)
def test_bad_requests_are_told_in_one_line(viewer, address, status, words):
    answer = viewer.answer(address)
    assert answer.status == status
    assert words in json.loads(answer.body)["error"]


def test_without_features_there_is_no_similarity(files):
    viewer = Viewer(open_layers([files.scene]))
    assert viewer.answer("/similarity?lon=0&lat=0").status == HTTPStatus.NOT_FOUND
    assert json.loads(viewer.answer("/layers.json").body)["similarity"] is False


def test_longitudes_of_other_copies_of_the_world_count(files):
    viewer = Viewer(open_layers([files.heights]))
    (west, south, east, north) = json.loads(viewer.answer("/layers.json").body)["bounds"]
    lon, lat = (west + east) / 2, (south + 3 * north) / 4
    one, other = (json.loads(viewer.answer(f"/value?lon={lon + k}&lat={lat}").body) for k in (0, 360))
    assert (one[0]["row"], one[0]["col"]) == (other[0]["row"], other[0]["col"])


def test_only_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_port
    assert get(server, "/", host="evil.example")[0] == HTTPStatus.FORBIDDEN
    assert get(server, "/value?lon=0&lat=0", host=f"evil.example:{port}")[0] == HTTPStatus.FORBIDDEN
    assert get(server, "/", host=f"localhost:{port}")[0] == HTTPStatus.OK


def test_the_page_asks_nobody_else(project_root):
    folder = project_root / "dinov3geo" / "viewer" / "page"
    assert {path.name for path in folder.iterdir()} == set(PAGE_FILES)
    for name in ("index.html", "viewer.css", "viewer.mjs"):
        assert "http" not in (folder / name).read_text(encoding="utf-8").replace("http-equiv", "")
    assert "3-Clause BSD" in (folder / "maplibre-gl.mjs").read_text(encoding="utf-8")[:300]
    assert "MapLibre contributors" in (folder / "maplibre-gl.LICENSE.txt").read_text(encoding="utf-8")


def test_a_taken_port_is_refused(viewer):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(ConfigError, match="leave --port out"):
            ViewerServer(viewer, taken.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_interrupted(files, number):
    words = [sys.executable, "-m", "dinov3geo", "view", str(files.heights), str(files.scene), "--no-browser"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", url)
            assert found
            connection = http.client.HTTPConnection(HOST, int(found[1]), timeout=20)
            connection.request("GET", "/layers.json")
            assert len(json.loads(connection.getresponse().read())["layers"]) == 2
            connection.close()
            process.send_signal(number)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()  # or leaving the block would wait for ever
    assert process.returncode == 0
    assert "stopped" in said and "Traceback" not in said


def test_bad_input_is_refused_before_anything_is_served(capsys, files, store, tmp_path, write_raster):
    def error_of(*words: object) -> str:
        assert main(["view", *map(str, words), "--no-browser"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return str(err)

    assert "no coordinate reference system" in error_of(write_raster("plain.tif", crs=None))
    assert "missing.tif" in error_of(tmp_path / "missing.tif")
    assert "one .zarr" in error_of(store, tmp_path / "b.zarr")
    assert "no feature store" in error_of(files.heights, tmp_path / "b.zarr")
    os.mkdir(tmp_path / "empty.zarr")
    assert "no feature store" in error_of(files.heights, tmp_path / "empty.zarr")
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        assert "cannot listen" in error_of(files.heights, "--port", taken.getsockname()[1])


def test_without_rio_tiler_the_command_says_what_to_install(capsys, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "rio_tiler.io", None)
    assert main(["view", str(files.heights), "--no-browser"]) == 2
    assert "dinov3geo[viewer]" in capsys.readouterr().err


def test_page_files_travel_with_the_package():
    import importlib.resources

    folder = importlib.resources.files("dinov3geo.viewer") / "page"
    for name in PAGE_FILES:
        assert Path(str(folder / name)).stat().st_size > 0
