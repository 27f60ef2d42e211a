"""Tool calls of training rows: one form for their arguments, and the check against the row's `tools`.

Arguments are JSON objects in a row, whether its source had them as JSON text (OpenAI's form) or as objects, because
chat templates write objects. Types and the order of keys are those of the source: 1, "1", 1.0 and true stay four
values, and a template writes the same bytes as for a request to a server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sartor.core import strict_json
from sartor.core.errors import ConfigError
from sartor.core.records import Example, MalformedRow
from sartor.core.strict_json import StrictJsonError
from sartor.text.json_schema import check_schema, violations

# tools of a row whose schemas stay parsed: the rows of a file mostly have the same
_PARSED_TOOLS = 256


def normalized_calls(tool_calls: str, location: str) -> str:
    """Return the JSON text of a turn's tool calls with arguments as objects.

    tool_calls: JSON text of OpenAI's list; empty for none. A list in another form, which some template may know, is
    returned unchanged.
    location: of the turn, for errors.
    Raises MalformedRow for arguments that are no JSON object, or have a key twice.
    """
    calls = json.loads(tool_calls) if tool_calls else None
    if not isinstance(calls, list):
        return tool_calls
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
            result.append(call)
            continue
        result.append({**call, "function": {**function, "arguments": _object(function, location)}})
    return tool_calls if result == calls else json.dumps(result, ensure_ascii=False)


def _object(function: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return the arguments of a call as an object; empty text stands for no arguments."""
    text = function["arguments"]
    name = str(function.get("name"))[:64]
    try:
        value = strict_json.loads(text) if text.strip() else {}
    except (StrictJsonError, RecursionError) as error:
        problem = error.problem if isinstance(error, StrictJsonError) else "they are nested too deep"
        raise MalformedRow("bad_tool_call", f"the arguments of {name!r} in {location}: {problem}") from None
    if not isinstance(value, dict):
        detail = f"the arguments of {name!r} in {location} are a {type(value).__name__}, not an object"
        raise MalformedRow("bad_tool_call", detail)
    return value


def check_calls(example: Example) -> None:
    """Raise MalformedRow for a call of a tool that the row does not declare, or with arguments against its schema.

    Rows without `tools`, and tools or calls in another form than OpenAI's, are not checked. Neither are arguments of a
    tool whose `parameters` are no JSON Schema.
    """
    turns = [*example.messages, *example.rejected]
    if not example.tools or not any(turn.tool_calls for turn in turns):
        return
    schemas = _schemas(example.tools)
    if not schemas:
        return
    for index, turn in enumerate(turns, 1):
        calls = json.loads(turn.tool_calls) if turn.tool_calls else None
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                continue
            name = function["name"]
            if name not in schemas:
                detail = f"turn {index} calls {name[:64]!r}; the row declares {', '.join(schemas)[:200]}"
                raise MalformedRow("bad_tool_call", detail)
            schema = schemas[name]
            if schema is not None and (faults := _faults(function.get("arguments", {}), schema)):
                raise MalformedRow("bad_tool_call", f"turn {index} calls {name[:64]!r}: {faults[0]}")


def _faults(arguments: Any, schema: Mapping[str, Any]) -> list[str]:
    try:
        return violations(arguments, schema)
    except ConfigError as error:  # a reference to what the schema lacks
        return [error.problem]


@lru_cache(maxsize=_PARSED_TOOLS)
def _schemas(tools: str) -> dict[str, dict[str, Any] | None]:
    """Return the JSON Schema of each declared tool's arguments by name, None for one that cannot be checked.

    Empty if any declaration is in an unknown form.
    """
    declared = json.loads(tools)
    result: dict[str, dict[str, Any] | None] = {}
    for tool in declared if isinstance(declared, list) else ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return {}
        result[function["name"]] = _schema(function.get("parameters"))
    return result


def _schema(parameters: Any) -> dict[str, Any] | None:
    if not isinstance(parameters, dict):
        return None
    try:
        check_schema(parameters)
    except (ConfigError, RecursionError):
        return None
    return parameters
