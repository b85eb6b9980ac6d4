"""The server of the web map: listens on this machine only; serves the page, layers, tiles and numbers."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dinov3geo.errors import ConfigError, UserError
from dinov3geo.viewer.layers import MAX_ZOOM, MapLayer
from dinov3geo.viewer.similarity import SimilarityLayer

HOST = "127.0.0.1"

PAGE_FILES: Mapping[str, str] = {
    "index.html": "text/html; charset=utf-8",
    "viewer.css": "text/css; charset=utf-8",
    "viewer.mjs": "text/javascript; charset=utf-8",
    "maplibre-gl.css": "text/css; charset=utf-8",
    "maplibre-gl.mjs": "text/javascript; charset=utf-8",
    "maplibre-gl-worker.mjs": "text/javascript; charset=utf-8",
    "maplibre-gl.LICENSE.txt": "text/plain; charset=utf-8",
}
"""All that the page is made of, with its types; nothing else of the package is served."""

# The browser itself refuses whatever would come from another machine.
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back to the browser.

    Attributes:
        status: of HTTP.
        kind: type of the content.
        body: the content.
    """

    status: HTTPStatus
    kind: str
    body: bytes


class Viewer:
    """Answers the requests of the page; knows nothing of sockets."""

    def __init__(self, layers: Sequence[MapLayer], similarity: SimilarityLayer | None = None) -> None:
        """Takes the layers.

        Args:
            layers: the lowest first.
            similarity: layer of the patches similar to a clicked one, or None.
        """
        self._layers = {layer.key: layer for layer in layers}
        self._similarity = similarity

    def answer(self, address: str) -> Answer:
        """Answers one request.

        Args:
            address: path and query, e.g. `/tiles/0/12/2138/1445.png` or `/value?lon=1&lat=2`.
        """
        parts = urlsplit(address)
        words = parts.path.strip("/").split("/")
        try:
            match words:
                case ["layers.json"]:
                    return _json(self._describe())
                case ["value"]:
                    lon, lat = _lon_lat(parts.query)
                    return _json([layer.value_at(lon, lat) for layer in reversed(self._layers.values())])
                case ["similarity"] if self._similarity is not None:
                    return _json(self._similarity.describe(*_lon_lat(parts.query)))
                case ["tiles", key, z, x, y] if key in self._layers:
                    return _png(self._layers[key].tile(*_tile(z, x, y)))
                case ["similarity", row, col, z, x, y] if self._similarity is not None:
                    return _png(self._similarity.tile(int(row), int(col), *_tile(z, x, y)))
                case [name] if (name or "index.html") in PAGE_FILES:
                    return _page_file(name or "index.html")
        except UserError as error:
            return _json({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)
        except ValueError as error:
            return _json({"error": f"{address}: {error}"}, HTTPStatus.BAD_REQUEST)
        return _json({"error": f"nothing at {parts.path}"}, HTTPStatus.NOT_FOUND)

    def _describe(self) -> dict[str, Any]:
        layers = [layer.describe() for layer in self._layers.values()]
        boxes = [layer["bounds"] for layer in layers]
        if not boxes and self._similarity is not None:
            boxes = [self._similarity.bounds]
        west, south, east, north = zip(*boxes, strict=True)
        return {
            "layers": layers,
            "similarity": self._similarity is not None,
            "bounds": (min(west), min(south), max(east), max(north)),
        }


class ViewerServer(ThreadingHTTPServer):
    """Serves a viewer on this machine; `url` says where."""

    daemon_threads = True

    def __init__(self, viewer: Viewer, port: int = 0) -> None:
        """Binds a port.

        Args:
            viewer: answers the requests.
            port: to listen on; 0 for a free one.

        Raises:
            ConfigError: the port is taken or not allowed.
        """
        self.viewer = viewer
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"cannot listen on port {port} ({reason}); leave --port out for a free one"
            ) from error

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    """Turns one request into a call of the viewer."""

    server: ViewerServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        """Serves a connection until either side ends it."""
        try:
            super().handle()
        except ConnectionError:
            # A browser that is closed, or that no longer wants a tile, says no goodbye.
            self.close_connection = True

    def do_GET(self) -> None:
        """Answers."""
        port = self.server.server_port
        # Another site may let its own name point to 127.0.0.1; its page must not read files through that.
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            answer = _json({"error": "this server answers its own page only"}, HTTPStatus.FORBIDDEN)
        else:
            answer = self.server.viewer.answer(self.path)
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing: a line per tile would hide what matters."""


def _page_file(name: str) -> Answer:
    folder = importlib.resources.files("dinov3geo.viewer") / "page"
    return Answer(HTTPStatus.OK, PAGE_FILES[name], (folder / name).read_bytes())


def _json(content: object, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    text = json.dumps(content, allow_nan=False)
    return Answer(status, "application/json", text.encode())


def _png(body: bytes) -> Answer:
    return Answer(HTTPStatus.OK, "image/png", body)


def _lon_lat(query: str) -> tuple[float, float]:
    """Longitude and latitude; raises `ValueError` where they are missing or no such numbers."""
    found = parse_qs(query)
    if not {"lon", "lat"} <= set(found):
        raise ValueError("expected ?lon=...&lat=...")
    lon, lat = float(found["lon"][0]), float(found["lat"][0])
    if not (abs(lon) <= 360 and abs(lat) <= 90):
        raise ValueError("expected degrees, lon from -360 to 360 and lat from -90 to 90")
    return (lon + 180) % 360 - 180 if abs(lon) > 180 else lon, lat


def _tile(z: str, x: str, y: str) -> tuple[int, int, int]:
    """Zoom, column and row of a tile; raises `ValueError` where there is none such."""
    zoom, col, row = int(z), int(x), int(y.removesuffix(".png"))
    if not (0 <= zoom <= MAX_ZOOM and 0 <= col < 2**zoom and 0 <= row < 2**zoom):
        raise ValueError(f"no such tile; zoom levels are 0 to {MAX_ZOOM}")
    return zoom, col, row
