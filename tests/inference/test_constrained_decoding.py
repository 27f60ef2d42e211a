"""Constrained decoding: whatever the model wants to say, what comes out obeys the schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from sartor.core.errors import ModelError, RequestError
from sartor.inference.constrained_decoding import Constraint, Grammar
from sartor.inference.engine import GenerateCall
from sartor.inference.prompts import PromptReader
from sartor.models.chat import ChatTokenizer
from sartor.text.json_schema import DEEPEST, JSON_OBJECT, MOST_BYTES, read_schema

VOCABULARY = 384  # wider than the tokenizer, as a model's padded embedding is
INTENT = {
    "type": "object",
    "properties": {"intent": {"enum": ["HassTurnOn", "HassTurnOff"]}, "area": {"type": "string", "maxLength": 5}},
    "required": ["intent", "area"],
    "additionalProperties": False,
}
NESTED = {
    "$defs": {
        "leaf": {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["n"],
            "additionalProperties": False,
        }
    },
    "type": "array",
    "minItems": 1,
    "maxItems": 3,
    "items": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
}
PATTERN = {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]+$", "maxLength": 9}
NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(tiny.tokenizer())


@pytest.fixture(scope="module")
def grammar(chat: ChatTokenizer) -> Grammar:
    return Grammar(chat.tokenizer, chat.stops, VOCABULARY)


def write(constraint: Constraint, choose: Callable[[torch.Tensor], int], most: int = 400) -> list[int]:
    """Tokens chosen until the reply is over."""
    written: list[int] = []
    while not constraint.is_done and len(written) < most:
        token = choose(constraint.mask())
        constraint.advance(token)
        written.append(token)
    return written


def at_random(seed: int, towards_end: float = 0.0) -> Callable[[torch.Tensor], int]:
    source = torch.Generator().manual_seed(seed)

    def choose(mask: torch.Tensor) -> int:
        logits = torch.randn(VOCABULARY, generator=source)
        logits[2] += towards_end
        return int(logits.masked_fill(~mask, -torch.inf).argmax())

    return choose


@pytest.mark.parametrize("schema", [INTENT, NESTED, PATTERN, NUMBERS], ids=["intent", "nested", "pattern", "numbers"])
def test_random_logits_write_what_validates(chat: ChatTokenizer, grammar: Grammar, schema: Any) -> None:
    replies = set()
    for seed in range(12):
        written = write(grammar.constraint(json.dumps(schema)), at_random(seed, towards_end=4.0))
        replies.add(chat.decode(written))
        jsonschema.validate(json.loads(chat.decode(written)), schema)
    assert len(replies) > 6


def test_any_object(chat: ChatTokenizer, grammar: Grammar) -> None:
    ended = 0
    for seed in range(8):
        constraint = grammar.constraint(JSON_OBJECT)
        text = chat.decode(write(constraint, at_random(seed), most=200))
        assert text.startswith("{")
        if constraint.is_complete:
            ended += 1
            assert isinstance(json.loads(text), dict)
    assert ended


def test_a_reply_may_end_only_when_the_value_is_whole(chat: ChatTokenizer, grammar: Grammar) -> None:
    text = '{"intent":"HassTurnOn","area":"kitch"}'
    constraint = grammar.constraint(json.dumps(INTENT))
    for token in chat.tokenizer(text)["input_ids"]:
        mask = constraint.mask()
        assert not mask[sorted(chat.special)].any() and mask[token] and not constraint.is_complete
        constraint.advance(token)
    assert constraint.is_complete and constraint.is_done
    assert constraint.mask().nonzero().flatten().tolist() == chat.stops


def test_a_number_may_end_or_go_on(chat: ChatTokenizer, grammar: Grammar) -> None:
    constraint = grammar.constraint('{"type":"integer"}')
    (digit,) = chat.tokenizer("4")["input_ids"]
    constraint.advance(digit)
    mask = constraint.mask()
    assert constraint.is_complete and not constraint.is_done and mask[digit] and mask[chat.stops].all()
    constraint.advance(chat.stops[0])
    assert constraint.is_done


def test_no_reply_of_white_space_alone(chat: ChatTokenizer, grammar: Grammar) -> None:
    """What wants nothing but space and line breaks comes to an end of them."""
    spaces = [token for token in range(len(chat.tokenizer)) if chat.decode([token]).isspace()]
    constraint = PromptReader(cast(Any, None), chat, {"vocab_size": VOCABULARY}, 512).constraint(
        GenerateCall(id="c", schema=json.dumps(INTENT))
    )
    assert constraint is not None
    for _ in range(200):
        allowed = [token for token in spaces if constraint.mask()[token]]
        if not allowed:
            break
        constraint.advance(allowed[0])
    assert not allowed


def test_a_token_beyond_the_mask_is_an_error(chat: ChatTokenizer, grammar: Grammar) -> None:
    constraint = grammar.constraint(json.dumps(INTENT))
    (wrong,) = chat.tokenizer("z")["input_ids"]
    with pytest.raises(RequestError):
        constraint.advance(wrong)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("{", "no JSON"),
        ("[]", "no object"),
        ("true", "no object"),
        ('{"const":NaN}', "NaN"),
        ('{"const":1e400}', "out of range"),
        ("\ud800", "no JSON"),
        ('{"a":' * 100 + "1" + "}" * 100, f"deeper than {DEEPEST}"),
        ("[" * 60_000, f"deeper than {DEEPEST}"),
        (json.dumps({"description": "x" * MOST_BYTES}), f"at most {MOST_BYTES}"),
        ('{"type":"strin"}', "strin"),
        ('{"type":"array","uniqueItems":true}', "uniqueItems"),
        ('{"$ref":"http://example.com/a"}', "nothing is fetched"),
        ('{"$ref":"#"}', "refers to itself"),
        ('{"type":"string","pattern":"((("}', "regex"),
        ('{"items":{"x-guidance":{"lenient":true}}}', "x-guidance"),
        ('{"enum":[]}', ""),
        ('{"type":"integer","minimum":5,"maximum":3}', "minimum"),
        ('{"oneOf":[{"type":"string"},{"type":"string","minLength":2}]}', "oneOf"),
        ('{"multipleOf":0}', "multipleOf"),
        ('{"anyOf":[{"$ref":"#/$defs/a"}],"$defs":{"a":{"$ref":"#"}}}', "refers to itself"),
        ('{"anyOf":[]}', "holds nothing"),
    ],
)
def test_a_schema_that_cannot_be_obeyed_is_refused(grammar: Grammar, schema: str, says: str) -> None:
    with pytest.raises(RequestError, match=".") as refused:
        grammar.constraint(schema)
    assert says in refused.value.problem and refused.value.remedy and "\n" not in refused.value.problem


def test_exploding_schema_fails_only_its_own_row(grammar: Grammar) -> None:
    """A pattern of nested repetitions is refused only while a reply is written."""
    other = grammar.constraint(json.dumps(INTENT))
    bomb = grammar.constraint('{"type":"string","pattern":"(.{1,1000}){1,1000}"}')
    with pytest.raises(RequestError, match="cannot be obeyed"):
        write(bomb, at_random(0))
    assert other.mask().any()


def test_a_vocabulary_that_is_too_small_is_refused(chat: ChatTokenizer) -> None:
    with pytest.raises(ModelError, match="constrained"):
        Grammar(chat.tokenizer, chat.stops, 100)


_WORDS = st.sampled_from(
    [
        "type",
        "object",
        "string",
        "array",
        "items",
        "properties",
        "anyOf",
        "enum",
        "pattern",
        "minLength",
        "$ref",
        "#/items",
        "^a+$",
        "not",
    ]
)
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _WORDS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(_ANYTHING)
def test_any_value_as_schema_is_obeyed_or_refused(grammar: Grammar, value: Any) -> None:
    try:
        constraint = grammar.constraint(json.dumps(value))
    except RequestError:
        return
    assert constraint.mask().any()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet='{}[]":,1e', max_size=60))
def test_any_text_as_schema_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(read_schema(text), dict)
    except RequestError as refused:
        assert refused.remedy
