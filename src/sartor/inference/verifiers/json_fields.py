"""Verifier `json_fields`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sartor.core.config import option
from sartor.core.records import canonical_text
from sartor.inference.verifiers.json_schema import json_value
from sartor.inference.verifiers.submission import Submission


@dataclass(frozen=True)
class JsonFieldsVerifier:
    """Fraction of the fields of a JSON object that are exactly those of the reference, types included."""

    fields: tuple[str, ...] = option(
        (), "top-level names that are compared; empty: all, and a field too many counts as wrong"
    )
    kind: Literal["json_fields"] = "json_fields"

    def missing(self, row: Submission) -> str:
        """Return the fields that the reference lacks, or that it is no JSON object."""
        value = json_value(row.reference)
        if not isinstance(value, dict) or not (self.fields or value):
            return "a JSON object with fields as its reply"
        lacking = [name for name in self.fields if name not in value]
        return f"the fields {', '.join(lacking)} in its reply" if lacking else ""

    def right_reply(self, row: Submission) -> str:
        """Return the reference."""
        return row.reference

    def rewards(self, submissions: Sequence[Submission]) -> list[float]:
        """Return the fractions of equal fields; 0 for a reply that is no JSON object."""
        return [self._reward(json_value(each.reply), json_value(each.reference)) for each in submissions]

    def _reward(self, reply: Any, reference: Any) -> float:
        if not isinstance(reply, dict) or not isinstance(reference, dict):
            return 0.0
        names = self.fields or tuple({**reference, **reply})
        equal = [is_same(reply[name], reference[name]) for name in names if name in reply and name in reference]
        return sum(equal) / len(names) if names else float(reply == reference)


def is_same(first: Any, second: Any) -> bool:
    """Return whether two JSON values are the same, with their types: 1, 1.0, "1" and true differ."""
    return canonical_text(first) == canonical_text(second)
