"""Prometheus metrics and OpenTelemetry spans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers

from sartor.core.errors import missing_package
from sartor.core.records import Feedback
from sartor.serving.http.request_log import RequestRecord
from sartor.serving.http.services import Services

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Prometheus metrics: counters of requests that ended, and the state of the services when they are scraped."""

    def __init__(self, services: Services, connections: Callable[[], int], lines_lost: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "requests that ended", "route", "agent", "status")
        self._errors = self._counter(
            "errors", "requests that ended with an error, by its kind", "route", "agent", "kind"
        )
        self._tokens = self._counter("tokens", "tokens of prompts, of them cached, and of replies", "agent", "kind")
        self._wall = self._histogram(
            "request_seconds", "from a request's head to the end of its answer", "route", "agent"
        )
        self._first = self._histogram(
            "first_token_seconds", "from a request's head to its reply's first text", "agent"
        )
        self._feedback = self._counter("feedback", "what people said of replies", "agent", "kind")
        self._masked = self._counter("feedback_masked", "values of personal data masked in what people said", "kind")
        self._registry.register(_StateCollector(services, connections, lines_lost))

    def count(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.route, record.agent, record.status).inc()
        self._wall.labels(record.route, record.agent).observe(record.elapsed_s)
        if record.error:
            self._errors.labels(record.route, record.agent, record.error).inc()
        if record.first_s is not None:
            self._first.labels(record.agent).observe(record.first_s)
        usage = record.usage
        for kind, tokens in (("prompt", usage.prompt), ("cached", usage.cached), ("reply", usage.reply)):
            if tokens:
                self._tokens.labels(record.agent, kind).inc(tokens)

    def count_feedback(self, submitted: Feedback, stored: Feedback) -> None:
        """Count feedback as submitted and as stored.

        `withheld` counts feedback whose words were not stored for lack of consent.
        """
        kinds = {
            "rating": submitted.rating is not None,
            "correction": submitted.correction,
            "comment": submitted.comment,
        }
        had_words = submitted.has_words or submitted.correction or submitted.comment
        kinds["withheld"] = had_words and stored.by.consent == "refused"
        for kind, is_present in kinds.items():
            if is_present:
                self._feedback.labels(submitted.agent, kind).inc()
        for entity, count in stored.masked.items():
            self._masked.labels(entity).inc(count)

    def page(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sartor_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"sartor_{name}", text, labels, buckets=SECONDS, registry=self._registry)


class _StateCollector(Collector):
    """Prometheus collector of the current state of the services."""

    def __init__(self, services: Services, connections: Callable[[], int], lines_lost: Callable[[], int]) -> None:
        self._services = services
        self._connections = connections
        self._lines_lost = lines_lost

    def collect(self) -> Iterator[Metric]:
        """Yield gauges and counters of workers, agents, connections, lost receipts and lost log lines."""
        health = self._services.workers.health()
        yield from _workers(health["workers"])
        yield from _agents(health["agents"])
        yield _frozen(self._services.frozen_rollouts())
        yield GaugeMetricFamily("sartor_connections", "open connections", value=self._connections())
        yield CounterMetricFamily(
            "sartor_receipts_lost", "receipts that could not be written", value=self._services.receipts_lost()
        )
        yield CounterMetricFamily("sartor_log_lines_lost", "log lines that nobody took", value=self._lines_lost())


def _frozen(versions: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(
        "sartor_rollout_frozen", "trials and watches that wait for an admin", labels=["agent", "version"]
    )
    for agent, version in versions.items():
        family.add_metric([agent, version], 1)
    return family


def _workers(workers: Any) -> Iterator[Metric]:
    states = GaugeMetricFamily("sartor_workers", "worker processes by state", labels=["state"])
    memory = GaugeMetricFamily("sartor_worker_memory_bytes", "resident memory", labels=["worker"])
    restarts = CounterMetricFamily("sartor_worker_restarts", "restarts of a worker's place", labels=["worker"])
    counts: dict[str, int] = {}
    for index, worker in enumerate(workers):
        counts[worker["state"]] = counts.get(worker["state"], 0) + 1
        memory.add_metric([str(index)], worker["memory_bytes"])
        restarts.add_metric([str(index)], worker["restarts"])
    for state, count in counts.items():
        states.add_metric([state], count)
    yield from (states, memory, restarts)


def _agents(agents: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    breakers = GaugeMetricFamily(
        "sartor_breaker", "1 for the state that an agent's breaker is in", labels=["agent", "state"]
    )
    queued = GaugeMetricFamily("sartor_queued", "requests that wait", labels=["agent"])
    live = GaugeMetricFamily("sartor_live", "requests that are answered", labels=["agent"])
    for name, agent in agents.items():
        breakers.add_metric([name, agent["breaker"]], 1)
        queued.add_metric([name], agent["queued"])
        live.add_metric([name], agent["live"])
    yield from (breakers, queued, live)


_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Tracer:
    """OpenTelemetry tracer; it does nothing if `endpoint` is empty.

    Raises ExtraError if OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if endpoint or exporter:
            self._open(endpoint, exporter)

    def _open(self, endpoint: str, exporter: Any) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise missing_package("opentelemetry", "otel") from None
        # An atexit hook would wait for an unreachable endpoint. `close` shuts down instead, within its time limit.
        self._provider = TracerProvider(resource=Resource.create({"service.name": "sartor"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("sartor.serve")

    @contextmanager
    def span(self, record: RequestRecord, headers: Headers) -> Iterator[None]:
        """Record one request as a span, a child of the caller's span if the header `traceparent` names one."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": headers.get("traceparent", "")})
        span = self._tracer.start_span("request", context=parent, kind=SpanKind.SERVER)
        try:
            yield
        finally:
            span.update_name(f"{_OPERATIONS.get(record.route, record.method)} {record.agent or record.route}")
            span.set_attributes(attributes(record))
            span.end()

    def close(self) -> None:
        """Send the waiting spans and shut down."""
        if self._provider is not None:
            self._provider.shutdown()


def attributes(record: RequestRecord) -> dict[str, Any]:
    """Return the attributes of a span, named by OpenTelemetry's conventions for HTTP and generative AI."""
    fields: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "sartor.request": record.id,
        "error.type": record.error,
    }
    if record.route in _OPERATIONS:
        fields |= {
            "gen_ai.operation.name": _OPERATIONS[record.route],
            "gen_ai.provider.name": "sartor",
            "gen_ai.response.model": record.agent,
            "gen_ai.response.finish_reasons": (record.finish,) if record.finish else "",
            "gen_ai.usage.input_tokens": record.usage.prompt,
            "gen_ai.usage.output_tokens": record.usage.reply,
        }
    if record.first_s is not None:
        fields["gen_ai.server.time_to_first_token"] = record.first_s
    return {name: value for name, value in fields.items() if value != ""}
