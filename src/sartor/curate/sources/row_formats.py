r"""Row formats of OpenAI, ShareGPT, Alpaca, preference, LLaVA and other data.

`detect_row_format` names the format of a row by its keys. `parse_row` turns a row of a format into an Example, or
raises MalformedRow with the reason under which the row is counted.

{"conversations": [{"from": "human", "value": "<image>\nWhat is wrong?"}, ...], "image": "a.png"} {"messages":
[{"role": "user", "content": "<image> or <image>?"}, ...], "images": ["a.png", "b.png"]}
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import PurePath
from typing import Any, cast

from sartor.core.records import ROLES, Example, MalformedRow, Message, Origin, Part, PartKind
from sartor.core.reply_markup import with_fields
from sartor.core.splits import stated_group
from sartor.curate.sources.column_options import fields_option
from sartor.curate.sources.file_formats import kind_of
from sartor.curate.sources.row_tools import check_calls, normalized_calls

_MARK = re.compile(r"\n?<(image|audio)>\n?")
_FIELDS = {"image": ("image", "images"), "audio": ("audio", "audios")}
_CODE = re.compile(r"[\x21-\x7e]*")  # one word of ASCII
_SENTENCE_CHARACTERS = 15  # mean length from which a column is taken for what is asked


def fill_placeholders(row: Mapping[str, Any], turns: Any) -> Any:
    """Return the turns with each placeholder replaced by the next media file that the row names.

    A placeholder is a mark such as `<image>` in a text, or a media part without a value. Texts of a row that names no
    media are left as they are. Raises MalformedRow unless there are as many placeholders as media.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        return turns
    named_media = {kind: _named(row, kind) for kind in _FIELDS}
    remaining = {kind: iter(values) for kind, values in named_media.items()}
    counts = dict.fromkeys(_FIELDS, 0)
    filled_turns = [_placeholders_turn(turn, remaining, counts, has_marks=any(named_media.values())) for turn in turns]
    for kind, values in named_media.items():
        if counts[kind] != len(values):
            problem = (
                f"the turns hold {counts[kind]} <{kind}> and the row names {len(values)}: each mark is one {kind}"
            )
            raise MalformedRow("placeholder_count", problem)
    return filled_turns


