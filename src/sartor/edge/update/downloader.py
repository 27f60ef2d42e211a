"""Resumable downloads from untrusted mirrors.

What arrives is checked elsewhere (TUF for metadata, sha256 for content). Here stands what a mirror can do without
forging
anything: cut, stall, drip, answer another range, ignore the range, compress, send without end, redirect. RFC 9110
section 14 for ranges. `http.client` rather than a pool: the socket is at hand, so that a drip in the headers can be
ended as well.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sartor.core.errors import ArtifactError, ConfigError, MissingError

# 256 KiB: an append to the store costs an fsync, and a device has little memory
CHUNK_BYTES = 1 << 18
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)$")
_REDIRECTS = (301, 302, 303, 307, 308)
Sink = Callable[[int, bytes], None]


@dataclass(frozen=True)
class DownloadLimits:
    """What a mirror may take its time for.

    A transfer may last `grace_s` and then what its bytes need at `least_bytes_per_s`. `attempts` is the number of
    failures in a row without a byte of progress; the n-th is followed by `backoff_s` * 2**n, at most `most_backoff_s`.
    """

    connect_s: float = 15.0
    read_s: float = 30.0
    grace_s: float = 30.0
    least_bytes_per_s: float = 500.0
    attempts: int = 5
    redirects: int = 3
    backoff_s: float = 0.5
    most_backoff_s: float = 30.0


class TransientDownloadError(Exception):
    """One attempt broke off in a way that the next may mend: a cut, a timeout, a 5xx. Never leaves this package."""


class AbsentError(Exception):
    """The mirror says that it has no such file. Never leaves this module."""


@dataclass
class Body:
    """An answer before its bytes: where in the file they begin, and how many are declared (None: not said)."""

    start: int
    length: int | None
    read: Callable[[int], bytes]


@dataclass
class Fetcher:
    """Downloads by HTTP, HTTPS or from a folder (`file:`), and counts what came. `limits`: see Limits."""

    limits: DownloadLimits = DownloadLimits()
    fetched_bytes: int = 0
    broken: list[str] = field(default_factory=list)  # what failed and was tried again

    def small(self, url: str, max_bytes: int) -> bytes | None:
        """A whole small file; None where the mirror has none. Raises MissingError: unreachable, too slow, cut too
        often;
        ArtifactError: more than `max_bytes`.
        """
        buffer = bytearray()

        def take(offset: int, content: bytes) -> None:
            del buffer[offset:]
            buffer.extend(content)

        try:
            self._until_done(url, max_bytes, exact=False, done=lambda: len(buffer), take=take)
        except AbsentError:
            return None
        return bytes(buffer)

    def resume(self, url: str, length: int, done: Callable[[], int], take: Sink) -> None:
        """Bring a file of exactly `length` bytes from the offset `done()` on; `take(offset, content)` keeps what
        comes.

        Returns once `done() == length`. Raises MissingError: absent, unreachable, too slow, cut too often (what came
        is kept, so a later call goes on); ArtifactError: the mirror sends more, or another range, than the length
        declares.
        """
        try:
            if done() < length:
                self._until_done(url, length, exact=True, done=done, take=take)
        except AbsentError as error:
            raise MissingError(
                f"{url} is not there ({error})",
                f"curl -I {url}; the same command again later, or with another mirror's URL",
            ) from None

    def post(self, url: str, body: bytes) -> None:
        """Send a few bytes, once. Raises MissingError unless they are taken (a 2xx), ConfigError for what is no
        address.
        """
        url_parts = urllib.parse.urlsplit(url)
        if url_parts.scheme not in ("http", "https") or not url_parts.hostname:
            raise ConfigError(f"{url} is no http or https address", "give an address, or a folder")
        try:
            connection = _connection(url_parts, self.limits)
            try:
                with _close_after(connection, self.limits.grace_s + self.limits.connect_s):
                    status = _request(connection, url_parts, 0, body).status
            finally:
                connection.close()
        except TransientDownloadError as error:
            raise MissingError(f"{url}: {error}", "try again later: the next sync says it again") from None
        if not 200 <= status < 300:
            raise MissingError(
                f"{url} does not take it: HTTP {status}",
                f"curl -i {url} shows what answers; --report takes a folder, too",
            ) from None

    def _until_done(self, url: str, length: int, *, exact: bool, done: Callable[[], int], take: Sink) -> None:
        failures = 0
        while True:
            offset = done()
            try:
                self._once(url, offset, length, exact=exact, take=take)
                if not exact or done() >= length:
                    return
                raise TransientDownloadError(f"it ended after {done():,} of {length:,} bytes")
            except TransientDownloadError as error:
                self.broken.append(str(error))
                failures = 1 if done() > offset else failures + 1
                if failures >= self.limits.attempts:
                    raise MissingError(
                        f"{url}: {error}; {done():,} bytes are here, and {failures} attempts in a row brought no more",
                        "try again later, or another mirror: what came is kept",
                    ) from None
                time.sleep(min(self.limits.backoff_s * 2 ** (failures - 1), self.limits.most_backoff_s))

    def _once(self, url: str, offset: int, length: int, *, exact: bool, take: Sink) -> None:
        """One attempt: at most `length - offset` bytes are kept, in pieces of CHUNK_BYTES; also what a broken one
        brought.
        """
        # what is no exact length is small, and begun anew
        offset = offset if exact else 0
        with self._open_body(url, offset, length) as body:
            if exact and body.length is not None and body.start + body.length > length:
                raise _too_long(url, length, f"{body.start + body.length:,}")
            skip, pending, position = offset - body.start, bytearray(), offset
            try:
                for piece in self._pieces(url, body, length):
                    fresh = piece[skip:] if skip else piece
                    skip -= len(piece) - len(fresh)
                    pending += fresh
                    if len(pending) >= CHUNK_BYTES:
                        take(position, bytes(pending))
                        position, pending = position + len(pending), bytearray()
            finally:
                if pending:
                    take(position, bytes(pending))

    def _pieces(self, url: str, body: Body, length: int) -> Iterator[bytes]:
        """What is read, as it comes. Reads one byte more than is allowed, to see that there is an end."""
        start_s, received_bytes = time.monotonic(), 0
        while True:
            allowed_bytes = length - body.start - received_bytes
            try:
                piece = body.read(min(CHUNK_BYTES, allowed_bytes) if allowed_bytes else 1)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise TransientDownloadError(f"it broke off ({type(error).__name__})") from None
            if not piece:
                if body.length is not None and received_bytes < body.length:
                    raise TransientDownloadError(f"it was cut after {received_bytes:,} of {body.length:,} bytes")
                return
            received_bytes += len(piece)
            self.fetched_bytes += len(piece)
            if not allowed_bytes:
                raise _too_long(url, length, "more")
            yield piece
            if body.length is not None and received_bytes >= body.length:
                return
            overtime_s = time.monotonic() - start_s - self.limits.grace_s
            if overtime_s > 0 and received_bytes < overtime_s * self.limits.least_bytes_per_s:
                raise TransientDownloadError(
                    f"it drips: {received_bytes:,} bytes in {overtime_s + self.limits.grace_s:.0f} s"
                )

    @contextmanager
    def _open_body(self, url: str, offset: int, length: int) -> Iterator[Body]:
        for _ in range(self.limits.redirects + 1):
            url_parts = urllib.parse.urlsplit(url)
            if url_parts.scheme == "file":
                with _local(url, offset) as body:
                    yield body
                return
            if url_parts.scheme not in ("http", "https") or not url_parts.hostname:
                raise ConfigError(
                    f"{url} is no http, https or file address", "give the address of the repository's folder"
                )
            connection = _connection(url_parts, self.limits)
            try:
                with _close_after(connection, self.limits.grace_s + self.limits.connect_s):
                    response = _request(connection, url_parts, offset)
                if response.status in _REDIRECTS:
                    url = _next(url, response.getheader("Location", ""))
                    continue
                seconds = self.limits.grace_s + (length - offset) / self.limits.least_bytes_per_s
                with _close_after(connection, seconds):
                    yield _body(url, response, offset, length)
                return
            finally:
                connection.close()
        raise ArtifactError(
            f"{url} is the end of more than {self.limits.redirects} redirects",
            f"curl -sIL {url} shows the final address: give that one",
        )


@contextmanager
def _local(url: str, offset: int) -> Iterator[Body]:
    path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            yield Body(offset, max(0, path.stat().st_size - offset), stream.read)
    except (FileNotFoundError, IsADirectoryError):
        raise AbsentError("no such file") from None


def _connection(url_parts: urllib.parse.SplitResult, limits: DownloadLimits) -> http.client.HTTPConnection:
    assert url_parts.hostname
    if url_parts.scheme == "https":
        context = ssl.create_default_context()
        result: http.client.HTTPConnection
        result = http.client.HTTPSConnection(
            url_parts.hostname, url_parts.port, timeout=limits.connect_s, context=context
        )
    else:
        result = http.client.HTTPConnection(url_parts.hostname, url_parts.port, timeout=limits.connect_s)
    try:
        result.connect()
        assert result.sock is not None
        result.sock.settimeout(limits.read_s)
    except OSError as error:
        result.close()
        raise TransientDownloadError(f"cannot connect ({type(error).__name__}: {error})") from None
    return result


@contextmanager
def _close_after(connection: http.client.HTTPConnection, seconds: float) -> Iterator[None]:
    """End the connection after `seconds`: a timeout of the socket counts from byte to byte, and a drip never meets
    it.
    """
    sock = connection.sock

    def end() -> None:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is closed already

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _request(
    connection: http.client.HTTPConnection, url_parts: urllib.parse.SplitResult, offset: int, body: bytes | None = None
) -> http.client.HTTPResponse:
    """The head of an answer: to a GET, from `offset` on; with a body to a POST of it."""
    request_target = urllib.parse.urlunsplit(("", "", url_parts.path or "/", url_parts.query, ""))
    # identity: a compressed answer could unpack to any size, and a range of one is no range of the file
    headers = {"Accept-Encoding": "identity", "User-Agent": "sartor", "Connection": "close"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection.request("GET" if body is None else "POST", request_target, body, headers)
        return connection.getresponse()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise TransientDownloadError(f"no answer ({type(error).__name__})") from None


def _next(url: str, location: str) -> str:
    """Where a redirect leads: to the same host, and never from TLS to plain or into the device's own files."""
    target = urllib.parse.urljoin(url, location)
    old, new = urllib.parse.urlsplit(url), urllib.parse.urlsplit(target)
    safe = (new.scheme == old.scheme or new.scheme == "https") and new.hostname == old.hostname
    if not location or not safe:
        raise ArtifactError(
            f"{url} redirects to {location[:200]!r}", f"curl -sIL {url} shows the final address: give that one"
        )
    return target


