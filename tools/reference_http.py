"""Page of the routes of `sartor serve`, from the application's OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.routing import APIRoute

from reference_text import anchor_of, in_markdown, page_of, table
from sartor.serving.http.routes.system import agent_card_router, mcp_router
from sartor.serving.http.server import assemble_app
from sartor.serving.team_config import Team

INTRODUCTION = """\
Routes of `sartor serve`, in OpenAI's form where OpenAI has the route. Examples: [serving](../serving.md). A server describes itself at
`/openapi.json`. With keys, each request needs `Authorization: Bearer KEY`; without keys, a server listens on loopback alone
([API keys](../receipts.md)). Bodies are JSON in UTF-8: an unknown field is an error, and no value is coerced.
"""
HEADERS = (
    ("`authorization`", "request", "`Bearer KEY`: the API key"),
    ("`x-sartor-user`", "request", "the user for whom a key with that right speaks"),
    ("`x-request-id`", "both", "id of the request, in the log too; one is made if none is sent"),
    ("`x-sartor-agent`", "response", "exact version that answered"),
    ("`x-sartor-reason`", "response", "why this version answered: named, routed, trial or fall-back"),
    ("`x-sartor-receipt`", "response", "id of the signed receipt of the reply"),
    ("`retry-after`", "response", "seconds until a request may succeed, of 429 and 503"),
)
# routes beside the OpenAPI document, which options of TEAM.yaml switch on
OPTIONAL = {"/mcp": "`mcp: {serve: true}`", "/.well-known": "`a2a: {card: true}`"}


def write_http() -> str:
    """Return the page: routes, headers, errors, bodies."""
    document = assemble_app(state=None, team=Team(base="starter", agents=()), tools=None).openapi()
    schemas = document["components"]["schemas"]
    lines = [INTRODUCTION, "## Routes", ""]
    routes = [(method.upper(), path, operation) for path, methods in document["paths"].items() for method, operation in methods.items()]
    lines += table(
        ("route", "does"),
        [(f"[`{method} {path}`](#{anchor_of(f'{method} {path}')})", _summary(operation)) for method, path, operation in routes],
    )
    lines += ["Routes that an option of TEAM.yaml switches on; they are not in `/openapi.json`:", "", *_optional_routes()]
    for method, path, operation in routes:
        lines += list(_describe_route(method, path, operation))
    lines += ["## Headers", "", *table(("header", "of", "meaning"), HEADERS), "## Errors", ""]
    lines += ["Every error has the body [`ErrorResponse`](#errorresponse); `kind` is a heading of [errors](../errors.md).", ""]
    failed = {code: response["description"] for _, _, operation in routes for code, response in operation["responses"].items() if code >= "4"}
    lines += table(("status", "meaning"), sorted((code, in_markdown(text)) for code, text in failed.items() if code != "503"))
    lines += ["## Bodies", ""]
    for name in sorted(schemas, key=str.lower):
        lines += list(_describe_schema(name, schemas[name]))
    return page_of("HTTP", "the OpenAPI document of `sartor serve`", lines)


def _summary(operation: Mapping[str, Any]) -> str:
    return in_markdown(" ".join(operation.get("description", "").split("\n\n")[0].split()))


def _optional_routes() -> list[str]:
    routers = (mcp_router(None), agent_card_router(Team(base="starter", agents=())))
    rows = []
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute):
                option = next(text for beginning, text in OPTIONAL.items() if route.path.startswith(beginning))
                rows.append((f"`{' '.join(sorted(route.methods))} {route.path}`", option, in_markdown(route.description)))
    return table(("route", "option", "does"), rows)


def _describe_route(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {method} {path}", "", in_markdown(operation.get("description", "")), "")
    if parameters := operation.get("parameters"):
        rows = [(f"`{one['name']}`", one["in"], _type_text(one["schema"])) for one in parameters]
        yield from table(("parameter", "in", "type"), rows)
    if body := operation.get("requestBody"):
        yield from (f"Request: {_type_text(body['content']['application/json']['schema'])}.", "")
    answers = []
    for status, response in operation["responses"].items():
        if status.startswith("2") or (status == "503" and path == "/health"):
            content = response.get("content", {})
            kinds = [_content_text(kind, value) for kind, value in content.items() if value["schema"] or len(content) == 1]
            answers.append(f"{status} {' or '.join(kinds)}".strip())
    yield from (f"Response: {'; '.join(answers)}.", "")


def _content_text(kind: str, content: Mapping[str, Any]) -> str:
    return _type_text(content["schema"]) if kind == "application/json" else f"`{kind}`"


def _describe_schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "")
    if description := schema.get("description"):
        yield from (in_markdown(" ".join(description.split())), "")
    required = set(schema.get("required", ()))
    rows = []
    for field, value in schema.get("properties", {}).items():
        presence = "required" if field in required else f"`{value['default']!r}`" if "default" in value else ""
        rows.append((f"`{field}`", _type_text(value), presence, in_markdown(value.get("description", ""))))
    if rows:
        yield from table(("field", "type", "default", "meaning"), rows)


def _type_text(schema: Mapping[str, Any]) -> str:
    """Return the type of a field with its bounds: `integer, 1 to 16`, `list of Message`, `"a" or "b"`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{anchor_of(name)})"
    if members := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type_text(member) for member in members))
    if "const" in schema:
        return f"`{schema['const']!r}`"
    if "enum" in schema:
        return " or ".join(f"`{choice!r}`" for choice in schema["enum"])
    kind = schema.get("type", "any value")
    if kind == "array":
        kind = f"list of {_type_text(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        kind = f"mapping to {_type_text(schema['additionalProperties'])}"
    return f"{kind}{_bounds(schema)}"


def _bounds(schema: Mapping[str, Any]) -> str:
    lower = next((schema[key] for key in ("minimum", "minLength", "minItems", "exclusiveMinimum") if key in schema), None)
    upper = next((schema[key] for key in ("maximum", "maxLength", "maxItems", "exclusiveMaximum") if key in schema), None)
    if lower is None and upper is None:
        return ""
    unit = " characters" if schema.get("type") == "string" else " items" if schema.get("type") == "array" else ""
    if upper is None:
        return f", at least {lower}{unit}"
    return f", at most {upper}{unit}" if lower is None else f", {lower} to {upper}{unit}"
