"""Transport protocol, its message loop, and the transport within one process.

A transport need not be trusted: messages are signed, and what is lost is sent again. It need not be fast: a request
that waited is answered late, which costs that client the stage and nobody else anything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sartor.core.errors import InputError, RefusedError, SartorError
from sartor.federate.rounds.round_client import RoundClient
from sartor.federate.rounds.round_coordinator import Coordinator, RoundPlan, RoundResult

# between two tries where a transport returns before its time
_POLL_S = 0.05


class Transport(Protocol):
    """Brings requests to clients, and their answers back."""

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterable[bytes]:
        """Send each request to the client of its name; give answers as they come, also to requests of before, for
        `wait_s`.

        The loop may stop asking for more at any time. A client that does not answer, or says no, is left out.
        """
        ...


@dataclass
class TransferStats:
    """Bytes and messages of a run, and the answers that did not count, by the kind of error."""

    sent_bytes: int = 0
    received_bytes: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def finish(coordinator: Coordinator, transport: Transport, stats: TransferStats | None = None) -> RoundResult | None:
    """Bring the open round to its end, and tell the clients. None where no round is open; they are told of the last
    one.
    """
    stats = stats or TransferStats()
    while coordinator.is_open:
        requests, n_answers = coordinator.requests(), 0
        stats.sent_bytes += sum(map(len, requests.values()))
        for answer in transport.exchange(requests, coordinator.left_s()):
            stats.received_bytes += len(answer)
            n_answers += _take_answer(coordinator, answer, stats)
            if not coordinator.missing:
                break
        coordinator.advance()
        if coordinator.is_open and not n_answers:
            time.sleep(min(_POLL_S, coordinator.left_s()))
    for _ in transport.exchange(coordinator.outcomes(), 0.0):
        pass
    return coordinator.last


def run_round(
    coordinator: Coordinator, transport: Transport, plan: RoundPlan, stats: TransferStats | None = None
) -> RoundResult:
    """Begin a round by the plan, and bring it to its end."""
    coordinator.begin(plan)
    result = finish(coordinator, transport, stats)
    assert result
    return result


def _take_answer(coordinator: Coordinator, answer: bytes, stats: TransferStats) -> bool:
    try:
        return coordinator.take(answer)
    except (InputError, RefusedError) as error:
        stats.refused[error.kind] += 1
        return False


@dataclass
class InProcess:
    """Clients of this process: for tests, and for simulations of thousands. offline: whose requests wait until they
    are back.

    said_no: the last error of each client that refused.
    """

    clients: Mapping[str, RoundClient]
    offline: set[str] = field(default_factory=set)
    said_no: dict[str, SartorError] = field(default_factory=dict)
    _waiting: dict[str, list[bytes]] = field(default_factory=dict)

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
        """See Transport."""
        for name, request in requests.items():
            queue = self._waiting.setdefault(name, [])
            if request not in queue:
                queue.append(request)
        for name, queue in list(self._waiting.items()):
            while queue and name not in self.offline:
                if answer := self._answer(name, queue.pop(0)):
                    yield answer

    def _answer(self, name: str, request: bytes) -> bytes:
        try:
            return self.clients[name].answer(request)
        except SartorError as error:
            self.said_no[name] = error
            return b""
