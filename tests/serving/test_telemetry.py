"""Traces hold names, numbers and times: no content, and a span for each request under the caller's own."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import serving
from sartor.core.errors import ExtraError
from sartor.serving.http import telemetry
from sartor.serving.http.request_log import RequestLog, ServerLines
from sartor.serving.http.telemetry import Tracer
from serving import chat

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *bodies: Any) -> list[Any]:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr("sartor.serving.http.server.Tracer", lambda endpoint: Tracer(endpoint, exporter))

    async with serving.client(serving.house(), serving.team(tmp_path), traceparent=PARENT) as client:
        for body in bodies:
            await client.post("/v1/chat/completions", json=body)
    return list(exporter.get_finished_spans())


async def test_a_request_is_a_span_without_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reply, refused = await spans(
        tmp_path, monkeypatch, chat("my secret", stream=True), chat("my secret", model="nobody")
    )
    assert reply.name == "chat faq@1.0"
    assert f"{reply.parent.span_id:016x}" == "b7ad6b7169203331"
    said = dict(reply.attributes)
    assert said["gen_ai.response.model"] == "faq@1.0"
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (7, 4)
    assert said["gen_ai.response.finish_reasons"] == ("stop",)
    assert said["http.response.status_code"] == 200
    assert said["gen_ai.server.time_to_first_token"] > 0
    assert dict(refused.attributes)["error.type"] == "UnknownAgentError"
    assert "secret" not in json.dumps([span.to_json() for span in (reply, refused)])


def test_tracer_without_endpoint_needs_no_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an endpoint and without the package, ExtraError names it."""
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.setitem(sys.modules, name, None)
    Tracer("").close()
    with pytest.raises(ExtraError, match="opentelemetry"):
        telemetry.Tracer("http://localhost:4318/v1/traces")


def test_server_lines_log_no_values() -> None:
    """Records of uvicorn are logged by format and error type; records of Sartor keep their values."""
    log = serving.Log()
    journal = RequestLog(log)
    lines = ServerLines(journal)
    try:
        raise ValueError("my secret")
    except ValueError:
        lines.emit(
            logging.LogRecord("uvicorn.error", logging.ERROR, "", 1, "Exception in %s", ("secret",), sys.exc_info())
        )
    lines.emit(logging.LogRecord("sartor.serving.workers.worker_pool", logging.ERROR, "", 1, "%s workers", (3,), None))
    journal.close()
    line, own = log.lines
    assert own["problem"] == "3 workers"
    assert (line["event"], line["error"], line["problem"]) == ("server", "ValueError", "Exception in %s")
    assert "secret" not in json.dumps(line)


def test_lines_that_nobody_takes_are_counted() -> None:
    class Gone(serving.Log):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    journal = RequestLog(Gone())
    for _ in range(3):
        journal.say("ready")
    journal.close()
    assert journal.lost == 3