def question_content(row: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
    """Return the content of a question: its text with the row's media at their marks, or before the text."""
    marks = "".join(f"<{kind}>" for kind in _FIELDS for _ in _named(row, kind))
    text = text if _MARK.search(text) or not marks else marks + text
    (turn,) = fill_placeholders(row, [{"content": text}])
    return turn["content"] if marks else [{"type": "text", "text": text}]


def _named(row: Mapping[str, Any], kind: str) -> list[Any]:
    """Return the media of a kind that the row names beside its turns."""
    for field in _FIELDS[kind]:
        value = row.get(field)
        if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a cell of a CSV file
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if value is not None and value != "" and value != []:
            return list(value) if isinstance(value, list | tuple) else [value]
    return []


def _placeholders_turn(
    turn: Any, remaining: Mapping[str, Iterator[Any]], counts: dict[str, int], *, has_marks: bool
) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    content = turn.get("content")
    if isinstance(content, str) and has_marks:
        parts = list(_placeholders_parts(content, remaining, counts))
    elif isinstance(content, Sequence) and not isinstance(content, str):
        parts = [_part(part, remaining, counts) for part in content]
    else:
        return turn
    return {**turn, "content": parts}


def _placeholders_parts(
    text: str, remaining: Mapping[str, Iterator[Any]], counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
    end = 0
    for mark in _MARK.finditer(text):
        if before := text[end : mark.start()]:
            yield {"type": "text", "text": before}
        yield _part({"type": mark[1]}, remaining, counts)
        end = mark.end()
    if rest := text[end:]:
        yield {"type": "text", "text": rest}


def _part(part: Any, remaining: Mapping[str, Iterator[Any]], counts: dict[str, int]) -> Any:
    """Return a media part without a value with the next media of the row; other parts unchanged.

    A part for which the row has no media left gets None; it is counted, so that the caller reports it.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if (
        not isinstance(kind, str)
        or kind not in _FIELDS
        or any(part.get(name) is not None for name in (kind, "image_url", "input_audio"))
    ):
        return part
    counts[kind] += 1
    return {**part, kind: next(remaining[kind], None)}


# format -> keys that its rows must have; the first match wins, so more specific formats come first
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "preference": ("prompt", "chosen", "rejected"),
    "alpaca": ("instruction", "output"),
    "rated": ("prompt", "completion"),  # and a rating, which `detect_row_format` checks
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "label_studio": ("data", "annotations"),
    "argilla": ("fields", "responses"),
    "text": ("text",),
}
# A table of media has `file_name` and one of these columns. Only files named metadata.* are such tables (convention of
# ImageFolder in the datasets library); elsewhere `file_name` is the origin of a text.
CAPTIONED = "captioned"
CAPTIONS = ("text", "caption", "transcript", "transcription", "label")
# Columns that hold the class of a text in sets for classification, in any case of letters
LABELS = (
    *("label", "labels", "class", "category", "intent", "target", "diagnosis"),
    *("klasse", "kategorie", "diagnose", "etikett", "absicht"),
    *("etiqueta", "clase", "categoría", "categoria", "diagnóstico", "intención"),
    *("étiquette", "etiquette", "classe", "catégorie", "categorie", "diagnostic", "intention"),
)
# Columns that may hold a part of the question, in the forms of QUESTION_FORMS, which read a `history` of pairs alone
CONTEXTS = ("context", "passage", "text", "document", "history")
QUESTION_FORMS = ("alpaca", "question_answer")
# Beginning of the note about rows of the form "text" that have a column of LABELS; the column's name follows
UNREAD_LABEL = "unread label: "
# Beginning of the note about rows that have a column of CONTEXTS; the column's name follows
UNREAD_CONTEXT = "unread context: "
DATES = ("date", "timestamp", "created_at", "created")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}

# fields that are read besides those of the row's format
_ASIDE = (
    "system",
    "input",
    "group",
    "rating",
    "label",
    "weight",
    "tools",
    "file_name",
    "image",
    "images",
    "audio",
    "audios",
)
FIELDS = frozenset((*(key for keys in FORMS.values() for key in keys), *CAPTIONS, *DATES, *_ASIDE))

# formats whose system prompt may be in a separate field
_SYSTEM_BESIDE = ("prompt_completion", "rated", "question_answer", "preference")

# spellings of the role in a table with one row a turn; for other names the last speaker is taken for the assistant
_TURN_ROLES = {
    **{role: role for role in ROLES},
    **_SHAREGPT_ROLES,
    "customer": "user",
    "bot": "assistant",
    "agent": "assistant",
}

Media = Callable[[str, str], str]  # (kind, path or data URL) -> path below the dataset


def detect_row_format(row: Mapping[str, Any], *, of_media: bool = False) -> str | None:
    """Return the format of a row by its keys, or None.

    of_media: whether the file may be a table of media.
    """
    if of_media and row.get("file_name") is not None and caption_field(row):
        return CAPTIONED
    for form, keys in FORMS.items():
        has_fields = all(row.get(key) is not None for key in keys)
        if has_fields and (form != "rated" or _stated_rating(row) is not None):
            return form
    return None


def unread_label(row: Mapping[str, Any]) -> str:
    """Return the column with the class of a row in the form "text", which does not read it; empty without one."""
    return _filled_column(row, LABELS)


def unread_context(row: Mapping[str, Any], form: str) -> str:
    """Return the column that may hold a part of the question and is not read; empty without one."""
    if form not in QUESTION_FORMS:
        return ""
    return _filled_column({**row, "history": None} if _earlier_turns(row) else row, CONTEXTS)


def _filled_column(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the column of a row that is filled and has one of the names, in any case of letters; empty for none."""
    filled = {str(name).casefold(): str(name) for name, value in row.items() if value not in (None, "", [])}
    return next((filled[name] for name in names if name in filled), "")


def column_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the columns of rows, in order."""
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def suggest_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the columns that most likely hold what is asked and the answer, of the first rows of an unknown format.

    They are `text` and its label, if there are such columns. Else what is asked is the first column of sentences, the
    answer the next column of words. A column of numbers or dates,
    or with another code in each row, is neither unless there is no other. Where a column is missing it is "COLUMN".
    """
    if label := next((label for row in rows if row.get("text") is not None and (label := unread_label(row))), ""):
        return "text", label
    values = {name: [str(row[name]) for row in rows if row.get(name) is not None] for row in rows for name in row}
    names = [str(name) for name in values]
    words = [str(name) for name, texts in values.items() if _are_words(texts)]
    lengths = {str(name): sum(map(len, texts)) / max(1, len(texts)) for name, texts in values.items()}
    sentences = [name for name in words if lengths[name] >= _SENTENCE_CHARACTERS]
    prompt = (*sentences, *words, *names, "COLUMN")[0]
    after = names[names.index(prompt) + 1 :] if prompt in names else []
    others = [name for name in (*after, *names) if name != prompt]
    completion = (*(name for name in others if name in words), *others, "COLUMN")[0]
    return prompt, completion


def _are_words(texts: Sequence[str]) -> bool:
    """Return whether values of a column have letters and are no codes, of which each row has another."""
    if not any(character.isalpha() for text in texts for character in text):
        return False
    return len(set(texts)) < len(texts) or not all(map(_CODE.fullmatch, texts))


def rename_columns(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with its columns under Sartor's names.

    columns: Sartor's name -> the row's column.
    In a renamed column a number or boolean becomes text, as a table shows it. An object, or a list of items that are
    no turns, becomes JSON text, so structured slots can be a reply. Raises MalformedRow if a renamed column appears
    twice, or another column already has the new name: one would hide the other.
    """
    if not columns:
        return row
    renamed = {key: value for key, value in row.items() if key not in columns.values()}
    for field, column in columns.items():
        if f"{column} (2)" in row:
            raise MalformedRow(
                "duplicate_columns", f"the column {column!r}, which is taken for `{field}`, stands there twice"
            )
        if column != field and field in renamed and renamed[field] is not None:
            raise MalformedRow(
                "duplicate_columns",
                f"the row has a column `{field}` besides {column!r}, which is taken for it; rename one",
            )
        value = row.get(column)
        if isinstance(value, float) and math.isnan(value):
            value = None  # pandas writes NaN for a missing number
        if isinstance(value, (int, float)) and field not in ("rating", "weight", "date"):
            value = str(value)
        elif isinstance(value, Mapping) or (
            isinstance(value, list) and not all(isinstance(item, Mapping) for item in value)
        ):
            value = json.dumps(value, ensure_ascii=False)
        if column in row:
            renamed[field] = value
    return renamed


def renamed_rows(rows: Iterator[tuple[str, Any]], columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield rows under Sartor's names.

    If `columns` names a conversation, the turns of each are merged into one row.
    """

    def renamed() -> Iterator[tuple[str, Any]]:
        for line, row in rows:
            try:
                yield line, rename_columns(row, columns) if isinstance(row, dict) else row
            except MalformedRow as fault:
                yield line, fault

    return merge_turns(renamed()) if "conversation" in columns else renamed()


def merge_turns(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Merge rows with one turn each into one row a conversation.

    Each row has the columns `conversation`, `role` and `content`. The turns of a conversation must follow one another.
    Other fields of its first row (group, weight) apply to the whole conversation. An unreadable row makes its
    conversation a MalformedRow, since later turns would answer another text.
    """
    lines: list[str] = []
    turns: list[Mapping[str, Any]] = []
    fault: MalformedRow | None = None
    ended: set[str] = set()

    def conversation() -> tuple[str, Any]:
        span = lines[0] if len(lines) == 1 else f"{lines[0].split('-')[0]}-{lines[-1].split('-')[-1]}"
        if fault is not None:
            return span, MalformedRow(fault.reason, f"a turn of the conversation: {fault.detail}")
        first = {key: value for key, value in turns[0].items() if key not in ("conversation", "role", "content")}
        senders = [str(turn["role"]) for turn in turns]
        if all(sender.casefold() in _TURN_ROLES for sender in senders):
            said = [
                {"role": _TURN_ROLES[sender.casefold()], "content": turn.get("content")}
                for sender, turn in zip(senders, turns, strict=True)
            ]
        else:
            said = [
                {"sender": sender, "text": turn.get("content")} for sender, turn in zip(senders, turns, strict=True)
            ]
        return span, {**first, "messages": said}

    for line, row in rows:
        if isinstance(row, Mapping) and row.get("conversation") is not None and row.get("role") is not None:
            name = str(row["conversation"])
            if turns and name != str(turns[0]["conversation"]):
                yield conversation()
                ended.add(str(turns[0]["conversation"]))
                lines, turns, fault = [], [], None
            lines.append(line)
            turns.append(row)
            if name in ended:
                fault = MalformedRow(
                    "split_conversation", f"{name[:40]!r} has turns further up; sort the table by conversation"
                )
        elif turns:
            lines.append(line)
            fault = (
                row
                if isinstance(row, MalformedRow)
                else MalformedRow("missing_field", "a row names no conversation or role")
            )
        else:
            yield (
                line,
                row
                if isinstance(row, MalformedRow)
                else MalformedRow("missing_field", "the row names no conversation or role"),
            )
    if turns:
        yield conversation()


def unknown_form(row: Any) -> MalformedRow:
    """Return the error of a row without a known format: its fields, the known formats, and an example of `fields`."""
    if not isinstance(row, Mapping):
        return MalformedRow("unknown_form", f"the row is a {type(row).__name__}, not an object with fields")
    names = [str(key) for key in row]
    forms = "; ".join(dict.fromkeys(", ".join(keys) for keys in FORMS.values()))
    prompt, completion = suggest_columns([row])
    return MalformedRow(
        "unknown_form",
        f"no known form has these fields: {', '.join(sorted(names)[:8])}; known are: {forms}; "
        f"say which column holds what: {fields_option(prompt=prompt, completion=completion)}",
    )


def caption_field(row: Mapping[str, Any]) -> str:
    """Return the field that holds the caption or transcript of a media file; empty if there is none."""
    return next((key for key in CAPTIONS if row.get(key) is not None), "")


def parse_row(row: Any, form: str, origin: Origin, media: Media) -> Example:
    """Parse a row of a format into an Example.

    The row's own date replaces that of `origin`. Raises MalformedRow.
    """
    if not isinstance(row, Mapping):
        raise MalformedRow("not_an_object", f"the row is a {type(row).__name__}, not an object with fields")
    detected_form = detect_row_format(row, of_media=form == CAPTIONED)
    if detected_form != form and {detected_form, form} != {
        "rated",
        "prompt_completion",
    }:  # some replies of a file may be rated and others not
        raise _other_form(row, form)
    messages, rejected = _PARSERS[form](row, media)
    if form in _SYSTEM_BESIDE and row.get("system") and messages and messages[0].role != "system":
        messages = (Message.of("system", _text(row, "system")), *messages)
    _check_turns(messages, form)
    if rejected:
        _check_turns(messages[:-1] + rejected, form)
    group = stated_group(row.get("group"))
    if group is None:
        raise MalformedRow("bad_field", f"`group` is a {type(row['group']).__name__}, not text")
    example = Example(
        messages=messages,
        origins=_origins(row, replace(origin, date=date_of(row)[0] or origin.date)),
        group=group,
        weight=_weight(row),
        rejected=rejected,
        tools=_json_text(row.get("tools"), "tools"),
        rating=_rating(row) if detected_form in ("rated", "messages") else 0.0,
    )
    example = with_fields(example)
    check_calls(example)
    return example


def _origins(row: Mapping[str, Any], origin: Origin) -> tuple[Origin, ...]:
    """Return the Origin of a row, and those of synthetic content in its `origins`.

    A Dataset's own Parquet files have `origins`. If some of them are not synthetic, the row keeps its plain Origin
    beside the others.
    """
    origins = row.get("origins")
    if not isinstance(origins, Sequence) or isinstance(origins, (str, bytes)):
        return (origin,)
    synthetic_origins = []
    for item in origins:
        if isinstance(item, Mapping) and isinstance(item.get("made_by"), str) and item["made_by"]:
            parents = tuple(map(str, item.get("parents") or ()))
            step = str(item.get("step") or origin.step)
            synthetic_origins.append(replace(origin, parents=parents, step=step, made_by=item["made_by"]))
    if synthetic_origins and len(synthetic_origins) == len(origins):
        return tuple(synthetic_origins)
    return (origin, *synthetic_origins)


def date_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return (ISO date, name of a field with an invalid date) of a row.

    Both are empty if no field of DATES is filled; one of them is empty otherwise.
    """
    for key in DATES:
        if (value := row.get(key)) is not None and value != "":
            iso_text = iso_date(value)
            return iso_text, "" if iso_text else key
    return "", ""


def iso_date(value: Any) -> str:
    """Convert a date to ISO 8601; return an empty string for what is no date.

    value: ISO 8601, or seconds, milli-, micro- or nanoseconds since 1970 (years 1973 to 2286).
    """
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    if isinstance(value, str):
        text = value.strip()
        try:
            return text if len(text) == 10 and date.fromisoformat(text) else datetime.fromisoformat(text).isoformat()
        except ValueError:
            value = text
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return ""
    for scale in (1, 1e3, 1e6, 1e9):
        if 1e8 <= seconds / scale < 1e10:
            return datetime.fromtimestamp(seconds / scale, UTC).isoformat()
    return ""


def _other_form(row: Mapping[str, Any], form: str) -> MalformedRow:
    keys = ("file_name", CAPTIONS[0]) if form == CAPTIONED else FORMS[form]
    detected_form = detect_row_format(row)
    if (detected_form is None or form == CAPTIONED) and any(key in row for key in keys):
        missing = [key for key in keys if row.get(key) is None]
        return MalformedRow("missing_field", f"the row has no {' and no '.join(missing)}")
    if detected_form is None:
        return unknown_form(row)
    return MalformedRow("mixed_form", f"the row is in the form {detected_form!r}, the file in {form!r}")


def _messages(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    turns = _loads(row["messages"])
    entries: list[Any] = []
    if isinstance(turns, list):
        for turn in turns:
            entries += turn if isinstance(turn, list) else [turn]
    if entries and all(
        isinstance(entry, Mapping) and "role" not in entry and "sender" in entry and "text" in entry
        for entry in entries
    ):
        return _conversation(entries), ()
    return _turns(fill_placeholders(row, turns), media), ()


def _conversation(entries: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Parse {sender, text} entries of two people; the last speaker becomes the assistant, the other one the user."""
    turns: list[tuple[str, list[str]]] = []
    for item in entries:
        sender, text = str(item["sender"]), _text(item, "text")
        if turns and turns[-1][0] == sender:
            turns[-1][1].append(text)
        else:
            turns.append((sender, [text]))
    senders = {sender for sender, _ in turns}
    if len(senders) > 2:
        raise MalformedRow(
            "bad_field", f"{len(senders)} people speak in `messages`; two can be taken for user and assistant"
        )
    return tuple(
        Message.of("assistant" if sender == turns[-1][0] else "user", "\n".join(texts)) for sender, texts in turns
    )


def _captioned(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    name, field = _text(row, "file_name"), caption_field(row)
    kind = kind_of(PurePath(name).name)
    if kind not in ("image", "audio"):
        raise MalformedRow(
            "bad_media", f"`file_name` {name[:80]!r} has the extension of no image or audio file that is read"
        )
    caption = row[field]
    reply = str(caption) if isinstance(caption, int) and not isinstance(caption, bool) else _text(row, field)
    parts = [Part(cast(PartKind, kind), media=media(kind, name))]
    if row.get("prompt") is not None:
        parts.append(Part("text", _text(row, "prompt")))
    return (Message("user", tuple(parts)), Message.of("assistant", reply)), ()


def _sharegpt(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    turns = _loads(row["conversations"])
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise MalformedRow("bad_field", "`conversations` is not a list of turns")
    plain: list[dict[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        plain.append({"role": "system", "content": row["system"]})
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise MalformedRow("bad_field", "a turn in `conversations` is not an object")
        speaker = turn.get("from", turn.get("role"))
        role, content = _SHAREGPT_ROLES.get(str(speaker), speaker), turn.get("value", turn.get("content"))
        plain.append({"role": role, "content": content, "weight": turn.get("weight")})
    return _turns(fill_placeholders(row, plain), media), ()


def _preference(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    prompt = _prompt(row, media)
    chosen, rejected = (_answer(row[key], key, media) for key in ("chosen", "rejected"))
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) != 1:
            raise MalformedRow("bad_field", f"`{name}` has {len(turns)} turns after the prompt, not one")
    if rejected[0].weight != 1:
        raise MalformedRow("bad_field", "`rejected` has a `weight`; that of the pair is the chosen reply's")
    return prompt + chosen, rejected


def _alpaca(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    instruction, input_text = _text(row, "instruction"), _text(row, "input") if row.get("input") else ""
    system = (Message.of("system", _text(row, "system")),) if row.get("system") else ()
    question = f"{instruction}\n\n{input_text}" if input_text.strip() else instruction
    answer = Message.of("assistant", _text(row, "output"))
    return (*system, *_earlier_turns(row), _question(row, question, media), answer), ()


def _earlier_turns(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the turns before the question: the [question, answer] pairs of `history`, as LLaMA-Factory has them.

    Empty for another value, such as a text, which `unread_context` names.
    """
    pairs = row.get("history")
    if isinstance(pairs, str) and pairs.lstrip().startswith("["):  # a list in a cell of a CSV file
        with contextlib.suppress(ValueError):
            pairs = json.loads(pairs)
    is_read = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    )
    if not is_read:
        return ()
    return tuple(
        Message.of(role, text)
        for pair in cast(list[list[str]], pairs)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )


def _prompt_completion(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    return _prompt(row, media) + _answer(row["completion"], "completion", media), ()


def _label_studio(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Parse a task of Label Studio's JSON export: its text, and the answer of most annotators who did not cancel."""
    data, annotations = row["data"], row["annotations"]
    if not isinstance(data, Mapping) or not isinstance(annotations, Sequence) or isinstance(annotations, str):
        raise MalformedRow("bad_field", "`data` or `annotations` is not as Label Studio exports it")
    answers = [
        _label_studio_answer(annotation.get("result"))
        for annotation in annotations
        if isinstance(annotation, Mapping) and not annotation.get("was_cancelled")
    ]
    prompt = data.get("text") if isinstance(data.get("text"), str) else _only_text(data, "data")
    return _annotated(str(prompt), [answer for answer in answers if answer])


def _label_studio_answer(result: Any) -> str:
    """Return the answer of one annotator: classes and texts as they are, spans as JSON."""
    said: list[str] = []
    spans: list[dict[str, Any]] = []
    for item in result if isinstance(result, Sequence) and not isinstance(result, str) else ():
        value = item.get("value") if isinstance(item, Mapping) else None
        if not isinstance(value, Mapping):
            continue
        if isinstance(value.get("labels"), list) and "start" in value:
            spans.append({key: value[key] for key in ("start", "end", "text", "labels") if key in value})
        for key in ("choices", "text", "rating"):
            if key in value and "start" not in value:
                said += map(str, value[key] if isinstance(value[key], list) else [value[key]])
    if spans:
        said.append(json.dumps(sorted(spans, key=lambda span: str(span)), ensure_ascii=False, sort_keys=True))
    return ", ".join(said)


def _argilla(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Parse a record of an Argilla dataset (`records.to_json`).

    It must have one text, and submitted answers to at most one question.
    """
    fields, responses = row["fields"], row["responses"]
    if not isinstance(fields, Mapping) or not isinstance(responses, Mapping):
        raise MalformedRow("bad_field", "`fields` or `responses` is not as Argilla exports it")
    answered = {name: said for name, said in responses.items() if isinstance(said, Sequence) and said}
    if len(answered) > 1:
        names = ", ".join(map(str, answered))
        raise MalformedRow(
            "bad_field", f"several questions are answered ({names}); export one, or name it: fields.completion"
        )
    answers: list[str] = []
    for question_responses in answered.values():
        for response in question_responses:
            if not isinstance(response, Mapping) or response.get("status", "submitted") != "submitted":
                continue
            value = response.get("value")
            answers.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True))
    return _annotated(_only_text(fields, "fields"), answers)


def _only_text(values: Mapping[str, Any], name: str) -> str:
    texts = {key: value for key, value in values.items() if isinstance(value, str)}
    if len(texts) != 1:
        names = ", ".join(map(str, texts)) or "none"
        raise MalformedRow(
            "bad_field", f"`{name}` holds {len(texts)} texts ({names}), and it is not said which one is asked"
        )
    return next(iter(texts.values()))


def _annotated(prompt: str, answers: Sequence[str]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the turns of a row that people labelled, with the most frequent answer as the reply.

    Raises MalformedRow if there is no answer, or no single most frequent one.
    """
    counts = Counter(answers).most_common(2)
    if not counts:
        raise MalformedRow("not_labelled", "nobody has submitted an answer")
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        detail = f"{counts[0][1]} say {counts[0][0][:60]!r}, as many {counts[1][0][:60]!r}"
        raise MalformedRow("annotators_disagree", detail)
    return (Message.of("user", prompt), Message.of("assistant", counts[0][0])), ()


def _question_answer(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    answer = Message.of("assistant", _text(row, "answer"))
    return (*_earlier_turns(row), _question(row, _text(row, "question"), media), answer), ()


def _text_row(row: Mapping[str, Any], media: Media) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    reply = Message.of("assistant", _text(row, "text"))
    # the text of a row that names an image or a recording describes it
    media_parts = [part for part in question_content(row, "") if part["type"] != "text"]
    return ((Message("user", tuple(_parts(media_parts, 1, media))), reply) if media_parts else (reply,)), ()


_PARSERS: dict[str, Callable[[Mapping[str, Any], Media], tuple[tuple[Message, ...], tuple[Message, ...]]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "alpaca": _alpaca,
    "rated": _prompt_completion,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "label_studio": _label_studio,
    "argilla": _argilla,
    "text": _text_row,
    CAPTIONED: _captioned,
}


def _question(row: Mapping[str, Any], text: str, media: Media) -> Message:
    """Return the user turn of a row, with the media that the row names."""
    return Message("user", tuple(_parts(question_content(row, text), 1, media)))


def _prompt(row: Mapping[str, Any], media: Media) -> tuple[Message, ...]:
    value = _loads(row["prompt"])
    return (_question(row, value, media),) if isinstance(value, str) else _turns(fill_placeholders(row, value), media)


def _answer(value: Any, name: str, media: Media) -> tuple[Message, ...]:
    value = _loads(value)
    if isinstance(value, str):
        return (Message.of("assistant", value),)
    if not isinstance(value, list) or (value and not any(isinstance(item, Mapping) for item in value)):
        kind = "a list of texts" if isinstance(value, list) else f"a {type(value).__name__}"
        detail = f"`{name}` is {kind}, neither text nor turns; fields: {{{name}: {name}}} reads it as text"
        raise MalformedRow("bad_field", detail)
    turns = _turns(value, media)
    if not turns:
        raise MalformedRow("empty_answer", f"`{name}` is empty")
    return turns


def _turns(value: Any, media: Media) -> tuple[Message, ...]:
    value = _loads(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise MalformedRow("bad_field", f"the turns are a {type(value).__name__}, not a list")
    return tuple(_turn(turn, index, media) for index, turn in enumerate(value, 1))


def _turn(turn: Any, index: int, media: Media) -> Message:
    if not isinstance(turn, Mapping):
        raise MalformedRow("bad_field", f"turn {index} is a {type(turn).__name__}, not an object")
    role = turn.get("role")
    if role is None or role == "":
        raise MalformedRow("missing_role", f"turn {index} has no role")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise MalformedRow(
            "unknown_role", f"turn {index} has the role {str(role)[:40]!r}; known are {', '.join(ROLES)}"
        )
    weight = _weight(turn, f"`weight` of turn {index}")
    if role != "assistant" and turn.get("weight") is not None and weight != 0:
        detail = f"`weight` of turn {index} ({role}) is {weight:g}; replies alone are learnt, so only they have one"
        raise MalformedRow("bad_field", detail)
    calls = normalized_calls(_json_text(turn.get("tool_calls"), "tool_calls"), f"turn {index}")
    content = turn.get("content")
    if content is None and not calls:
        raise MalformedRow("missing_content", f"turn {index} ({role}) has no content")
    fields = {key: turn.get(key) or "" for key in ("name", "tool_call_id", "reasoning_content")}
    # the name of newer vLLM and OpenRouter
    reasoning = turn.get("reasoning") or fields["reasoning_content"]
    if fields["reasoning_content"] not in ("", reasoning):
        raise MalformedRow("bad_field", f"`reasoning_content` and `reasoning` of turn {index} differ; one has to go")
    fields["reasoning_content"] = reasoning
    if not all(isinstance(value, str) for value in fields.values()):
        raise MalformedRow(
            "bad_field", f"`name`, `tool_call_id`, `reasoning_content` or `reasoning` of turn {index} is not text"
        )
    weight = weight if role == "assistant" else 1.0
    return Message(role, tuple(_parts(content, index, media)), tool_calls=calls, weight=weight, **fields)


def _parts(content: Any, index: int, media: Media) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Part("text", content)]
    if not isinstance(content, Sequence):
        raise MalformedRow("bad_content", f"the content of turn {index} is a {type(content).__name__}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        # OpenAI's spelling of media parts, besides the short one
        kind = {"image_url": "image", "input_audio": "audio"}.get(str(kind), kind)
        if kind not in ("text", "image", "audio"):
            raise MalformedRow(
                "bad_content", f"turn {index} has a part of type {kind!r}; known are text, image, audio"
            )
        value = _value(part, kind)
        if not isinstance(value, str):
            raise MalformedRow("bad_content", f"the {kind} part of turn {index} has no {kind!r} text")
        parts.append(Part("text", value) if kind == "text" else Part(cast(PartKind, kind), media=media(kind, value)))
    return parts


def _value(part: Mapping[str, Any], kind: str) -> Any:
    """Return the value of a part.

    Other forms are accepted too: OpenAI's {image_url: {url}} and {input_audio: {data, format}}, and {bytes, path} as
    in the Hub's Parquet files.
    """
    value = part.get(kind, part.get("image_url" if kind == "image" else "input_audio"))
    if isinstance(value, Mapping) and isinstance(value.get("data"), str):
        return f"data:audio/{value.get('format', '')};base64,{value['data']}"
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return f"data:;base64,{base64.b64encode(value['bytes']).decode()}"
    return value.get("url") if isinstance(value, Mapping) else value


def _check_turns(messages: tuple[Message, ...], form: str) -> None:
    if not messages:
        raise MalformedRow("no_turns", "the row has no turns")
    last = messages[-1]
    if last.role != "assistant":
        raise MalformedRow("no_answer", f"the last turn is the {last.role}'s; there is nothing to learn after it")
    if not last.text.strip() and not last.tool_calls:
        raise MalformedRow("empty_answer", "the last reply is empty")
    if len(messages) == 1 and form != "text":
        raise MalformedRow("no_prompt", "there is a reply, but nothing that it replies to")
    users = [message for message in messages if message.role == "user"]
    if users and not any(part.media or part.text.strip() for message in users for part in message.content):
        raise MalformedRow("empty_prompt", "every user turn is empty")


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise MalformedRow("bad_field", f"`{key}` is a {type(value).__name__}, not text")
    return value


def _weight(row: Mapping[str, Any], name: str = "`weight`") -> float:
    value = row.get("weight")
    if value is None:
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        raise MalformedRow("bad_field", f"{name} is {value!r:.80}, not a number") from None
    if not 0 <= weight < float("inf"):
        raise MalformedRow("bad_field", f"{name} is {value}; it must be finite and not negative")
    return weight


def _stated_rating(row: Mapping[str, Any]) -> float | None:
    """Return the rating of a row, or None without one.

    It is the number in `rating`, or 1 and -1 for true and false in `label`.
    """
    if isinstance(rating := row.get("rating"), (int, float, str)) and not isinstance(rating, bool):
        try:
            return float(rating)
        except OverflowError:  # a whole number beyond any float, which the range refuses
            return math.inf
        except ValueError:
            pass  # a word: see the label
    # CSV files hold true and false as text; the label of a row with `messages` is a class, not a rating
    return {"true": 1.0, "false": -1.0}.get(str(row.get("label")).lower()) if row.get("messages") is None else None


def _rating(row: Mapping[str, Any]) -> float:
    rating = _stated_rating(row) or 0.0
    if not -1 <= rating <= 1:
        raise MalformedRow(
            "bad_field", f"`rating` is {rating:g}; it must be from -1 (bad) to 1 (good), 0 where nobody said"
        )
    return rating


def _loads(value: Any) -> Any:
    """Parse a list that is stored as JSON text, as in CSV files; return other values unchanged."""
    if isinstance(value, str) and value.lstrip().startswith(("[{", "[ {", "[\n")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _json_text(value: Any, name: str) -> str:
    if value is None or value == [] or value == "":
        return ""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise MalformedRow("bad_field", f"`{name}` is not JSON") from None
    try:
        # in the order of the keys: templates write tools and calls in it, as servers do
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        raise MalformedRow("bad_field", f"`{name}` holds a number that JSON has not") from None
