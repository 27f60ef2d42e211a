"""Verifier `tool_call`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sartor.core.config import option
from sartor.core.lazy_import import import_module
from sartor.core.records import canonical_text
from sartor.inference.engine import GenerateCall
from sartor.inference.verifiers.submission import Submission


@dataclass(frozen=True)
class ToolCallVerifier:
    """Fraction of a reply's tool calls that are those of the reference, in any order, by name and typed arguments."""

    arguments: Literal["equal", "valid"] = option(
        "equal", "equal: those of the reference; valid: any that the tool's declared parameters allow"
    )
    kind: Literal["tool_call"] = "tool_call"

    def missing(self, row: Submission) -> str:
        """Return that the row declares no tool, or that its reply calls none, if so."""
        if not row.tools:
            return "declared tools"
        return "" if read_calls(row.reference, row) else "a call of a declared tool in its reply"

    def right_reply(self, row: Submission) -> str:
        """Return the reference."""
        return row.reference

    def rewards(self, submissions: Sequence[Submission]) -> list[float]:
        """Return the matching calls as a fraction of the calls of reply or reference, whichever has more."""
        results = []
        for submission in submissions:
            keys = []
            for text in (submission.reply, submission.reference):
                calls = read_calls(text, submission)
                keys.append(Counter(self._key(name, arguments, submission) for name, arguments in calls))
            most = max(keys[0].total(), keys[1].total())
            results.append((keys[0] & keys[1]).total() / most if most else 0.0)
        return results

    def _key(self, name: str, arguments: dict[str, Any], submission: Submission) -> tuple[str, str]:
        """Return what two calls have in common if they count as the same."""
        if self.arguments == "equal":
            return name, canonical_text(arguments)
        violations = import_module("sartor.text.json_schema").violations
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in submission.tools}
        return name, "" if not violations(arguments, schemas.get(name) or {}) else canonical_text(arguments)


def read_calls(text: str, submission: Submission) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and arguments of each call of a declared tool in a text."""
    reader = import_module("sartor.inference.tool_calls").CallReader(
        GenerateCall(submission.row, tools=submission.tools)
    )
    reader.feed(text)
    _, calls = reader.end()
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
