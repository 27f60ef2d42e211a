"""What may not straddle a split: a name for what a row asks, and for the conversation that it is of."""

from __future__ import annotations

from dataclasses import replace

from sartor.core.records import Example, digest


def prompt_group(row: Example) -> str:
    """A name for what the row asks: rows with the same user turns share it, and rows about the same pictures and recordings,
    whatever they ask of them: a picture that is held out must not be one that was trained on.
    """
    if row.is_document:
        return row.id
    prompt = [message for message in row.messages if message.role == "user"]
    if media := [part.plain() for message in prompt for part in message.content if part.media]:
        return f"media:{digest(media)[:16]}"
    return f"prompt:{digest([message.plain() for message in prompt])[:16]}"


def conversation_group(row: Example) -> str:
    """A name for the conversation: that of its first question, which is the prompt's own where it asks one thing."""
    first = next((place for place, message in enumerate(row.messages) if message.role == "user"), len(row.messages) - 1)
    return prompt_group(replace(row, messages=(*row.messages[: first + 1], row.messages[-1])))
