"""Reading of JSON Schemas within size limits, and checks of values against them within a time limit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
import regex

from sartor.core.errors import ConfigError, RequestError

JSON_OBJECT = '{"type":"object"}'
MOST_BYTES = 65_536
DEEPEST = 64
# limit of one check of a value; a reply of a few kilobytes takes milliseconds
CHECK_S = 0.5


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
        level = [
            part
            for item in level
            for part in (item.values() if isinstance(item, dict) else item)
            if isinstance(part, dict | list)
        ]
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


def schema_errors(value: Any, schema: Mapping[str, Any], most: int = 8) -> list[str]:
    """Return the violations of a schema as at most `most` sentences, ordered by path.

    A schema of a client or of a tool server can be made to take for ever: patterns that backtrack, and references that
    double at each step. A check has CHECK_S seconds; one that is not done is a violation, and so is a schema that
    cannot be applied. No remote reference is fetched. Raises ConfigError for a reference to what the schema lacks.
    """
    try:
        # the clock is part of the class: the library hands keywords their validator and nothing else
        validator = _CheckClock().validator_class()(dict(schema), registry=referencing.Registry())
        errors = sorted(validator.iter_errors(value), key=lambda error: error.json_path)
    except referencing.exceptions.Unresolvable as missing:
        raise ConfigError(
            f"the schema refers to {missing.ref!r}, which is not in it",
            '"$defs": {"NAME": {...}} in the schema, and "$ref": "#/$defs/NAME"',
        ) from None
    except TimeoutError:
        return [f"the schema cannot be checked within {CHECK_S:g} s: its patterns or references take too long"]
    except RecursionError:
        return ["the schema cannot be checked: it refers to itself without end, or the value is nested too deeply"]
    except (
        Exception
    ) as error:  # the library raises many kinds on a schema that is none, and on numbers without a float
        return [f"the schema cannot be checked: {type(error).__name__}: {str(error)[:200]}"]
    return [f"at {error.json_path}: {error.message[:200]}" for error in errors[:most]]


@dataclass
class _CheckClock:
    """Time limit of one check.

    deadline: by the monotonic clock.
    """

    deadline: float = field(default_factory=lambda: time.monotonic() + CHECK_S)

    def validator_class(self) -> Any:
        """Return the validator of draft 2020-12 whose patterns and references keep to the limit."""
        names = {
            "$ref": self._reference,
            "$dynamicRef": self._reference,
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "additionalProperties": self._additional_properties,
            "unevaluatedProperties": self._unevaluated_properties,
        }
        validators = {name: _timed(check, _KEYWORDS[name]) for name, check in names.items()}
        return jsonschema.validators.extend(jsonschema.Draft202012Validator, validators)

    def _is_match(self, pattern: str, text: str) -> bool:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return regex.search(pattern, text, timeout=left_s) is not None

    def _reference(self, original: Any, validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if time.monotonic() > self.deadline:
            raise TimeoutError
        return original(validator, value, instance, schema)  # type: ignore[no-any-return]

    def _pattern(self, original: Any, validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(instance, "string") and not self._is_match(value, instance):
            yield jsonschema.ValidationError(f"{instance!r:.100} does not match {value!r:.100}")

    def _pattern_properties(
        self, original: Any, validator: Any, value: Any, instance: Any, schema: Any
    ) -> Iterator[Any]:
        if validator.is_type(instance, "object"):
            for pattern, subschema in value.items():
                for name, item in instance.items():
                    if self._is_match(pattern, name):
                        yield from validator.descend(item, subschema, path=name, schema_path=pattern)

    def _additional_properties(
        self, original: Any, validator: Any, value: Any, instance: Any, schema: Any
    ) -> Iterator[Any]:
        if not validator.is_type(instance, "object"):
            return
        patterns, named = schema.get("patternProperties", {}), schema.get("properties", {})
        others = [
            name
            for name in instance
            if name not in named and not any(self._is_match(pattern, name) for pattern in patterns)
        ]
        if isinstance(value, Mapping):
            for name in others:
                yield from validator.descend(instance[name], value, path=name)
        elif not value and others:
            verb = "was" if len(others) == 1 else "were"
            listed = ", ".join(f"{name!r:.100}" for name in others[:8])
            yield jsonschema.ValidationError(f"Additional properties are not allowed ({listed} {verb} unexpected)")

    def _unevaluated_properties(
        self, original: Any, validator: Any, value: Any, instance: Any, schema: Any
    ) -> Iterator[Any]:
        # the library would match the patterns of every subschema by `re`, which knows no time limit
        if _holds_key(validator.schema, "patternProperties"):
            raise ValueError("unevaluatedProperties beside patternProperties is not supported")
        return original(validator, value, instance, schema)  # type: ignore[no-any-return]


_KEYWORDS: Mapping[str, Any] = jsonschema.Draft202012Validator.VALIDATORS


def _timed(check: Any, original: Any) -> Any:
    """Return a keyword in the library's form."""
    return lambda validator, value, instance, schema: check(original, validator, value, instance, schema)


def _holds_key(schema: Any, key: str) -> bool:
    level = [schema]
    while level:
        if any(isinstance(item, Mapping) and key in item for item in level):
            return True
        level = [
            part
            for item in level
            for part in (item.values() if isinstance(item, Mapping) else item)
            if isinstance(part, Mapping | list)
        ]
    return False
