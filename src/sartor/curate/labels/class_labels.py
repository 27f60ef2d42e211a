"""Class label of a row, found in its reply."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sartor.core.errors import ConfigError
from sartor.core.records import canonical_text

# Preferred names if several fields could be the label, in order; otherwise the first field in the replies is taken.
NAMES = ("intent", "label", "category", "class", "sentiment", "topic", "type", "answer")
ENOUGH = 0.5  # least fraction of rows that must have a label of the form that `auto` chooses
REPEATED = 3.0  # least mean number of rows per label
SHORT_WORDS, SHORT_CHARACTERS = 6, 80  # longest reply that may be a label as a whole
SENTENCE_WORDS = 4  # from this many words, a closing full stop makes a reply a sentence and no label
ONCE = 0.05  # fraction of distinct labels with one row; above it, they are answers, not labels
DEPTH = 3  # levels of nested objects whose fields are considered
_FENCE = re.compile(r"^```[\w-]*\s*\n(.*?)\n?```\s*$", re.DOTALL)


@dataclass(frozen=True)
class ClassLabels:
    """Labels of N rows.

    labels: label of each row; None if it has none.
    form: the form that was used, such as `json:intent`. explanation: a sentence on it.
    others: forms that would also do.
    spelling: label -> its spelling in the first row that has it.
    """

    labels: list[str | None]
    form: str
    explanation: str
    others: tuple[str, ...] = ()
    spelling: Mapping[str, str] = field(default_factory=dict)


def check(form: str, option: str = "label:") -> None:
    """Raise ConfigError unless `form` is auto, reply, text, json:KEY or regex:PATTERN.

    option: as it is written before its value, for the error.
    """
    kind, _, rest = form.partition(":")
    name = option.rstrip(":")
    if form in ("auto", "reply", "text") or (kind == "json" and rest):
        return
    if kind == "regex" and rest:
        try:
            re.compile(rest)
        except re.error as error:
            raise ConfigError(
                f"{name}: the pattern {rest!r} does not compile: {error}",
                rf"{option} 'regex:Label: (\w+)', or another pattern that Python's re compiles",
            ) from None
        return
    raise ConfigError(f"{name} is {form!r}", f"{option} auto, or one of reply, text, json:KEY and regex:PATTERN")


def find(replies: Sequence[str], form: str = "auto") -> ClassLabels:
    """Return the labels of N replies. With the form `text` no row has one."""
    kind, _, rest = form.partition(":")
    if form == "auto":
        return _auto(replies)
    if form == "text":
        return ClassLabels([None] * len(replies), form, "as the recipe says: replies are free text")
    reader: Callable[[str], str | None] = as_label
    if kind == "json":
        reader = _json_reader(rest)
    elif kind == "regex":
        reader = _pattern_reader(rest)
    labels = [reader(reply) for reply in replies]
    return ClassLabels(
        labels, form, _explanation(labels, "as the recipe says"), spelling=_spelling(labels, replies, form)
    )


def as_label(text: str) -> str | None:
    """Return a reply as a label, ignoring case, spaces and closing punctuation; None if nothing is left."""
    return " ".join(text.casefold().split()).strip(" .!,;:\"'`*") or None


def with_label(reply: str, form: str, label: str) -> str | None:
    """Return a reply with another label in the part that `form` names; None if it has no such part."""
    if form == "reply":
        return label
    kind, _, name = form.partition(":")
    text = reply.strip()
    fenced = _FENCE.match(text)
    body = fenced.group(1).strip() if fenced else text
    if kind != "json" or name not in (_object(reply) or {}):
        return None
    row = json.loads(body)
    _put(row, name, label)
    new_body = json.dumps(row, ensure_ascii=False)
    return text.replace(body, new_body, 1) if fenced else new_body


def _put(row: dict[str, Any], name: str, label: str) -> None:
    """Set the field `outer.inner` to a value of its own type. A key may itself contain a full stop."""
    if name in row:
        row[name] = label if isinstance(row[name], str) else json.loads(label)
        return
    outer = next(key for key in row if name.startswith(f"{key}.") and isinstance(row[key], dict))
    _put(row[outer], name[len(outer) + 1 :], label)


def _auto(replies: Sequence[str]) -> ClassLabels:
    objects = [_object(reply) for reply in replies]
    field_names = list(_json_fields(objects, len(replies)))
    if field_names:
        best = min(field_names, key=lambda name: (_rank(name), field_names.index(name)))
        labels = [None if row is None or best not in row else _value(row[best]) for row in objects]
        others = tuple(f"json:{name}" for name in field_names if name != best)
        return ClassLabels(labels, f"json:{best}", _explanation(labels, f"the field {best!r} of JSON replies"), others)
    labels = [as_label(reply) if _is_short(reply) else None for reply in replies]
    if _is_labelling(labels, len(replies)):
        label_counts = Counter(labels)
        single_count = sum(label is not None and count == 1 for label, count in label_counts.items())
        if single_count > ONCE * len(labels):  # labels mixed with answers: a reply that occurs once is an answer
            labels = [label if label_counts[label] > 1 else None for label in labels]
        spelling = _spelling(labels, replies, "reply")
        return ClassLabels(labels, "reply", _explanation(labels, "short replies, as a whole"), spelling=spelling)
    reason = "no field of a JSON reply and no short reply has few, repeated values: replies are compared as free text"
    return ClassLabels([None] * len(replies), "text", reason)


def _rank(name: str) -> int:
    """Return the position in NAMES of the first of the field's parts that stands there; len(NAMES) if none does."""
    parts = [part.casefold() for part in name.split(".")]
    return min((NAMES.index(part) for part in parts if part in NAMES), default=len(NAMES))


