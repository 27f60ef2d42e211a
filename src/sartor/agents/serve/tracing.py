"""Traces by OpenTelemetry, where `http.otel` names who takes them: one span a request, with tokens and times, no content."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers

from sartor.agents.serve.entry import Entry
from sartor.core.errors import need

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Tracer:
    """Makes spans, or nothing when `endpoint` is empty. Raises ExtraError when OpenTelemetry is not installed."""

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
            raise need("opentelemetry", "otel") from None
        # atexit would wait for an endpoint that is gone; `close` does, within its bound
        self._provider = TracerProvider(resource=Resource.create({"service.name": "sartor"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("sartor.serve")

    @contextmanager
    def span(self, entry: Entry, headers: Headers) -> Iterator[None]:
        """The time of one request, as a child of the caller's span where it names one."""
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
            span.update_name(f"{_OPERATIONS.get(entry.route, entry.method)} {entry.agent or entry.route}")
            span.set_attributes(attributes(entry))
            span.end()

    def close(self) -> None:
        """Send what waits."""
        if self._provider is not None:
            self._provider.shutdown()


def attributes(entry: Entry) -> dict[str, Any]:
    """What a span says, in the names of OpenTelemetry's conventions for HTTP and generative models."""
    said: dict[str, Any] = {
        "http.request.method": entry.method,
        "http.route": entry.route,
        "http.response.status_code": entry.status,
        "sartor.request": entry.id,
        "error.type": entry.error,
    }
    if entry.route in _OPERATIONS:
        said |= {
            "gen_ai.operation.name": _OPERATIONS[entry.route],
            "gen_ai.provider.name": "sartor",
            "gen_ai.response.model": entry.agent,
            "gen_ai.response.finish_reasons": (entry.finish,) if entry.finish else "",
            "gen_ai.usage.input_tokens": entry.usage.prompt,
            "gen_ai.usage.output_tokens": entry.usage.reply,
        }
    if entry.first_s is not None:
        said["gen_ai.server.time_to_first_token"] = entry.first_s
    return {name: value for name, value in said.items() if value != ""}
