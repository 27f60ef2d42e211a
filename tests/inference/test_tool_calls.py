"""Tools: declarations and choices are checked, references survive their move, and no reply's form is ever an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from sartor.core.errors import RequestError
from sartor.inference import tool_calls
from sartor.inference.constrained_decoding import Grammar
from sartor.inference.engine import GenerateCall
from sartor.inference.tool_calls import CallReader
from sartor.models.chat import ChatTokenizer


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "description": "d", "parameters": parameters or {"type": "object"}},
    }


TREE = {
    "type": "object",
    "properties": {"enum": {"$ref": "#/$defs/node"}, "$ref": {"type": "integer"}},
    "required": ["enum", "$ref"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"const": {"$ref": "#/x"}}},
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}
TOOLS = (tool("find"), tool("turn_on", TREE))


def read(
    text: str, *, cuts: Sequence[int] = (), declared: Sequence[dict[str, Any]] = TOOLS
) -> tuple[str, str, list[tuple[str, Any]]]:
    """(text told while it came, text told at the end, calls) of a reply that comes in pieces."""
    reader = CallReader(GenerateCall(id="c", tools=tuple(declared)))
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    told = "".join(reader.feed(text[start:end]) for start, end in zip(places, places[1:], strict=False))
    rest, calls = reader.end()
    return told, rest, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


FIND = '{"name": "find", "arguments": {"q": "a"}}'
TURN = '{"name": "turn_on", "arguments": {}}'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (f"<tool_call>\n{FIND}\n</tool_call>", "", ["find"]),
        (
            f"I look.\n<tool_call>{FIND}</tool_call>\n<tool_call>\n{TURN}\n</tool_call>\n",
            "I look.\n",
            ["find", "turn_on"],
        ),
        (f"<tool_call>{FIND}", "", ["find"]),
        (f"<tool_call>```json\n{FIND}\n```</tool_call>", "", ["find"]),
        (FIND, "", ["find"]),
        (f"  {FIND}\n", "", ["find"]),
        (f"{FIND}; {TURN}", "", ["find", "turn_on"]),
        (f"[{FIND}, {TURN}]", "", ["find", "turn_on"]),
        (f"```json\n{FIND}\n```", "", ["find"]),
        ('<|python_tag|>{"name": "find", "parameters": {"q": "a"}}', "", ["find"]),
        (f"So: <|python_tag|>{FIND}", "So: ", ["find"]),
        ('{"name": "find", "arguments": "{\\"q\\": \\"a\\"}"}', "", ["find"]),
        (f"<tool_call> no <tool_call>{FIND}</tool_call>", "<tool_call> no ", ["find"]),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text: str, content: str, names: list[str]) -> None:
    for cuts in ([], range(len(text)), [1], [5, 9, 12], [len(text) - 1]):
        told, rest, calls = read(text, cuts=list(cuts))
        assert (told + rest, [name for name, _ in calls]) == (content, names)
        assert calls[0] == ("find", {"q": "a"})


@pytest.mark.parametrize(
    "text",
    [
        "The sky is blue.",
        "",
        "  ",
        "{",
        '{"name": "find"}',
        '{"name": "find", "arguments": [1]}',
        '{"name": "other", "arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"intent": "HassTurnOn"}',
        FIND + " and more",
        "<tool_call>" + FIND[:-1] + "</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>",
        "a <tool",
        f"{FIND}; 3",
        "[" * 3000,
        '{"name": "find", "arguments": {"a": NaN}}',
        "```",
        "<|python_tag|>print(1)",
        '{"a":' * 3000,
        "[]",
        '{"name": "find", "arguments": "{"}',
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    for cuts in ([], range(0, len(text), 7)):
        told, rest, calls = read(text, cuts=list(cuts))
        assert (told + rest, calls) == (text, [])


def test_text_is_told_while_it_comes() -> None:
    reader = CallReader(GenerateCall(id="c", tools=TOOLS))
    assert (
        reader.feed("The sky") == "The sky"
        and reader.feed(" is <b>blue") == " is <b>blue"
        and reader.feed(" <tool") == " "
    )
    assert reader.feed("s>") == "<tools>" and reader.end() == ("", ())


def test_without_tools_everything_is_told_at_once() -> None:
    reader = CallReader(GenerateCall(id="c"))
    assert (reader.feed(FIND), reader.end()) == (FIND, ("", ()))


_FRAGMENTS = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "```",
        "```json",
        "{",
        "}",
        "[",
        "]",
        ";",
        ",",
        ":",
        '"name"',
        '"find"',
        "\n",
        " ",
        '"arguments"',
        '"parameters"',
        FIND,
        TURN,
        "null",
        "1e999",
        "\\ud800",
        '"',
        "<tool",
        "text",
        "é",
        "\x00",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_FRAGMENTS | st.text(max_size=6), max_size=12).map("".join), st.lists(st.integers(0, 80), max_size=4))
def test_no_reply_raises_or_is_lost(text: str, cuts: list[int]) -> None:
    told, rest, calls = read(text, cuts=cuts)
    assert (told, rest, calls)[1:] is not None
    if not calls:
        assert told + rest == text
    assert all(isinstance(arguments, dict) and name in ("find", "turn_on") for name, arguments in calls)
    assert (told + rest, calls) == (lambda whole: (whole[0] + whole[1], whole[2]))(read(text))


def test_ids_differ_and_are_the_same_again() -> None:
    def ids(call: str) -> list[str]:
        reader = CallReader(GenerateCall(id=call, tools=TOOLS))
        reader.feed(f"{FIND};{TURN}")
        return [found["id"] for found in reader.end()[1]]

    assert len({*ids("a"), *ids("b")}) == 4 and ids("a") == ids("a")


@pytest.mark.parametrize("must", ["find", "turn_on", "*"])
def test_a_forced_choice_writes_a_call_that_validates(must: str) -> None:
    chat = ChatTokenizer(tiny.tokenizer())
    call = GenerateCall(id="c", tools=TOOLS, must_call=must, schema='{"type":"integer"}')
    grammar = Grammar(chat.tokenizer, chat.stops, 320)
    source = torch.Generator().manual_seed(5)
    seen = set()
    for _ in range(8):
        constraint, written = grammar.constraint(tool_calls.reply_schema(call)), []
        while not constraint.is_done and len(written) < 600:
            logits = torch.randn(320, generator=source)
            logits[2] += 3
            token = int(logits.masked_fill(~constraint.mask(), -torch.inf).argmax())
            constraint.advance(token)
            written.append(token)
        if constraint.is_complete:
            _, _, ((name, arguments),) = read(chat.decode(written))
            seen.add(name)
            jsonschema.validate(arguments, {"find": {"type": "object"}, "turn_on": TREE}[name])
    assert seen and (seen == {must} if must != "*" else seen <= {"find", "turn_on"})


def test_the_schema_of_a_reply() -> None:
    assert (
        tool_calls.reply_schema(GenerateCall(id="c", schema='{"type":"integer"}', tools=TOOLS)) == '{"type":"integer"}'
    )
    assert tool_calls.reply_schema(GenerateCall(id="c")) == ""
    with pytest.raises(RequestError, match="not declared"):
        tool_calls.reply_schema(GenerateCall(id="c", tools=TOOLS, must_call="other"))


@pytest.mark.parametrize(
    ("choice", "kept", "must"),
    [
        (None, 2, ""),
        ("auto", 2, ""),
        ("none", 0, ""),
        ("required", 2, "*"),
        ({"type": "function", "function": {"name": "find"}}, 2, "find"),
    ],
)
def test_choices(choice: Any, kept: int, must: str) -> None:
    left, named = tool_calls.read_choice(choice, TOOLS)
    assert (len(left), named) == (kept, must)


@pytest.mark.parametrize(
    "choice",
    [
        "find",
        3,
        [],
        {"type": "function"},
        {"type": "function", "function": {"name": "other"}},
        {"function": {"name": "find"}},
        {"type": "function", "function": {"name": ["find"]}},
    ],
)
def test_a_wrong_choice_is_refused(choice: Any) -> None:
    with pytest.raises(RequestError, match="tool_choice"):
        tool_calls.read_choice(choice, TOOLS)


def test_no_tool_can_be_required_where_none_is_declared() -> None:
    with pytest.raises(RequestError, match="tool_choice"):
        tool_calls.read_choice("required", ())


def _deep() -> Any:
    deep: Any = {}
    for _ in range(5000):
        deep = {"properties": {"a": deep}}
    return deep


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ("find", "no list"),
        ([3], r"tools\[0\]"),
        ([{"type": "function"}], r"tools\[0\]"),
        ([{**tool("a"), "type": "web"}], r"tools\[0\]"),
        ([tool("a b")], "a b"),
        ([tool("x" * 65)], "xxx"),
        ([tool("a"), tool("a")], "two tools"),
        ([tool("a", [1])], "no object"),
        ([tool("a", _deep())], "deep"),
        ([tool("a", {"description": "x" * 70_000})], "at most"),
        ([tool(f"t{n}") for n in range(129)], "129"),
        ([{"type": "function", "function": {"name": "a", "description": 3}}], "description"),
        ([tool("a", {"a": {1, 2}})], "no JSON"),
        ([tool(f"t{n}", {"description": "x" * 1000}) for n in range(100)], "bytes"),
    ],
)
def test_a_wrong_declaration_is_refused(declared: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        tool_calls.read_tools(declared)


def test_declarations_are_taken_as_they_are() -> None:
    assert tool_calls.read_tools(list(TOOLS)) == TOOLS and tool_calls.read_tools([]) == ()
    assert len(tool_calls.read_tools([{"type": "function", "function": {"name": "a", "parameters": None}}])) == 1
