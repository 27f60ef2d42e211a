"""The body of a chat completion, streamed as server-sent events or whole -> an Answer; half of one is no answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sartor.core.teachers import Answer, Finish

MOST_BYTES = 8 << 20
DONE = "[DONE]"


class BrokenError(Exception):
    """A body that ended early or is not what the protocol says: to be asked for again."""


def read_body(lines: Iterable[bytes], kind: str) -> Answer:
    """The Answer in a body of that content type. Raises BrokenError."""
    if "event-stream" in kind:
        return _streamed(lines)
    whole = _object(b"".join(_bounded(lines)).decode("utf-8", "replace"))
    choice = _choice(whole)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    return _answer(text if isinstance(text, str) else "", choice.get("finish_reason"), whole.get("usage"))


def _streamed(lines: Iterable[bytes]) -> Answer:
    pieces: list[str] = []
    finish: Any = None
    usage: Any = None
    for line in _bounded(lines):
        said = line.decode("utf-8", "replace").strip()
        if not said.startswith("data:"):
            continue
        data = said.removeprefix("data:").strip()
        if data == DONE:
            break
        event = _object(data)
        usage = event.get("usage") or usage
        if not event.get("choices"):
            continue  # the usage comes in an event of its own
        choice = _choice(event)
        delta = choice.get("delta")
        content = delta.get("content") if isinstance(delta, dict) else None
        pieces.append(content if isinstance(content, str) else "")
        finish = choice.get("finish_reason") or finish
    return _answer("".join(pieces), finish, usage)


def _bounded(lines: Iterable[bytes]) -> Iterable[bytes]:
    total = 0
    for line in lines:
        total += len(line)
        if total > MOST_BYTES:
            raise BrokenError(f"more than {MOST_BYTES:,} bytes")
        yield line


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BrokenError(f"{text[:60]!r} is not JSON") from None
    if not isinstance(value, dict):
        raise BrokenError(f"{text[:60]!r} is no JSON object")
    if "error" in value:
        raise BrokenError(f"the server says {str(value['error'])[:200]}")
    return value


def _choice(value: dict[str, Any]) -> dict[str, Any]:
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BrokenError("there is no choice in it")
    return choices[0]


def _answer(text: str, finish: Any, usage: Any) -> Answer:
    if not isinstance(finish, str):
        raise BrokenError("it ended without saying why")
    known: dict[str, Finish] = {"length": "length", "content_filter": "refused"}
    counts = usage if isinstance(usage, dict) else {}
    tokens = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if all(isinstance(count, int) for count in tokens):
        return Answer(text, known.get(finish, "stop"), int(tokens[0] or 0), int(tokens[1] or 0))
    return Answer(text, known.get(finish, "stop"), 0, 0, is_estimated=True)
