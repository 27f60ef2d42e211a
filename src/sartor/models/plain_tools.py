"""Tools in plain turns, for chat templates that do not write them.

The system turn declares the tools with TOOLS_TEXT, calls of earlier turns have the form that it asks for, and tool
results stand in user turns. Training rows and requests are rendered by the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sartor.core.errors import SourceError
from sartor.core.records import Message, Part
from sartor.models.content_shielding import calls_as_text

TOOLS_TEXT = (
    "You may call functions to answer. These are declared, with their parameters as JSON "
    "Schema:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write its name and arguments as JSON, and nothing after the last call:\n"
    '<tool_call>\n{{"name": "...", "arguments": {{...}}}}\n</tool_call>'
)
TOOLS_EXAMPLE = '"tools": [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]'


def uses_tools(messages: Sequence[Message], tools: str) -> bool:
    """Return whether a conversation declares tools, calls one, or holds a tool's result."""
    return bool(tools) or any(message.tool_calls or message.role == "tool" for message in messages)


def plain_conversations(messages: Sequence[Message], tools: str) -> Iterator[list[Message]]:
    """Yield the conversation without fields of tools: declared in the system turn, then in the first user turn.

    messages: shielded. tools: JSON text of OpenAI's list, shielded; empty for none.
    The second form is for templates that refuse a system turn. Raises SourceError for calls and tools in another form.
    """
    plain = _in_plain_turns(messages)
    if not tools:
        yield plain
        return
    try:
        declared = [json.dumps(tool.get("function", tool)) for tool in json.loads(tools)]
    except (ValueError, RecursionError, TypeError, AttributeError):
        raise SourceError("`tools` is no list of declarations in OpenAI's form", TOOLS_EXAMPLE) from None
    note = TOOLS_TEXT.format(tools="\n".join(declared))
    yield _noted(plain, note, "system")
    yield _noted(plain, note, "user")


def _in_plain_turns(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with calls and tool results as text of assistant and user turns.

    Adjacent tool results share one turn.
    """
    turns: list[Message] = []
    is_tool_result = False
    for message in messages:
        text, role = message.text, message.role
        if message.role == "tool":
            text, role = f"<tool_response>\n{text}\n</tool_response>", "user"
            if is_tool_result:
                text = f"{turns.pop().text}\n{text}"
        if message.tool_calls:
            calls = calls_as_text(message.tool_calls, ascii_only=False)
            text = f"{text}\n{calls}" if text else calls
        is_tool_result = message.role == "tool"
        if any(part.kind != "text" for part in message.content):
            turns.append(message)
        else:
            content = (Part("text", text),)
            turns.append(replace(message, role=role, content=content, name="", tool_calls="", tool_call_id=""))
    return turns


def _noted(messages: Sequence[Message], note: str, role: str) -> list[Message]:
    """Return the messages with a note added to the role's turn.

    A system note is appended to a leading system turn or becomes a turn of its own. A user note is placed before the
    text of the first user turn.
    """
    first = next((index for index, message in enumerate(messages) if message.role == role), None)
    if first is None or (role == "system" and first):
        return [Message.of(role, note), *messages]
    content = messages[first].content
    noted = Message(
        role, (*content, Part("text", f"\n\n{note}")) if role == "system" else (Part("text", f"{note}\n\n"), *content)
    )
    return [*messages[:first], noted, *messages[first + 1 :]]
