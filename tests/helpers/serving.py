"""A house with nobody in it but a script: what the HTTP front can be tested against without a model or a process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from pydantic import TypeAdapter

from sartor.core.errors import (
    AdmissionError,
    BusyError,
    ConflictError,
    KeyRefusedError,
    SartorError,
    UnknownAgentError,
)
from sartor.inference.engine import EngineInfo, Event, Logprob, ReplyDone, ReplyFailed, TextDelta
from sartor.serving.api_keys import Principal
from sartor.serving.http.request_log import RequestLog
from sartor.serving.http.server import HttpServer, bind
from sartor.serving.http.services import Services
from sartor.serving.team_config import Http, RequestLimits, Team
from sartor.serving.types import AgentListing, AgentReply, AgentRequest, EmbeddingResult

ABOUT = EngineInfo("local", "tiny", "b" * 64, "t" * 64, 512, 4)
CUT_BEYOND = 1000  # characters of a text, by the crew's encoder
KEYS = {
    "key-faq": Principal("k1", frozenset({"faq", "auto"}), False),
    "key-all": Principal("k2", None, False),
    "key-admin": Principal("k3", frozenset(), True),
    "key-both": Principal("k4", None, True),
}


@dataclass
class Replies:
    """Answers with the words of `text`, a piece each. The last user turn may name what is to go wrong instead.

    asked: every Request that came. closed: receipts of the Answers that were closed. hold: while it is not set, an Answer
    stops after its first piece.
    """

    text: str = "the sky is blue"
    asked: list[AgentRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    hold: asyncio.Event | None = None
    fail: SartorError | Exception | None = None
    ends_with: Event | None = None
    pieces: Sequence[TextDelta] = ()

    async def open(self, request: AgentRequest) -> AgentReply:
        self.asked.append(request)
        receipt = f"r{len(self.asked)}"
        await asyncio.sleep(0)
        if self.fail is not None:
            raise self.fail
        name = "faq" if request.model == "auto" else request.model
        version = "base@" + ABOUT.base_digest[:12] if name == "base" else name if "@" in name else f"{name}@1.0"
        return AgentReply(version, "asked by näme\nand more", receipt, self._events(request, receipt))

    async def _events(self, request: AgentRequest, receipt: str) -> AsyncIterator[Event]:
        try:
            for place, piece in enumerate(self.pieces or self._words(request)):
                if place and self.hold is not None:
                    await self.hold.wait()
                yield piece
            self.done.append(receipt)
            yield self.ends_with or self._end(request, receipt)
        finally:
            self.closed.append(receipt)

    def _words(self, request: AgentRequest) -> list[TextDelta]:
        if request.must_call:
            return []
        text = '{"intent": "on"}' if request.schema else self.text
        words = [word + " " for word in text.split(" ")]
        return [TextDelta("c", word, 1, self._logprobs(word, request.top_logprobs)) for word in words]

    def _logprobs(self, word: str, top: int) -> tuple[Logprob, ...]:
        likely = ((word, -0.5), ("other", float("-inf")))[: max(top, 0)]
        return (Logprob(word, -0.5, likely),) if top >= 0 else ()

    def _end(self, request: AgentRequest, receipt: str) -> ReplyDone:
        name = request.tools[0]["function"]["name"] if request.tools else ""
        call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": '{"room": "hall"}'}}
        return ReplyDone("c", "stop", 7, 4, 2, (call, call) if request.must_call else ())


@dataclass
class Crew:
    """Embeds a text as its length; its workers are in the states that are set."""

    about: EngineInfo = ABOUT
    states: Sequence[str] = ("ready", "ready")
    breaker: str = "closed"

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        await asyncio.sleep(0)
        cut = tuple(place for place, text in enumerate(texts) if len(text) > CUT_BEYOND)
        return EmbeddingResult([[0.0, float(len(text))] for text in texts], sum(map(len, texts)), cut)

    def health(self) -> Mapping[str, Any]:
        workers = [
            {"state": state, "role": "answers", "pid": 4242, "memory_bytes": 10, "restarts": 1, "live": 0}
            for state in self.states
        ]
        return {
            "workers": workers,
            "agents": {"faq@1.0": {"breaker": self.breaker, "why": "NaN", "queued": 1, "live": 2}},
        }


@dataclass
class Doors:
    keys: Mapping[str, Principal] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        return not self.keys

    @property
    def has_admin(self) -> bool:
        return any(visitor.is_admin for visitor in self.keys.values())

    def admit(self, secret: str) -> Principal:
        if secret not in self.keys:
            raise KeyRefusedError("nobody has this key", "sartor agents key NAME")
        return self.keys[secret]


@dataclass
class Rates:
    most: int = 10**9
    begun: int = 0
    tokens: dict[str, int] = field(default_factory=dict)

    def begin(self, key: str) -> None:
        self.begun += 1
        if self.begun > self.most:
            raise BusyError("the rate is used up", "ask again later", 12.3)

    def count(self, key: str, tokens: int) -> None:
        self.tokens[key] = self.tokens.get(key, 0) + tokens


@dataclass
class Roster:
    live: dict[str, str] = field(default_factory=lambda: {"faq": "1.0", "home": "2.0"})
    heard: list[tuple[str, float]] = field(default_factory=list)

    async def listed(self) -> Sequence[AgentListing]:
        return [AgentListing(name, live, (live, "0.9"), {"state": "serving"}) for name, live in self.live.items()]

    def _expect(self, name: str, expected: str | None) -> None:
        if name not in self.live:
            raise UnknownAgentError(f"no agent {name!r}", "sartor agents list")
        if expected not in (None, self.live[name]):
            raise ConflictError(f"{name} has {self.live[name]} live", "look again")

    async def promote(self, name: str, release: str, version: str, expected: str | None) -> Mapping[str, Any]:
        self._expect(name, expected)
        if release.endswith("bad"):
            raise AdmissionError("the adapter holds NaN", "tune it again")
        self.live[name] = version or Path(release).name
        return {"name": name, "live": self.live[name]}

    async def rollback(self, name: str, expected: str | None) -> Mapping[str, Any]:
        self._expect(name, expected)
        self.live[name] = "0.9"
        return {"name": name, "live": "0.9"}

    async def drain(self, name: str) -> Mapping[str, Any]:
        self._expect(name, None)
        return {"name": name, "live": self.live[name], "state": "draining"}

    async def release(self, name: str) -> Mapping[str, Any]:
        self._expect(name, None)
        return {"name": name, "live": self.live[name], "state": "serving"}

    async def hear(self, agent: str, rating: float, key: str = "") -> None:
        self.heard.append((agent, rating))


@dataclass
class Receipts:
    replies: Replies

    async def find(self, receipt: str) -> Mapping[str, Any] | None:
        places = {f"r{place + 1}": request for place, request in enumerate(self.replies.asked)}
        if receipt not in places:
            return None
        name = places[receipt].model
        return {"id": receipt, "agent": "base@bb" if name == "base" else f"{name.partition('@')[0]}@1.0"}


def house(*, keys: Mapping[str, Principal] | None = None, **parts: Any) -> Services:
    replies = parts.pop("replies", None) or Replies()
    made = {
        "replies": replies,
        "workers": Crew(),
        "authenticator": Doors(keys or {}),
        "rates": Rates(),
        "agent_admin": Roster(),
        "receipts": Receipts(replies),
    }
    return Services(**{**made, **parts})


def team(state: Path, **changes: Any) -> Team:
    """A team whose state is in `state`; `limits` and `http` are changes of those."""
    limits, http = changes.pop("limits", {}), changes.pop("http", {})
    return Team(
        base="tiny",
        state=str(state),
        limits=replace(RequestLimits(), **limits),
        http=replace(Http(port=0), **http),
        **changes,
    )


class Log(io.StringIO):
    """Lines of a journal."""

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@contextlib.contextmanager
def running(server: HttpServer) -> Iterator[str]:
    """The server on a free port, in a thread of its own; yields its address, and drains at the end."""
    address: list[str] = []
    is_ready = threading.Event()
    loop = asyncio.new_event_loop()

    def told(url: str) -> None:
        address.append(url)
        is_ready.set()

    def run() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(server.serve(bind(server.team), told))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert is_ready.wait(120), "the server did not start"
        yield address[0]
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(120)
        assert not thread.is_alive(), "the server did not end"


@contextlib.asynccontextmanager
async def client(served: Services, made: Team, **headers: str) -> AsyncIterator[Client]:
    """A client of the application itself, without a socket; `client.log` holds the journal once it is closed."""
    log = Log()
    server = HttpServer(served, made, log=RequestLog(log))
    transport = httpx.ASGITransport(server.asgi)
    try:
        async with Client(transport=transport, base_url="http://127.0.0.1:8440", headers=headers) as opened:
            opened.log, opened.server = log, server
            yield opened
    finally:
        server.close()


class Client(httpx.AsyncClient):
    """With the log of the server that it asks."""

    log: Log
    server: HttpServer


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat."""
    return {"model": "faq", "messages": [{"role": "user", "content": text}], **fields}


def checked(model: Any, body: Any) -> Any:
    """Return a response body, or a part of one, that has the form of its typed dictionary."""
    return TypeAdapter(model).validate_python(body, strict=True)


def events(text: str) -> list[Any]:
    """What a stream's events hold; the last is `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [*(json.loads(line) for line in lines[:-1]), lines[-1]]


def failed(kind: str) -> ReplyFailed:
    """An event that tells of an error of that kind."""
    return ReplyFailed("c", kind, "it was too slow", "ask for less")
