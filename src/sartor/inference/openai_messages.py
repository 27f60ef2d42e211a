"""Turns in OpenAI's form as Messages: of requests, and of replies that are traced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sartor.core.errors import RequestError
from sartor.core.records import ROLES, Message, Part
from sartor.media.content_parts import MEDIA, is_media, url_in

_REMEDY = '{"role": "user", "content": "..."}'


def read_message(fields: Any, index: int) -> Message:
    """Return a turn of a request. Raises RequestError if it does not have OpenAI's form."""
    role = fields.get("role") if isinstance(fields, Mapping) else None
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise RequestError(f"messages[{index}] has the role {role!r:.80}; roles are {', '.join(ROLES)}", _REMEDY)
    name, tool_call_id = fields.get("name") or "", fields.get("tool_call_id") or ""
    if not isinstance(name, str) or not isinstance(tool_call_id, str):
        raise RequestError(f"messages[{index}] has a name or tool_call_id that is no text", _REMEDY)
    calls = _calls(fields.get("tool_calls"), index)
    reasoning = fields.get("reasoning_content") or fields.get("reasoning")  # the name of newer vLLM and OpenRouter
    content = _content(fields.get("content"), index, bool(calls))
    return Message(
        role,
        content,
        name=name,
        tool_calls=calls,
        tool_call_id=tool_call_id,
        reasoning_content=reasoning if isinstance(reasoning, str) else "",
    )


def _content(content: Any, index: int, may_lack: bool) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part("text", content),)
    if content is None and may_lack:
        return (Part("text"),)
    if not isinstance(content, list | tuple):
        raise RequestError(f"messages[{index}] has a content of type {type(content).__name__}", _REMEDY)
    return tuple(_part(part, index) for part in content)


def _part(part: Any, index: int) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if not isinstance(text := part.get("text"), str):
            raise RequestError(f"messages[{index}] holds a part without text", '{"type": "text", "text": "..."}')
        return Part("text", text)
    if not is_media(part):
        problem = f"messages[{index}] holds a part of type {kind!r:.80}; known are text, image_url and input_audio"
        raise RequestError(problem, '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}')
    medium, url = MEDIA[part["type"]], url_in(part)
    if not url:
        problem = f"the {medium} in messages[{index}] is no data URL, and nothing is fetched for a request"
        raise RequestError(problem, f"send the bytes: data:{medium}/...;base64,...")
    return Part(medium, media=url)


def _calls(tool_calls: Any, index: int) -> str:
    """Return earlier tool calls as JSON; empty for none.

    Their arguments become the mappings that templates expect.
    """
    if not tool_calls:
        return ""
    if not isinstance(tool_calls, list | tuple):
        raise _wrong_call(index)
    calls = []
    for call in tool_calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _wrong_call(index)
        calls.append({**call, "function": {**function, "arguments": _mapping(function.get("arguments"))}})
    return json.dumps(calls)


def _wrong_call(index: int) -> RequestError:
    return RequestError(
        f"messages[{index}] has a tool call without a function's name", "send tool_calls as they were replied"
    )


def _mapping(arguments: Any) -> Any:
    """Return arguments parsed to a mapping; unchanged if they do not parse to one."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, Mapping) else arguments
