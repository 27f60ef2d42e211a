"""Demographic group and outcome of each row."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.curate.labels import class_labels
from sartor.curate.labels.class_labels import ClassLabels
from sartor.text.demographics import group_terms

Memberships = dict[str, list[str | None]]
LEXICON = "lexicon"
ROW_GROUP = "group"  # stands for the row's own group if no field has that name
# Default fields, of JSON or of lines `Name: value`, that name groups of people.
FIELDS = (
    "gender",
    "sex",
    "race",
    "ethnicity",
    "nationality",
    "religion",
    "age_group",
    "disability",
    "marital_status",
    "region",
)
_MOST_VALUES = 12
# attributes of the lexicon, and the attribute for each kind of text/demographics/group_terms.py
ATTRIBUTES = ("sex", "name_origin", "age", "nationality", "disability")
_CALLED = {"pronouns": "sex", "names": "name_origin"}
_OF_PRONOUN = {"she": "female", "he": "male"}


def memberships(rows: Sequence[Example], fields: Sequence[str] = ()) -> Memberships:
    """Return attribute -> group of each row, for the attributes with two groups or more.

    The group is None if a row names none or several. Without `fields`, attributes with more than 12 values are left
    out.
    fields: `lexicon`, one of ATTRIBUTES, or a field of the rows; by default the lexicon and well-known fields.

    Raises ConfigError for a field that no row has.
    """
    people = row_memberships(rows, fields)
    if absent := [name for name in fields if name != LEXICON and not any(people[_CALLED.get(name, name)])]:
        raise ConfigError(
            f"no row has the group field {absent[0]!r}", f"lexicon, {', '.join(ATTRIBUTES)}, or {_known(rows)}"
        )
    result: Memberships = {}
    for name, values in people.items():
        has_several = len(set(values) - {None, ""}) > 1
        if has_several and (name in fields or len(set(values)) <= _MOST_VALUES):
            result[name] = values
    return result


def row_memberships(rows: Sequence[Example], fields: Sequence[str] = ()) -> Memberships:
    """Return attribute -> group of each row, for all attributes, from each row alone.

    Unlike `memberships` it suits a worker that sees only some of the rows.
    """
    people: Memberships = {}
    for field in fields or (LEXICON, *FIELDS):
        attribute = _CALLED.get(field, field)
        if field == LEXICON:
            people |= {name: values for name, values in _by_lexicon(rows).items() if name not in people}
        elif fields and attribute in ATTRIBUTES:
            # a field of that name is more reliable than the words of the text
            pairs = zip(rows, _by_lexicon(rows)[attribute], strict=True)
            people[attribute] = [field_value(row, field) or lexicon_group for row, lexicon_group in pairs]
        elif attribute not in people:
            people[attribute] = [field_value(row, field) for row in rows]
        else:
            people[attribute] = [
                field_value(row, field) or lexicon_group
                for row, lexicon_group in zip(rows, people[attribute], strict=True)
            ]
    return people


def _by_lexicon(rows: Sequence[Example]) -> Memberships:
    people: Memberships = {name: [] for name in ATTRIBUTES}
    for row in rows:
        text = spoken_of(row)
        row_groups = {"sex": sexes_of(text), "name_origin": origins_of(text)}
        for kind in ("age", "nationality", "disability"):
            row_groups[kind] = {item.group for item in group_terms.mentions(text, kind)}
        for name, values in row_groups.items():
            people[name].append(next(iter(values)) if len(values) == 1 else None)
    return people


def sexes_of(text: str) -> set[str]:
    """Return the sexes ("female", "male") that the first names and pronouns of a text signal."""
    names = {item.group.rpartition("_")[2] for item in group_terms.mentions(text, "names") if item.form == "first"}
    return names | {
        _OF_PRONOUN[mention.group]
        for mention in group_terms.mentions(text, "pronouns")
        if mention.group in _OF_PRONOUN
    }


def origins_of(text: str) -> set[str]:
    """Return the origins that the first names of a text signal, such as black or hispanic.

    Names that signal no origin count as "common".
    """
    return {item.group.rpartition("_")[0] for item in group_terms.mentions(text, "names") if item.form == "first"}


def spoken_of(row: Example) -> str:
    """Return the text that describes the person: the prompt without system messages, or a document itself."""
    if row.is_document:
        return row.reply
    return "\n".join(message.text for message in row.prompt if message.role != "system")


def field_value(row: Example, field: str) -> str | None:
    """Return the value of a field of a row, casefolded; None if there is none.

    The field is a key of a message's JSON (the last message first), or `Field: value` in a line or clause of the
    prompt.
    """
    for message in reversed(row.messages):
        if (value := _of_json(message.text, field)) is not None:
            return value
    name = r"[ _-]".join(re.escape(part) for part in re.split(r"[ _-]", field))
    match = re.search(
        rf"(?:^|[\n,;.(|]\s*|\s)[\"']?{name}[\"']?\s*[:=]\s*[\"']?([^\n,;.|)\"']+)", spoken_of(row), re.IGNORECASE
    )
    if match:
        return match.group(1).strip().casefold() or None
    if field == ROW_GROUP:
        return row.group or None
    return None


def _of_json(text: str, field: str) -> str | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for key in field.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, (dict, list)):
        return None
    return str(value).strip().casefold() or None


def _known(rows: Sequence[Example]) -> str:
    names: Counter[str] = Counter()
    for row in rows[:500]:
        for message in row.messages:
            try:
                fields = json.loads(message.text) if message.text.lstrip().startswith("{") else {}
            except (ValueError, RecursionError):
                fields = {}
            names.update(list(fields))
            names.update(
                name.strip().casefold()
                for name in re.findall(r"^\s*(\w[\w ]{1,30}?):\s*\S", message.text, re.MULTILINE)
            )
    return (
        ", ".join(name for name, _ in names.most_common(8))
        or "the fields of JSON or `Name: value` lines (there are none)"
    )


_FEW, _ROWS_PER_REPLY = 12, 10


def outcomes(rows: Sequence[Example], form: str = "auto") -> ClassLabels:
    """Return the outcome of each row.

    form: as in `class_labels.find`, or the bare name of a field of JSON replies. `auto` also takes whole replies of
    any length as outcomes if they have few distinct values.

    Raises ConfigError if no row has the outcome that `form` names.
    """
    return of_replies([row.reply for row in rows], form)


def of_replies(replies: Sequence[str], form: str = "auto") -> ClassLabels:
    """Return the outcome of each reply, as `outcomes` does for rows."""
    if form not in ("auto", "reply", "text") and form.partition(":")[0] not in ("json", "regex"):
        form = f"json:{form}"
    class_labels.check(form, "--outcome")
    row_labels = class_labels.find(replies, form)
    if any(row_labels.labels):
        return row_labels
    if form not in ("auto", "text"):
        raise ConfigError(f"no reply has the outcome {form!r}", "auto, reply, json:KEY or regex:PATTERN")
    labels = [class_labels.as_label(reply) for reply in replies]
    label_counts = Counter(label for label in labels if label)
    if form == "auto" and 2 <= len(label_counts) <= min(_FEW, len(replies) / _ROWS_PER_REPLY):
        return ClassLabels(
            labels,
            "reply",
            f"whole replies: {len(label_counts)} values in {label_counts.total():,} of {len(replies):,} rows",
        )
    return row_labels
