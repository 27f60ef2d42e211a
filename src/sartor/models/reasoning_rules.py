"""Rules for the reasoning of training rows: which turns keep it, and what a template writes of it.

    keep   every reply's reasoning; a row of which the template leaves some out is refused
    last   that of the replies after the last user turn, with the tool calls between them; earlier reasoning is dropped
    drop   none

`last` is what templates of reasoning models (Qwen 3, SmolLM 3) do themselves, as clients do not send reasoning back:
in the prompt of a later turn there is none, and the model has to answer without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sartor.core.errors import SourceError
from sartor.core.records import Example, Message
from sartor.models.chat import ChatTokenizer

# keys of the counts that a plan and a manifest show
KEPT, DROPPED, AS_TEXT = "kept", "dropped", "written_as_text"


def with_reasoning_rule(example: Example, rule: str, chat: ChatTokenizer, counts: Counter[str]) -> Example:
    """Return the row with the reasoning that the recipe keeps; itself if it has none.

    rule: keep, last or drop (`data.reasoning`).
    counts: receives the rows with reasoning that is kept, dropped, or written as text by a template without a place
    for it; a row may count in several.
    Raises SourceError for a row whose template leaves out reasoning that is to be kept.
    """
    turns = [*example.messages, *example.rejected]
    if not any(turn.reasoning_content for turn in turns):
        return example
    messages = _kept(example.messages, rule)
    rejected = _kept(example.rejected, rule)
    kept = [turn.reasoning_content for turn in (*messages, *rejected) if turn.reasoning_content]
    result = example
    if len(kept) < sum(bool(turn.reasoning_content) for turn in turns):
        counts[DROPPED] += 1
        result = replace(example, messages=messages, rejected=rejected)
        vars(result)["id"] = example.id  # the row keeps the id that it has in its Dataset
    if kept:
        _check_written(result, chat, rule)
        counts[KEPT] += 1
        if not chat.probed.writes_reasoning:
            counts[AS_TEXT] += 1
    return result


def _kept(messages: tuple[Message, ...], rule: str) -> tuple[Message, ...]:
    """Return the turns without the reasoning that a rule drops."""
    if rule == "keep":
        return messages
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    first = len(messages) if rule == "drop" else last_user + 1
    return (*(replace(message, reasoning_content="") for message in messages[:first]), *messages[first:])


def _check_written(example: Example, chat: ChatTokenizer, rule: str) -> None:
    """Raise SourceError unless the template writes all reasoning of the row."""
    for messages in _conversations(example):
        text = chat.markup.opened(chat.conversation(messages, example.tools).text).text
        if any(message.reasoning_content.strip() not in text for message in messages):
            raise SourceError(
                f"it leaves out reasoning that data.reasoning={rule} keeps; take last, or drop",
                "--data.reasoning last, or --data.reasoning drop",
            )


def _conversations(example: Example) -> list[Sequence[Message]]:
    with_rejected = [(*example.prompt, *example.rejected)] if example.rejected else []
    return [example.messages, *with_rejected]
