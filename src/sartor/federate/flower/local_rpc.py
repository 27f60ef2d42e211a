"""Requests over a Unix socket with checked peers.

    the carrier sends      8 bytes: length N, big-endian; N bytes: one request
    and receives           1 byte: kind of the response (RpcResponse.kind); 8 bytes: length; that many bytes; the end
                           of the connection

An empty request asks for the name of the client. A connection carries one request. The system reports who connects
(SO_PEERCRED, Linux only), not the carrier. A request that is too long, too slow, malformed or from another user ends
its connection and affects nothing else. Requests are answered one at a time, by the thread that serves.

RoundClient checks each request as if an enemy had sent it, for an enemy may: nothing is trusted but what the
coordinator signed. A refusal leaves as the error's class and check. Its text may name what lies on this machine, so it
stays in the log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shlex
import signal
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from sartor.core.errors import BusyError, ConfigError, MissingError, RequestError, SartorError

# answer; no: a refusal, as `KIND check`; busy: ask again later; stranger: this user is not served; none: a malformed
# request
Kind = Literal["answer", "no", "busy", "stranger", "none"]
_KINDS: dict[bytes, Kind] = {b"a": "answer", b"n": "no", b"b": "busy", b"s": "stranger", b"x": "none"}
_BYTES = {kind: byte for byte, kind in _KINDS.items()}
_LENGTH = struct.Struct(">Q")
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_PIECE_BYTES = 1 << 20
# largest path in sockaddr_un, without its final zero
_MOST_PATH_BYTES = 107


@dataclass(frozen=True)
class RpcResponse:
    """Response that comes back through the socket."""

    kind: Kind
    content: bytes = b""


@dataclass(frozen=True)
class TransferLimits:
    """Limits of the socket.

    most_bytes: bytes of a request or an answer.
    transfer_s: seconds for all bytes of one of them.
    most_waiting: connections at a time.
    """

    most_bytes: int = 256 << 20
    transfer_s: float = 60.0
    most_waiting: int = 4


@dataclass
class _Waiting:
    """Request that waits for its turn."""

    request: bytes
    response: RpcResponse = RpcResponse("busy")
    done: threading.Event = field(default_factory=threading.Event)


class LocalRpcServer:
    """Server of the socket.

    allowed: user ids that are served; by default this process's.
    group: members may connect (0660); None: the owner only (0600).
    Raises ConfigError for a folder in which others could put their own socket, BusyError if another process answers
    already, MissingError where the system cannot report peers or the socket cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        allowed: frozenset[int] | None = None,
        group: int | None = None,
        limits: TransferLimits | None = None,
    ) -> None:
        self.path, self.allowed, self.limits = (
            path,
            frozenset({os.geteuid()}) if allowed is None else allowed,
            limits or TransferLimits(),
        )
        # SimpleQueue: a signal handler may call stop() while the serving thread stands in the queue
        self._turns: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._slots = threading.Semaphore(self.limits.most_waiting)
        self._stopped, self._name = False, ""
        self._accepting = threading.Thread(target=self._accept, name="hatch", daemon=True)
        _check_folder(path)
        self._listener = _listen(path, group, self.limits.most_waiting)

    def __enter__(self) -> LocalRpcServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and remove the socket."""
        self.stop()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        if self._accepting.is_alive():
            # if it were closed before, the descriptor's number could be reused by another socket
            self._accepting.join()
        self._listener.close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def stop(self) -> None:
        """Make `serve` return after the current request. May be called from a signal handler."""
        self._stopped = True
        self._turns.put(None)

    def serve(self, name: str, answer: Callable[[bytes], RpcResponse]) -> None:
        """Answer one request after the other in this thread, until `stop`. `answer` must raise nothing."""
        self._name = name
        self._accepting.start()
        while (waiting := self._turns.get()) is not None and not self._stopped:
            waiting.response = answer(waiting.request)
            waiting.done.set()

    def _accept(self) -> None:
        while not self._stopped:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                # closed, or no descriptor is free: in that case connections keep waiting
                time.sleep(0.05)
                continue
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._attend, args=(connection,), daemon=True).start()
            else:
                self._respond(connection, RpcResponse("busy"))

    def _attend(self, connection: socket.socket) -> None:
        try:
            self._respond(connection, self._handle(connection))
        finally:
            self._slots.release()

    def _handle(self, connection: socket.socket) -> RpcResponse:
        try:
            _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if user not in self.allowed:
                return RpcResponse("stranger")
            request = _receive(connection, self.limits.most_bytes, time.monotonic() + self.limits.transfer_s)
        except (OSError, RequestError):
            return RpcResponse("none")
        if not request:
            return RpcResponse("answer", self._name.encode())
        waiting = _Waiting(request)
        self._turns.put(waiting)
        while not waiting.done.wait(0.5):
            if self._stopped:
                return RpcResponse("busy")
        return waiting.response

    def _respond(self, connection: socket.socket, response: RpcResponse) -> None:
        with connection, contextlib.suppress(OSError, RequestError):
            _send(
                connection,
                (_BYTES[response.kind] + _LENGTH.pack(len(response.content)), response.content),
                self.limits.transfer_s,
            )


def ask(path: Path, request: bytes, wait_s: float, limits: TransferLimits | None = None) -> RpcResponse:
    """Send a request to the socket and return the response; b"" asks for the name.

    wait_s: seconds until the answer begins.
    Raises MissingError if no process answers, RequestError if the answer is malformed or does not come.
    """
    limits = limits or TransferLimits()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with connection:
        try:
            connection.settimeout(limits.transfer_s)
            connection.connect(str(path))
        except OSError as error:
            raise MissingError(
                f"nobody answers at {path}: {error.strerror}", "start the trainer; see its rights"
            ) from None
        try:
            # a user who is not served gets the response before the request is sent completely
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _send(connection, (_LENGTH.pack(len(request)), request), limits.transfer_s)
            kind = _receive_exactly(connection, 1, time.monotonic() + wait_s)
            content = _receive(connection, limits.most_bytes, time.monotonic() + limits.transfer_s)
            return RpcResponse(_KINDS[kind], content)
        except (OSError, KeyError) as error:
            raise RequestError(
                f"the answer at {path} did not come whole: {error!r:.80}",
                "the same call again: a request that was answered is answered from the journal",
            ) from None


def _send(connection: socket.socket, pieces: tuple[bytes, ...], within_s: float) -> None:
    # sendall applies the time-out to each piece as a whole
    connection.settimeout(within_s)
    for piece in pieces:
        connection.sendall(piece)


def _receive(connection: socket.socket, most_bytes: int, deadline: float) -> bytes:
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size, deadline))
    if length > most_bytes:
        raise RequestError(
            f"a message of {length:,} bytes; at most {most_bytes:,} pass",
            f"TransferLimits(most_bytes={length}) on both sides",
        )
    return _receive_exactly(connection, length, deadline)


def _receive_exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    return b"".join(_pieces(connection, count, deadline))


def _pieces(connection: socket.socket, count: int, deadline: float) -> Iterator[bytes]:
    """Yield `count` bytes as they arrive; no memory is reserved for bytes that are only announced."""
    while count:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"{count:,} bytes did not come in time")
        connection.settimeout(left_s)
        piece = connection.recv(min(count, _PIECE_BYTES))
        if not piece:
            raise ConnectionResetError(f"the connection ended {count:,} bytes early")
        count -= len(piece)
        yield piece


def _check_folder(path: Path) -> None:
    if len(os.fsencode(path)) > _MOST_PATH_BYTES:
        raise ConfigError(
            f"{path} has more than {_MOST_PATH_BYTES} bytes, which no socket's path may",
            f"--socket /run/sartor/{path.name}, or another path of at most {_MOST_PATH_BYTES} bytes",
        )
    try:
        folder = path.parent.stat()
    except OSError as error:
        raise ConfigError(
            f"{path.parent} cannot be used: {error.strerror}", f"install -d -m 0750 {path.parent}"
        ) from None
    is_writable = folder.st_uid not in (os.geteuid(), 0) or (
        folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX
    )
    if is_writable:
        raise ConfigError(
            f"others may write in {path.parent} (mode {stat.S_IMODE(folder.st_mode):04o}), and put their own socket "
            "there",
            f"a folder of your own: chmod 0750 {shlex.quote(str(path.parent))}",
        )


def _listen(path: Path, group: int | None, backlog: int) -> socket.socket:
    if "SO_PEERCRED" not in vars(socket):
        raise MissingError("this system does not say who connects to a socket", "run sartor federate client on Linux")
    _clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous_umask = os.umask(0o177)  # nobody may connect before the permissions are set
    try:
        listener.bind(str(path))
        if group is not None:
            os.chown(path, -1, group)
            os.chmod(path, 0o660)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise MissingError(
            f"{path} cannot be listened at: {error.strerror}",
            f"ls -ld {path.parent}; --socket in a folder of your own, --group with a group of yours",
        ) from None
    finally:
        os.umask(previous_umask)
    return listener


def _clear(path: Path) -> None:
    """Remove the socket of a process that was killed.

    Raises BusyError if a process listens there, ConfigError for another kind of file.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(
                f"{path} is there, and is no socket", f"ls -l {path}; remove it, or --socket with another path"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5.0)
        if probe.connect_ex(str(path)) == 0:
            raise BusyError(f"another process answers at {path}", "stop it, or choose another path")
    path.unlink()


