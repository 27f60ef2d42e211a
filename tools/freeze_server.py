"""`sartor serve` with what freezing needs to see: all routes, metrics, tracers and spans, and each error as a status.

    python tools/freeze_server.py TEAM.yaml --port 0 --json

Only other packages are patched (FastAPI, prometheus_client, OpenTelemetry), before Sartor is imported, so that it does
not matter where Sartor keeps its parts. The routes `/freeze/seen` and `/freeze/error/KIND` are added to the
application.
"""

from __future__ import annotations

import inspect
import runpy
import sys
from typing import Any

SEEN: dict[str, Any] = {"metrics": {}, "tracers": [], "spans": [], "routes": []}
# what an error's constructor may ask for beside the problem and the remedy
ARGUMENTS = {"retry_after_s": 3.0, "number": 2}


def watch_application() -> None:
    """Add two routes to each application that FastAPI makes."""
    from fastapi import FastAPI

    original = FastAPI.__init__

    def watched(self: FastAPI, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.add_api_route("/freeze/seen", lambda: SEEN, include_in_schema=False)
        self.add_api_route("/freeze/error/{kind}", raise_error, include_in_schema=False)

    FastAPI.__init__ = watched  # type: ignore[method-assign]


def watch_routes() -> None:
    """Note path and methods of every route, those outside the OpenAPI too."""
    from fastapi.routing import APIRoute

    original = APIRoute.__init__

    def noted(self: APIRoute, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        routes = {f"{method} {self.path}" for method in self.methods if not self.path.startswith("/freeze/")}
        SEEN["routes"] = sorted({*SEEN["routes"], *routes})

    APIRoute.__init__ = noted  # type: ignore[method-assign]


async def raise_error(kind: str) -> None:
    """Raise an error of that kind: of the public tree, or `Bug`."""
    import sartor

    tree = vars(sys.modules[sartor.SartorError.__module__])
    if kind not in tree:
        raise ZeroDivisionError(kind)
    parameters = inspect.signature(tree[kind]).parameters
    raise tree[kind](**{name: ARGUMENTS.get(name, name) for name in parameters})


def watch_metrics() -> None:
    """Note name, type and labels of each metric, whether it has a value yet or not."""
    from prometheus_client import metrics, metrics_core

    original = metrics.MetricWrapperBase.__init__

    def counted(
        self: Any, name: str, documentation: str, labelnames: Any = (), *arguments: Any, **options: Any
    ) -> None:
        seen = {"type": self._type, "labels": list(labelnames)}
        if buckets := options.get("buckets"):
            seen["buckets"] = list(buckets)
        SEEN["metrics"][name] = seen
        original(self, name, documentation, labelnames, *arguments, **options)

    metrics.MetricWrapperBase.__init__ = counted  # type: ignore[method-assign]
    for family, kind in ((metrics_core.GaugeMetricFamily, "gauge"), (metrics_core.CounterMetricFamily, "counter")):
        watch_family(family, kind)


def watch_family(family: Any, kind: str) -> None:
    """Note the metrics that are made anew for each scrape."""
    original = family.__init__

    def counted(self: Any, name: str, documentation: str, *arguments: Any, labels: Any = (), **options: Any) -> None:
        SEEN["metrics"][name] = {"type": kind, "labels": list(labels)}
        original(self, name, documentation, *arguments, labels=labels or None, **options)

    family.__init__ = counted


def watch_traces() -> None:
    """Note names of tracers, and name and attributes of spans, which are not sent."""
    from opentelemetry.sdk.trace import TracerProvider, export

    original = TracerProvider.get_tracer

    def named(self: Any, name: str, *arguments: Any, **options: Any) -> Any:
        SEEN["tracers"].append(name)
        return original(self, name, *arguments, **options)

    TracerProvider.get_tracer = named  # type: ignore[method-assign]

    def ended(self: Any, span: Any) -> None:
        attributes = {
            name: "int" if isinstance(value, int) else type(value).__name__
            for name, value in (span.attributes or {}).items()
        }
        SEEN["spans"].append({"name": span.name, "kind": span.kind.name, "attributes": attributes})

    export.BatchSpanProcessor.on_end = ended  # type: ignore[method-assign]


def main() -> None:
    """Patch, then serve."""
    for watch in (watch_routes, watch_application, watch_metrics, watch_traces):
        watch()
    sys.argv = ["sartor", "serve", *sys.argv[1:]]
    runpy.run_module("sartor", run_name="__main__")


if __name__ == "__main__":
    main()
