"""The prompts of a receipt: what the Release's Dataset holds out, else its Report's rows; topped up with generic ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from sartor.core.artifacts import Artifact
from sartor.core.errors import SourceError
from sartor.core.lineage import ancestry
from sartor.core.records import Message
from sartor.evaluate.predictions import held_out
from sartor.models.chat import Chat

LEAST = 50
# where nothing else is left of what a Release was made of; ordinary questions in ordinary words
_ASKED = (
    "What is {}?",
    "Explain {} to a child.",
    "Give three facts about {}.",
    "Why do people need {}?",
    "Write one sentence about {}.",
    "Is {} new or old?",
)
_ABOUT = ("water", "a contract", "electricity", "bread", "a bridge", "music", "a calendar", "trade", "a clock")


@dataclass(frozen=True)
class Asked:
    """A conversation that waits for a reply, its token ids, and where it is from."""

    messages: tuple[Message, ...]
    tools: str
    ids: tuple[int, ...]
    source: str
    # other runtimes read markup that a text spells as markup
    spells_markup: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether roles and texts are all of it: no tools, which each runtime writes in its own way, and no markup."""
        return (
            not self.tools
            and not self.spells_markup
            and not any(one.tool_calls or one.tool_call_id or one.name for one in self.messages)
        )

    def as_json(self) -> list[dict[str, Any]]:
        """The conversation in OpenAI's form."""
        return [{"role": message.role, "content": message.text} for message in self.messages]


def choose(release: Artifact, chat: Chat, count: int = LEAST) -> list[Asked]:
    """`count` prompts (fewer are topped up with generic ones). Those that the chat template refuses are passed over."""
    found: dict[tuple[int, ...], Asked] = {}
    system = str(release.manifest.get("system_prompt", ""))
    for source, messages, tools in [*_held_out(release, count), *_generic(system)]:
        if len(found) == count:
            break
        try:
            ids = tuple(chat.prompt_ids(messages, tools))
        except SourceError:
            continue
        spells = any(chat.markup.spelt(message.text) for message in messages)
        found.setdefault(ids, Asked(tuple(messages), tools, ids, source, spells))
    return list(found.values())


Found = list[tuple[str, Sequence[Message], str]]


def _held_out(release: Artifact, count: int) -> Found:
    """Rows that were not trained on: of the Dataset where it stands, else what the Report inside the Release asked."""
    if ancestry.find_parent(release, "dataset") is not None:
        try:
            examples = held_out(release, None, 4 * count, release.path).examples
        except SourceError:  # it holds nothing out
            examples = []
        return [("held-out rows", one.prompt, one.tools) for one in examples if not one.is_document and one.prompt]
    system = str(release.manifest.get("system_prompt", ""))
    table = pq.read_table(release.path / "report" / "rows.parquet", columns=["prompt"])
    return [("rows of the Report", _turns(system, text), "") for text in table["prompt"].to_pylist() if text]


def _generic(system: str) -> Found:
    return [("generic prompts", _turns(system, form.format(thing)), "") for thing in _ABOUT for form in _ASKED]


def _turns(system: str, text: str) -> list[Message]:
    return [*([Message.of("system", system)] if system else []), Message.of("user", text)]
