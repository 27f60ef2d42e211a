"""What a teacher said -> the JSON in it, checked against its schema; or what is wrong with it, for a second try."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import referencing
import referencing.exceptions

from sartor.core.errors import ConfigError
from sartor.core.teachers import Answer, Question
from sartor.curate.synthesize.contract import Unusable, quoted
from sartor.text.json_schema import check_schema  # noqa: F401

MOST_STARTS = 50
_SHOWN = 3000


def read(answer: Answer, schema: Mapping[str, Any]) -> dict[str, Any] | Unusable:
    """The object in an answer that fits the schema. Texts around it, and fences, are left out."""
    if answer.finish == "refused":
        return Unusable("teacher_refused", "the teacher would not answer")
    found = _object_in(answer.text)
    if found is None:
        if answer.finish == "length":
            return Unusable("answer_cut", "the answer was cut at max_tokens, before its JSON ended")
        return Unusable("no_json", "there is no JSON object in the answer")
    # an empty registry: a `$ref` to an address is an error, not a request
    checker = jsonschema.Draft202012Validator(dict(schema), registry=referencing.Registry())
    try:
        error = next(iter(checker.iter_errors(found)), None)
    except referencing.exceptions.Unresolvable as missing:
        raise ConfigError(f"the schema refers to {missing.ref!r}, which is not in it", "put that under $defs") from None
    if error is not None:
        return Unusable("schema_mismatch", f"at {error.json_path}: {error.message[:200]}")
    return found


def repair(question: Question, answer: Answer, fault: Unusable) -> Question:
    """The second question: what was said, and what is wrong with it."""
    asked = (
        f"Your answer was:\n{quoted(answer.text[:_SHOWN])}\nIt cannot be used: {fault.detail}. "
        f"Answer again, with the JSON object alone, of this schema: {question.schema}"
    )
    said = (*question.messages, ("assistant", answer.text[:_SHOWN]), ("user", asked))
    return Question(said, question.seed, question.max_tokens, question.temperature, question.schema)


def _object_in(text: str) -> dict[str, Any] | None:
    """The first whole JSON object in a text."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    for _ in range(MOST_STARTS):
        if start < 0:
            return None
        try:
            value, _ = decoder.raw_decode(text, start)
            # half of a surrogate pair is no text that a file can hold
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return value if isinstance(value, dict) else None
    return None
