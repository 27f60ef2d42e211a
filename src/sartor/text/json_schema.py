"""Reading and checking of JSON Schemas within limits of size and time.

A schema may come from a client or from a server of tools, and what it checks from a model. So no pattern is searched
without an end: `regex` gives up after a while and lets other threads run meanwhile, which `re` does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
import regex

from sartor.core.errors import ConfigError, RequestError

JSON_OBJECT = '{"type":"object"}'
MOST_BYTES = 65_536
DEEPEST = 64
# Time for all patterns and references of one check
CHECK_S = 0.2
# A reference may lead to itself by several ways, so that a small schema asks for any number of steps
MOST_REFERENCES = 10_000


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


_Errors = Iterator[jsonschema.ValidationError]


class _UncheckedError(Exception):
    """Reason why a value cannot be checked against a schema."""


@dataclass
class _CheckBudget:
    """Rest of the time and of the references of one check.

    deadline: monotonic time, s.
    """

    deadline: float
    references: int = MOST_REFERENCES

    def matches(self, pattern: str, text: str) -> bool:
        """Return whether a pattern is found in a text."""
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise _too_slow(pattern)
        try:
            return regex.search(pattern, text, timeout=left_s, concurrent=True) is not None
        except TimeoutError:
            raise _too_slow(pattern) from None
        except (regex.error, OverflowError, RecursionError) as error:
            raise _UncheckedError(f"the schema's pattern {pattern[:80]!a} cannot be read: {error}") from None

    def step(self) -> None:
        """Count one reference."""
        self.references -= 1
        if self.references < 0 or time.monotonic() > self.deadline:
            raise _UncheckedError(f"the schema's references take more than {MOST_REFERENCES} steps or {CHECK_S} s")


def _too_slow(pattern: str) -> _UncheckedError:
    return _UncheckedError(f"the schema's pattern {pattern[:80]!a} was searched for longer than {CHECK_S} s")


def violations(value: Any, schema: Mapping[str, Any]) -> list[str]:
    """Return the violations of a schema as sentences, ordered by path.

    No remote reference is fetched. A schema that cannot be checked within CHECK_S, or that is none, is a violation
    too. Raises ConfigError for a reference to what the schema lacks.
    """
    keywords = _BoundedKeywords(_CheckBudget(time.monotonic() + CHECK_S))
    validator_class = jsonschema.validators.extend(jsonschema.Draft202012Validator, keywords.as_mapping())
    checker = validator_class(dict(schema), registry=referencing.Registry())
    try:
        errors = sorted(checker.iter_errors(value), key=lambda error: error.json_path)
    except referencing.exceptions.Unresolvable as missing:
        raise ConfigError(
            f"the schema refers to {missing.ref!r}, which is not in it",
            '"$defs": {"NAME": {...}} in the schema, and "$ref": "#/$defs/NAME"',
        ) from None
    except _UncheckedError as reason:
        return [str(reason)]
    except RecursionError:
        return ["the schema leads to itself without an end"]
    except Exception as error:  # many kinds, for a schema that is none and for numbers without a float
        return [f"the schema cannot be checked: {type(error).__name__}: {str(error)[:200]}"]
    return [f"at {error.json_path}: {error.message[:200]}" for error in errors]


class _BoundedKeywords:
    """Keywords of JSON Schema whose patterns and references stay within a budget."""

    def __init__(self, budget: _CheckBudget) -> None:
        self._budget = budget

    def as_mapping(self) -> dict[str, Any]:
        """Return the keywords' functions, as jsonschema takes them."""
        plain = jsonschema.Draft202012Validator.VALIDATORS

        def unevaluated(validator: Any, allowed: Any, instance: Any, schema: Any) -> _Errors:
            if "patternProperties" in json.dumps(schema):  # whose names would be searched for by `re`
                raise _UncheckedError("unevaluatedProperties beside patternProperties is not checked here")
            yield from plain["unevaluatedProperties"](validator, allowed, instance, schema) or ()

        def reference(keyword: str) -> Any:
            def check(validator: Any, target: Any, instance: Any, schema: Any) -> _Errors:
                self._budget.step()
                yield from plain[keyword](validator, target, instance, schema) or ()

            return check

        return {
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "additionalProperties": self._additional_properties,
            "unevaluatedProperties": unevaluated,
            "$ref": reference("$ref"),
            "$dynamicRef": reference("$dynamicRef"),
        }

    def _pattern(self, validator: Any, pattern: str, instance: Any, schema: Any) -> _Errors:
        if isinstance(instance, str) and not self._budget.matches(pattern, instance):
            yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")

    def _pattern_properties(self, validator: Any, subschemas: Any, instance: Any, schema: Any) -> _Errors:
        members = instance.items() if isinstance(instance, dict) else ()
        for pattern, subschema in subschemas.items():
            for name, member in members:
                if self._budget.matches(pattern, name):
                    yield from validator.descend(member, subschema, path=name, schema_path=pattern)

    def _additional_properties(self, validator: Any, allowed: Any, instance: Any, schema: Any) -> _Errors:
        known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        extras = []
        for name in instance if isinstance(instance, dict) else ():
            if name not in known and not any(self._budget.matches(pattern, name) for pattern in patterns):
                extras.append(name)
        if isinstance(allowed, dict):
            for name in extras:
                yield from validator.descend(instance[name], allowed, path=name)
        elif not allowed and extras:
            names = ", ".join(repr(name) for name in sorted(extras))
            verb = "was" if len(extras) == 1 else "were"
            yield jsonschema.ValidationError(f"Additional properties are not allowed ({names} {verb} unexpected)")
