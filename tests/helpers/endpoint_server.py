"""An endpoint on loopback that speaks OpenAI's protocol and fails as it is told: 429, time-outs, cut streams, broken JSON."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import listening
from sartor.synthesize.teacher import TeacherQuestion
from sartor.synthesize.teacher_options import FakeTeacher

FAULTS = ("429", "503", "silent", "cut", "no_end", "malformed", "not_json", "error_event", "hang_up")
REFUSALS = ("413", "429", "503", "520", "401", "400", "422", "302", "hang_up", "silent")


class EndpointServer:
    """asked: bodies by how often; answered: those that got a whole answer; fault: (digest of body, times asked) -> its name.

    answer_limit: how many requests are answered; the rest wait for `release`.
    """

    def __init__(self, fault: Callable[[str, int], str] = lambda body, times: "") -> None:
        self.fault = fault
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.answer_limit: int | None = None
        self.release = threading.Event()
        self.silent_s = 0.6  # of the fault `silent`: longer than the client waits
        self.word = ""  # in the body of a refusal
        self.text: Callable[[dict[str, Any]], str] | None = None
        self.completion: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # whole answers of /completions
        self.lock = threading.Lock()
        self.times: list[float] = []
        self.url = ""

    def reply(self, body: dict[str, Any]) -> str:
        """The fake teacher's answer to the same question."""
        if self.text:
            return self.text(body)
        form = body.get("response_format")
        schema = json.dumps(form["json_schema"]["schema"], sort_keys=True) if form else ""
        messages = tuple((one["role"], one["content"]) for one in body["messages"])
        return (
            FakeTeacher()
            .answer(TeacherQuestion(messages, body["seed"], body["max_tokens"], body["temperature"], schema))
            .text
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    told: EndpointServer  # set by `serving`, on a class of its own

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with self.told.lock:
            self.told.asked[raw] += 1
            times = self.told.asked[raw]
            is_held = self.told.answer_limit is not None and self.told.asked.total() > self.told.answer_limit
            self.told.headers.append(dict(self.headers))
            self.told.times.append(time.monotonic())
        fault = self.told.fault(raw, times)
        with self.told.lock:
            self.told.faults[fault] += 1
        if is_held:
            self.told.release.wait()
        with suppress(OSError):  # whoever asked is gone
            if fault in REFUSALS:
                self.fail(fault)
            else:
                self.say(raw, fault)

    def fail(self, fault: str) -> None:
        if fault in ("hang_up", "silent"):
            time.sleep(self.told.silent_s if fault == "silent" else 0)
            self.connection.close()
            return
        self.send_response(int(fault))
        if fault == "429":
            self.send_header("Retry-After", "0.05")
        if fault == "302":
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.write(
            json.dumps(
                {"error": {"message": f"{self.told.word} {fault} for {self.headers.get('Authorization')}"}}
            ).encode()
        )

    def say(self, raw: str, fault: str) -> None:
        if self.told.completion and self.path == "/v1/completions":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(self.told.completion(json.loads(raw))).encode())
            with self.told.lock:
                self.told.answered[raw] += 1
            return
        text = self.told.reply(json.loads(raw))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        half = len(text) // 2
        for number, piece in enumerate((text[:half], text[half:])):
            self.event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
            if number == 0 and fault in ("cut", "malformed", "not_json", "error_event"):
                body = {"malformed": 'data: {"choices": [{"del\n\n', "not_json": "data: <html>\n\n", "cut": ""}
                self.wfile.write(body.get(fault, 'data: {"error": {"message": "overloaded"}}\n\n').encode())
                return
        if fault == "no_end":
            return
        self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.wfile.flush()
        with self.told.lock:
            self.told.answered[raw] += 1

    def event(self, said: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(said)}\n\n".encode())
        self.wfile.flush()


@contextmanager
def serving(server: EndpointServer) -> Iterator[EndpointServer]:
    """The server, listening."""
    with listening(type("Handler", (_Handler,), {"told": server})) as address:
        server.url = f"{address}/v1"
        try:
            yield server
        finally:
            server.release.set()
