"""Seeded edits that make a right reply wrong: what a verifier must tell apart.

An edit changes what carries the answer: fields of JSON, the last number, lines and operators of code, words. One kind
is drawn for each reply, so that no kind of verifier is measured by the one error that it was written for. One kind in
five at most shows by the form alone (a number that is missing, JSON that is cut): a verifier of nothing but the form
of a number or of JSON has an AUC of 0.6 at most, and is refused (`verifier_check.LEAST_AUC`).
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sartor.core import strict_json
from sartor.inference.verifiers.numeric import last_number, last_number_match
from sartor.inference.verifiers.unit_tests import code_of

_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"\w+")
# operators of code and what stands in their place
_OPERATORS = {"+": "-", "-": "+", "<": ">=", ">": "<=", "==": "!=", "and": "or", "or": "and", "True": "False"}
_OPERATOR = re.compile(r"==|[<>](?!=)|(?<= )[+-](?= )|\band\b|\bor\b|\bTrue\b")
Edit = Callable[[str, random.Random], str]


def wrong_reply(reply: str, others: Sequence[str], seed: str) -> str | None:
    """Return a wrong reply made from a right one, or None if no edit changes it.

    others: right replies to other prompts, of which one may be taken whole.
    seed: decides the kind and place of the edit.
    """
    rng = random.Random(seed)
    edits = [*_edits_of(reply), _another(others)]
    for edit in rng.sample(edits, len(edits)):
        changed = edit(reply, rng)
        if changed.strip() != reply.strip():
            return changed
    return None


def _another(others: Sequence[str]) -> Edit:
    def edit(reply: str, rng: random.Random) -> str:
        different = sorted({other for other in others if other.strip() != reply.strip()})
        return rng.choice(different) if different else reply

    return edit


def _edits_of(reply: str) -> list[Edit]:
    """Return the edits that fit the form of a reply."""
    if _json_span(reply) is not None:
        return [_on_json(_change_value), _on_json(_retype_value), _on_json(_rename_key), _on_json(_drop_key), _cut]
    if _is_code(reply):
        return [_change_operator, _change_number, _drop_line, _cut_code]
    if last_number(reply) is not None:
        return [_change_number, _enlarge_number, _negate_number, _cut_number]
    return [_drop_word, _scramble_word, _cut]


def _json_span(text: str) -> tuple[int, int, Any] | None:
    """Return begin, end and value of the JSON object that a text is or holds; None without one that has keys."""
    start, end = text.find("{"), text.rfind("}") + 1
    if start < 0 or end <= start:
        return None
    try:
        value = strict_json.loads(text[start:end])
    except strict_json.StrictJsonError:
        return None
    return (start, end, value) if isinstance(value, dict) and value else None


def _is_code(text: str) -> bool:
    """Return whether a text is Python with a definition or an assignment."""
    try:
        tree = ast.parse(code_of(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.Return) for node in ast.walk(tree))


def _on_json(change: Callable[[Any, random.Random], None]) -> Edit:
    """Return the edit that applies `change` to the JSON object within a reply."""

    def edit(reply: str, rng: random.Random) -> str:
        span = _json_span(reply)
        assert span is not None
        start, end, value = span
        before = json.dumps(value, sort_keys=True)
        change(value, rng)
        if json.dumps(value, sort_keys=True) == before:  # written with other spaces it would be as right as before
            return reply
        return reply[:start] + json.dumps(value, ensure_ascii=False) + reply[end:]

    return edit


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value below a JSON value whose own value is no container with members."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list) and inner:
            yield from _places(inner)
        else:
            yield value, key


def _change_value(value: Any, rng: random.Random) -> None:
    container, key = rng.choice(list(_places(value)))
    old = container[key]
    if isinstance(old, bool) or old is None:
        container[key] = not old
    elif isinstance(old, int | float):
        container[key] = old + rng.randint(1, 9)
    elif isinstance(old, str):
        scrambled = _scramble_word(old, rng)
        container[key] = scrambled if scrambled != old else f"{old}x"
    else:
        container[key] = [1]


def _retype_value(value: Any, rng: random.Random) -> None:
    container, key = rng.choice(list(_places(value)))
    old = container[key]
    container[key] = len(old) if isinstance(old, str) else json.dumps(old)


def _rename_key(value: Any, rng: random.Random) -> None:
    mapping = rng.choice(_mappings(value))
    key = rng.choice(list(mapping))
    renamed = {f"{name}_" if name == key else name: inner for name, inner in mapping.items()}
    mapping.clear()
    mapping.update(renamed)


def _drop_key(value: Any, rng: random.Random) -> None:
    mapping = rng.choice(_mappings(value))
    del mapping[rng.choice(list(mapping))]


def _mappings(value: Any) -> list[dict[str, Any]]:
    """Return the objects with members of a JSON value, itself first."""
    inner = value.values() if isinstance(value, dict) else value
    below = [found for item in inner if isinstance(item, dict | list) for found in _mappings(item)]
    return [value, *below] if isinstance(value, dict) and value else below


def _cut(reply: str, rng: random.Random) -> str:
    return reply[: rng.randrange(len(reply) // 4, max(3 * len(reply) // 4, 1)) or 1] if len(reply) > 1 else ""


def _cut_code(reply: str, rng: random.Random) -> str:
    lines = code_of(reply).splitlines()
    return "\n".join(lines[: rng.randrange(len(lines))])


def _cut_number(reply: str, rng: random.Random) -> str:
    *_, last = _NUMBER.finditer(reply)
    return reply[: last.start()]


def _change_number(reply: str, rng: random.Random) -> str:
    numbers = list(_NUMBER.finditer(reply))
    if not numbers:
        return reply
    changed = numbers[-1]
    return reply[: changed.start()] + str(int(changed.group()) + rng.randint(1, 9)) + reply[changed.end() :]


def _enlarge_number(reply: str, rng: random.Random) -> str:
    found = last_number_match(reply)
    if found is None:
        return reply
    start = found.end() - len(found.group().lstrip("+-"))
    return reply[:start] + str(rng.randint(1, 9)) + reply[start:]


def _negate_number(reply: str, rng: random.Random) -> str:
    found = last_number_match(reply)
    if found is None:
        return reply
    number = found.group()
    negated = number[1:] if number.startswith("-") else f"-{number.lstrip('+')}"
    return reply[: found.start()] + negated + reply[found.end() :]


def _change_operator(reply: str, rng: random.Random) -> str:
    operators = list(_OPERATOR.finditer(reply))
    if not operators:
        return reply
    changed = rng.choice(operators)
    return reply[: changed.start()] + _OPERATORS[changed.group()] + reply[changed.end() :]


def _drop_line(reply: str, rng: random.Random) -> str:
    lines = code_of(reply).splitlines()
    del lines[rng.randrange(len(lines))]
    return "\n".join(lines)


def _drop_word(reply: str, rng: random.Random) -> str:
    words = reply.split()
    if len(words) < 2:
        return reply
    del words[rng.randrange(len(words))]
    return " ".join(words)


def _scramble_word(reply: str, rng: random.Random) -> str:
    """Return the reply with the letters of one word in another order."""
    words = [match for match in _WORD.finditer(reply) if len(set(match.group())) > 1]
    if not words:
        return reply
    changed = rng.choice(words)
    letters = changed.group()
    while letters == changed.group():
        letters = "".join(rng.sample(letters, len(letters)))
    return reply[: changed.start()] + letters + reply[changed.end() :]
