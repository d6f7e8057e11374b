"""A model named by its hub id, fetched from a hub: the real client against a server on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny-model"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 64,
    "pytorch_model.bin": b"a pickle, which nobody here may load",
    "README.md": b"# Tiny",
}


class Hub(BaseHTTPRequestHandler):
    """The calls that fetching a repository takes: what it is, what is in it, and each file."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        type(self).asked.append(path)
        data, kind = b"", "application/octet-stream"
        if path.startswith(f"/api/models/{NAME}"):
            kind = "application/json"
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": NAME, "sha": COMMIT, "siblings": siblings}
            data = json.dumps(tree if "/tree/" in path else info).encode()
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            data = FILES[path.rpartition("/")[2]]
        self.send_response(200 if data else 404)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve(name: str, hub: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: the hub client reads its settings once, when it is imported."""
    script = "import sys; from llumnix.instance import model_loader as m; print(m.resolve_model(sys.argv[1]))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", script, name], capture_output=True, text=True, timeout=60, env=environment
    )


def test_a_hub_id_is_fetched_once_and_without_pickles(hub: str, tmp_path: Path) -> None:
    first = resolve(NAME, hub, tmp_path)
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    Hub.asked.clear()
    assert resolve(NAME, hub, tmp_path).stdout == first.stdout
    assert not any("model.safetensors" in path for path in Hub.asked), "it was there already"


def test_a_hub_that_does_not_know_the_model_is_told_in_one_line(hub: str, tmp_path: Path) -> None:
    refused = resolve("someone/else", hub, tmp_path)
    assert refused.returncode != 0
    last = refused.stderr.strip().splitlines()[-1]
    assert "ConfigurationError: model 'someone/else' is no folder here, and the hub did not give it" in last
