"""Resumable downloads from untrusted mirrors.

Content is checked elsewhere (TUF for metadata, sha256 for content). This module handles what a mirror can do without
a forgery: cut, stall, drip, answer another range, ignore the range, compress, send without end, redirect. Ranges
follow RFC 9110, section 14. `http.client` rather than a pool gives access to the socket, so that dripping headers can
be ended too.
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
    """Limits of a mirror's answers.

    A transfer may last `grace_s`, and in addition the time that its bytes need at `least_bytes_per_s`. `attempts` is
    the number of failures in a row without a byte of progress. The n-th failure is followed by a pause of `backoff_s`
    * 2**(n - 1), at most `most_backoff_s`.
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
    """Failure of one attempt that the next may not have: a cut, a timeout, a 5xx. Never leaves this package."""


class AbsentError(Exception):
    """Answer of a mirror that has no such file. Never leaves this module."""


@dataclass
class Body:
    """Answer before its bytes.

    start: position in the file where they begin.
    length: declared number of bytes, or None.
    """

    start: int
    length: int | None
    read: Callable[[int], bytes]


@dataclass
class Fetcher:
    """Downloader by HTTP, HTTPS or from a folder (`file:`), which counts the bytes it fetched.

    broken: failures that were tried again.
    """

    limits: DownloadLimits = DownloadLimits()
    fetched_bytes: int = 0
    broken: list[str] = field(default_factory=list)  # failures that were tried again

    def small(self, url: str, max_bytes: int) -> bytes | None:
        """Return a whole small file, or None if the mirror has none.

        Raises MissingError if the mirror is unreachable, too slow or cuts too often; ArtifactError for more than
        `max_bytes`.
        """
        buffer = bytearray()

        def take(offset: int, content: bytes) -> None:
            """Keep a piece at an offset of the buffer."""
            del buffer[offset:]
            buffer.extend(content)

        try:
            self._until_done(url, max_bytes, exact=False, done=lambda: len(buffer), take=take)
        except AbsentError:
            return None
        return bytes(buffer)

    def resume(self, url: str, length: int, done: Callable[[], int], take: Sink) -> None:
        """Fetch a file of exactly `length` bytes from the offset `done()` on.

        take: called as `take(offset, content)` to keep each piece.

        Returns once `done() == length`. Raises MissingError if the file is absent, or the mirror is unreachable, too
        slow or cuts too often (fetched bytes are kept, so that a later call resumes). Raises ArtifactError if the
        mirror sends more than the length, or another range.
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
        """Send a few bytes, once.

        Raises MissingError unless they are accepted (a 2xx), ConfigError for an invalid address.
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
        """Repeat attempts until the file is complete. Raises MissingError after too many failures in a row."""
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
        """Make one attempt, which keeps at most `length - offset` bytes, in pieces of CHUNK_BYTES.

        The bytes of a broken attempt are kept too.
        """
        # a file without an exact length is small, and begins again from 0
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
        """Yield the bytes as they come.

        It reads one byte more than is allowed, to check that the answer ends.
        """
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
        """Open the answer to a request, after redirects."""
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
    """Open a file below a `file:` address."""
    path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            yield Body(offset, max(0, path.stat().st_size - offset), stream.read)
    except (FileNotFoundError, IsADirectoryError):
        raise AbsentError("no such file") from None


def _connection(url_parts: urllib.parse.SplitResult, limits: DownloadLimits) -> http.client.HTTPConnection:
    """Return an open connection with its timeouts. Raises TransientDownloadError."""
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
    """Hold a connection that is shut down after `seconds`.

    A socket's timeout counts from byte to byte, so that a drip never meets it.
    """
    sock = connection.sock

    def end() -> None:
        """Shut the socket down."""
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
    """Send a request and return the head of the answer.

    It is a GET from `offset` on, or with a body a POST.
    """
    request_target = urllib.parse.urlunsplit(("", "", url_parts.path or "/", url_parts.query, ""))
    # identity: a compressed answer could unpack to any size, and a range of it would be no range of the file
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
    """Return the target of a redirect.

    It must be on the same host, and may lead neither from TLS to plain HTTP nor to the device's own files. Raises
    ArtifactError.
    """
    target = urllib.parse.urljoin(url, location)
    old, new = urllib.parse.urlsplit(url), urllib.parse.urlsplit(target)
    safe = (new.scheme == old.scheme or new.scheme == "https") and new.hostname == old.hostname
    if not location or not safe:
        raise ArtifactError(
            f"{url} redirects to {location[:200]!r}", f"curl -sIL {url} shows the final address: give that one"
        )
    return target


def _body(url: str, response: http.client.HTTPResponse, offset: int, length: int) -> Body:
    """Return the body of a response. Raises the error that its status or its headers call for."""
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
    """Return the position where a 206 begins.

    Raises ArtifactError unless it is the requested range, within the signed length.
    """
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
