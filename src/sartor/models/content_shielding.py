"""Messages as a chat template is given them: markup in their content is taken apart, fields without a form go into the text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sartor.core.errors import SourceError
from sartor.core.records import Message, Part
from sartor.core.reply_markup import is_from_text
from sartor.models.markup import Markup


def shield_messages(markup: Markup, messages: Sequence[Message]) -> list[Message]:
    """Return messages with every text shielded. Those that spell no markup are the very same."""
    return [_shielded(markup, message) for message in messages]


def shield_json(markup: Markup, text: str) -> str:
    """Return JSON text with every text in it shielded; what is no JSON comes back as it is, for the template to refuse."""
    try:
        value = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return text
    shielded = markup.shield_values(value)
    return text if shielded == value else json.dumps(shielded)


def _shielded(markup: Markup, message: Message) -> Message:
    has_fields = message.name or message.tool_calls or message.tool_call_id or message.reasoning_content
    if not has_fields and all(markup.shield(part.text) is part.text for part in message.content):
        return message
    fields: dict[str, Any] = {
        "content": tuple(_shielded_part(markup, part) for part in message.content),
        "name": markup.shield(message.name),
        "tool_calls": shield_json(markup, message.tool_calls),
        "tool_call_id": markup.shield(message.tool_call_id),
        "reasoning_content": markup.shield(message.reasoning_content),
    }
    changed = {name: value for name, value in fields.items() if value != getattr(message, name)}
    return replace(message, **changed) if changed else message


def _shielded_part(markup: Markup, part: Part) -> Part:
    if part.kind != "text":
        return part
    text = markup.shield(part.text)
    return part if text == part.text else Part("text", text)


def in_text(messages: Sequence[Message], *, calls: bool, reasoning: bool) -> list[Message]:
    """Return messages with tool calls, or reasoning, in the text of the reply, in the form in which Sartor reads them.

    Of calls only those that were read from a text (`core/reply_markup.py`) go back there.
    """
    if not any(message.reasoning_content or message.tool_calls for message in messages):
        return list(messages)
    return [_in_text(message, calls, reasoning) for message in messages]


def _in_text(message: Message, calls: bool, reasoning: bool) -> Message:
    if message.reasoning_content and reasoning:
        lead = Part("text", f"<think>\n{message.reasoning_content}\n</think>\n\n")
        message = replace(message, content=(lead, *message.content), reasoning_content="")
    if message.tool_calls and calls and is_from_text(_loads(message.tool_calls)):
        said = calls_as_text(message.tool_calls, ascii_only=False)
        end = Part("text", f"\n{said}" if message.text else said)
        message = replace(message, content=(*message.content, end), tool_calls="")
    return message


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def calls_as_text(tool_calls: str, *, ascii_only: bool = True) -> str:
    """Return tool calls (JSON text of OpenAI's list) as a reply spells them where the template has no form of its own.

    Raises SourceError for JSON of another form.
    """
    try:
        calls = [call["function"] for call in json.loads(tool_calls)]
        said = [
            json.dumps({"name": call["name"], "arguments": call.get("arguments", {})}, ensure_ascii=ascii_only)
            for call in calls
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"tool_calls has another form than OpenAI's: {error!r}", "send tool_calls as they were replied"
        ) from None
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in said)


def reply_text(message: Message) -> str:
    """Return the text of a reply with its tool calls, as most templates write them; without those of another form."""
    if not message.tool_calls:
        return message.text
    try:
        calls = calls_as_text(message.tool_calls, ascii_only=False)
    except SourceError:
        return message.text
    return f"{message.text}\n{calls}" if message.text else calls


def with_content(message: Message, content: Any) -> dict[str, Any]:
    """Return a message as chat templates expect it."""
    plain: dict[str, Any] = {"role": message.role, "content": content}
    if message.name:
        plain["name"] = message.name
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = json.loads(message.tool_calls)
    if message.reasoning_content:
        plain["reasoning_content"] = message.reasoning_content
    return plain
