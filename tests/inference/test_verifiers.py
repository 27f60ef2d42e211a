"""Verifiers: right, wrong and hostile replies of each kind."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sartor.core import config
from sartor.core.errors import BudgetError, ConfigError
from sartor.core.records import Example, Message
from sartor.inference.verifiers import regular_expression
from sartor.inference.verifiers.numeric import last_number
from sartor.inference.verifiers.submission import Submission, Verifier
from sartor.inference.verifiers.unit_tests import asserts_of
from sartor.tune.recipe import Grpo

SCHEMA = {
    "type": "object",
    "properties": {"intent": {"enum": ["on", "off"]}, "level": {"type": "integer"}},
    "required": ["intent"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "light", "parameters": {"type": "object", "properties": {"level": {"type": "integer"}}}},
}


def verifier_of(**options: Any) -> Verifier:
    verifier: Verifier = config.load(Grpo, {"verifier": options}).verifier
    return verifier


def reward(options: dict[str, Any], reply: str, reference: str = "", **fields: Any) -> float:
    (value,) = verifier_of(**options).rewards([Submission("r", reply, reference, **fields)])
    return value


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"intent": "on"}', 1.0),
        (' {"intent": "off", "level": 3}\n', 1.0),
        ('{"intent": "dim"}', 0.0),
        ('{"intent": "on", "level": "3"}', 0.0),
        ('{"intent": "on", "intent": "off"}', 0.0),  # which one would be read?
        ('Sure: {"intent": "on"}', 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_json_schema_takes_one_value_of_the_schema(reply: str, expected: float) -> None:
    assert reward({"kind": "json_schema", "schema": SCHEMA}, reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"a": 1, "b": "x"}', 1.0),
        ('{"b": "x", "a": 1}', 1.0),
        ('{"a": 1, "b": "y"}', 0.5),
        ('{"a": "1", "b": "x"}', 0.5),
        ('{"a": true, "b": "x"}', 0.5),
        ('{"a": 1}', 0.5),
        ('{"a": 1, "b": "x", "c": 0, "d": 0}', 0.5),
        ("[1]", 0.0),
        ("no", 0.0),
    ],
)
def test_json_fields_compares_values_and_types(reply: str, expected: float) -> None:
    assert reward({"kind": "json_fields"}, reply, '{"a": 1, "b": "x"}') == expected


def test_json_fields_of_some_names_ignores_the_others() -> None:
    options = {"kind": "json_fields", "fields": ["a"]}
    assert reward(options, '{"a": 1, "c": 0}', '{"a": 1, "b": "x"}') == 1.0
    assert "b" in verifier_of(kind="json_fields", fields=["b"]).missing(Submission("r", "", '{"a": 1}'))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("It is 1,250.04 kg", 1.0),
        ("3 + 4 = 1250", 1.0),
        ("1250 or 1251", 0.0),
        ("1e999", 0.0),
        ("none", 0.0),
        ("9" * 1_000_000, 0.0),
    ],
)
def test_numeric_takes_the_last_number(reply: str, expected: float) -> None:
    assert reward({"kind": "numeric", "tolerance": 0.05}, reply, "the sum is 1250") == expected


def test_numeric_tolerance_may_be_relative() -> None:
    assert reward({"kind": "numeric", "relative": 0.1}, "109", "100") == 1.0
    assert reward({"kind": "numeric", "relative": 0.1}, "111", "100") == 0.0
    assert last_number("-3.5e2 and +7") == 7.0


def test_regex_finds_its_pattern() -> None:
    assert [reward({"kind": "regex", "pattern": "^on:"}, reply) for reply in ("on:hall", "so on:hall")] == [1.0, 0.0]


def test_regex_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular_expression, "SEARCH_S", 0.05)
    with pytest.raises(BudgetError, match="regex searched the reply to row r") as caught:
        reward({"kind": "regex", "pattern": r"^(a|aa)+$(?<!b)"}, "a" * 60 + "b")
    assert "pattern" in caught.value.remedy


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (call("light", level=3), 1.0),
        ("Of course. " + call("light", level=3), 1.0),
        ('{"name": "light", "parameters": {"level": 3}}', 1.0),
        (call("light", level=4), 0.0),
        (call("light", level="3"), 0.0),
        (call("door", level=3), 0.0),
        (call("light", level=3) + call("light", level=4), 0.5),
        ("<tool_call>" * 1000, 0.0),
        ("the light is on", 0.0),
    ],
)
def test_tool_call_compares_names_and_typed_arguments(reply: str, expected: float) -> None:
    assert reward({"kind": "tool_call"}, reply, call("light", level=3), tools=(TOOL,)) == expected


def test_tool_call_may_take_any_valid_arguments() -> None:
    options = {"kind": "tool_call", "arguments": "valid"}
    found = [
        reward(options, call("light", level=level), call("light", level=3), tools=(TOOL,)) for level in (9, "nine")
    ]
    assert found == [1.0, 0.0]


def test_submission_of_a_row_has_its_tool_calls_as_text() -> None:
    calls = json.dumps([{"type": "function", "function": {"name": "light", "arguments": '{"level": 3}'}}])
    row = Example(
        (Message.of("user", "light to 3"), Message("assistant", (), tool_calls=calls)), (), tools=json.dumps([TOOL])
    )
    submission = Submission.of_example(row)
    assert submission.reference == call("light", level=3) and submission.tools == (TOOL,)
    assert not verifier_of(kind="tool_call").missing(submission)
    assert submission.prompt == ({"role": "user", "content": "light to 3"},)


@pytest.mark.parametrize(
    ("kind", "reference", "problem"),
    [
        ("json_fields", "on", "a JSON object"),
        ("json_fields", "{}", "a JSON object"),
        ("numeric", "many", "a number"),
        ("tool_call", "on", "declared tools"),
        ("unit_tests", "x = 1", "asserts"),
        ("unit_tests", "this is no code", "asserts"),
    ],
)
def test_what_a_row_lacks_is_named(kind: str, reference: str, problem: str) -> None:
    assert problem in verifier_of(kind=kind).missing(Submission("r", "", reference))


def test_solution_is_the_code_without_its_asserts() -> None:
    text = "Here:\n```python\ndef f(x):\n    assert x\n    return x\nassert f(1) == 1\nassert f(2) == 2\n```\n"
    solution, tests = asserts_of(text)
    assert "return x" in solution and "assert x" in solution and "f(1)" not in solution
    assert tests == ["assert f(1) == 1", "assert f(2) == 2"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kind": "json_shape"}, "json_schema"),
        ({"kind": "json_schema", "schema": "x.json"}, "no mapping"),
        ({"kind": "json_schema", "schema": {"type": "thing"}}, "no JSON Schema"),
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "numeric", "tolerance": -1.0}, "at least 0"),
        ({"kind": "unit_tests", "time_s": 0.0}, "above 0"),
        ({"kind": "python", "function": "reward"}, "module"),
        ({"kind": "python", "function": "os.system"}, "module"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        verifier_of(**options)
    assert problem in f"{caught.value.problem} {caught.value.remedy}"
