"""Teacher behind an OpenAI-compatible endpoint.

    429, 503, 529     asked again after Retry-After (all threads wait), or after a doubling pause
    408, 409, 425, 500, 502, 504, time-out, cut stream, malformed JSON    asked again after a doubling pause
    401, 403          KeyRefusedError
    413, 422, content_filter, context_length_exceeded    the answer `refused`, for this question alone
    400, 404, 3xx, other    ConfigError: asking again would change nothing

The key is read from the environment and appears in no message, file or name. Only the standard library is used: the
plain install has no HTTP client of its own.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from sartor.core.errors import BusyError, ConfigError, KeyRefusedError, UnavailableError
from sartor.synthesize.teacher import Finish, TeacherAnswer, TeacherQuestion

MINUTE_S = 60.0


class RequestThrottle:
    """Rate limit for requests and tokens per minute, shared by all threads.

    A limit of 0 is none. `now` and `sleep` can be replaced in tests.
    """

    def __init__(
        self,
        requests: int = 0,
        tokens: int = 0,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.requests, self.tokens, self._now, self._sleep = requests, tokens, now, sleep
        self._sent: deque[tuple[float, int]] = deque()
        self._until = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: int) -> None:
        """Wait until a request of that many tokens may be sent, and count it.

        A request that exceeds the token limit by itself is sent alone.
        """
        while (delay := self._reserve(tokens)) > 0:
            self._sleep(delay)

    def pause(self, seconds: float) -> None:
        """Block all requests for that many seconds, as the endpoint demanded."""
        with self._lock:
            self._until = max(self._until, self._now() + seconds)

    def _reserve(self, tokens: int) -> float:
        """Return the seconds to wait before trying again, or 0 if the request was counted."""
        with self._lock:
            now = self._now()
            while self._sent and self._sent[0][0] <= now - MINUTE_S:
                self._sent.popleft()
            if now < self._until:
                return self._until - now
            spent = sum(cost for _, cost in self._sent)
            is_full = (self.requests and len(self._sent) >= self.requests) or (
                self.tokens and self._sent and spent + tokens > self.tokens
            )
            if is_full:
                return self._sent[0][0] + MINUTE_S - now
            self._sent.append((now, tokens))
            return 0.0


MOST_BYTES = 8 << 20
DONE = "[DONE]"


class IncompleteResponseError(Exception):
    """A body that ended early or violates the protocol. The request should be repeated."""


def read_body(lines: Iterable[bytes], content_type: str) -> TeacherAnswer:
    """Return the answer in a body of that content type. Raises IncompleteResponseError."""
    if "event-stream" in content_type:
        return _streamed(lines)
    body = _object(b"".join(_bounded(lines)).decode("utf-8", "replace"))
    choice = _choice(body)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    return _answer(text if isinstance(text, str) else "", choice.get("finish_reason"), body.get("usage"))


def _streamed(lines: Iterable[bytes]) -> TeacherAnswer:
    pieces: list[str] = []
    finish: Any = None
    usage: Any = None
    for line in _bounded(lines):
        text = line.decode("utf-8", "replace").strip()
        if not text.startswith("data:"):
            continue
        data = text.removeprefix("data:").strip()
        if data == DONE:
            break
        event = _object(data)
        usage = event.get("usage") or usage
        if not event.get("choices"):
            continue  # the usage arrives in a separate event
        choice = _choice(event)
        delta = choice.get("delta")
        content = delta.get("content") if isinstance(delta, dict) else None
        pieces.append(content if isinstance(content, str) else "")
        finish = choice.get("finish_reason") or finish
    return _answer("".join(pieces), finish, usage)


def _bounded(lines: Iterable[bytes]) -> Iterable[bytes]:
    total = 0
    for line in lines:
        total += len(line)
        if total > MOST_BYTES:
            raise IncompleteResponseError(f"more than {MOST_BYTES:,} bytes")
        yield line


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise IncompleteResponseError(f"{text[:60]!r} is not JSON") from None
    if not isinstance(value, dict):
        raise IncompleteResponseError(f"{text[:60]!r} is no JSON object")
    if "error" in value:
        raise IncompleteResponseError(f"the server says {str(value['error'])[:200]}")
    return value


def _choice(value: dict[str, Any]) -> dict[str, Any]:
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise IncompleteResponseError("there is no choice in it")
    return choices[0]


def _answer(text: str, finish: Any, usage: Any) -> TeacherAnswer:
    if not isinstance(finish, str):
        raise IncompleteResponseError("it ended without saying why")
    finish_names: dict[str, Finish] = {"length": "length", "content_filter": "refused"}
    counts = usage if isinstance(usage, dict) else {}
    tokens = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if all(isinstance(count, int) for count in tokens):
        return TeacherAnswer(text, finish_names.get(finish, "stop"), int(tokens[0] or 0), int(tokens[1] or 0))
    return TeacherAnswer(text, finish_names.get(finish, "stop"), 0, 0, is_estimated=True)


LONGEST_PAUSE_S = 60.0
MOST_RETRY_AFTER_S = 600.0
AGAIN = (408, 409, 425, 429)  # and the server's own failures: 5xx, but for 501, which is for good
OF_THE_QUESTION = (413, 422)
TOO_LONG = "context_length_exceeded"  # error code of OpenAI and vLLM in a 400
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CHARACTERS_PER_TOKEN = 4  # for estimates, if a server reports no counts


@dataclass(frozen=True)
class Access:
    """Address, model and key of an endpoint. The key is secret and not part of the repr."""

    url: str
    model: str
    key: str = ""

    def __repr__(self) -> str:
        return f"Access({self.url!r}, {self.model!r})"


@dataclass(frozen=True)
class Patience:
    """Retry policy.

    tries: attempts for one question.
    pause_s: first pause, doubled each time. timeout_s: longest silence of a socket.
    """

    tries: int = 6
    pause_s: float = 1.0
    timeout_s: float = 120.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Handler that refuses redirects, since urllib would send the key to the new address."""

    def redirect_request(self, *arguments: Any) -> None:
        """Return None, which makes urllib raise an HTTPError of 3xx."""
        return


