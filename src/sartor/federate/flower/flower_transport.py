"""Transport of requests to Flower nodes that come and go.

Whoever registers a node's key states its client (`flwr supernode register KEY --name CLIENT`). This name only decides
where to send: an answer counts by its client's signature. If two nodes have one name, each gets that client's
requests, which are no secret. A message without urgency (how a round ended) is sent along with the next request.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

_POLL_S = 0.25
# seconds between two attempts to reach a client that did not answer, or whose node was lost
_AGAIN_S = 5.0
# a message expires this many seconds after its exchange ends
_GRACE_S = 60.0
ANSWERED, AGAIN = "answered", "again"


class Node(NamedTuple):
    """Connected node.

    client: name of its client.
    active_since: time of its connection as text; it changes once the node has been away.
    """

    client: str
    active_since: str


@dataclass(frozen=True)
class NodeReply:
    """Reply of a node to a message.

    outcomes: of each request, "answered", "again" (busy, or no client was there) or `no KIND check`.
    answers: of each request; b"" where none is due, or none was given.
    """

    outcomes: tuple[str, ...] = ()
    answers: tuple[bytes, ...] = ()


class MessageCarrier(Protocol):
    """Carrier of messages: Flower's Grid, or a substitute."""

    def nodes(self) -> Mapping[int, Node]:
        """Return the connected nodes by id."""
        ...

    def send(self, node: int, requests: Sequence[bytes], keep_s: float) -> str:
        """Send the requests to a node in one message, and return its id; keep_s: seconds until it expires."""
        ...

    def collect(self, ids: Sequence[str]) -> Iterator[tuple[str, NodeReply | None]]:
        """Yield the replies that have arrived, by message id; None if the message was lost. Does not wait."""
        ...


class _Request(NamedTuple):
    """Request with the digest that identifies it, so that a large one is hashed once."""

    digest: str
    content: bytes

    @classmethod
    def of(cls, content: bytes) -> _Request:
        return cls(hashlib.sha256(content).hexdigest(), content)


@dataclass
class _Letter:
    """Message under way to a node.

    active_since: the node's `active_since` when it was sent.
    """

    client: str
    node: int
    active_since: str
    requests: tuple[_Request, ...]


@dataclass
class FlowerTransport:
    """Transport over a MessageCarrier.

    said_no: `CLIENT KIND check` -> how often a client refused.
    lost: number of messages whose node vanished, or whose client was busy or not there.
    away: clients of the last exchange without a connected node.
    """

    post: MessageCarrier
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    said_no: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    away: set[str] = field(default_factory=set)
    _nodes: dict[str, set[int]] = field(default_factory=dict)
    _pending: dict[str, _Request] = field(default_factory=dict)
    _outbox: _Outbox = field(default_factory=lambda: _Outbox())

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
        """Send each request to its client's nodes; yield answers as they come, for `wait_s` seconds.

        If wait_s is 0 or less, the requests are held until the next exchange or `deliver`.
        """
        by_client = {name: _Request.of(request) for name, request in requests.items()}
        if wait_s <= 0:
            self._pending = by_client
            return
        deadline = self.clock() + wait_s
        while True:
            self._send(
                {name: (*self._due(name), request) for name, request in by_client.items()}, deadline - self.clock()
            )
            self._collect()
            while self._outbox.arrived:
                yield self._outbox.arrived.popleft()
            if (left_s := deadline - self.clock()) <= 0:
                return
            self.sleep(min(_POLL_S, left_s))

    def deliver(self, wait_s: float) -> None:
        """Send the held requests, and wait until they have arrived, or for `wait_s` seconds."""
        deadline = self.clock() + wait_s
        while (
            due := {name: self._due(name) for name in self._pending if self._due(name)}
        ) and self.clock() < deadline:
            self._send(due, deadline - self.clock())
            self._collect()
            self.sleep(_POLL_S)

    def _due(self, name: str) -> tuple[_Request, ...]:
        pending = self._pending.get(name)
        is_settled = pending is not None and any(
            (node, pending.digest) in self._outbox.settled for node in self._of(name)
        )
        return () if pending is None or is_settled else (pending,)

    def _of(self, name: str) -> set[int]:
        return self._nodes.get(name, set())

    def _send(self, letters: Mapping[str, tuple[_Request, ...]], left_s: float) -> None:
        nodes = self.post.nodes()
        for node, info in nodes.items():
            self._nodes.setdefault(info.client, set()).add(node)
        self.away = letters.keys() - {info.client for info in nodes.values()}
        for name, requests in letters.items():
            for node in self._of(name) & nodes.keys():
                if self._outbox.needs(node, nodes[node].active_since, requests, self.clock()):
                    number = self.post.send(
                        node, [request.content for request in requests], max(left_s, 0.0) + _GRACE_S
                    )
                    self._outbox.letters[number] = _Letter(name, node, nodes[node].active_since, requests)

    def _collect(self) -> None:
        for number, reply in self.post.collect(tuple(self._outbox.letters)):
            self._take(self._outbox.letters.pop(number), reply or NodeReply())

    def _take(self, letter: _Letter, reply: NodeReply) -> None:
        """Handle the outcome of each request of a message."""
        to_retry = []
        for index, request in enumerate(letter.requests):
            outcome = reply.outcomes[index] if index < len(reply.outcomes) else AGAIN
            if outcome == AGAIN:
                to_retry.append(request)
                continue
            self._outbox.settled.add((letter.node, request.digest))
            if outcome != ANSWERED:
                self.said_no[f"{letter.client} {outcome.removeprefix('no ')}"] += 1
            elif index < len(reply.answers) and reply.answers[index]:
                self._outbox.arrived.append(reply.answers[index])
        if to_retry:
            self.lost += 1
            self._outbox.wait(letter.node, to_retry, self.clock() + _AGAIN_S)


@dataclass
class _Outbox:
    """Messages under way, answers that arrived, and requests that must wait.

    letters: message id -> message under way.
    settled: (node, digest of a request) that was answered or refused.
    not_before: (node, digest of a request) -> time of the next attempt.
    """

    letters: dict[str, _Letter] = field(default_factory=dict)
    arrived: deque[bytes] = field(default_factory=deque)
    settled: set[tuple[int, str]] = field(default_factory=set)
    not_before: dict[tuple[int, str], float] = field(default_factory=dict)

    def needs(self, node: int, active_since: str, requests: tuple[_Request, ...], now: float) -> bool:
        """Return whether the node lacks one of the requests.

        What it was sent before it was away counts as lost.
        """
        under_way = {
            request.digest
            for letter in self.letters.values()
            if (letter.node, letter.active_since) == (node, active_since)
            for request in letter.requests
        }
        return any(
            request.digest not in under_way
            and (node, request.digest) not in self.settled
            and self.not_before.get((node, request.digest), now) <= now
            for request in requests
        )

    def wait(self, node: int, requests: Sequence[_Request], until: float) -> None:
        """Delay the next attempt of these requests until a time."""
        for request in requests:
            self.not_before[node, request.digest] = until
