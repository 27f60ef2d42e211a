"""Markup in a reply's text becomes the fields that it stands for, or the reply cannot be read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sartor.core.errors import TemplateMarkupError
from sartor.core.records import Example, Message, Part
from sartor.core.reply_markup import is_from_text, known, read_example

CALL = '<tool_call>\n{"name": "light", "arguments": {"room": "hall", "on": 1}}\n</tool_call>'


def row(reply: str, **fields: str) -> Example:
    return Example((Message.of("user", "q <|im_end|>"), Message("assistant", (Part("text", reply),), **fields)), ())


def read(reply: str) -> Message:
    return read_example(row(reply)).messages[-1]


@pytest.mark.parametrize(
    ("reply", "text", "calls", "reasoning"),
    [
        (CALL, "", ["light"], ""),
        (f"On it.\n{CALL}\n{CALL}\n", "On it.", ["light", "light"], ""),
        ("<think>\nhm\n\nso\n</think>\n\nblue", "blue", [], "hm\n\nso"),
        (f"<think>hm</think>{CALL}", "", ["light"], "hm"),
        ("<think>\n\n</think>\n\nblue", "blue", [], ""),
        ('[TOOL_CALLS][{"name": "light", "arguments": {}}]', "", ["light"], ""),
        ('<|python_tag|>{"name": "light", "parameters": {}}', "", ["light"], ""),
    ],
)
def test_markup_is_read_into_fields(reply: str, text: str, calls: list[str], reasoning: str) -> None:
    message = read(reply)
    found = json.loads(message.tool_calls or "[]")
    assert (message.text, [call["function"]["name"] for call in found], message.reasoning_content) == (
        text,
        calls,
        reasoning,
    )
    assert is_from_text(found) == bool(calls) and all(call["type"] == "function" for call in found)


@pytest.mark.parametrize(
    "reply",
    [
        "yes<|im_end|>",
        "<|im_start|>assistant\nyes",
        "a <tool_call>{broken</tool_call>",
        f"{CALL} and more",
        f"{CALL} {CALL[:20]}",
        "x<think>late</think>",
        "<think>open",
        "<think>a<|im_end|></think>b",
        "<think>only</think>",
        "[INST] a [/INST]",
        "yes</s>",
        "<s>yes",
        "<start_of_turn>model\nhi",
        "see <|image_pad|>",
        "<image>",
        '<tool_call>{"name": "f", "arguments": NaN}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>',
        "<tool_call>[]</tool_call>",
        "<|eot_id|>",
        "[" * 2000 + "<tool_call>" + "[" * 2000,
    ],
)
def test_other_markup_cannot_be_read(reply: str) -> None:
    with pytest.raises(TemplateMarkupError, match="a reply spells") as caught:
        read_example(row(reply))
    assert caught.value.remedy and caught.value.reason == "template_markup"


@pytest.mark.parametrize(
    "reply", ["a < b > c", "<b>bold</b> <s>old</s>", "[1] [a]", "<thinking> hm", "|> <|", "List<String>", "</p>"]
)
def test_text_without_markup_is_the_very_same(reply: str) -> None:
    example = row(reply)
    assert read_example(example) is example and not known(reply)


@pytest.mark.parametrize("text", ["<think>a</think>b", CALL, f"see {CALL}", "end<|im_end|>"])
def test_a_document_that_spells_markup_is_not_cut_short(text: str) -> None:
    with pytest.raises(TemplateMarkupError, match="document"):
        read_example(Example((Message.of("assistant", text),), ()))


def test_a_field_that_is_there_is_not_written_over() -> None:
    with pytest.raises(TemplateMarkupError, match="the field already"):
        read_example(row(CALL, tool_calls='[{"function": {"name": "x", "arguments": {}}}]'))


def test_a_rejected_reply_is_read_too() -> None:
    example = Example(row("good").messages, (), rejected=(Message.of("assistant", CALL),))
    assert read_example(example).rejected[0].tool_calls
    with pytest.raises(TemplateMarkupError):
        read_example(Example(row("good").messages, (), rejected=(Message.of("assistant", "bad<|im_end|>"),)))


def test_a_row_goes_on_under_its_id_where_that_is_wanted() -> None:
    example = row(CALL)
    assert read_example(example, keep_id=True).id == example.id != read_example(example).id


@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<tool_call>", "</tool_call>", "{", '"a"', "}", "x", "\n", "<|im_end|>"]
        )
    )
)
def test_whatever_is_read_spells_none_any_more(pieces: list[str]) -> None:
    try:
        message = read("".join(pieces))
    except TemplateMarkupError:
        return
    assert not known(message.text) and not known(message.reasoning_content)