class EndpointTeacher:
    """Teacher that calls an endpoint. notice: gets a line for each retry."""

    def __init__(
        self,
        access: Access,
        pace: RequestThrottle,
        patience: Patience,
        at_once: int,
        notice: Callable[[str], object] = lambda line: None,
    ) -> None:
        _check(access)
        self.access, self.pace, self.patience, self.at_once, self._notice = access, pace, patience, at_once, notice
        self.name = f"{access.model}@{urlsplit(access.url).netloc.rpartition('@')[2]}"
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if urlsplit(access.url).hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        """Return the answer to a question, with retries, as `Teacher.answer`.

        Raises BusyError or UnavailableError once all tries are used, KeyRefusedError, ConfigError.
        """
        body, size = self._body(question)
        jitter = random.Random(question.digest(self.name))
        for attempt in range(self.patience.tries):
            self.pace.wait(size)
            try:
                answer = self._request(body)
                if not answer.is_estimated:
                    return answer
                tokens_out = len(answer.text) // CHARACTERS_PER_TOKEN + 1
                return replace(answer, tokens_in=_tokens(question), tokens_out=tokens_out)
            except _AgainError as failure:
                self._notice(f"{self.name}: {failure.problem}; try {attempt + 1} of {self.patience.tries}")
                pause = min(LONGEST_PAUSE_S, self.patience.pause_s * 2**attempt) * jitter.uniform(0.5, 1.0)
                last = failure
            if attempt + 1 < self.patience.tries:
                if last.after_s:
                    self.pace.pause(last.after_s)
                else:
                    time.sleep(pause)
        problem = f"{self.access.url} failed {self.patience.tries} times: {last.problem}"
        remedy = "the same command goes on where it stopped; what was answered is not asked again"
        raise BusyError(problem, remedy, last.after_s or pause) if last.is_busy else UnavailableError(problem, remedy)

    def _body(self, question: TeacherQuestion) -> tuple[bytes, int]:
        """Return the request body and its approximate number of tokens, including the answer."""
        fields: dict[str, Any] = {
            "model": self.access.model,
            "messages": [{"role": role, "content": text} for role, text in question.messages],
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            "seed": question.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if question.schema:
            form = {"name": "answer", "schema": json.loads(question.schema)}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}
        return json.dumps(fields).encode(), _tokens(question) + question.max_tokens

    def _request(self, body: bytes) -> TeacherAnswer:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "User-Agent": "sartor"}
        if self.access.key:
            headers["Authorization"] = f"Bearer {self.access.key}"
        request = urllib.request.Request(f"{self.access.url.rstrip('/')}/chat/completions", body, headers)
        try:
            with self._opener.open(request, timeout=self.patience.timeout_s) as response:
                return read_body(response, response.headers.get("Content-Type", ""))
        except urllib.error.HTTPError as error:
            with error:  # closes the socket
                failure = self._failure(error)
            if failure is None:
                return TeacherAnswer("", "refused")
            raise failure from None
        except IncompleteResponseError as error:
            raise _AgainError(self._redacted(str(error))) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
            raise _AgainError(self._redacted(f"{type(error).__name__}: {error}")) from None

    def _failure(self, error: urllib.error.HTTPError) -> Exception | None:
        """Return the exception for an error status; None if it concerns this question alone."""
        try:
            body = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            body = ""
        if error.code in OF_THE_QUESTION or (error.code == 400 and TOO_LONG in body):
            return None
        problem = self._redacted(f"{self.access.url} says {error.code}: {' '.join(body.split())[:300]}")
        if error.code in AGAIN or (error.code >= 500 and error.code != 501):
            is_busy = error.code in (429, 503, 529)
            return _AgainError(
                problem, _retry_after(error.headers.get("Retry-After", "")) if is_busy else 0.0, is_busy=is_busy
            )
        if error.code in (401, 403):
            return KeyRefusedError(problem, "set the environment variable that teacher.key_env names to a valid key")
        return ConfigError(problem, "check teacher.url and teacher.model; what was answered is kept")

    def _redacted(self, text: str) -> str:
        return text.replace(self.access.key, "***") if self.access.key else text


