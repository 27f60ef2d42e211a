"""Bulkheads: each agent has its own bounded queue, and no agent holds every row, so a flood of one drowns nobody else."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from sartor.agents.live import LiveCall
from sartor.core.errors import BusyError

_RESERVED_OF = 8  # one row in so many is kept for other agents
_LEAST_RESERVING_ROWS = 4  # fewer rows are too few to keep one
_OLD = 0.9  # weight of the past in the mean time that a call takes


class Bulkhead:
    """Who waits for which agent, and how many calls each has."""

    def __init__(self, per_agent: int) -> None:
        self._per_agent = per_agent
        self._waiting: dict[str, deque[LiveCall]] = {}
        self._alone: list[LiveCall] = []
        self._mean_s: dict[str, float] = {}
        self.inside: Counter[str] = Counter()

    def enter(self, agent: str, rows: int) -> None:
        """Count a call in. Raises BusyError when the agent has as many as it may; `rows` answer side by side."""
        inside = self.inside[agent]
        if inside >= self._per_agent:
            wait_s = max(1.0, self._mean_s.get(agent, 1.0) * inside / max(1, rows))
            raise BusyError(
                f"{agent} has {inside} requests, and may have {self._per_agent} at once",
                f"ask again in {wait_s:.0f} s, or raise limits.per_agent",
                wait_s,
            )
        self.inside[agent] += 1

    def leave(self, agent: str, took_s: float) -> None:
        """Count a call out, which was inside for so long."""
        self.inside[agent] -= 1
        if not self.inside[agent]:
            del self.inside[agent]
        self._mean_s[agent] = _OLD * self._mean_s.get(agent, took_s) + (1 - _OLD) * took_s

    def put(self, live: LiveCall) -> None:
        """Let a call wait, in the order in which calls came, among its agent's or, suspected, among those to be made alone."""
        if live.is_suspect:
            self._alone.append(live)
            return
        queue = self._waiting.setdefault(live.agent, deque())
        place = len(queue)
        while place and queue[place - 1].number > live.number:
            place -= 1
        queue.insert(place, live)

    def drop(self, live: LiveCall) -> None:
        """Take a call out of where it waits, if it waits."""
        if live in self._alone:
            self._alone.remove(live)
        queue = self._waiting.get(live.agent)
        if queue is None:
            return
        if live in queue:
            queue.remove(live)
        if not queue:
            del self._waiting[live.agent]

    def in_turn(self, held: Counter[str]) -> list[LiveCall]:
        """The first call of each agent: the agent that holds fewest rows first, then the call that waits longest."""
        return sorted((queue[0] for queue in self._waiting.values()), key=lambda live: (held[live.agent], live.number))

    def suspects(self, watched: Counter[str]) -> list[LiveCall]:
        """Calls to be made alone; those of agents that nothing is known against first."""
        return sorted(self._alone, key=lambda live: (watched[live.agent] > 0, live.number))

    def waiting(self) -> Iterator[LiveCall]:
        """All that wait."""
        for queue in list(self._waiting.values()):
            yield from list(queue)
        yield from list(self._alone)

    def health(self, agent: str) -> dict[str, int]:
        """How many calls of an agent wait, and how many workers make."""
        queued = len(self._waiting.get(agent, ())) + sum(live.agent == agent for live in self._alone)
        return {"queued": queued, "live": self.inside[agent] - queued}

    def any_waits(self) -> bool:
        """Whether a call waits that is not suspected."""
        return bool(self._waiting)


def most_rows(rows: int) -> int:
    """How many of `rows` one agent may hold."""
    return rows if rows < _LEAST_RESERVING_ROWS else rows - max(1, rows // _RESERVED_OF)
