"""Judges: an endpoint on loopback that answers chat completions by a script, and scripts that read a question."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import listening


@dataclass
class AskedQuestion:
    """Texts of a question as they stand between the boundaries. reference: empty without one."""

    prompt: str
    first: str
    second: str
    reference: str


def read_question(text: str) -> AskedQuestion:
    """Return the texts of a question; the boundary is what the instructions name."""
    boundary = re.search(r"lines that begin with (\S+)\.", text)
    assert boundary
    blocks: dict[str, str] = {}
    for block in text.split(f"\n{boundary[1]} ")[1:]:
        title, _, body = block.partition("\n")
        blocks[title.partition(" (")[0]] = body.rstrip("\n")
    return AskedQuestion(
        blocks["PROMPT"],
        blocks["REPLY A"],
        blocks["REPLY B"],
        blocks.get("REFERENCE, A RIGHT REPLY", ""),
    )


def likes_the_reference(text: str) -> str:
    """Prefer the reply that is the reference; T where both are, or neither."""
    asked = read_question(text)
    is_right = [reply.strip() == asked.reference.strip() for reply in (asked.first, asked.second)]
    return "T" if is_right[0] == is_right[1] else "AB"[is_right.index(True)]


@dataclass
class JudgeServer:
    """answer: text of a question -> text of the answer. status: HTTP status instead of an answer; 0 for none.

    fails_after: number of questions after which the status is answered. delay_s: time that an answer takes.
    peak: most questions that were open at the same time.
    """

    answer: Callable[[str], str]
    status: int = 0
    fails_after: int = 0
    delay_s: float = 0.0
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    open: int = 0
    peak: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    server_of: JudgeServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        server = self.server_of
        with server.lock:
            server.asked.append(body)
            server.keys.add(self.headers.get("Authorization"))
            is_failing = server.status and len(server.asked) > server.fails_after
            server.open += 1
            server.peak = max(server.peak, server.open)
        time.sleep(server.delay_s)
        with server.lock:
            server.open -= 1
        self.send_response(server.status if is_failing else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if is_failing:
            self.wfile.write(b'{"error": {"message": "no judge today"}}')
            return
        content = server.answer(body["messages"][0]["content"])
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        self.wfile.write(json.dumps({"choices": [choice]}).encode())


@contextmanager
def judging(answer: Callable[[str], str], **options: Any) -> Iterator[JudgeServer]:
    """The endpoint, listening."""
    server = JudgeServer(answer, **options)
    with listening(type("Handler", (_Handler,), {"server_of": server})) as address:
        server.url = f"{address}/v1"
        yield server
