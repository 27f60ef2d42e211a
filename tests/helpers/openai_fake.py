"""A small server on loopback with the routes of vLLM that Sartor uses, and the faults that a real one has."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import listening


@dataclass
class Fake:
    """replies: model -> the pieces of its reply. faults: statuses that are answered first, one per request for a reply."""

    replies: dict[str, list[str]] = field(default_factory=lambda: {"tiny": ["the sky", " is", " blue"]})
    roots: dict[str, str] = field(default_factory=dict)
    faults: list[int] = field(default_factory=list)
    key: str = ""
    reads_ids: str = ""
    cut_after: int = -1
    hold: threading.Event | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    url: str = ""

    def of(self, route: str) -> list[Any]:
        return [body for path, body in self.asked if path == route]

    def models(self) -> dict[str, Any]:
        base = {
            "id": "tiny",
            "object": "model",
            "owned_by": "vllm",
            "root": "/models/tiny",
            "parent": None,
            "max_model_len": 400,
        }
        loras = [{"id": name, "owned_by": "vllm", "root": root, "parent": "tiny"} for name, root in self.roots.items()]
        # what a served team of Sartor lists besides: it reads no tokens, and is nobody's base
        speech = {"id": "speech", "owned_by": "sartor", "root": "espeak", "parent": None, "max_model_len": None}
        return {"object": "list", "data": [speech, base, *loras]}


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._say(200, self.fake.models()) if self._may() and self.path == "/v1/models" else self._say(
            404, {"detail": "Not Found"}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.fake.asked.append((self.path, body))
        if not self._may():
            return self._say(401, {"error": {"message": "bad key", "code": 401}})
        if self.path == "/v1/completions":
            return self._complete(body)
        if self.path == "/v1/load_lora_adapter":
            if "broken" in body["lora_path"]:
                return self._say(400, {"error": {"message": "cannot load adapter", "code": 400}})
            self.fake.roots[body["lora_name"]] = body["lora_path"]
            self.fake.replies.setdefault(body["lora_name"], ["loaded"])
            return self._text(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")
        if self.path == "/v1/unload_lora_adapter":
            return (
                self._text("Success")
                if self.fake.roots.pop(body["lora_name"], None)
                else self._say(404, {"error": "no such"})
            )
        if self.path == "/detokenize" and self.fake.reads_ids:
            return self._say(200, {"prompt": self.fake.reads_ids})
        if self.path == "/v1/embeddings" and "vectors" in self.fake.extra:
            return self._say(200, {"data": self.fake.extra["vectors"]})
        return self._say(404, {"detail": "Not Found"})

    def _may(self) -> bool:
        return not self.fake.key or self.headers["authorization"] == f"Bearer {self.fake.key}"

    def _complete(self, body: Any) -> None:
        if self.fake.faults:
            return self._say(self.fake.faults.pop(0), {"error": {"message": "fault", "code": 1}})
        if body["model"] not in self.fake.replies:
            return self._say(404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        pieces = self.fake.replies[body["model"]]
        try:
            for place, piece in enumerate(pieces):
                if place == self.fake.cut_after:
                    return None
                if self.fake.hold and place:
                    self.fake.hold.wait(60)
                self._event(
                    {
                        "choices": [
                            {"index": 0, "text": piece, "finish_reason": None, **self.fake.extra.get(str(place), {})}
                        ]
                    }
                )
            self._event(
                {"choices": [{"index": 0, "text": "", "finish_reason": self.fake.extra.get("finish", "stop")}]}
            )
            usage = {
                "prompt_tokens": len(body["prompt"]),
                "completion_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 4},
            }
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.fake.broken.append(body["model"])
        return None

    def _event(self, said: Any) -> None:
        line = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        self.wfile.write(f"data: {line}\n\n".encode())
        self.wfile.flush()

    def _say(self, status: int, body: Any) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _text(self, text: str) -> None:
        self._send(200, "text/plain", text.encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """The fake at `fake.url`."""
    with listening(type("Answers", (_Answers,), {"fake": fake})) as address:
        fake.url = f"{address}/v1"
        yield fake
