"""What the tests of updates share: a store in a folder, small signed releases, and a mirror that can misbehave."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from loopback import listening
from sartor.core import home, signing
from sartor.core.artifacts import MANIFESTS, write_artifact
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.update.downloader import DownloadLimits

QUICK = DownloadLimits(
    connect_s=20.0, read_s=20.0, grace_s=0.4, least_bytes_per_s=20_000.0, attempts=3, backoff_s=0.01
)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    """name -> (dtype, bit patterns): bf16 too, which numpy does not have."""
    head, at = {}, 0
    for name, (dtype, bits) in tensors.items():
        head[name] = {"dtype": dtype, "shape": list(bits.shape), "data_offsets": [at, at + bits.nbytes]}
        at += bits.nbytes
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(bits.tobytes() for _, bits in tensors.values()))
    return path


def bf16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def adapter(seed: int, moved: float = 0.0, count: int = 8, width: int = 4096) -> dict[str, tuple[str, np.ndarray]]:
    """Weights as a tuner leaves them, in bf16; `moved`: by how much of their spread another epoch moved each."""
    rng, step = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    found = {}
    for number in range(count):
        start = rng.normal(0, 0.02, width).astype(np.float32)
        found[f"layers.{number}"] = ("BF16", bf16(start + moved * 0.02 * step.normal(0, 1, width)))
    return found


def release(
    path: Path, version: str, weights: Mapping[str, tuple[str, np.ndarray]], key: Path, name: str = "home"
) -> Path:
    """A signed Release of a base that is not on this machine."""

    def fill(part: Path) -> Mapping[str, object]:
        write_safetensors(part / "adapter_model.safetensors", weights)
        (part / "adapter_config.json").write_text('{"r": 8}')
        (part / "report").mkdir()
        (part / "report" / "report.json").write_text(json.dumps({"version": version}))
        base = {"name": "nowhere", "digest": "0" * 64, "template_digest": "0" * 64}
        return {"name": name, "version": version, "base": base, "gate": {}}

    made = write_artifact(path, "release", fill)
    document = (made.path / MANIFESTS["release"]).read_bytes()
    (made.path / "signature").write_text(signing.sign(document, signing.open_private(key)))
    return made.path


@dataclass
class Mirror:
    """A file server on loopback. `trick(request, file, start)` may answer itself and return true; tricks are of a list that
    is used up, one for each request whose path holds `only`.
    """

    folder: Path
    only: str = "/blobs/"
    tricks: list[Callable[[BaseHTTPRequestHandler, bytes, int], None]] = field(default_factory=list)
    always: Callable[[BaseHTTPRequestHandler, bytes, int], None] | None = None
    asked: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    mirror: Mirror
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        file = self.mirror.folder / self.path.lstrip("/")
        said = self.headers.get("Range", "")
        start = int(said.removeprefix("bytes=").removesuffix("-")) if said else 0
        self.mirror.asked.append((self.path, start))
        if not file.is_file():
            self.send_error(404)
            return
        trick = None
        if self.mirror.only in self.path:
            trick = self.mirror.tricks.pop(0) if self.mirror.tricks else self.mirror.always
        with contextlib.suppress(OSError):  # the client has gone
            (trick or honest)(self, file.read_bytes(), start)
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: object) -> None:
    request.send_response(status)
    for name, value in {"Content_Length": len(body), **headers}.items():
        if value is not None:
            request.send_header(name.replace("_", "-"), str(value))
    request.end_headers()
    request.wfile.write(body)


def honest(request: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
    if start:
        answer(request, 206, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
    else:
        answer(request, 200, content)


def cut(after: int) -> Callable[[BaseHTTPRequestHandler, bytes, int], None]:
    """Declares everything and ends `after` bytes later."""

    def trick(request: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
        said = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        answer(
            request, 206 if start else 200, content[start : start + after], Content_Length=len(content) - start, **said
        )

    return trick


def drip(request: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
    answer(request, 200, b"", Content_Length=len(content))
    for at in range(len(content)):
        request.wfile.write(content[at : at + 1])
        time.sleep(0.02)


@contextmanager
def serving(folder: Path) -> Iterator[Mirror]:
    mirror = Mirror(folder)
    with listening(type("Of", (_Handler,), {"mirror": mirror})) as mirror.url:
        yield mirror


def nothing(path: Path) -> None:
    """A health check that always agrees."""


@dataclass
class World:
    """A publisher with one version, and a device that was set up with its first root."""

    folder: Path
    key: Path
    keys: Path
    repository: Path
    store: ReleaseStore
    device: Path

    @property
    def root(self) -> bytes:
        return (self.repository / "metadata" / "1.root.json").read_bytes()

    @property
    def version(self) -> str:
        now = self.store.current("home")
        return now.version if now else ""


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: keys, and a repository with version 1.0 for all devices."""
    from sartor.edge.update import repository as publish  # tuf, which a session without these tests need not load
    from sartor.edge.update import tuf_roles

    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        signing.keygen(folder / "signer")
        tuf_roles.keygen(folder / "keys")
        made = release(folder / "1.0", "1.0", adapter(0), folder / "signer")
        publish.publish(made, folder / "repository", folder / "keys", key=folder / "signer")
    return folder


@pytest.fixture
def world(published: Path, tmp_path: Path) -> World:
    """A copy of `published`, and a device that never synced."""
    for name in ("signer", "keys", "repository"):
        shutil.copytree(published / name, tmp_path / name)
    shutil.copyfile(tmp_path / "signer" / "sartor.pub", home.folder("trusted") / "signer.pub")
    store = ReleaseStore(tmp_path / "store")
    return World(tmp_path, tmp_path / "signer", tmp_path / "keys", tmp_path / "repository", store, tmp_path / "device")
