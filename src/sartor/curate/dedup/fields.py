"""Which text of a record is compared: the fields that somebody named, or the ones that its file shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sartor.core.errors import ConfigError
from sartor.curate.sources import forms

# Fields that name a row: no two rows share them, however alike they are. Left out where nobody named a field, and said so.
_NAMES = {
    "",
    "id",
    "_id",
    "uuid",
    "guid",
    "index",
    "idx",
    "row",
    "row_id",
    "rec_id",
    "record_id",
    "__index_level_0__",
    "unnamed: 0",
}
# Of a message or content part: where its text may stand.
_TEXTS = ("content", "value", "text")


@dataclass(frozen=True)
class Choice:
    """The fields whose text is compared, in order.

    `joined`: nobody named them and no form was recognised, so every field with text or numbers counts, but `left_out`; fields
    that a later row has besides join in. `reason` is for the output.
    """

    fields: tuple[str, ...]
    joined: bool = False
    left_out: tuple[str, ...] = ()
    reason: str = ""


def choose(sample: Sequence[Mapping[str, Any]], named: str = "") -> Choice:
    """The choice for a file, from the first of its rows. `named`: one or several fields, comma separated; dots go into objects.

    Raises ConfigError when a named field is in none of the rows.
    """
    found = list(dict.fromkeys(str(name) for row in sample for name in row))
    if named:
        fields = tuple(part.strip() for part in named.split(",") if part.strip())
        for field in fields:
            if sample and not any(field in row or next(_at(row, field.split(".")), None) is not None for row in sample):
                raise ConfigError(
                    f"there is no field {field!r} in the first {len(sample)} rows; they have {', '.join(found) or 'none'}",
                    "name one of these; a.b goes into an object, and several are separated by commas",
                )
        return Choice(fields, reason="as asked")
    forms_found = [form for row in sample if (form := forms.detect(row))]
    if sum("text" in row for row in sample) * 2 > len(sample):
        return Choice(("text",), reason="the rows have a field `text`")
    if len(forms_found) * 2 > len(sample):
        form = max(set(forms_found), key=forms_found.count)
        names = (*forms.FORMS[form], *(("input",) if form == "alpaca" else ()))
        return Choice(names, reason=f"the rows have the form {form}")
    fields = tuple(name for name in found if any(isinstance(row.get(name), (str, int, float)) for row in sample))
    left_out = tuple(name for name in fields if name.strip().lower() in _NAMES and _names_rows(sample, name))
    if len(left_out) == len(fields):
        left_out = ()
    kept = tuple(name for name in fields if name not in left_out)
    return Choice(kept, True, left_out, "there is no field `text` and no known form: all fields joined")


def _names_rows(sample: Sequence[Mapping[str, Any]], field: str) -> bool:
    values = [str(row[field]) for row in sample if row.get(field) is not None]
    return len(set(values)) == len(values)


def text_of(row: Mapping[str, Any], choice: Choice) -> str | None:
    """The text of a record, or None where every chosen field is absent."""
    if choice.joined:
        names = [*choice.fields, *(name for name in row if name not in choice.fields and name not in choice.left_out)]
        values = [value for name in names if (value := row.get(name)) is not None]
    else:
        values = []
        for field in choice.fields:
            if field in row:
                values.append(row[field])
            elif "." in field:
                values.extend(_at(row, field.split(".")))
        values = [value for value in values if value is not None]
        if len(values) == 1 and isinstance(values[0], str) and not values[0].startswith("["):
            return values[0]
    if not values:
        return None
    return "\n".join(text for value in values for text in _texts(value))


def _at(value: Any, path: Sequence[str]) -> Iterator[Any]:
    """What stands at a dotted path: names go into objects, numbers into lists, and other names into every item of a list."""
    if not path:
        yield value
    elif isinstance(value, Mapping):
        if path[0] in value:
            yield from _at(value[path[0]], path[1:])
    elif isinstance(value, list):
        if path[0].lstrip("-").isdigit():
            yield from (inner for item in value[int(path[0]) :][:1] for inner in _at(item, path[1:]))
        else:
            yield from (inner for item in value for inner in _at(item, path))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value: of messages and content parts what they say, of other objects every field."""
    if isinstance(value, str):
        if value.startswith(("[{", "[ {")):  # a list kept as JSON text, as CSV files do
            try:
                yield from _texts(json.loads(value))
                return
            except (ValueError, RecursionError):
                pass
        yield value
    elif isinstance(value, bool):
        return
    elif isinstance(value, (int, float)):
        yield f"{value:g}" if isinstance(value, float) else str(value)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        said = [value[name] for name in _TEXTS if name in value]
        for inner in said or value.values():
            yield from _texts(inner)
    elif value is not None:
        yield str(value)
