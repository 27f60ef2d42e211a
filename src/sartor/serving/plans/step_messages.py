"""Typed messages between plan steps.

Agents exchange nothing else. If a step must answer in a given form, it is asked for by a JSON Schema. An engine that
supports it decodes under the schema, and the reply is checked against it here in any case.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sartor.core.errors import ConfigError
from sartor.media.content_parts import media_parts
from sartor.serving.plan_options import Given, PlanStep
from sartor.text import json_schema

Role = Literal["draft", "check", "mend", "plan", "part", "answer"]
Messages = tuple[Mapping[str, Any], ...]
_SYSTEM = ("system", "developer")
# Default inputs of each role
NEEDS: Mapping[Role, tuple[Given, ...]] = {
    "draft": ("request",),
    "check": ("request", "draft"),
    "mend": ("request", "draft", "findings"),
    "plan": ("request",),
    "part": ("request",),
    "answer": ("request", "findings"),
}
TASKS: Mapping[Role, str] = {
    "draft": "Make the draft a better answer to the request. Answer with it alone.",
    "check": "Say whether the draft answers the request rightly, and if not, what is wrong with it.",
    "mend": "Mend the draft so that nothing of the findings is wrong any more. Answer with the mended draft alone.",
    "plan": "Divide the request into parts, each for one of the agents.",
    "part": "Answer.",
    "answer": "Answer the request from the findings, which are answers to its parts.",
}
VERDICT: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "right": {"type": "boolean"},
        "findings": {"type": "array", "items": {"type": "string", "maxLength": 400}, "maxItems": 8},
    },
    "required": ["right", "findings"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class DraftFinding:
    """Problem that a check found in a draft.

    check: its index and kind (`0 json`).
    says: one sentence.
    """

    check: str
    says: str


@dataclass(frozen=True)
class CriticVerdict:
    """Judgement of a critic on a draft."""

    right: bool
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskPart:
    """Part of a request, and the agent that answers it."""

    agent: str
    task: str


@dataclass(frozen=True)
class PlanStepInput:
    """Possible inputs of a step: the client's conversation, the draft so far, and its findings."""

    conversation: Messages
    draft: str = ""
    findings: tuple[DraftFinding, ...] = ()

    def as_json(self, inputs: Sequence[Given]) -> dict[str, Any]:
        """Return the input fields of a step. A conversation of one user message is its text."""
        turns = [{"role": turn["role"], "content": text_of(turn)} for turn in self.conversation]
        is_single_turn = len(turns) == 1 and turns[0]["role"] == "user"
        fields = {"request": turns[0]["content"] if is_single_turn else turns, "draft": self.draft}
        return (
            {**fields, "findings": [asdict(finding) for finding in self.findings]} if "findings" in inputs else fields
        )

    def messages(self, step: PlanStep, role: Role) -> Messages:
        """Return the messages that a step is sent. Images and recordings come before the JSON, which
        cannot hold them.
        """
        inputs = step.gets or (("request", "draft") if role == "draft" and self.draft else NEEDS[role])
        turns = self._turns(step, role, inputs)
        if not step.system:
            return turns
        return ({"role": "system", "content": step.system}, *(turn for turn in turns if turn["role"] not in _SYSTEM))

    def _turns(self, step: PlanStep, role: Role, inputs: Sequence[Given]) -> Messages:
        if tuple(inputs) == ("request",) and role not in ("check", "plan"):
            return self.conversation
        if step.form == "turns":
            draft = ({"role": "assistant", "content": self.draft},) if "draft" in inputs else ()
            findings = "\n".join(finding.says for finding in self.findings) if "findings" in inputs else ""
            return (
                *self.conversation,
                *draft,
                {"role": "user", "content": "\n".join(filter(None, [TASKS[role], findings]))},
            )
        fields = {name: value for name, value in self.as_json(inputs).items() if name in inputs}
        text = json.dumps({"task": TASKS[role], **fields}, ensure_ascii=False)
        media = list(media_parts(self.conversation)) if "request" in inputs else []
        return ({"role": "user", "content": [*media, {"type": "text", "text": text}] if media else text},)


def text_of(turn: Mapping[str, Any]) -> str:
    """Return the text of a message."""
    content = turn.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def user_text(conversation: Messages) -> str:
    """Return the text of all user messages of a conversation."""
    return "\n".join(text_of(turn) for turn in conversation if turn.get("role") == "user")


def read_verdict(text: str) -> CriticVerdict | None:
    """Return a critic's verdict; None if the reply is none.

    A verdict that says `right` but has findings counts as not right.
    """
    value = read_json(text)
    if schema_errors(value, VERDICT):
        return None
    return CriticVerdict(value["right"] and not value["findings"], tuple(value["findings"]))


def parts_schema(members: Sequence[str], max_parts: int) -> dict[str, Any]:
    """Return the JSON Schema of a planner's reply."""
    task = {"type": "string", "minLength": 1, "maxLength": 2000}
    part = {
        "type": "object",
        "properties": {"agent": {"enum": list(dict.fromkeys(members))}, "task": task},
        "required": ["agent", "task"],
        "additionalProperties": False,
    }
    parts = {"type": "array", "items": part, "minItems": 1, "maxItems": max_parts}
    return {"type": "object", "properties": {"parts": parts}, "required": ["parts"], "additionalProperties": False}


def read_parts(text: str, members: Sequence[str], max_parts: int) -> list[TaskPart]:
    """Return the parts of a planner's reply; empty if it is invalid."""
    value = read_json(text)
    if schema_errors(value, parts_schema(members, max_parts)):
        return []
    return [TaskPart(item["agent"], item["task"]) for item in value["parts"]]


_NO_JSON = object()


def read_json(text: str) -> Any:
    """Return the JSON value of a text, or `_NO_JSON`, which satisfies no schema and equals nothing."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NO_JSON


def is_json(value: Any) -> bool:
    """Return whether `read_json` found a value."""
    return value is not _NO_JSON


def schema_errors(value: Any, schema: Mapping[str, Any]) -> list[str]:
    """Return the violations of a schema as at most eight sentences, ordered by path.

    It takes at most `json_schema.CHECK_S`, and more for a large value. A schema of a third party is checked in a
    thread.
    """
    if not is_json(value):
        return ["it is not JSON"]
    try:
        return json_schema.violations(value, schema)[:8]
    except ConfigError as error:
        return [error.problem]