def _body(url: str, response: http.client.HTTPResponse, offset: int, length: int) -> Body:
    status = response.status
    if status in (403, 404, 410):
        raise AbsentError(f"HTTP {status}")
    if status == 416:
        raise ArtifactError(
            f"{url} has no bytes after {offset:,}; {length:,} are signed",
            "sartor edge sync OTHER_URL NAME --device ID --root 1.root.json, with another mirror",
        )
    if status not in (200, 206):
        raise TransientDownloadError(f"HTTP {status}")
    if (encoding := response.getheader("Content-Encoding", "identity").strip().lower()) not in ("", "identity"):
        raise ArtifactError(
            f"{url} comes with Content-Encoding {encoding[:40]!r}, which was not asked for",
            "serve the repository as plain files, without compression",
        )
    start = _start(url, response, offset, length) if status == 206 else 0
    content_length = response.getheader("Content-Length", "")
    return Body(start, int(content_length) if content_length.isdigit() else None, response.read1)


def _start(url: str, response: http.client.HTTPResponse, offset: int, length: int) -> int:
    """Where a 206 begins. Raises ArtifactError unless it is the range that was asked for, within the signed length."""
    content_range = response.getheader("Content-Range", "")
    match = _RANGE.match(content_range)
    total = match[3] if match else ""
    is_expected = (
        match and int(match[1]) == offset <= int(match[2]) < length and (total == "*" or int(total) == length)
    )
    if not is_expected or not offset:
        expected = f"bytes {offset}-{length - 1}/{length}"
        raise ArtifactError(
            f"{url} answers with the range {content_range[:80]!r}; asked was {expected!r}",
            "sartor edge sync OTHER_URL NAME --device ID --root 1.root.json, with another mirror",
        )
    return offset


def _too_long(url: str, length: int, size: str) -> ArtifactError:
    return ArtifactError(
        f"{url} sends {size} bytes; {length:,} are allowed", "try another mirror: this one is broken or lies"
    )
