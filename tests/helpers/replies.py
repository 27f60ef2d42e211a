"""What an engine says to calls, taken to their end."""

from __future__ import annotations

from collections.abc import Sequence

from sartor.inference.engine import Engine, Event, GenerateCall, ReplyFailed, TextDelta


def replies(engine: Engine, asked: Sequence[GenerateCall]) -> dict[str, str]:
    """The text of each call by its id; of one that failed, the kind of its failure in angle brackets."""
    for call in asked:
        engine.submit(call)
    said = {call.id: "" for call in asked}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, TextDelta):
                said[event.call] += event.text
            elif isinstance(event, ReplyFailed):
                said[event.call] = f"<{event.kind}>"
    return said


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))
