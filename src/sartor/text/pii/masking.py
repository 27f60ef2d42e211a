"""Replacement of personal data in an Example by placeholders."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sartor.core.records import Example, Message, Origin
from sartor.text.pii.entities import BREAK, PLACEHOLDER, PiiEntity
from sartor.text.pii.example_layout import ExampleLayout, TextSlot, joints, lay_out_example, plain_text, replace_texts
from sartor.text.pii.scanner import Scanner

# A placeholder may be shorter than the value, which can bring a context word close enough to another number. Scanning
# is repeated until nothing is found, so that masking a masked text changes nothing.
MOST_PASSES = 8
LETTERS = str.maketrans("0123456789", "ghijklmnop")  # a digest with digits could be detected as a number
SHOWN = 20  # findings that a detail lists


@dataclass(frozen=True)
class Hit:
    """Part of a finding within one slot.

    slot: number of the slot.
    start, end: range in the slot's text.
    goes_on: whether the finding began in an earlier part.
    """

    slot: int
    start: int
    end: int
    finding: PiiEntity
    goes_on: bool = False


@dataclass(frozen=True)
class RowEntities:
    """Hits of a row in order, with its texts."""

    layout: ExampleLayout
    hits: tuple[Hit, ...]

    def slot(self, hit: Hit) -> TextSlot:
        """Return the slot of a hit."""
        return self.layout.slots[hit.slot]

    def describe(self) -> str:
        """Return kinds and spans, never a value: `email at messages[1].content 12-31; ...`."""
        whole_hits = [hit for hit in self.hits if not hit.goes_on]
        rest = f"; and {len(whole_hits) - SHOWN} more" if len(whole_hits) > SHOWN else ""
        return "; ".join(self._describe_hit(hit) for hit in whole_hits[:SHOWN]) + rest

    def _describe_hit(self, hit: Hit) -> str:
        slot = self.slot(hit)
        start, end = hit.start, hit.end
        if slot.leaf is not None:  # escapes may change positions within JSON, so the span is that of the whole string
            for part in self.layout.json[slot.location]:
                if any(leaf is slot.leaf for leaf in part.plain()):
                    start, end = part.start, part.end
        subtype = "" if hit.finding.subtype == hit.finding.entity else f" ({hit.finding.subtype})"
        return f"{hit.finding.entity}{subtype} at {slot.name} {start}-{end}"


def find_in_row(scanner: Scanner, example: Example, *, escapes: bool = False) -> RowEntities:
    """Find personal data in the texts of a row.

    The texts are scanned together, so words of one field are context for the next.
    """
    plain = None if escapes else plain_text(example)
    if plain is not None and not scanner.find(plain):
        return NOTHING  # most rows; they need no layout
    layout = lay_out_example(example)
    starts = [0]
    for slot in layout.slots:
        starts.append(starts[-1] + len(slot.text) + 1)
    hits = []
    for finding in scanner.find(BREAK.join(slot.text for slot in layout.slots), escapes=escapes):
        number = bisect_right(starts, finding.start) - 1
        hits.append(Hit(number, finding.start - starts[number], finding.end - starts[number], finding))
    for numbers in joints(example, layout):
        across = _across(scanner, layout, numbers)
        outside = []
        for hit in hits:
            if not any(hit.slot == other.slot and hit.start < other.end and other.start < hit.end for other in across):
                outside.append(hit)
        hits = outside + across
    return RowEntities(layout, tuple(sorted(hits, key=lambda hit: (hit.slot, hit.start))))


def _across(scanner: Scanner, layout: ExampleLayout, numbers: Sequence[int]) -> list[Hit]:
    """Return the findings that span several parts of a message, such as a number split between two parts."""
    texts = [layout.slots[number].text for number in numbers]
    hits = []
    for finding in scanner.find("".join(texts)):
        begin = 0
        pieces: list[Hit] = []
        for number, text in zip(numbers, texts, strict=True):
            start, end = max(finding.start, begin), min(finding.end, begin + len(text))
            if start < end:
                pieces.append(Hit(number, start - begin, end - begin, finding, goes_on=bool(pieces)))
            begin += len(text)
        if len(pieces) > 1:
            hits += pieces
    return hits


NOTHING = RowEntities(ExampleLayout((), {}), ())


class Placeholders:
    """Placeholders `<EMAIL_1>`, numbered by value within a row, or `<EMAIL>` without numbers."""

    def __init__(self, numbered: bool, texts: Iterable[str]) -> None:
        """Reserve the numbers of placeholders that are already in `texts`."""
        self._numbered = numbered
        self._numbers: dict[tuple[str, str], int] = {}
        self._last: dict[str, int] = {}
        for text in texts:
            if "<" not in text:  # many times faster than the pattern
                continue
            for match in PLACEHOLDER.finditer(text):
                self._last[match[1]] = max(self._last.get(match[1], 0), int(match[2] or 0))

    def of(self, finding: PiiEntity) -> str:
        """Return the placeholder of a finding."""
        name = finding.entity.upper()
        if not self._numbered:
            return f"<{name}>"
        key = (name, finding.value)
        if key not in self._numbers:
            self._last[name] = self._numbers[key] = self._last.get(name, 0) + 1
        return f"<{name}_{self._numbers[key]}>"


def masked(example: Example, row_entities: RowEntities, names: Placeholders) -> Example:
    """Return the row with placeholders for the hits.

    A `group` with a hit becomes its digest, so that different groups stay different.
    """
    changed: dict[int, str] = {}
    by_slot: dict[int, list[Hit]] = {}
    for hit in row_entities.hits:
        by_slot.setdefault(hit.slot, []).append(hit)
    for number, hits in by_slot.items():
        slot = row_entities.layout.slots[number]
        if slot.location[0] == "group":
            changed[number] = f"group-{hashlib.sha256(example.group.encode()).hexdigest()[:16].translate(LETTERS)}"
            continue
        changed[number] = _replaced(slot.text, hits, names)
    return replace_texts(example, row_entities.layout, changed)


def _replaced(text: str, hits: Sequence[Hit], names: Placeholders) -> str:
    pieces: list[str] = []
    at = 0
    for hit in hits:
        pieces += [text[at : hit.start], "" if hit.goes_on else names.of(hit.finding)]
        at = hit.end
    return "".join([*pieces, text[at:]])


def select_hits(row_entities: RowEntities, keep: Callable[[TextSlot, PiiEntity], bool]) -> RowEntities:
    """Return the hits for which `keep` is true."""
    return RowEntities(
        row_entities.layout, tuple(hit for hit in row_entities.hits if keep(row_entities.slot(hit), hit.finding))
    )


def text_masker(scanner: Scanner, numbered: bool, cut_length: int) -> Callable[[str], str]:
    """Return a function that replaces personal data in a text by placeholders; JSON stays JSON.

    A text of `cut_length` characters was cut: its last word may be the first part of a value, so it is removed too.
    """
    origins = (Origin("", ""),)

    def mask(text: str) -> str:
        if len(text) == cut_length:
            text = text[: _last_word(text)] + "..."
        example = Example((Message.of("assistant", text),), origins)
        names = Placeholders(numbered, [text])
        for _ in range(MOST_PASSES):
            row_entities = find_in_row(scanner, example, escapes=True)
            if not row_entities.hits:
                break
            example = masked(example, row_entities, names)
        return example.messages[0].text

    return mask


def _last_word(text: str) -> int:
    """Return the start of the last word of a text, including digits and marks before it.

    It is at most 200 characters from the end.
    """
    position = len(text)
    earliest = max(0, position - 200)
    while position > earliest and (not text[position - 1].isspace() or text[max(0, position - 2)].isdigit()):
        position -= 1
    return position


def entity_counts(row_entities: RowEntities) -> Mapping[str, int]:
    """Return the number of findings by entity and field (`email.reply`)."""
    counts: dict[str, int] = {}
    for hit in row_entities.hits:
        if not hit.goes_on:
            slot = row_entities.slot(hit)
            key = f"{hit.finding.entity}.{'group' if slot.location[0] == 'group' else slot.field}"
            counts[key] = counts.get(key, 0) + 1
    return counts
