"""Layout of all texts of an Example for one scan."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sartor.core.records import Example, Message
from sartor.text.pii.entities import BREAK

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?')
DEEPEST = 8


@dataclass(frozen=True)
class Leaf:
    r"""String or number in JSON text.

    start, end: its range in the JSON text.
    escaped: whether it contains `\u` escapes.
    inner: leaves of a string that is JSON itself, such as `arguments`.
    """

    start: int
    end: int
    text: str
    quoted: bool
    escaped: bool
    inner: tuple[Leaf, ...] = ()

    def plain(self) -> Iterator[Leaf]:
        """Yield the innermost leaves, in order."""
        if not self.inner:
            yield self
        for leaf in self.inner:
            yield from leaf.plain()


def leaves(text: str, deep: int = 0) -> tuple[Leaf, ...] | None:
    """Return the leaves of a JSON object or list; None for any other text."""
    start, end = text[:1], text[-1:]
    if start not in "{[ \n\t\r" or end not in "}] \n\t\r" or text.strip()[:1] not in ("{", "["):
        return None
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    return tuple(_leaf(match, deep) for match in _TOKEN.finditer(text))


def _leaf(match: re.Match[str], deep: int) -> Leaf:
    raw = match[0]
    if raw[0] != '"':
        return Leaf(match.start(), match.end(), text=raw, quoted=False, escaped=False)
    text = json.loads(raw, strict=False)
    inner = leaves(text, deep + 1) if deep < DEEPEST and text[:1] in ("{", "[") else None
    return Leaf(match.start(), match.end(), text=text, quoted=True, escaped="\\u" in raw, inner=inner or ())


def rebuilt(text: str, parts: Sequence[Leaf], changed: dict[int, str]) -> str:
    """Return the JSON text with some leaves changed.

    changed: `id` of a leaf from `plain` -> new text. A changed number becomes a string.
    """
    pieces = []
    at = 0
    for leaf in parts:
        new = changed.get(id(leaf)) if not leaf.inner else rebuilt(leaf.text, leaf.inner, changed)
        if new is None or new == leaf.text:
            continue
        pieces += [text[at : leaf.start], json.dumps(new, ensure_ascii=leaf.escaped)]
        at = leaf.end
    return "".join([*pieces, text[at:]])


FieldName = Literal["prompt", "reply", "system", "tools"]
JSON_BEGINS = frozenset("{[ \n\t\r")
# text fields of a message besides its content
_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
TextLocation = tuple[str, int, str, int]  # ("messages" | "rejected" | "tools" | "group", message, attribute, part)


@dataclass(frozen=True)
class TextSlot:
    """One text of a row.

    leaf: set if the text is a string or number inside JSON.
    """

    location: TextLocation
    field: FieldName
    text: str
    leaf: Leaf | None = None

    @property
    def name(self) -> str:
        """Location for people, such as `messages[2].tool_calls`."""
        section, message, attribute, part = self.location
        if section in ("tools", "group"):
            return section
        return f"{section}[{message}].{attribute}" + (f"[{part}]" if part else "")


@dataclass(frozen=True)
class ExampleLayout:
    """All texts of a row, in order, and the leaves of those that are JSON."""

    slots: tuple[TextSlot, ...]
    json: Mapping[TextLocation, tuple[Leaf, ...]]


def lay_out_example(example: Example) -> ExampleLayout:
    """Return every text of a row except its origins (paths) and media."""
    slots: list[TextSlot] = []
    json: dict[TextLocation, tuple[Leaf, ...]] = {}
    for location, field, text in _texts(example):
        json_leaves = leaves(text) if text[:1] in JSON_BEGINS else None
        if json_leaves is None:
            slots.append(TextSlot(location, field, text))
            continue
        json[location] = json_leaves
        for part in json_leaves:
            slots += [TextSlot(location, field, leaf.text, leaf) for leaf in part.plain()]
    return ExampleLayout(tuple(slots), json)


def plain_text(example: Example) -> str | None:
    """Return the texts of a row joined by BREAK, as its slots would be.

    None if a text may be JSON, a message has several parts or other fields, or the row has tools, a group or a
    rejected reply.
    """
    if example.tools or example.group or example.rejected:
        return None
    texts = []
    for message in example.messages:
        if len(message.content) != 1 or any(getattr(message, name) for name in _FIELDS):
            return None
        text = message.content[0].text
        if text[:1] in JSON_BEGINS:
            return None
        texts.append(text)
    return BREAK.join(texts)


def _texts(example: Example) -> Iterator[tuple[TextLocation, FieldName, str]]:
    if example.tools:
        yield ("tools", 0, "", 0), "tools", example.tools
    last = len(example.messages) - 1
    for number, message in enumerate(example.messages):
        field: FieldName = "prompt"
        if message.role == "system":
            field = "system"
        elif number == last:
            field = "reply"
        yield from _of_message("messages", number, field, message)
    for number, message in enumerate(example.rejected):
        yield from _of_message("rejected", number, "reply", message)
    if example.group:
        yield ("group", 0, "", 0), "prompt", example.group


def _of_message(
    section: str, number: int, field: FieldName, message: Message
) -> Iterator[tuple[TextLocation, FieldName, str]]:
    if message.name:
        yield (section, number, "name", 0), field, message.name
    for index, part in enumerate(message.content):
        if part.text:
            yield (section, number, "content", index), field, part.text
    if message.tool_calls:
        yield (section, number, "tool_calls", 0), field, message.tool_calls
    for name in ("tool_call_id", "reasoning_content"):
        if text := getattr(message, name):
            yield (section, number, name, 0), field, text


def replace_texts(example: Example, layout: ExampleLayout, changed: Mapping[int, str]) -> Example:
    """Return the row with the texts of some slots replaced.

    changed: number of the slot -> new text.
    """
    texts: dict[TextLocation, str] = {}
    by_leaf: dict[TextLocation, dict[int, str]] = {}
    for number, text in changed.items():
        slot = layout.slots[number]
        if slot.leaf is None:
            texts[slot.location] = text
        else:
            by_leaf.setdefault(slot.location, {})[id(slot.leaf)] = text
    for location, new in by_leaf.items():
        texts[location] = rebuilt(_text_at(example, location), layout.json[location], new)
    return replace(
        example,
        messages=_renewed("messages", example.messages, texts),
        rejected=_renewed("rejected", example.rejected, texts),
        tools=texts.get(("tools", 0, "", 0), example.tools),
        group=texts.get(("group", 0, "", 0), example.group),
    )


def _text_at(example: Example, location: TextLocation) -> str:
    section, number, attribute, part = location
    if section in ("tools", "group"):
        return example.tools if section == "tools" else example.group
    message = (example.messages if section == "messages" else example.rejected)[number]
    if attribute == "content":
        return message.content[part].text
    return str(getattr(message, attribute))


def _renewed(section: str, messages: tuple[Message, ...], texts: Mapping[TextLocation, str]) -> tuple[Message, ...]:
    touched = {location[1] for location in texts if location[0] == section}
    return tuple(
        _message(section, number, message, texts) if number in touched else message
        for number, message in enumerate(messages)
    )


def _message(section: str, number: int, message: Message, texts: Mapping[TextLocation, str]) -> Message:
    def new(attribute: str, part: int, old: str) -> str:
        return texts.get((section, number, attribute, part), old)

    fields: dict[str, Any] = {name: new(name, 0, getattr(message, name)) for name in _FIELDS}
    return replace(
        message,
        content=tuple(
            replace(part, text=new("content", index, part.text)) if part.kind == "text" else part
            for index, part in enumerate(message.content)
        ),
        **fields,
    )


def joints(example: Example, layout: ExampleLayout) -> Iterator[list[int]]:
    """Yield the numbers of the slots that together form one message's text, for messages with several."""
    together: dict[tuple[str, int], list[int]] = {}
    for number, slot in enumerate(layout.slots):
        if slot.location[2] == "content" and slot.leaf is None:
            together.setdefault(slot.location[:2], []).append(number)
    yield from (numbers for numbers in together.values() if len(numbers) > 1)
