"""Calls -> token ids: OpenAI's messages by the base's chat template, or a raw text to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.core.errors import RequestError, SourceError
from sartor.core.records import Message, Part
from sartor.models.chat import Chat
from sartor.models.engine.contract import Call


def prompt_ids(call: Call, chat: Chat) -> list[int]:
    """The tokens of a call's prompt, at least one. Raises RequestError when there is none, or the template refuses it."""
    if bool(call.messages) == bool(call.text):
        raise RequestError("a call has either messages or a text", 'messages: [{"role": "user", "content": "..."}]')
    if call.text:
        ids = chat.text_ids(call.text)
    else:
        messages = [_message(said) for said in call.messages]
        try:
            ids = chat.prompt_ids(messages, json.dumps(list(call.tools)) if call.tools else "")
        except SourceError as error:
            raise RequestError(error.problem, "use the roles and their order that this base's template knows") from None
    if not ids:
        raise RequestError("the prompt has no tokens", "ask something")
    return ids


def _message(said: Mapping[str, Any]) -> Message:
    content, calls = said.get("content"), said.get("tool_calls")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    return Message(
        role=str(said.get("role", "")),
        content=_parts(parts),
        name=str(said.get("name") or ""),
        tool_calls=json.dumps(calls) if calls else "",
        tool_call_id=str(said.get("tool_call_id") or ""),
    )


def _parts(parts: Sequence[Any]) -> tuple[Part, ...]:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"a message holds a part of type {kind!r}; this base reads text", '{"type": "text", "text": "..."}'
            )
    return tuple(Part("text", part["text"]) for part in parts)
