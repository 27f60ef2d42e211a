"""Requests to an OpenAI-compatible endpoint, with retries and a rate limit.

    429, 503, 529     asked again after Retry-After (all threads wait), or after a doubling pause
    408, 409, 425, 500, 502, 504, time-out, cut stream, malformed JSON    asked again after a doubling pause
    401, 403          KeyRefusedError
    413, 422, 400 for its length or content         QuestionRefused, for this question alone
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
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sartor.core.errors import BusyError, ConfigError, KeyRefusedError, UnavailableError, about_option

Answer = TypeVar("Answer")
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


class IncompleteResponseError(Exception):
    """A body that ended early or violates the protocol. The request should be repeated."""


def bounded_lines(lines: Iterable[bytes]) -> Iterable[bytes]:
    """Yield the lines. Raises IncompleteResponseError beyond MOST_BYTES."""
    total = 0
    for line in lines:
        total += len(line)
        if total > MOST_BYTES:
            raise IncompleteResponseError(f"more than {MOST_BYTES:,} bytes")
        yield line


def json_body(text: str) -> dict[str, Any]:
    """Return the JSON object in a body. Raises IncompleteResponseError for another text, or a stated error."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise IncompleteResponseError(f"{text[:60]!r} is not JSON") from None
    if not isinstance(value, dict):
        raise IncompleteResponseError(f"{text[:60]!r} is no JSON object")
    if value.get("error"):  # some gateways write all fields, this one as null
        raise IncompleteResponseError(f"the server says {str(value['error'])[:200]}")
    return value


LONGEST_PAUSE_S = 60.0
MOST_RETRY_AFTER_S = 600.0
AGAIN = (408, 409, 425, 429)  # and the server's own failures: 5xx, but for 501, which is for good
OF_THE_QUESTION = (413, 422)
# in a 400 for the length: the code of OpenAI, words of OpenAI, vLLM and SGLang, the type of llama.cpp's server
TOO_LONG = ("context_length_exceeded", "context length", "maximum model length", "exceed_context_size_error")
CONTENT = "content_filter"  # code of Azure's in a 400
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class QuestionRefused:
    """That an endpoint refuses one question alone.

    problem: its words, in one line. is_too_long: whether for the length.
    """

    problem: str
    is_too_long: bool


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