LOG = logging.getLogger("sartor.trainer")


class Responder(Protocol):
    """Object that answers requests: RoundClient, or a substitute."""

    def answer(self, request: bytes) -> bytes:
        """Return the answer; empty where none is due."""
        ...


def serve(
    client: Responder,
    name: str,
    path: Path,
    *,
    allowed: frozenset[int] | None = None,
    group: int | None = None,
    limits: TransferLimits | None = None,
) -> None:
    """Answer at the socket `path` until SIGTERM or SIGINT, as LocalRpcServer does.

    name: this client's name in the coordinator's roster. Call it in the thread that opened the client's journal.
    Raises the errors of LocalRpcServer.
    """
    with LocalRpcServer(path, allowed, group, limits) as hatch:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: hatch.stop())
        LOG.info("%s answers at %s", name, path)
        hatch.serve(name, lambda request: respond(client, request))


def respond(client: Responder, request: bytes) -> RpcResponse:
    """Return the answer, or the reason why there is none.

    An error of one request does not end the server: it is logged, and the response is a refusal.
    """
    started = time.monotonic()
    try:
        answer = client.answer(request)
    except SartorError as error:
        LOG.warning("refused a request of %d bytes: %s", len(request), error)
        return RpcResponse("no", f"{error.kind} {error.check}".strip().encode())
    except Exception:
        LOG.exception("a request of %d bytes could not be answered", len(request))
        return RpcResponse("no", b"failed")
    LOG.info("answered %d bytes with %d in %.2f s", len(request), len(answer), time.monotonic() - started)
    return RpcResponse("answer", answer)
