"""What `sartor serve` shows of itself: routes, schemas, statuses, headers, metrics, spans, tools of MCP.

A team of the frozen artefacts is served by another process (freeze_server.py) and asked over HTTP.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

import sartor
from freeze_runs import tree_facts, united
from freeze_surface import Facts, public_errors
from freeze_types import shape

AGENT, BASE = "lights", "sartor-tests/tiny"
START_S = 120.0
# prose of an OpenAPI document, and names that come from components and functions
PROSE = {"title", "description", "summary", "operationId", "tags"}
TEAM = f"""
base: {BASE}
workers: {{count: 1, spare: 0}}
trust: signer/sartor.pub
state: .frozen
speech: {{voice: 'off'}}
router: {{encoder: tfidf}}
http: {{otel: 'http://127.0.0.1:9/v1/traces', cors: ['http://example.org']}}
limits: {{body_bytes: 20000}}
mcp: {{serve: true}}
a2a: {{card: true}}
agents:
  - {{name: {AGENT}, release: release-1.0, about: switches lights}}
plans:
  - {{name: checked, kind: sequence, steps: {{agent: {AGENT}, max_tokens: 8}}, check: [json]}}
"""
TOOL = {
    "type": "function",
    "function": {"name": "switch", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "state", "schema": {"enum": ["on", "off"]}}}
CHAT: dict[str, Any] = {
    "model": AGENT,
    "messages": [{"role": "user", "content": "switch hall on"}],
    "temperature": 0,
    "max_tokens": 6,
}
CALL = {"name": "ask", "arguments": {"prompt": "switch hall on", "agent": AGENT}}
JSON_AND_EVENTS = {"accept": "application/json, text/event-stream"}


def http_facts(root: Path) -> Facts:
    """Serve the artefacts in `root`, the working directory, and return every fact of this module."""
    (root / "frozen.yaml").write_text(TEAM, encoding="utf-8")
    keys = {
        "agent": sartor.make_key(root / "frozen.yaml", ["*"])["key"],
        "admin": sartor.make_key(root / "frozen.yaml", [], is_admin=True)["key"],
    }
    facts: Facts = {}
    with served(root) as client:
        client.headers["authorization"] = f"Bearer {keys['agent']}"
        document = client.get("/openapi.json").raise_for_status().json()
        facts |= dict(openapi_facts(document))
        for name, method, path, options in requests(keys):
            answer = client.request(method, path, **options)
            facts |= dict(answer_facts(f"answer {name}", answer))
            if name == "chat":
                receipt = answer.json()["id"].removeprefix("chatcmpl-")
                facts |= dict(answer_facts("answer receipt", client.get(f"/v1/receipts/{receipt}")))
                said = {"receipt": receipt, "rating": 1, "correction": "on:hall"}
                facts |= dict(answer_facts("answer feedback", client.post("/v1/feedback", json=said)))
        facts |= dict(error_statuses(client))
        facts |= dict(seen_facts(client.get("/freeze/seen").json()))
    return facts | united(tree_facts(Path(".frozen")))


@contextmanager
def served(root: Path) -> Iterator[httpx.Client]:
    """Serve the team; give a client of it."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("freeze_server.py")),
        "frozen.yaml",
        "--port",
        "0",
        "--json",
    ]
    with (
        (root / "server.log").open("w") as log,
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        assert server.stdout
        line = server.stdout.readline()
        if not line.startswith("{"):
            raise RuntimeError(f"the server did not start: {(root / 'server.log').read_text()[-4000:]}")
        try:
            with httpx.Client(base_url=json.loads(line)["address"], timeout=START_S) as client:
                yield client
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        finally:
            server.kill()


def requests(keys: Mapping[str, str]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (name, method, path, options) of what is asked, in order."""
    admin = {"authorization": f"Bearer {keys['admin']}"}
    agents = f"/v1/agents/{AGENT}"
    yield from (
        ("health", "GET", "/health", {}),
        ("models", "GET", "/v1/models", {}),
        ("model", "GET", f"/v1/models/{AGENT}", {}),
        ("model unknown", "GET", "/v1/models/nobody", {}),
        ("chat", "POST", "/v1/chat/completions", {"json": CHAT, "headers": {"origin": "http://example.org"}}),
        ("chat auto", "POST", "/v1/chat/completions", {"json": {**CHAT, "model": "auto"}}),
        ("chat plan", "POST", "/v1/chat/completions", {"json": {**CHAT, "model": "checked"}}),
        ("chat logprobs", "POST", "/v1/chat/completions", {"json": {**CHAT, "logprobs": True, "top_logprobs": 2}}),
        (
            "chat schema",
            "POST",
            "/v1/chat/completions",
            {"json": {**CHAT, "response_format": SCHEMA, "max_tokens": 40}},
        ),
        (
            "chat tool",
            "POST",
            "/v1/chat/completions",
            {"json": {**CHAT, "tools": [TOOL], "tool_choice": "required", "max_tokens": 200}},
        ),
        (
            "chat stream",
            "POST",
            "/v1/chat/completions",
            {"json": {**CHAT, "stream": True, "stream_options": {"include_usage": True}}},
        ),
        ("completion", "POST", "/v1/completions", {"json": {"model": AGENT, "prompt": "switch", "max_tokens": 4}}),
        (
            "completion stream",
            "POST",
            "/v1/completions",
            {"json": {"model": AGENT, "prompt": "switch", "max_tokens": 4, "stream": True}},
        ),
        ("embeddings", "POST", "/v1/embeddings", {"json": {"model": "base", "input": ["switch hall on"]}}),
        ("speech", "POST", "/v1/audio/speech", {"json": {"model": "speech", "input": "hello", "voice": "alloy"}}),
        ("card", "GET", "/.well-known/agent-card.json", {}),
        ("tools", "POST", "/mcp", {"json": rpc("tools/list", {}), "headers": JSON_AND_EVENTS}),
        ("tool", "POST", "/mcp", {"json": rpc("tools/call", CALL), "headers": JSON_AND_EVENTS}),
        ("tools of an agent", "POST", f"/mcp/{AGENT}", {"json": rpc("tools/list", {}), "headers": JSON_AND_EVENTS}),
        ("no key", "GET", "/v1/models", {"headers": {"authorization": ""}}),
        ("unknown key", "GET", "/v1/models", {"headers": {"authorization": "Bearer sk-nobody"}}),
        ("not an admin", "GET", "/v1/agents", {}),
        ("no route", "GET", "/v1/nothing", {}),
        ("no method", "DELETE", "/v1/models", {}),
        (
            "no JSON",
            "POST",
            "/v1/chat/completions",
            {"content": b"{", "headers": {"content-type": "application/json"}},
        ),
        (
            "no media type",
            "POST",
            "/v1/chat/completions",
            {"content": b"{}", "headers": {"content-type": "text/plain"}},
        ),
        ("too large", "POST", "/v1/chat/completions", {"json": {**CHAT, "user": "x" * 30_000}}),
        ("unknown field", "POST", "/v1/chat/completions", {"json": {**CHAT, "temperatur": 1}}),
        ("wrong field", "POST", "/v1/chat/completions", {"json": {**CHAT, "temperature": "hot"}}),
        ("unknown agent", "POST", "/v1/chat/completions", {"json": {**CHAT, "model": "nobody"}}),
        ("agents", "GET", "/v1/agents", {"headers": admin}),
        (
            "promote conflict",
            "POST",
            f"{agents}/promote",
            {"json": {"release": "release-1.0", "expected_version": "9.9"}, "headers": admin},
        ),
        ("promote unknown", "POST", f"{agents}/promote", {"json": {"release": "nowhere"}, "headers": admin}),
        ("rollback refused", "POST", f"{agents}/rollback", {"json": {}, "headers": admin}),
        ("drain", "POST", f"{agents}/drain", {"json": {}, "headers": admin}),
        ("chat drained", "POST", "/v1/chat/completions", {"json": CHAT}),
        ("release", "POST", f"{agents}/release", {"json": {}, "headers": admin}),
        ("metrics", "GET", "/metrics", {"headers": admin}),
    )


def rpc(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request of JSON-RPC."""
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": dict(params)}


# the OpenAPI document


def openapi_facts(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schema of each request and answer, a property a fact."""
    schemas = document.get("components", {}).get("schemas", {})
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from _operation_facts(f"http {method.upper()} {path}", operation, schemas)
    yield "http security", document["components"]["securitySchemes"]


def _operation_facts(name: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield f"{name} security", operation.get("security", [])
    for parameter in operation.get("parameters", ()):
        fact = {"required": parameter.get("required", False), "schema": inlined(parameter.get("schema", {}), schemas)}
        yield f"{name} {parameter['in']} {parameter['name']}", fact
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield from flattened(f"{name} request {kind}", inlined(content.get("schema", {}), schemas))
    errors: dict[str, list[str]] = {}
    for status, answer in operation["responses"].items():
        for kind, content in answer.get("content", {"": {}}).items():
            schema = inlined(content.get("schema", {}), schemas)
            if status.startswith("2"):
                yield from flattened(f"{name} {status} {kind}", schema)
            else:
                errors.setdefault(f"{kind} {json.dumps(schema, sort_keys=True)}", []).append(status)
    for schema_text, statuses in errors.items():
        yield f"{name} {' '.join(sorted(statuses))}", schema_text


def inlined(schema: Any, schemas: Mapping[str, Any], above: tuple[str, ...] = ()) -> Any:
    """Return a schema with its components in place of references, and without prose; one inside itself is `(as
    above)`.
    """
    if isinstance(schema, list):
        return [inlined(item, schemas, above) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return (
            {"(as above)": len(above) - above.index(name)}
            if name in above
            else inlined(schemas[name], schemas, (*above, name))
        )
    result = {}
    for key, value in schema.items():
        if key == "properties":  # names of fields, `title` among them
            result[key] = {name: inlined(inner, schemas, above) for name, inner in value.items()}
        elif key not in PROSE:
            result[key] = inlined(value, schemas, above)
    return result


def flattened(name: str, schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield a schema's own terms, then those of each property below it."""
    if not isinstance(schema, dict):
        yield name, schema
        return
    yield (
        name,
        {key: value for key, value in schema.items() if key not in ("properties", "items", "anyOf", "oneOf", "allOf")},
    )
    for field, inner in schema.get("properties", {}).items():
        yield from flattened(f"{name}.{field}", inner)
    if "items" in schema:
        yield from flattened(f"{name}[]", schema["items"])
    for key in ("anyOf", "oneOf", "allOf"):
        for index, inner in enumerate(schema.get(key, ())):
            yield from flattened(f"{name} {key} {index}", inner)


# answers


def answer_facts(name: str, answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    """Yield an answer's status, headers, and the keys of its JSON or of its events."""
    kind = answer.headers.get("content-type", "")
    yield (
        name,
        {
            "status": answer.status_code,
            "type": kind,
            "headers": sorted(set(answer.headers) - {"date", "content-length"}),
        },
    )
    if kind.startswith("application/json"):
        body = answer.json()
        yield from shape(f"{name} body", body)
        if answer.status_code >= 400 and isinstance(body.get("error"), dict):
            yield f"{name} error", {key: body["error"].get(key) for key in ("type", "code", "param", "kind")}
    elif kind.startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        yield f"{name} ends with", events[-1]
        yield from shape(f"{name} event", [json.loads(event) for event in events[:-1]])
    elif name == "answer metrics":
        yield from ((f"metric line {line}", True) for line in answer.text.splitlines() if line.startswith("# TYPE"))


def error_statuses(client: httpx.Client) -> Iterator[tuple[str, Any]]:
    """Yield the status of each kind of error, and of a bug."""
    for kind in [*sorted(cls.__name__ for cls in public_errors()), "Bug"]:
        answer = client.get(f"/freeze/error/{kind}")
        error = answer.json()["error"]
        headers = {
            name: answer.headers[name] for name in ("retry-after", "www-authenticate") if name in answer.headers
        }
        yield (
            f"error status {kind}",
            {
                "status": answer.status_code,
                "headers": headers,
                **{key: error[key] for key in ("type", "code", "param", "kind")},
            },
        )


def seen_facts(seen: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield routes, metrics, tracers and spans that the server's process noted."""
    yield from ((f"route {route}", True) for route in seen["routes"])
    yield from ((f"metric {name}", fact) for name, fact in seen["metrics"].items())
    yield from ((f"tracer {name}", True) for name in seen["tracers"])
    spans: dict[str, set[str]] = {}
    for span in seen["spans"]:
        if "/freeze/" not in span["name"] and "openapi" not in span["name"]:
            spans.setdefault(f"span {span['kind']} {span['name']}", set()).update(
                f"{name}: {kind}" for name, kind in span["attributes"].items()
            )
    yield from ((name, sorted(attributes)) for name, attributes in spans.items())


def main() -> None:
    """Serve the artefacts of the working directory; write the facts into the file that the first argument names."""
    os.umask(0o022)  # modes of files are facts
    Path(sys.argv[1]).write_text(json.dumps(http_facts(Path.cwd())), encoding="utf-8")


if __name__ == "__main__":
    main()
