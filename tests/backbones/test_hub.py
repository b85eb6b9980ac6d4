"""Weights of the hub: never fetched unasked, read from the cache, fetched from a real (local) server."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from dinov3geo.backbones.card import NORMALIZATIONS, BackboneCard
from dinov3geo.backbones.rewrite import rewrite_checkpoint
from dinov3geo.backbones.zoo import build_backbone, load_backbone, save_backbone
from dinov3geo.errors import ConfigError, DataError, UnknownNameError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/dinov3-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a small satellite model."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    card = BackboneCard("w", "vit_tiny", 16, NORMALIZATIONS["sat"])
    save_backbone(root / "w.safetensors", build_backbone("vit_tiny"), card)
    rewrite_checkpoint(root / "w.safetensors", root / "hf", "hf")
    return root / "hf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_into(cache: Path, folder: Path) -> None:
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_the_cache_is_read_without_the_network(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", no_network)
    put_into(cache, folder)
    card = load_backbone(f"hub:{NAME}").card
    assert card is not None
    assert card.name == f"hub:{NAME}" and card.recipe["commit"] == COMMIT
    assert card.normalization == NORMALIZATIONS["sat"]
    assert load_backbone(f"hub:{NAME}@{COMMIT}").card.recipe["commit"] == COMMIT


def test_nothing_is_fetched_unasked(cache: Path) -> None:
    with pytest.raises(UnknownNameError, match=f"on the hub: hub:{NAME}"):
        load_backbone(NAME)
    with pytest.raises(DataError, match=f"dinov3geo models hub:{NAME} --download"):
        load_backbone(f"hub:{NAME}")
    assert not cache.exists()


@pytest.mark.parametrize("name", ["hub:", "hub:alone", "hub:a/b/c", "hub:a//b", "hub:a b/c", "hub:/b"])
def test_names_of_another_form(cache: Path, name: str) -> None:
    with pytest.raises((ConfigError, DataError)):
        load_backbone(name)


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that a download needs."""

    folder: Path
    status = 200

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        if self.status != 200:
            self.reply(b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, self.status)
        elif self.path.startswith(f"/api/models/{NAME}/revision/"):
            siblings = [{"rfilename": name} for name in self.sizes()]
            self.reply_json({"id": NAME, "sha": COMMIT, "siblings": siblings})
        elif self.path.startswith(f"/api/models/{NAME}/tree/{COMMIT}"):
            files = [{"type": "file", "path": n, "size": s, "oid": COMMIT} for n, s in self.sizes().items()]
            self.reply_json(files)
        elif self.path.startswith(f"/{NAME}/resolve/{COMMIT}/") and not self.path.endswith(".bin"):
            data = (self.folder / self.path.rsplit("/", 1)[1]).read_bytes()
            self.reply(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{len(data)}"'})
        else:
            self.reply(b"{}", {}, 404)

    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.iterdir()} | {"evil.bin": 3}

    def reply_json(self, fields: object) -> None:
        self.reply(json.dumps(fields).encode(), {"Content-Type": "application/json"})

    def reply(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(folder: Path) -> Iterator[type[Hub]]:
    handler = type("LocalHub", (Hub,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def command(hub: type[Hub], cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The verb in a process of its own: the client reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache)}  # type: ignore[attr-defined]
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-m", "dinov3geo", "models", f"hub:{NAME}", *words],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )


def test_a_download_that_was_asked_for(hub: type[Hub], tmp_path: Path) -> None:
    fetched = command(hub, tmp_path / "cache", "--download")
    assert fetched.returncode == 0, fetched.stderr
    card = json.loads(fetched.stdout)
    assert card["dialect"] == "hf" and card["variant"] == "vit_tiny" and card["recipe"]["commit"] == COMMIT
    names = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_gated_and_unreachable(hub: type[Hub], tmp_path: Path) -> None:
    hub.status = 403
    gated = command(hub, tmp_path / "cache", "--download")
    assert gated.returncode == 2 and "is gated" in gated.stderr and gated.stderr.count("\n") == 1
    hub.url = "http://127.0.0.1:9"  # type: ignore[attr-defined]
    gone = command(hub, tmp_path / "cache", "--download")
    assert gone.returncode == 2 and "hub is not reached" in gone.stderr and gone.stderr.count("\n") == 1