class _AgainError(Exception):
    """A failure that may be temporary. after_s: pause that the endpoint demanded; 0 for none."""

    def __init__(self, problem: str, after_s: float = 0.0, *, is_busy: bool = False) -> None:
        super().__init__(problem)
        self.problem, self.after_s, self.is_busy = problem, after_s, is_busy


def key_of(variable: str) -> str:
    """Return the key in an environment variable; empty if no variable is named.

    Raises KeyRefusedError if it is not set.
    """
    if not variable:
        return ""
    if not (key := os.environ.get(variable, "").strip()):
        raise KeyRefusedError(
            f"the environment variable {variable} of teacher.key_env holds no key", f"export {variable}=..."
        )
    return key


def _check(access: Access) -> None:
    parts = urlsplit(access.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"teacher.url is {access.url!r}", "url: https://HOST/v1")
    if parts.username or parts.password:
        raise ConfigError(
            "teacher.url holds a password", "put the key into the environment, and name it in teacher.key_env"
        )
    if access.key and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ConfigError(f"a key would go to {parts.hostname} unencrypted", "url: https://...")


def _retry_after(value: str) -> float:
    """Return the seconds of a Retry-After header: a number or a date; 0 if it is neither."""
    try:
        return min(max(float(value), 0.0), MOST_RETRY_AFTER_S)
    except ValueError:
        pass
    try:
        return min(max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0), MOST_RETRY_AFTER_S)
    except (ValueError, TypeError):
        return 0.0


def _tokens(question: TeacherQuestion) -> int:
    return sum(len(text) for _, text in question.messages) // CHARACTERS_PER_TOKEN + 1