def _spelling(labels: Sequence[str | None], replies: Sequence[str], form: str) -> dict[str, str]:
    spelling: dict[str, str] = {}
    if form == "reply":
        for label, reply in zip(labels, replies, strict=True):
            if label is not None:
                spelling.setdefault(label, reply.strip())
    return spelling


def _json_fields(objects: Sequence[Mapping[str, Any] | None], rows: int) -> Iterable[str]:
    """Yield the fields that could be a label, in order of first appearance."""
    values: dict[str, Counter[str]] = {}
    for row in objects:
        for name, value in (row or {}).items():
            if isinstance(value, (str, bool, int)) and len(str(value)) <= SHORT_CHARACTERS:
                values.setdefault(name, Counter())[_value(value)] += 1
    present = sum(1 for row in objects if row is not None)
    for name, value_counts in values.items():
        total = value_counts.total()
        if total >= ENOUGH * rows and total >= 0.8 * present and 2 <= len(value_counts) <= total / REPEATED:
            yield name


def _is_labelling(labels: Sequence[str | None], rows: int) -> bool:
    label_counts = Counter(label for label in labels if label is not None)
    repeat_counts = [count for count in label_counts.values() if count > 1]
    return (
        sum(repeat_counts) >= ENOUGH * rows
        and len(label_counts) >= 2
        and sum(repeat_counts) >= REPEATED * len(repeat_counts)
    )


def _is_short(reply: str) -> bool:
    words = len(reply.split())
    is_sentence = words >= SENTENCE_WORDS and reply.rstrip()[-1] in ".!?…。！？।"  # noqa: RUF001
    return len(reply) <= SHORT_CHARACTERS and words <= SHORT_WORDS and not is_sentence


def _explanation(labels: Sequence[str | None], description: str) -> str:
    label_counts = Counter(label for label in labels if label is not None)
    return f"{description}: {len(label_counts):,} values in {label_counts.total():,} of {len(labels):,} rows"


def _json_reader(name: str) -> Callable[[str], str | None]:
    def read(reply: str) -> str | None:
        row = _object(reply)
        if row is None or name not in row:
            return None
        return _value(row[name])

    return read


def _pattern_reader(pattern: str) -> Callable[[str], str | None]:
    compiled = re.compile(pattern)

    def read(reply: str) -> str | None:
        match = compiled.search(reply)
        if match is None:
            return None
        return as_label(match.group(1 if compiled.groups else 0) or "")

    return read


def _object(reply: str) -> dict[str, Any] | None:
    """Return the JSON object of a reply, with nested fields as `outer.inner`; None if there is none.

    An object in a code fence counts as well.
    """
    text = reply.strip()
    fenced = _FENCE.match(text)
    if fenced:
        text = fenced.group(1).strip()
    if not text.startswith("{"):
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return dict(_flat(row, "", DEPTH)) if isinstance(row, dict) else None


def _flat(row: Mapping[str, Any], prefix: str, depth: int) -> Iterable[tuple[str, Any]]:
    for key, value in row.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict) and depth > 1:
            yield from _flat(value, f"{prefix}{key}.", depth - 1)


def _value(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else canonical_text(value)
