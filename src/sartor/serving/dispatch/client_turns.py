"""Turns of a client under a fixed system prompt and beside the team's tools.

An agent with `system: fixed` has the Release's signed system prompt and no other text in its place: a client's system
messages become part of user turns. An agent whose tools the team runs takes no turns of tools from a client, since
the server alone calls those tools, and nobody else can know what they answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sartor.core.errors import RequestError

SYSTEM_ROLES = ("system", "developer")
FOLDED = "the request's system message is read as the user's, since the agent's own is fixed"
_BETWEEN = "\n\n"

Turn = Mapping[str, Any]


def fold_system(messages: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return the messages with the text of each system message in a user turn.

    The text comes before that of the next turn if it is the user's, else after that of the user's turn before it;
    where there is neither, it is a user turn of its own. So no two user turns follow each other that did not before,
    which some templates refuse.
    """
    turns: list[Turn] = []
    pending: list[Turn] = []
    for message in messages:
        if message.get("role") in SYSTEM_ROLES:
            pending.append(message)
            continue
        if pending and message.get("role") == "user":
            message = {**message, "content": _joined([*pending, message])}
        elif pending:
            _place(turns, pending)
        turns.append(message)
        pending = []
    if pending:
        _place(turns, pending)
    return tuple(turns)


def _place(turns: list[Turn], system: Sequence[Turn]) -> None:
    if turns and turns[-1].get("role") == "user":
        turns[-1] = {**turns[-1], "content": _joined([turns[-1], *system])}
    else:
        turns.append({"role": "user", "content": _joined(system)})


def _joined(messages: Sequence[Turn]) -> str | list[Any]:
    """Return the contents of messages as one: a text, or parts if one of them has parts."""
    contents = [message.get("content") or "" for message in messages]
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) == len(contents):
        return _BETWEEN.join(filter(None, texts))
    parts: list[Any] = []
    for content in contents:
        if parts and content:
            parts.append({"type": "text", "text": _BETWEEN})
        parts += [{"type": "text", "text": content}] if isinstance(content, str) and content else content
    return parts


def check_no_tool_turns(messages: Sequence[Turn], agent: str) -> None:
    """Raise RequestError if a message of a client is a tool's result or an assistant's call of a tool."""
    for index, message in enumerate(messages):
        if message.get("role") == "tool" or message.get("tool_calls"):
            turn = "a tool's result" if message.get("role") == "tool" else "a call of a tool"
            raise RequestError(
                f"messages[{index}] is {turn}, and the tools of {agent} are called by this server alone",
                "leave the turns of tools out and send what was said; or declare `tools` that you call yourself",
            )
