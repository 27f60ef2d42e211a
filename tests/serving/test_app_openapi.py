"""The OpenAPI is true: requests made from it, fitting and not, never find a 5xx, an undeclared status or another form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving
from sartor.serving.http.request_log import RequestLog
from sartor.serving.http.server import HttpServer
from sartor.serving.http.speech_service import SpeechService
from sartor.serving.team_config import SpeechOptions

# What a request may ask for is known at run time alone: without it nearly all are 404, and little is tried
KNOWN = {
    "model": ["base", "auto", "faq", "faq@1.0", "speech"],
    "voice": ["default", "espeak:de"],
    "receipt": ["r1", "chatcmpl-r2", "none"],
}
NAMES = ["faq", "home", "nobody"]
# Requests that fit their schema may be refused for what no schema says: control characters, two fields that exclude each other
LEFT_OUT = "positive_data_acceptance"
EXAMPLES = 25


def narrowed(openapi: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI with the names that this server has."""
    for schema in openapi["components"]["schemas"].values():
        for name, known in KNOWN.items():
            if schema.get("properties", {}).get(name, {}).get("type") == "string" and "Request" in schema["title"]:
                schema["properties"][name] = {"type": "string", "enum": known}
    for operations in openapi["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = {"type": "string", "enum": KNOWN.get(parameter["name"], NAMES)}
    return openapi


@pytest.mark.services
def test_every_route_keeps_to_the_openapi(tmp_path: Path) -> None:
    log, program = serving.Log(), Path(sys.executable).parent / "schemathesis"
    replies = serving.Replies()
    house = serving.house(keys=serving.KEYS, replies=replies, speech=SpeechService(SpeechOptions()))
    server = HttpServer(house, serving.team(tmp_path / "state"), log=RequestLog(log))
    with serving.running(server) as url:
        (tmp_path / "openapi.json").write_text(
            json.dumps(narrowed(httpx.get(f"{url}/openapi.json", timeout=300).json()))
        )
        command = [program, "run", "openapi.json", "--url", url, "-H", "Authorization: Bearer key-both", "--no-color"]
        settings = [
            "--phases",
            "fuzzing",
            "-n",
            str(EXAMPLES),
            "--seed",
            "1",
            "--request-timeout",
            "120",
            "--exclude-checks",
            LEFT_OUT,
        ]
        done = subprocess.run([*command, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(replies.asked) > EXAMPLES // 2, "hardly any request was answered"
    assert [line for line in log.lines if line["event"] == "bug"] == []
    tried = {line["route"] for line in log.lines if line["event"] == "request"}
    assert {"/v1/chat/completions", "/v1/feedback", "/v1/agents/{name}/promote", "/v1/audio/speech"} <= tried


def test_the_openapi_declares_every_status_that_is_answered(tmp_path: Path) -> None:
    server = HttpServer(serving.house(), serving.team(tmp_path), log=RequestLog(serving.Log()))
    openapi = server.app.openapi()
    server.close()
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            assert {"200", "400", "401", "403", "404", "429", "503", "504"} <= set(operation["responses"]), (
                method,
                path,
            )
            assert ("409" in operation["responses"]) == path.startswith("/v1/agents")
    chat = openapi["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False
    assert chat["required"] == ["model", "messages"] or set(chat["required"]) == {"model", "messages"}
    assert chat["properties"]["max_completion_tokens"]["anyOf"][0]["minimum"] == 1
    assert "HTTPValidationError" not in openapi["components"]["schemas"]
