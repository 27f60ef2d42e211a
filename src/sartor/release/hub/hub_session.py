"""Requests to a Hugging Face hub by `huggingface_hub`, with limits on what the hub may do.

The token goes to the hub's own origin, by TLS or on loopback, and to no other: not by a redirect, by a link to a next
page or by the address of an upload. Answers are bounded and uncompressed, waits are bounded, and so is the number of
requests. An error is one of Sartor's, without the token. Xet, whose library has an HTTP client of its own, is off:
files go by Git LFS over HTTP.

`huggingface_hub` has one HTTP client for a process, so the limits hold for every request of the process until the
session ends.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from sartor.core.errors import (
    BusyError,
    ConfigError,
    ConflictError,
    HubError,
    KeyRefusedError,
    SartorError,
    missing_package,
)
from sartor.core.remedies import REQUEST_AGAIN
from sartor.core.terminal import printable

ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 60.0
MAX_WAIT_S = 120
MAX_ANSWER_BYTES = 32 << 20
_TOKEN = re.compile(r"[\x21-\x7e]+")
_ORIGIN_PORTS = {"http": 80, "https": 443}
_READS = ("GET", "HEAD")


@dataclass(frozen=True)
class HubAccess:
    """Address of a hub and the token for it; empty for a public repository that is read."""

    endpoint: str
    token: str = field(default="", repr=False)

    @property
    def host(self) -> str:
        """Name of the hub, for messages."""
        return urlsplit(self.endpoint).netloc

    def scrubbed(self, text: str) -> str:
        """Return the first line of a text from outside, without the token and control characters, cut to 200."""
        first = (text.strip().splitlines() or [""])[0]
        return printable(first.replace(self.token, "***") if self.token else first)[:200]


def open_access(token_env: str = "", *, needs_token: bool) -> HubAccess:
    """Return the hub of HF_ENDPOINT, and the token of a variable; by default HF_TOKEN or that of `hf auth login`.

    Raises ConfigError for a plain HTTP address beyond loopback, an unset variable or a token that is none;
    KeyRefusedError without a token that is needed; ExtraError without `huggingface_hub`.
    """
    try:
        from huggingface_hub import get_token
    except ImportError:
        raise missing_package("huggingface_hub", "tune") from None
    endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme not in _ORIGIN_PORTS or not parts.hostname or parts.username or parts.password:
        raise ConfigError("HF_ENDPOINT is no address of a hub", f"export HF_ENDPOINT={ENDPOINT}")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ConfigError(
            f"HF_ENDPOINT is {endpoint}: over plain HTTP everybody on the way could read the token",
            f"export HF_ENDPOINT=https://{parts.netloc}",
        )
    if token_env and not os.environ.get(token_env):
        raise ConfigError(
            f"the environment variable {token_env} is not set", f"read -rs {token_env}; export {token_env}"
        )
    token = (os.environ[token_env] if token_env else get_token() or "").strip()
    if token and not _TOKEN.fullmatch(token):
        raise ConfigError("the hub's token holds characters that no token has", "hf auth login, or set HF_TOKEN anew")
    if needs_token and not token:
        raise KeyRefusedError(
            f"there is no token for {parts.netloc}", "hf auth login; or export HF_TOKEN, or --token-env VARIABLE"
        )
    return HubAccess(endpoint, token)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HubGuard:
    """Limits on the requests and answers of one session.

    max_requests: most requests, redirects and retries included.
    max_answer_bytes: most bytes of one answer; raised to the size of a file before it is fetched.
    """

    def __init__(self, access: HubAccess, max_requests: int) -> None:
        self._access, self._origin = access, _origin(access.endpoint)
        self._left = max_requests
        self.max_answer_bytes = MAX_ANSWER_BYTES

    def guarded(self, factory: Callable[[], Any]) -> Callable[[], Any]:
        """Return a factory of HTTP clients that are made by `factory` and obey the limits."""

        def make() -> Any:
            client = factory()
            # httpx, or httpx2 since huggingface_hub 2
            stream_type = importlib.import_module(type(client).__mro__[-2].__module__.partition(".")[0]).SyncByteStream
            client.timeout = TIMEOUT_S
            client.headers["accept-encoding"] = "identity"
            hooks = client.event_hooks
            client.event_hooks = {
                "request": [*hooks.get("request", ()), self._check_request],
                "response": [*hooks.get("response", ()), lambda answer: self._check_answer(answer, stream_type)],
            }
            return client

        return make

    def _check_request(self, request: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise HubError(f"{self._access.host} keeps asking for more requests than this needs", REQUEST_AGAIN)
        if "authorization" in request.headers and _origin(str(request.url)) != self._origin:
            raise HubError(
                f"{self._access.host} names {request.url.host} for a request with the token, which goes nowhere else",
                "check HF_ENDPOINT; nothing was sent there",
            )

    def _check_answer(self, answer: Any, stream_type: Any) -> None:
        host, headers = self._access.host, answer.headers
        target = urljoin(str(answer.request.url), headers.get("location", ""))
        is_write = "authorization" in answer.request.headers and answer.request.method not in _READS
        if answer.has_redirect_location and is_write and _origin(target) != self._origin:
            raise HubError(
                f"{host} redirects an upload to {urlsplit(target).hostname}, another host",
                "check HF_ENDPOINT; nothing was sent there",
            )
        wait = headers.get("retry-after", "").strip()
        if wait.isdigit() and int(wait) > MAX_WAIT_S:
            raise BusyError(f"{host} asks to wait {wait[:12]} s", REQUEST_AGAIN, float(wait[:12]))
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise HubError(f"{host} sends a compressed answer, which was not asked for", REQUEST_AGAIN)
        max_bytes = self.max_answer_bytes

        class BoundedStream(stream_type):  # type: ignore[misc,valid-type]
            """Answer of at most `max_bytes` bytes."""

            def __init__(self, inner: Any) -> None:
                self._inner = inner

            def __iter__(self) -> Iterator[bytes]:
                count = 0
                for piece in self._inner:
                    count += len(piece)
                    if count > max_bytes:
                        raise HubError(f"{host} sends an answer of more than {max_bytes:,} bytes", REQUEST_AGAIN)
                    yield piece

            def close(self) -> None:
                self._inner.close()

        answer.stream = BoundedStream(answer.stream)


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _ORIGIN_PORTS.get(parts.scheme, 0)


@contextlib.contextmanager
def hub_session(access: HubAccess, repo_id: str, max_requests: int) -> Iterator[tuple[Any, HubGuard]]:
    """Yield an `HfApi` of the hub, and the limits that hold until the block ends.

    Raises KeyRefusedError (401, 403), ConflictError (409, 412), BusyError (429), HubError for every other failure.
    """
    from huggingface_hub import HfApi, constants, set_client_factory
    from huggingface_hub.utils import (
        _http,
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    guard = HubGuard(access, max_requests)
    factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)  # a user's own, with its proxy
    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    is_xet_off, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    set_client_factory(guard.guarded(factory))
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield HfApi(access.endpoint, token=access.token or False, library_name="sartor"), guard
    except SartorError:
        raise
    except Exception as error:
        raise _translated(error, access, repo_id) from None
    finally:
        set_client_factory(factory)
        constants.HF_HUB_DISABLE_XET = is_xet_off
        logging.set_verbosity(verbosity)
        if had_bars:
            enable_progress_bars()


def _translated(error: Exception, access: HubAccess, repo_id: str) -> SartorError:
    """Return Sartor's error for one of `huggingface_hub`, by the answer's status if there was one."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    if sartor_error := next((cause for cause in causes if isinstance(cause, SartorError)), None):
        return sartor_error
    answers = [getattr(cause, "response", None) for cause in causes]
    status = next((answer.status_code for answer in answers if answer is not None), 0)
    host, detail = access.host, access.scrubbed(str(getattr(error, "server_message", None) or error))
    if status == 401:
        return KeyRefusedError(
            f"{host} refuses the token for {repo_id} (401)", "hf auth login, or set HF_TOKEN to a token that may write"
        )
    if status == 403:
        return KeyRefusedError(
            f"the token may not do this with {repo_id} on {host} (403): {detail}",
            "take a token with the right to write to that owner's repositories",
        )
    if status == 404:
        return HubError(f"{host} has no such repository or revision: {repo_id} (404)", "check the name and --revision")
    if status in (409, 412):
        return ConflictError(f"{repo_id} changed on {host} meanwhile ({status}): {detail}", REQUEST_AGAIN)
    if status == 429:
        return BusyError(f"{host} asks to send less (429): {detail}", REQUEST_AGAIN, 60.0)
    if status:
        return HubError(f"{host} answers {status}: {detail}", f"{REQUEST_AGAIN}: what was uploaded is not sent twice")
    if type(error).__name__ == "OfflineModeIsEnabled":
        return HubError(f"{host} is not asked: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    return HubError(
        f"{host} cannot be used: {type(error).__name__}: {detail}",
        f"check the network and HF_ENDPOINT, then {REQUEST_AGAIN}",
    )
