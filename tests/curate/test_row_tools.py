"""Rows with tools, reasoning and weights of turns: one form of arguments, types kept, faults named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sartor.core import parquet_io
from sartor.core.records import Drop, Example, MalformedRow, Message, Origin, Part
from sartor.curate.review.row_edits import apply_edit, everywhere_masked
from sartor.curate.sources.row_formats import detect_row_format, parse_row
from sartor.curate.steps.regex_rules import RegexRule, RegexRules
from sartor.curate.steps.text_cleaning import RepairText
from sartor.curate.steps.text_duplicates import text_of
from sartor.text.example_text import rewritten, texts
from sartor.text.pii.example_layout import lay_out_example

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "on": {"type": "boolean"},
        "q": {"type": "string"},
    },
    "required": ["n"],
}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "finds", "parameters": SCHEMA}}]


def parsed(row: dict[str, Any]) -> Example:
    form = detect_row_format(row)
    assert form
    return parse_row(row, form, Origin("rows.jsonl", "rows.jsonl:1"), lambda kind, path: path)


def called(arguments: Any, *, name: str = "find", tools: Any = TOOLS, **fields: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call], **fields},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "b"},
    ]
    return {"messages": turns, "tools": tools}


def arguments_of(example: Example) -> Any:
    return json.loads(example.messages[1].tool_calls)[0]["function"]["arguments"]


def test_arguments_as_text_and_as_objects_are_one_row() -> None:
    values = {"n": 1, "x": 1.0, "q": "1", "on": True}
    as_text, as_object = parsed(called(json.dumps(values))), parsed(called(values))
    assert as_text == as_object and as_text.id == as_object.id
    found = arguments_of(as_text)
    assert [(key, type(value)) for key, value in found.items()] == [("n", int), ("x", float), ("q", str), ("on", bool)]


@pytest.mark.parametrize("number", ["1e21", "-0.0", "0.1", "9223372036854775808", "1.0"])
def test_numbers_keep_value_and_type(number: str) -> None:
    text = parsed(called(f'{{"n": 1, "x": {number}}}')).messages[1].tool_calls
    (call,) = json.loads(text)
    assert repr(call["function"]["arguments"]["x"]) == repr(json.loads(number))


def test_order_of_keys_is_kept_and_not_part_of_the_id() -> None:
    forwards, backwards = (parsed(called({key: 1 for key in keys})) for keys in (("n", "x"), ("x", "n")))
    assert forwards.id == backwards.id and list(arguments_of(backwards)) == ["x", "n"]
    assert list(json.loads(forwards.tools)[0]) == ["type", "function"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"n": "1"}, "is not of type 'integer'"),
        ({"n": 1.5}, "is not of type 'integer'"),
        ({"n": True}, "is not of type 'integer'"),
        ({"n": 1, "on": "true"}, "is not of type 'boolean'"),
        ({}, "'n' is a required property"),
        ("[1]", "are a list, not an object"),
        ("{not json", "is not JSON"),
        ('{"n": 1, "n": 2}', "stands twice"),
    ],
)
def test_arguments_against_the_schema_are_a_drop(arguments: Any, problem: str) -> None:
    with pytest.raises(MalformedRow, match=problem) as fault:
        parsed(called(arguments))
    assert fault.value.reason == "bad_tool_call"


def test_undeclared_tool_is_a_drop_that_names_it() -> None:
    with pytest.raises(MalformedRow, match="calls 'delete'; the row declares find"):
        parsed(called({}, name="delete"))


@pytest.mark.parametrize("tools", [None, [{"name": "find", "parameters": {"q": {"type": "str, optional"}}}], ["find"]])
def test_calls_without_a_readable_schema_stay(tools: Any) -> None:
    assert arguments_of(parsed(called({"n": "1"}, tools=tools))) == {"n": "1"}


def test_weight_of_a_turn_is_read_stored_and_part_of_the_id() -> None:
    plain, weighted = parsed(called({"n": 1})), parsed(called({"n": 1}, weight=0.5))
    assert parsed(called({"n": 1}, weight=1)).id == plain.id != weighted.id
    assert [message.weight for message in weighted.messages] == [1, 0.5, 1, 1]
    table = parquet_io.examples_table([weighted, plain])
    assert table.schema == parquet_io.EXAMPLES
    weights = [[message["weight"] for message in row["messages"]] for row in table.to_pylist()]
    assert weights == [[None, 0.5, None, None], [None] * 4]
    assert [parquet_io.example_of(row) for row in table.to_pylist()] == [weighted, plain]
    stored = json.loads(json.dumps(table.to_pylist()[0]))
    row = {**stored, "tools": TOOLS, "rating": None, "rejected": None}
    assert parsed(row).messages == weighted.messages


def test_steps_that_change_a_turn_keep_its_weight() -> None:
    reply = {"role": "assistant", "content": "write to ann@example.org", "weight": 0}
    row = parsed({"messages": [{"role": "user", "content": "a"}, reply]})
    changed = rewritten(row, str.upper, "reply", "shout")
    edited = apply_edit(row, {"reply": "c"})
    for result in (changed, edited, everywhere_masked(row)):
        assert isinstance(result, Example) and result.id != row.id and result.messages[-1].weight == 0


def test_weight_of_a_sharegpt_turn_is_read() -> None:
    turns = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b", "weight": 0},
        {"from": "gpt", "value": "c"},
    ]
    assert [message.weight for message in parsed({"conversations": turns}).messages] == [1, 0, 1]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [({"weight": -1}, "not negative"), ({"weight": "much"}, "not a number"), ({"weight": float("inf")}, "finite")],
)
def test_weight_that_is_none_is_a_drop(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(MalformedRow, match=problem):
        parsed(called({"n": 1}, **fields))


def test_weight_of_another_turn_than_a_reply_is_a_drop() -> None:
    row = called({"n": 1})
    row["messages"][0]["weight"] = 1
    with pytest.raises(MalformedRow, match="replies alone are learnt"):
        parsed(row)
    row["messages"][0]["weight"] = 0
    assert parsed(row).messages[0].weight == 1


def test_weight_of_a_rejected_reply_is_a_drop() -> None:
    rejected = [{"role": "assistant", "content": "c", "weight": 0.5}]
    with pytest.raises(MalformedRow, match="chosen reply's"):
        parsed({"prompt": "a", "chosen": "b", "rejected": rejected})


# reasoning is text


def thoughtful(reasoning: str, reply: str = "blue") -> Example:
    turn = Message("assistant", (Part("text", reply),), reasoning_content=reasoning)
    return Example((Message.of("user", "a"), turn), (Origin("s", "1"),))


def test_reasoning_is_a_text_of_the_reply() -> None:
    row = thoughtful("since it is day")
    assert texts(row, "reply") == ["since it is day", "blue"] and texts(row, "prompt") == ["a"]
    assert texts(row, "replies", with_reasoning=False) == ["blue"]
    changed = rewritten(row, str.upper, "reply", "shout")
    assert isinstance(changed, Example)
    assert (changed.messages[1].reasoning_content, changed.messages[1].text) == ("SINCE IT IS DAY", "BLUE")
    assert rewritten(row, lambda text: text, "reply", "nothing") is row


def test_steps_clean_and_scan_reasoning(tmp_path: Path) -> None:
    mended = RepairText().open(tmp_path)(thoughtful("cafÃ© \u200b"))
    assert isinstance(mended, Example) and mended.messages[1].reasoning_content.startswith("café")
    rules = RegexRules((RegexRule("token"),))
    assert isinstance(rules.open(tmp_path)(thoughtful("the token is 4")), Drop)


def test_reasoning_tells_rows_apart_and_is_searched_for_personal_data() -> None:
    first, second = thoughtful("one"), thoughtful("two")
    assert first.id != second.id and text_of(first, "reply") != text_of(second, "reply")
    names = [slot.name for slot in lay_out_example(thoughtful("ann@example.org")).slots]
    assert "messages[1].reasoning_content" in names
