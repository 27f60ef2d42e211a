"""Shielding of content: keeps markup out of its token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sartor.core.errors import SourceError
from sartor.core.records import Message, Part
from sartor.core.reply_markup import is_from_text
from sartor.models.template_markup import TemplateMarkup


def shield_messages(markup: TemplateMarkup, messages: Sequence[Message]) -> list[Message]:
    """Return messages with every text shielded. Messages that spell no markup are the same objects."""
    return [_shielded(markup, message) for message in messages]


def shield_json(markup: TemplateMarkup, text: str) -> str:
    """Return JSON text with every string in it shielded.

    Invalid JSON is returned unchanged, for the template to refuse.
    """
    try:
        value = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return text
    shielded = markup.shield_values(value)
    return text if shielded == value else json.dumps(shielded)


def _shielded(markup: TemplateMarkup, message: Message) -> Message:
    """Return a message with its text parts and fields shielded; the same object if it spells no markup."""
    has_fields = message.name or message.tool_calls or message.tool_call_id or message.reasoning_content
    if not has_fields and all(markup.shield(part.text) is part.text for part in message.content):
        return message
    content = []
    for part in message.content:
        text = markup.shield(part.text) if part.kind == "text" else part.text
        content.append(part if text == part.text else Part("text", text))
    fields: dict[str, Any] = {
        "content": tuple(content),
        "name": markup.shield(message.name),
        "tool_calls": shield_json(markup, message.tool_calls),
        "tool_call_id": markup.shield(message.tool_call_id),
        "reasoning_content": markup.shield(message.reasoning_content),
    }
    changed = {name: value for name, value in fields.items() if value != getattr(message, name)}
    return replace(message, **changed) if changed else message


def in_text(messages: Sequence[Message], *, calls: bool, reasoning: bool) -> list[Message]:
    """Return messages with tool calls, or reasoning, moved into the text of the reply.

    They are written in the form in which Sartor reads them. Only calls that were read from a text
    (`core/reply_markup.py`) are moved.
    """
    if not any(message.reasoning_content or message.tool_calls for message in messages):
        return list(messages)
    return [_in_text(message, calls, reasoning) for message in messages]


def _in_text(message: Message, calls: bool, reasoning: bool) -> Message:
    """Return a message with its reasoning before its text, and its calls behind it, as flagged."""
    if message.reasoning_content and reasoning:
        lead = Part("text", f"<think>\n{message.reasoning_content}\n</think>\n\n")
        message = replace(message, content=(lead, *message.content), reasoning_content="")
    if message.tool_calls and calls and is_from_text(_loads(message.tool_calls)):
        calls_text = calls_as_text(message.tool_calls, ascii_only=False)
        end = Part("text", f"\n{calls_text}" if message.text else calls_text)
        message = replace(message, content=(*message.content, end), tool_calls="")
    return message


def with_typed_calls(message: Message, *, as_text: bool = False) -> Message:
    """Return the message with its calls' arguments as JSON objects, which chat templates expect; types are kept.

    as_text: with arguments as JSON text instead, for templates that insert them verbatim.
    Arguments that are no object, and calls of another form than OpenAI's, stay as they are.
    """
    calls = _loads(message.tool_calls) if message.tool_calls else None
    if not isinstance(calls, list):
        return message
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and "arguments" in function:
            arguments = function["arguments"]
            value = _loads(arguments) if isinstance(arguments, str) else arguments
            if isinstance(value, dict):
                arguments = json.dumps(value, ensure_ascii=False) if as_text else value
                call = {**call, "function": {**function, "arguments": arguments}}
        result.append(call)
    return message if result == calls else replace(message, tool_calls=json.dumps(result, ensure_ascii=False))


def _loads(text: str) -> Any:
    """Return the value of JSON text; None if it is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def calls_as_text(tool_calls: str, *, ascii_only: bool = True) -> str:
    """Return tool calls as a reply spells them if the template has no form of its own.

    tool_calls: JSON text of OpenAI's list. Raises SourceError for JSON of another form.
    """
    try:
        calls = [call["function"] for call in json.loads(tool_calls)]
        encoded_calls = [
            json.dumps({"name": call["name"], "arguments": call.get("arguments", {})}, ensure_ascii=ascii_only)
            for call in calls
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"tool_calls has another form than OpenAI's: {error!r}", "send tool_calls as they were replied"
        ) from None
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in encoded_calls)


def reply_text(message: Message) -> str:
    """Return the text of a reply with its tool calls, as most templates write them.

    Calls of another form than OpenAI's are left out.
    """
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


Piece = tuple[int, int, int]  # token, start, end
# Anchors put before a text that continues in the middle of a word. The first one is taken across whose end no token
# runs
_ANCHORS = ("\ue002", ".", "a", "\n")


def pieces_of(tokenizer: Any, text: str, cuts: Sequence[int] = (), *, is_first: bool) -> list[Piece]:
    """Return (token, start, end) as the tokenizer gives them, without a leading space behind media.

    cuts: positions that no token may cross. Raises SourceError if the tokenizer cannot be made to respect one.
    """
    if not cuts:
        opening = "" if is_first or not text else str(tokenizer.eos_token)
        encoding = tokenizer(opening + text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        skip = len(opening)
        return [(token, max(start - skip, 0), end - skip) for token, (start, end) in tokens if end > skip or not skip]
    pieces = pieces_of(tokenizer, text[: cuts[0]], is_first=is_first)
    ends = [*cuts[1:], len(text)]
    parts = _behind(tokenizer, [text[start:end] for start, end in zip(cuts, ends, strict=True)])
    for cut, part in zip(cuts, parts, strict=True):
        pieces += [(token, cut + start, cut + end) for token, start, end in part]
    return pieces


def _behind(tokenizer: Any, texts: Sequence[str]) -> list[list[Piece]]:
    """Return the tokens of texts that each continue in the middle of a word.

    No tokenizer adds its leading space there. Raises SourceError if every anchor merges with the text.
    """
    results: dict[str, list[Piece]] = {}
    for anchor in _ANCHORS:
        missing = list(dict.fromkeys(text for text in texts if text not in results))
        if not missing:
            break
        coded = tokenizer([anchor + text for text in missing], add_special_tokens=False, return_offsets_mapping=True)
        for text, ids, offsets in zip(missing, coded["input_ids"], coded["offset_mapping"], strict=True):
            pieces = [(token, start - 1, end - 1) for token, (start, end) in zip(ids, offsets, strict=True) if end > 1]
            if all(start >= 0 for _, start, _ in pieces):
                results[text] = pieces
    if missing := [text for text in texts if text not in results]:
        problem = f"the tokenizer cannot go on with {missing[0][:80]!r} behind the beginning of a control token"
        raise SourceError(problem, "take control tokens out of the text")
    return [results[text] for text in texts]
