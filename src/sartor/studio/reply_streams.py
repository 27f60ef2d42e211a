"""Replies that are being received from servers, one thread each.

A reply is received in a thread of the studio, so that a browser that reloads, or a second one, sees it go on; the text
so far is in memory, the end on disk. A studio that is killed loses what had come of the running replies: on disk they
are pending then, with no thread, and pages say that they broke off.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from sartor.core.errors import BusyError
from sartor.studio.served_talk import ReplyEnd, Side, SideReply
from sartor.studio.server_traffic import key_headers

TIMEOUT_S = 300.0
CONNECT_S = 10.0
MAX_TOKENS = 400
# of a reply, whatever a server sends
MAX_REPLY_CHARS = 200_000
MAX_RUNNING = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplyKey:
    """Reply of a conversation: name of its Talk, index of the turn and of the side."""

    talk: str
    turn: int
    side: int


@dataclass(frozen=True)
class ReplyRequest:
    """What is sent for a reply. options: further fields of the request."""

    address: str
    side: Side
    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]


class LiveReply:
    """Reply that is being received. text: so far. is_over: its end is on disk."""

    def __init__(self) -> None:
        self.text = ""
        self.is_over = False
        self.is_stopping = False
        self.thread: threading.Thread | None = None


class RunningReplies:
    """Replies that a studio receives now. Safe to use from several threads."""

    def __init__(self) -> None:
        self._live: dict[ReplyKey, LiveReply] = {}
        self._lock = threading.Lock()

    def find(self, key: ReplyKey) -> LiveReply | None:
        """Return a running reply; None if it has ended."""
        with self._lock:
            return self._live.get(key)

    def is_busy(self, talk: str) -> bool:
        """Return whether a reply of a conversation is being received."""
        with self._lock:
            return any(key.talk == talk for key in self._live)

    def check_room(self, count: int) -> None:
        """Raise BusyError if `count` more replies are too many at once."""
        with self._lock:
            if len(self._live) + count > MAX_RUNNING:
                problem = f"{len(self._live)} replies are being written; {MAX_RUNNING} are the limit"
                raise BusyError(problem, "ask again when some of them have ended")

    def start(self, key: ReplyKey, request: ReplyRequest, keep: Callable[[SideReply], None]) -> LiveReply:
        """Receive a reply in a thread and return it. keep: stores the reply at its end."""
        live = LiveReply()

        def run() -> None:
            try:
                keep(receive(request, live))
            except Exception:
                _log.exception("a reply could not be stored")
            finally:
                with self._lock:
                    self._live.pop(key, None)
                live.is_over = True  # last: who hears of the end and asks again finds it on disk alone

        live.thread = threading.Thread(target=run, daemon=True, name="studio-reply")
        with self._lock:
            self._live[key] = live
        live.thread.start()
        return live

    def stop(self, key: ReplyKey) -> None:
        """Ask a running reply to end with what it has. One that has ended is left alone."""
        if live := self.find(key):
            live.is_stopping = True


def receive(request: ReplyRequest, live: LiveReply) -> SideReply:
    """Return the reply of a server, whose text grows in `live` meanwhile. No error of the server is raised."""
    begun = time.monotonic()
    reply = SideReply(request.side.key, request.side.model, end=ReplyEnd.CUT)
    body = {"model": request.side.model, "messages": request.messages, "stream": True, **request.options}
    timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_S)
    try:
        with httpx.stream(
            "POST",
            f"{request.address}/v1/chat/completions",
            json=body,
            headers=key_headers(),
            timeout=timeout,
            trust_env=False,
        ) as answer:
            if answer.status_code != 200:
                answer.read()
                reply = replace(reply, problem=_problem(answer.json()))
            else:
                names = {"model": "agent", "reason": "reason", "receipt": "receipt"}
                said = {name: answer.headers.get(f"x-sartor-{header}", "") for name, header in names.items()}
                reply = replace(reply, **{name: value for name, value in said.items() if value})
                reply = _read_events(answer, reply, live)
    except httpx.HTTPError as error:
        reply = replace(reply, problem=f"the server does not answer: {error or type(error).__name__}")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reply = replace(reply, problem=f"the server sends no reply: {error}")
    if reply.end is ReplyEnd.CUT and not live.text:
        reply = replace(reply, end=ReplyEnd.FAILED)
    return replace(reply, text=live.text, wall_s=time.monotonic() - begun)


def _read_events(answer: httpx.Response, reply: SideReply, live: LiveReply) -> SideReply:
    """Return the reply as its stream ends. Raises what reading and parsing raise."""
    for line in answer.iter_lines():
        if live.is_stopping:
            return replace(reply, end=ReplyEnd.STOPPED)
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            return replace(reply, end=ReplyEnd.CUT, problem=_problem(event))
        for choice in event["choices"]:
            delta = choice["delta"]
            live.text += delta.get("content") or ""
            if calls := delta.get("tool_calls"):
                live.text += json.dumps([call["function"] for call in calls], ensure_ascii=False)
            if finish := choice["finish_reason"]:
                reply = replace(reply, end=ReplyEnd.LENGTH if finish == "length" else ReplyEnd.WHOLE)
        if len(live.text) > MAX_REPLY_CHARS:
            problem = f"the reply has more than {MAX_REPLY_CHARS:,} characters"
            return replace(reply, end=ReplyEnd.CUT, problem=problem)
    if reply.end is ReplyEnd.CUT:
        return replace(reply, problem="the stream ended before the reply did")
    return reply


def _problem(body: Any) -> str:
    """Return the sentence of an error in OpenAI's form, which names a remedy too. Raises KeyError, TypeError."""
    return str(body["error"]["message"])
