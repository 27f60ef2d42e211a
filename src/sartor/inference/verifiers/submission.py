"""Reply that is handed to a verifier, and the verifier's interface."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sartor.core.records import Example


@dataclass(frozen=True)
class Submission:
    """Reply with what a verifier may compare it with.

    row: id of the row. prompt: the messages before the reply, as role and content.
    reference: the row's own reply, with its tool calls as `<tool_call>` blocks; empty for none.
    tools: OpenAI's tool declarations of the row.
    """

    row: str
    reply: str
    reference: str = ""
    prompt: tuple[Mapping[str, str], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of_example(cls, example: Example) -> Submission:
        """Return the submission of a row's own reply."""
        reference = "\n".join(part for part in (example.reply, *_call_blocks(example.messages[-1].tool_calls)) if part)
        prompt = tuple({"role": message.role, "content": message.text} for message in example.prompt)
        tools = json.loads(example.tools) if example.tools else ()
        return cls(example.id, reference, reference, prompt, tuple(tools))


def _call_blocks(tool_calls: str) -> list[str]:
    """Return the tool calls of a message as the blocks that models write."""
    blocks = []
    for call in json.loads(tool_calls) if tool_calls else ():
        arguments = call["function"].get("arguments") or {}
        fields = {
            "name": call["function"]["name"],
            "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments,
        }
        blocks.append(f"<tool_call>{json.dumps(fields, ensure_ascii=False)}</tool_call>")
    return blocks


class Verifier(Protocol):
    """Options of a verifier, which are also its function."""

    @property
    def kind(self) -> str:
        """Name of the verifier in a recipe."""
        ...

    def missing(self, row: Submission) -> str:
        """Return what a row lacks of what this verifier needs; empty if it lacks nothing."""
        ...

    def right_reply(self, row: Submission) -> str:
        """Return a reply to a row that deserves the full reward."""
        ...

    def rewards(self, submissions: Sequence[Submission]) -> list[float]:
        """Return the rewards of submissions, each 0..1, in order.

        Raises ConfigError, BudgetError or MissingError if the verifier itself fails, with the row.
        """
        ...
