"""Facts of one request and its JSON log line.

A thread writes the lines, so that a stalled reader of the log cannot stall replies. Lines that do not fit into the
queue are counted as lost.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, TextIO

from sartor.inference.engine import Event, ReplyDone, TextDelta
from sartor.serving.api_keys import Principal
from sartor.serving.http.response_models import CompletionUsage
from sartor.serving.http.services import NOBODY


@dataclass
class TokenUsage:
    """Tokens of all replies to one request.

    prompt: tokens of the prompts. cached: those of them that were cached.
    reply: counted as they arrive, so that an interrupted reply counts too.
    """

    prompt: int = 0
    reply: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        """Tokens that count against the token rate."""
        return self.prompt + self.reply

    def as_json(self) -> CompletionUsage:
        """Return OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.reply,
            "total_tokens": self.total,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class RequestRecord:
    """Record of one request.

    agent: exact version that answers; "" before it is known.
    error: kind of the error that ended the request; "" for none.
    began: monotonic clock, s.
    first_s: seconds until the first text of a reply; None before.
    """

    id: str
    method: str
    route: str = ""
    principal: Principal = NOBODY
    agent: str = ""
    receipt: str = ""
    finish: str = ""
    status: int = 0
    error: str = ""
    usage: TokenUsage = field(default_factory=TokenUsage)
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None

    def count_event(self, event: Event, prompt_is_new: bool = True) -> None:
        """Count an event of a reply.

        prompt_is_new: False if another reply to the same prompt counts the prompt's tokens.
        """
        if isinstance(event, TextDelta):
            self.usage.reply += event.tokens
            if self.first_s is None:
                self.first_s = self.elapsed_s
        elif isinstance(event, ReplyDone):
            self.finish = event.finish
            if prompt_is_new:
                self.usage.prompt += event.prompt_tokens
                self.usage.cached += event.cached_tokens

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request's head was read."""
        return time.monotonic() - self.began


MOST_WAITING = 10_000
LOGGERS = ("uvicorn.error", "sartor")
SILENT = ("/health", "/metrics")


class RequestLog:
    """JSON log that a thread writes to a stream until `close`.

    lost: number of lines that could not be written.
    """

    def __init__(self, stream: TextIO) -> None:
        self.lost = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="sartor-journal", daemon=True)
        self._thread.start()

    def say(self, event: str, **fields: Any) -> None:
        """Add one line with time, event and fields. A line is lost if the queue is full."""
        now = time.time()
        timestamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
        try:
            self._lines.put_nowait(json.dumps({"time": timestamp, "event": event, **fields}))
        except queue.Full:
            self.lost += 1

    def request(self, record: RequestRecord) -> None:
        """Log a request that has ended. Successful requests to `SILENT` routes are left out."""
        if record.route in SILENT and record.status < 400:
            return
        usage = record.usage
        fields = {
            "request": record.id,
            "method": record.method,
            "route": record.route,
            "status": record.status,
            "key": record.principal.key,
            "agent": record.agent,
            "receipt": record.receipt,
            "finish": record.finish,
            "error": record.error,
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "reply_tokens": usage.reply,
            "first_s": None if record.first_s is None else round(record.first_s, 4),
            "wall_s": round(record.elapsed_s, 4),
        }
        self.say("request", **{name: value for name, value in fields.items() if value not in ("", None, 0)})

    def bug(self, record: RequestRecord, error: BaseException) -> None:
        """Log an unexpected exception by its type and source lines, without its message."""
        self.say("bug", request=record.id, route=record.route, error=type(error).__name__, at=places(error))

    def close(self) -> None:
        """Write the waiting lines and end the thread."""
        self._lines.put(None)
        self._thread.join(timeout=5)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # the reader of the log has gone; replies must go on
                self.lost += 1


def places(error: BaseException) -> list[str]:
    """Return the last 8 source lines of an error's traceback, innermost last, without any values."""
    return [
        f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)[-8:]
    ]


class ServerLines(logging.Handler):
    """Logging handler that writes warnings and errors of `LOGGERS` to the request log.

    An exception is logged by its type and source lines. Of uvicorn's messages only the format string is logged, since
    the arguments may come from a client.
    """

    def __init__(self, log: RequestLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write one log record as a line of the request log."""
        error = record.exc_info[1] if record.exc_info else None
        extra = {"error": type(error).__name__, "at": places(error)} if error else {}
        problem = record.getMessage() if record.name.startswith("sartor") else str(record.msg)
        self._log.say("server", level=record.levelname.lower(), problem=problem.strip(), **extra)
