"""Transport protocol, its message loop, and the transport within one process.

A transport need not be trusted: messages are signed, and lost ones are sent again. It need not be fast: a late answer
costs that client the stage, and nobody else anything.
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

# seconds between two exchanges if a transport returns early
_POLL_S = 0.05


class Transport(Protocol):
    """Carrier of requests to clients and of their answers."""

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterable[bytes]:
        """Send each request to the client of its name; yield answers as they come, for `wait_s` seconds.

        Answers to earlier requests are yielded too. The caller may stop iterating at any time. A client that does not
        answer, or refuses, is left out.
        """
        ...


@dataclass
class TransferStats:
    """Bytes of a run, and its rejected answers by the kind of error."""

    sent_bytes: int = 0
    received_bytes: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def finish(coordinator: Coordinator, transport: Transport, stats: TransferStats | None = None) -> RoundResult | None:
    """Run the open round to its end, tell the clients, and return the last result.

    Without an open round the clients are told of the last one. None if there was no round in this process.
    """
    stats = stats or TransferStats()
    while coordinator.is_open:
        requests, n_answers = coordinator.requests(), 0
        stats.sent_bytes += sum(map(len, requests.values()))
        for answer in transport.exchange(requests, coordinator.left_s()):
            stats.received_bytes += len(answer)
            try:
                n_answers += coordinator.take(answer)
            except (InputError, RefusedError) as error:
                stats.refused[error.kind] += 1
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
    """Run one round by the plan, from its beginning to its end."""
    coordinator.begin(plan)
    result = finish(coordinator, transport, stats)
    assert result
    return result


@dataclass
class InProcess:
    """Transport to clients of this process, for tests and for simulations of thousands.

    offline: clients whose requests wait until they are back.
    said_no: the last error of each client that refused.
    """

    clients: Mapping[str, RoundClient]
    offline: set[str] = field(default_factory=set)
    said_no: dict[str, SartorError] = field(default_factory=dict)
    _waiting: dict[str, list[bytes]] = field(default_factory=dict)

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
        """Send each request to its client in this process; yield answers of the clients that are online."""
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
