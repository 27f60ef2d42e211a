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
Routes of `sartor serve`, in OpenAI's form where OpenAI has the route. Examples: [serving](../serving.md). A server
describes itself at `/openapi.json`. With keys, each request needs `Authorization: Bearer KEY`; without keys, a server
listens on loopback alone ([API keys](../receipts.md)). Bodies are JSON in UTF-8: an unknown field is an error, and no
value is coerced.
"""
OF_OPTIONS = "Routes that an option of TEAM.yaml switches on; they are not in `/openapi.json`:"
OF_ERRORS = "Every error has the body [`ErrorResponse`](#errorresponse). Kinds of errors: [errors](../errors.md)."
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
    listed, described, failures = [], [], {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            name = f"{method.upper()} {path}"
            listed.append((f"[`{name}`](#{anchor_of(name)})", _summary(operation)))
            described += list(_describe_route(name, path, operation))
            for status, response in operation["responses"].items():
                if status >= "4" and path != "/health":  # whose 503 is its answer
                    failures[status] = in_markdown(response["description"])
    lines = [INTRODUCTION, "## Routes", "", *table(("route", "does"), listed)]
    lines += [OF_OPTIONS, "", *_optional_routes(), *described]
    lines += ["## Headers", "", *table(("header", "of", "meaning"), HEADERS)]
    lines += ["## Errors", "", OF_ERRORS, "", *table(("status", "meaning"), sorted(failures.items())), "## Bodies", ""]
    for name, schema in sorted(document["components"]["schemas"].items(), key=lambda item: item[0].lower()):
        lines += list(_describe_schema(name, schema))
    return page_of("HTTP", "the OpenAPI document of `sartor serve`", lines)


def _summary(operation: Mapping[str, Any]) -> str:
    return in_markdown(" ".join(operation.get("description", "").split("\n\n")[0].split()))


def _optional_routes() -> list[str]:
    rows = []
    for router in (mcp_router(None), agent_card_router(Team(base="starter", agents=()))):
        for route in filter(lambda route: isinstance(route, APIRoute), router.routes):
            option = next(text for beginning, text in OPTIONAL.items() if route.path.startswith(beginning))
            name = f"{' '.join(sorted(route.methods))} {route.path}"
            rows.append((f"`{name}`", option, in_markdown(route.description)))
    return table(("route", "option", "does"), rows)


def _describe_route(name: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "", in_markdown(operation.get("description", "")), "")
    if parameters := operation.get("parameters"):
        rows = [(f"`{one['name']}`", one["in"], _type_text(one["schema"])) for one in parameters]
        yield from table(("parameter", "in", "type"), rows)
    if body := operation.get("requestBody"):
        yield from (f"Request: {_type_text(body['content']['application/json']['schema'])}.", "")
    answers = []
    for status, response in operation["responses"].items():
        if status.startswith("2") or (status == "503" and path == "/health"):
            content = response.get("content", {})
            shown = {kind: value for kind, value in content.items() if value["schema"]} or content
            kinds = [_content_text(kind, value) for kind, value in shown.items()]
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
    """Return the bounds of a number, of a text's length or of a list's length; empty if it has none."""
    found = [schema.get(f"{side}{of}") for side in ("min", "max") for of in ("imum", "Length", "Items")]
    lower = next((bound for bound in found[:3] if bound is not None), None)
    upper = next((bound for bound in found[3:] if bound is not None), None)
    if lower is None and upper is None:
        return ""
    unit = {"string": " characters", "array": " items"}.get(schema.get("type", ""), "")
    if upper is None:
        return f", at least {lower}{unit}"
    return f", at most {upper}{unit}" if lower is None else f", {lower} to {upper}{unit}"
