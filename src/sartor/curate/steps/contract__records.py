"""Part of curate.steps.contract."""

from __future__ import annotations

from sartor.core.records import Drop, Example

TEXT_KEPT = 2000  # characters of a row that a Drop holds as evidence


def dropped(example: Example, reason: str, detail: str, *, step: str) -> Drop:
    """The Drop of an Example: id, place and detail, and the start of its text as evidence."""
    origin = example.origins[0]
    return Drop(reason, origin.source, origin.locator, detail, step, example.id, text=evidence_text(example))


def evidence_text(example: Example) -> str:
    """The start of a row as a person reads it."""
    return "\n".join(f"{message.role}: {message.text}" for message in example.messages)[:TEXT_KEPT]
