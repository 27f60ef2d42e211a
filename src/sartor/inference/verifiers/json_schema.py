"""Verifier `json_schema`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sartor.core import strict_json
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.lazy_import import import_module
from sartor.inference.verifiers.submission import Submission


@dataclass(frozen=True)
class JsonSchemaVerifier:
    """1 for a reply that is one JSON value of a schema (draft 2020-12), else 0; it needs no reference reply."""

    schema: Any = option(REQUIRED, "the JSON Schema of a reply: a mapping")
    kind: Literal["json_schema"] = "json_schema"

    def __post_init__(self) -> None:
        if not isinstance(self.schema, Mapping):
            raise ConfigError(f"schema is {self.schema!r:.80}, no mapping", "schema: {type: object, properties: {}}")
        import_module("sartor.text.json_schema").check_schema(self.schema)

    def missing(self, row: Submission) -> str:
        """Return an empty string: the schema is all that is needed."""
        return ""

    def right_reply(self, row: Submission) -> str:
        """Return the reference."""
        return row.reference

    def rewards(self, submissions: Sequence[Submission]) -> list[float]:
        """Return 1 for each reply without a violation. Raises ConfigError for a reference to what the schema lacks."""
        violations = import_module("sartor.text.json_schema").violations
        results = []
        for submission in submissions:
            value = json_value(submission.reply)
            results.append(float(value is not NO_JSON and not violations(value, self.schema)))
        return results


# result of `json_value` for a text that is no JSON; None is a value of JSON
NO_JSON: Any = object()


def json_value(text: str) -> Any:
    """Return the JSON value that a text is, or NO_JSON."""
    try:
        return strict_json.loads(text.strip())
    except strict_json.StrictJsonError:
        return NO_JSON
