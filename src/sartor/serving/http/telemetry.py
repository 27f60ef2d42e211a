"""The numbers of /metrics. Labels hold routes, exact versions and states: nothing that a client makes up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sartor.agents.serve.entry import Entry
from sartor.agents.serve.seams import House
from sartor.core.records import Feedback

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Meters:
    """What is counted as requests end, and what is asked of the house when somebody looks."""

    def __init__(self, house: House, connections: Callable[[], int], lines_lost: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "requests that ended", "route", "agent", "status")
        self._errors = self._counter("errors", "requests that ended with an error, by its kind", "route", "agent", "kind")
        self._tokens = self._counter("tokens", "tokens of prompts, of them cached, and of replies", "agent", "kind")
        self._wall = self._histogram("request_seconds", "from a request's head to the end of its answer", "route", "agent")
        self._first = self._histogram("first_token_seconds", "from a request's head to its reply's first text", "agent")
        self._feedback = self._counter("feedback", "what people said of replies", "agent", "kind")
        self._masked = self._counter("feedback_masked", "values of personal data masked in what people said", "kind")
        self._registry.register(_State(house, connections, lines_lost))

    def count(self, entry: Entry) -> None:
        """A request that is over."""
        self._requests.labels(entry.route, entry.agent, entry.status).inc()
        self._wall.labels(entry.route, entry.agent).observe(entry.elapsed_s)
        if entry.error:
            self._errors.labels(entry.route, entry.agent, entry.error).inc()
        if entry.first_s is not None:
            self._first.labels(entry.agent).observe(entry.first_s)
        usage = entry.usage
        for kind, tokens in (("prompt", usage.prompt), ("cached", usage.cached), ("reply", usage.reply)):
            if tokens:
                self._tokens.labels(entry.agent, kind).inc(tokens)

    def hear(self, said: Feedback, kept: Feedback) -> None:
        """Feedback as it came, and as it was written: `withheld` counts words that were not kept for want of consent."""
        kinds = {"rating": said.rating is not None, "correction": said.correction, "comment": said.comment}
        kinds["withheld"] = (said.has_words or said.correction or said.comment) and kept.by.consent == "refused"
        for kind, is_so in kinds.items():
            if is_so:
                self._feedback.labels(said.agent, kind).inc()
        for entity, count in kept.masked.items():
            self._masked.labels(entity).inc(count)

    def page(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sartor_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"sartor_{name}", text, labels, buckets=SECONDS, registry=self._registry)


class _State(Collector):
    """What the house is like now."""

    def __init__(self, house: House, connections: Callable[[], int], lines_lost: Callable[[], int]) -> None:
        self._house = house
        self._connections = connections
        self._lines_lost = lines_lost

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        health = self._house.crew.health()
        yield from _workers(health["workers"])
        yield from _agents(health["agents"])
        yield GaugeMetricFamily("sartor_connections", "open connections", value=self._connections())
        yield CounterMetricFamily(
            "sartor_receipts_lost", "receipts that could not be written", value=self._house.receipts_lost()
        )
        yield CounterMetricFamily("sartor_log_lines_lost", "log lines that nobody took", value=self._lines_lost())


def _workers(workers: Any) -> Iterator[Metric]:
    states = GaugeMetricFamily("sartor_workers", "worker processes by state", labels=["state"])
    memory = GaugeMetricFamily("sartor_worker_memory_bytes", "resident memory", labels=["worker"])
    restarts = CounterMetricFamily("sartor_worker_restarts", "restarts of a worker's place", labels=["worker"])
    counted: dict[str, int] = {}
    for place, worker in enumerate(workers):
        counted[worker["state"]] = counted.get(worker["state"], 0) + 1
        memory.add_metric([str(place)], worker["memory_bytes"])
        restarts.add_metric([str(place)], worker["restarts"])
    for state, count in counted.items():
        states.add_metric([state], count)
    yield from (states, memory, restarts)


def _agents(agents: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    breakers = GaugeMetricFamily("sartor_breaker", "1 for the state that an agent's breaker is in", labels=["agent", "state"])
    queued = GaugeMetricFamily("sartor_queued", "requests that wait", labels=["agent"])
    live = GaugeMetricFamily("sartor_live", "requests that are answered", labels=["agent"])
    for name, agent in agents.items():
        breakers.add_metric([name, agent["breaker"]], 1)
        queued.add_metric([name], agent["queued"])
        live.add_metric([name], agent["live"])
    yield from (breakers, queued, live)
