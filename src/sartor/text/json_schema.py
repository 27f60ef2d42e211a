"""Reading and checking of JSON Schemas within size limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema

from sartor.core.errors import ConfigError, RequestError

JSON_OBJECT = '{"type":"object"}'
MOST_BYTES = 65_536
DEEPEST = 64


def read_schema(schema: str) -> dict[str, Any]:
    """Parse a JSON Schema.

    Raises RequestError for a text that is no JSON object, is larger than MOST_BYTES bytes, is nested deeper than
    DEEPEST, or sets options of the library.
    """
    if (size := len(schema.encode(errors="surrogatepass"))) > MOST_BYTES:
        raise RequestError(
            f"the JSON Schema has {size} bytes; at most {MOST_BYTES} are read", "leave out what the reply needs not"
        )
    try:
        fields = json.loads(schema, parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise RequestError(f"the JSON Schema is no JSON: {error}", JSON_OBJECT) from None
    if not isinstance(fields, dict):
        raise RequestError(f"the JSON Schema is {schema[:40]!r} and no object", JSON_OBJECT)
    _check_depth(fields)
    return fields


def _check_depth(fields: dict[str, Any]) -> None:
    """Raise RequestError for a schema that is too deep or sets options; checked by level, without recursion."""
    level: list[Any] = [fields]
    for _ in range(DEEPEST):
        if any("x-guidance" in item for item in level if isinstance(item, dict)):
            raise RequestError(
                "the JSON Schema sets 'x-guidance', an option of the server's library", "leave 'x-guidance' out"
            )
        next_level: list[Any] = []
        for item in level:
            parts = item.values() if isinstance(item, dict) else item
            next_level += [part for part in parts if isinstance(part, dict | list)]
        level = next_level
        if not level:
            return
    raise _too_deep()


def _too_deep() -> RequestError:
    return RequestError(
        f"the JSON Schema is nested deeper than {DEEPEST}", "name its parts under $defs and refer to them by $ref"
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON")


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a schema is a valid JSON Schema of draft 2020-12."""
    try:
        jsonschema.Draft202012Validator.check_schema(dict(schema))
    except jsonschema.SchemaError as error:
        raise ConfigError(
            f"that is no JSON Schema: {error.message[:200]}", "see json-schema.org/draft/2020-12"
        ) from None
