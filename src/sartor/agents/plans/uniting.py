"""Several replies -> one: the one that most give, or a JSON object made of theirs field by field."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.agents.plans.declared import Merge, Rule, Vote
from sartor.agents.plans.handover import is_json, read_json
from sartor.core import records

_ABSENT = object()


def alike(text: str, fields: Sequence[str] = ()) -> str:
    """What two replies have equal where they count as the same: their JSON, or some fields of it, else their words."""
    value = read_json(text)
    if not is_json(value):
        return " ".join(text.casefold().split())
    if fields and isinstance(value, dict):
        value = [[name, name in value, value.get(name)] for name in fields]
    return records.canonical_text(value)


def winner(replies: Sequence[str], vote: Vote) -> tuple[int, int]:
    """(place of the reply that stands for the majority, how many say so). Of equally many the one that stands first."""
    forms = [alike(reply, vote.fields) for reply in replies]
    counts = Counter(forms)
    most = max(counts.values())
    return next((place, most) for place, form in enumerate(forms) if counts[form] == most)


def merged(replies: Sequence[str], merge: Merge) -> tuple[str, int]:
    """(a JSON object as text, of how many replies it is made): those that are objects. ("", 0) where none is."""
    values = [value for value in map(read_json, replies) if isinstance(value, dict)]
    rules: dict[str, Rule] = {field.name: field.rule for field in merge.fields}
    names = dict.fromkeys(name for value in values for name in value)
    made = {name: _united(name, values, rules.get(name, merge.rule)) for name in names}
    kept = {name: value for name, value in made.items() if value is not _ABSENT}
    return (json.dumps(kept, ensure_ascii=False, separators=(",", ":")), len(values)) if values else ("", 0)


def _united(name: str, values: Sequence[Mapping[str, Any]], rule: Rule) -> Any:
    given = [value[name] for value in values if name in value]
    if rule == "first":
        return given[0]
    if rule == "longest":
        return max(given, key=lambda one: len(one if isinstance(one, str) else records.canonical_text(one)))
    if rule == "union":
        items = [item for one in given for item in (one if isinstance(one, list) else [one])]
        return list({records.canonical_text(item): item for item in items}.values())
    said = [value.get(name, _ABSENT) for value in values]
    forms = ["" if one is _ABSENT else records.canonical_text(one) for one in said]
    counts = Counter(forms)
    return said[next(place for place, form in enumerate(forms) if counts[form] == max(counts.values()))]
