"""A Hugging Face hub on loopback: the routes that `huggingface_hub` asks for a push and a pull, and the faults of a bad one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from loopback import listening

TOKEN = "hf_TokenOfTheTests0123456789"
LFS = (".safetensors", ".parquet", ".png", ".wav", ".gguf")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Repository:
    """private; commits: id -> {path: content}; branches: name -> id of a commit."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        digests = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in files.items())
        oid = hashlib.sha1(repr((len(self.commits), digests)).encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Reply:
    """What a fault answers: a status and a body; `pieces` without an end make an endless one."""

    status: int = 500
    body: Any = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    pieces: Iterator[bytes] | None = None


@dataclass
class FakeHub:
    """repositories: by `models/OWNER/NAME` and `datasets/OWNER/NAME`. objects: Git LFS, by sha256.

    fault: gets method and path of each request, and answers it if it returns a Reply; it may raise ConnectionError, and then the
    connection ends without an answer. change: gets path and content of each file of a commit, and returns what the hub keeps.
    asked: method, path and authorization of each request.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    ignored: tuple[str, ...] = ()
    verify_at: str = ""
    fault: Callable[[str, str], Reply | None] = lambda method, path: None
    change: Callable[[str, bytes], bytes] = lambda path, content: content
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paths(self, method: str) -> list[str]:
        return [path for asked, path, _ in self.asked if asked == method]

    def tokens(self) -> set[str]:
        return {authorization for _, _, authorization in self.asked if authorization}


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.hub.asked.append((method, path, self.headers.get("authorization", "")))
        try:
            fault = self.hub.fault(method, path)
        except ConnectionError:
            self.close_connection = True
            self.connection.close()
            return
        with self.hub.lock:
            reply = fault or self._routed(method, path, body, parse_qs(parts.query))
        self._send(reply, has_body=method != "HEAD")

    def _send(self, reply: Reply, *, has_body: bool) -> None:
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.pieces is not None:
            self.send_header("connection", "close")
            self.end_headers()
            try:
                for piece in reply.pieces:
                    self.wfile.write(piece)
            except OSError:
                pass
            self.close_connection = True
            return
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.wfile.write(content)

    def _routed(self, method: str, path: str, body: bytes, query: dict[str, list[str]]) -> Reply:
        hub = self.hub
        is_write = method not in ("GET", "HEAD") and not path.startswith("/objects/")
        if is_write and self.headers.get("authorization") != f"Bearer {TOKEN}":
            return Reply(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            front = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
            is_valid = front and isinstance(yaml.safe_load(front[1]), dict)
            return (
                Reply(200, {"errors": [], "warnings": []}) if is_valid else Reply(400, {"errors": [{"message": "no"}]})
            )
        if match := re.fullmatch(r"/objects/(\w{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return Reply(400, {"error": "the bytes have another digest"})
            hub.objects[match[1]] = body
            return Reply(200, b"")
        if path == "/verify":
            return Reply(200, {}) if json.loads(body)["oid"] in hub.objects else Reply(404, {})
        if match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(f"{match[1] or 'models/'}{match[2]}", match[3], match[4])
        if match := re.fullmatch(r"/api/((?:models|datasets)/[\w.-]+/[\w.-]+)(?:/(\w+)(?:/(.+))?)?", path):
            repository = hub.repositories.get(match[1])
            if repository is None:
                return Reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return self._of_repository(repository, match[1], match[2] or "", match[3] or "", body)
        return Reply(404, {"error": f"no route {path}"})

    def _create(self, wish: dict[str, Any]) -> Reply:
        kind = "datasets" if wish.get("type") == "dataset" else "models"
        name = f"{kind}/{wish['organization']}/{wish['name']}"
        url = f"{self.hub.url}/{name.removeprefix('models/')}"
        if name in self.hub.repositories:
            return Reply(409, {"error": "You already created this repo", "url": url})
        repository = self.hub.repositories[name] = Repository(wish.get("visibility") == "private")
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return Reply(200, {"url": url})

    def _batch(self, wish: dict[str, Any]) -> Reply:
        objects = []
        for item in wish["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/objects/{item['oid']}"},
                    "verify": {"href": f"{self.hub.verify_at or self.hub.url}/verify"},
                }
            objects.append(entry)
        return Reply(200, {"transfer": "basic", "objects": objects})

    def _resolve(self, name: str, revision: str, path: str) -> Reply:
        repository = self.hub.repositories.get(name)
        commit = repository.resolve(revision) if repository else None
        if repository is None or commit is None or path not in repository.commits[commit]:
            return Reply(404, {}, {"X-Error-Code": "EntryNotFound"})
        content = repository.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"', "Content-Length": str(len(content))}
        return Reply(200, content, headers)

    def _of_repository(self, repository: Repository, name: str, route: str, rest: str, body: bytes) -> Reply:
        hub = self.hub
        if route == "branch":
            if rest in repository.branches:
                return Reply(409, {"error": "Reference already exists"})
            repository.branches[rest] = repository.branches["main"]
            return Reply(200, {})
        commit = repository.resolve(rest or "main")
        if commit is None:
            return Reply(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if route in ("", "revision"):
            return Reply(200, {"id": name.partition("/")[2], "sha": commit, "private": repository.private})
        if route == "tree":
            return Reply(200, [_entry(path, content) for path, content in sorted(files.items())])
        if route == "preupload":
            modes = []
            for item in json.loads(body)["files"]:
                mode = "lfs" if item["path"].endswith(LFS) else "regular"
                is_ignored = item["path"] in hub.ignored
                modes.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": is_ignored})
            return Reply(200, {"files": modes})
        if route == "commit":
            return self._commit(repository, name, rest, body)
        return Reply(404, {"error": f"no route {route}"})

    def _commit(self, repository: Repository, name: str, branch: str, body: bytes) -> Reply:
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files(branch))
        for line in lines:
            key, value = line["key"], line["value"]
            if (
                key == "header"
                and value.get("parentCommit", repository.branches[branch]) != repository.branches[branch]
            ):
                return Reply(412, {"error": "A commit has happened since. Please refresh and try again."})
            if key == "file":
                files[value["path"]] = self.hub.change(value["path"], base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return Reply(422, {"error": "LFS object is absent"})
                files[value["path"]] = self.hub.change(value["path"], self.hub.objects[value["oid"]])
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, branch)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return Reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": None})


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
    if path.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub without repositories, which takes TOKEN alone."""
    hub = FakeHub()
    with listening(type("Answers", (_Answers,), {"hub": hub})) as hub.url:
        yield hub


def use_hub(monkeypatch: Any, hub: FakeHub) -> None:
    """Let this process ask the hub, with its token and without waits between retries."""
    from types import SimpleNamespace

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