class EndpointClient:
    """Client of one route of an endpoint.

    option: name of the recipe's option with the address, for errors.
    keeps_answers: whether the caller keeps what was answered, so that the same command goes on.
    notice: gets a line for each retry, and for the first question that is refused.
    """

    def __init__(
        self,
        access: Access,
        pace: RequestThrottle,
        patience: Patience,
        *,
        route: str,
        option: str = "teacher",
        keeps_answers: bool = True,
        notice: Callable[[str], object] = lambda line: None,
    ) -> None:
        _check(access, option)
        self.access, self.pace, self.patience, self._notice = access, pace, patience, notice
        self._route, self._option, self._keeps_answers = route, option, keeps_answers
        self._has_noted_refusal = False
        self.name = f"{access.model}@{urlsplit(access.url).netloc.rpartition('@')[2]}"
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if urlsplit(access.url).hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def ask(
        self, body: bytes, tokens: int, read: Callable[[Iterable[bytes], str], Answer], *, seed: str
    ) -> Answer | QuestionRefused:
        """Return what `read` makes of the answer to a request, with retries.

        tokens: of the request and its answer, for the rate limit.
        read: of the lines of the body and its content type; raises IncompleteResponseError.
        seed: of the jitter of the pauses.
        Raises BusyError or UnavailableError once all tries are used, KeyRefusedError, ConfigError.
        """
        jitter = random.Random(seed)
        for attempt in range(self.patience.tries):
            self.pace.wait(tokens)
            try:
                answer = self._request(body, read)
                if isinstance(answer, QuestionRefused) and not self._has_noted_refusal:
                    self._has_noted_refusal = True
                    self._notice(f"{self.name} refuses a question (later refusals are not printed): {answer.problem}")
                return answer
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
        remedy = "once the endpoint answers, type the same command again, with --replace"
        if self._keeps_answers:
            remedy = "the same command goes on where it stopped; what was answered is not asked again"
        raise BusyError(problem, remedy, last.after_s or pause) if last.is_busy else UnavailableError(problem, remedy)

    def _request(self, body: bytes, read: Callable[[Iterable[bytes], str], Answer]) -> Answer | QuestionRefused:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "User-Agent": "sartor"}
        if self.access.key:
            headers["Authorization"] = f"Bearer {self.access.key}"
        request = urllib.request.Request(f"{self.access.url.rstrip('/')}{self._route}", body, headers)
        try:
            with self._opener.open(request, timeout=self.patience.timeout_s) as response:
                return read(response, response.headers.get("Content-Type", ""))
        except urllib.error.HTTPError as error:
            with error:  # closes the socket
                failure = self._failure(error)
            if isinstance(failure, QuestionRefused):
                return failure
            raise failure from None
        except IncompleteResponseError as error:
            raise _AgainError(self._redacted(str(error))) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
            raise _AgainError(self._redacted(f"{type(error).__name__}: {error}")) from None

    def _failure(self, error: urllib.error.HTTPError) -> Exception | QuestionRefused:
        """Return the exception for an error status, or the refusal if it concerns this question alone."""
        try:
            body = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            body = ""
        problem = self._redacted(f"{self.access.url} says {error.code}: {' '.join(body.split())[:300]}")
        is_too_long = error.code == 413 or (error.code in (400, 422) and any(words in body for words in TOO_LONG))
        if error.code in OF_THE_QUESTION or is_too_long or (error.code == 400 and CONTENT in body):
            return QuestionRefused(problem, is_too_long)
        if error.code in AGAIN or (error.code >= 500 and error.code != 501):
            is_busy = error.code in (429, 503, 529)
            return _AgainError(
                problem, retry_after(error.headers.get("Retry-After", "")) if is_busy else 0.0, is_busy=is_busy
            )
        if error.code in (401, 403):
            remedy = f"export VARIABLE=KEY with a valid key, and {self._option}.key_env: VARIABLE"
            if self.access.key:
                remedy = f"export VARIABLE=KEY with a valid key, for the VARIABLE that {self._option}.key_env names"
            return KeyRefusedError(problem, remedy)
        remedy = f"check {self._option}.url, which has to serve {self._route}, and {self._option}.model"
        if error.code == 400 and body.strip():
            remedy = f"change what the endpoint's words name; if they name nothing, {remedy}"
        if self._keeps_answers:
            remedy += "; what was answered is kept"
        return about_option(ConfigError(problem, remedy), self._option)

    def _redacted(self, text: str) -> str:
        return text.replace(self.access.key, "***") if self.access.key else text


class _AgainError(Exception):
    """A failure that may be temporary. after_s: pause that the endpoint demanded; 0 for none."""

    def __init__(self, problem: str, after_s: float = 0.0, *, is_busy: bool = False) -> None:
        super().__init__(problem)
        self.problem, self.after_s, self.is_busy = problem, after_s, is_busy


def key_of(variable: str, option: str = "teacher") -> str:
    """Return the key in an environment variable; empty if no variable is named.

    option: name of the recipe's option that names it, for errors.

    Raises KeyRefusedError if it is not set.
    """
    if not variable:
        return ""
    if not (key := os.environ.get(variable, "").strip()):
        raise KeyRefusedError(
            f"the environment variable {variable} of {option}.key_env holds no key", f"export {variable}=..."
        )
    return key


def _check(access: Access, option: str) -> None:
    parts = urlsplit(access.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{option}.url is {access.url!r}", "url: https://HOST/v1")
    if parts.username or parts.password:
        raise ConfigError(
            f"{option}.url holds a password", f"put the key into the environment, and name it in {option}.key_env"
        )
    if access.key and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ConfigError(f"a key would go to {parts.hostname} unencrypted", "url: https://...")


def retry_after(value: str) -> float:
    """Return the seconds of a Retry-After header: a number or a date; 0 if it is neither."""
    try:
        return min(max(float(value), 0.0), MOST_RETRY_AFTER_S)
    except ValueError:
        pass
    try:
        return min(max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0), MOST_RETRY_AFTER_S)
    except (ValueError, TypeError):
        return 0.0
