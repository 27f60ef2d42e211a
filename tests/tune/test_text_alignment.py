"""Chunks of a reply that two tokenizers cut differently: boundaries, ends, characters of several bytes, other texts."""

from __future__ import annotations

import pytest

import tiny
from sartor.core.records import Example, Message
from sartor.models.chat import ChatTokenizer
from sartor.tune.text_alignment import Chunk, align, supervised_ids, supervised_runs

OTHER = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def other_tokenizer(template: str = OTHER) -> ChatTokenizer:
    """A tokenizer of other words and another template."""
    fast = tiny.tokenizer(template, texts=["blue skies, bright lights: on and off"] * 8, size=300)
    return ChatTokenizer(fast)


@pytest.fixture(scope="module")
def sides() -> tuple[ChatTokenizer, ChatTokenizer]:
    return ChatTokenizer(tiny.tokenizer()), other_tokenizer()


def conversation(*replies: str) -> Example:
    turns = []
    for reply in replies:
        turns += [Message.of("user", "what colour"), Message.of("assistant", reply)]
    return Example(tuple(turns), ())


def texts(chunks: list[Chunk], row: object, chat: ChatTokenizer, side: str) -> list[str]:
    ids = supervised_ids(row)  # type: ignore[arg-type]
    return [
        chat.tokenizer.decode([ids[place] for place in getattr(chunk, side)], skip_special_tokens=True)
        for chunk in chunks
    ]


@pytest.mark.parametrize("reply", ["the sky is blue", "light: on, café 21 °C — 你好!", "x", '{"intent":"HassTurnOn"}'])
def test_chunks_spell_the_same_text_on_both_sides(sides: tuple[ChatTokenizer, ChatTokenizer], reply: str) -> None:
    rows = [chat.encode(conversation(reply)) for chat in sides]
    chunks = align((rows[0], sides[0]), (rows[1], sides[1]))
    spelt = [
        texts(chunks, row, chat, side) for row, chat, side in zip(rows, sides, ("student", "teacher"), strict=True)
    ]
    assert [text.strip() for text in spelt[0]] == [text.strip() for text in spelt[1]]
    assert "".join(spelt[0]) == reply
    # every supervised token is in one chunk, in order
    for side, row in zip(("student", "teacher"), rows, strict=True):
        assert [place for chunk in chunks for place in getattr(chunk, side)] == list(range(row.supervised_tokens))
    if len(reply) > 10:
        assert len(chunks) > 2


def test_no_chunk_ends_within_a_character(sides: tuple[ChatTokenizer, ChatTokenizer]) -> None:
    rows = [chat.encode(conversation("你好")) for chat in sides]
    chunks = align((rows[0], sides[0]), (rows[1], sides[1]))
    assert [text for text in texts(chunks, rows[0], sides[0], "student") if text] == ["你", "好"]


def test_each_reply_of_a_conversation_is_aligned(sides: tuple[ChatTokenizer, ChatTokenizer]) -> None:
    rows = [chat.encode(conversation("the sky is blue", "turn on the light")) for chat in sides]
    assert len(supervised_runs(rows[0])) == len(supervised_runs(rows[1])) == 2
    chunks = align((rows[0], sides[0]), (rows[1], sides[1]))
    assert "".join(texts(chunks, rows[0], sides[0], "student")) == "the sky is blueturn on the light"


def test_a_reply_that_a_template_changes_has_no_chunk(sides: tuple[ChatTokenizer, ChatTokenizer]) -> None:
    rows = [sides[0].encode(conversation("the sky is blue")), sides[1].encode(conversation("the sky was blue"))]
    assert align((rows[0], sides[0]), (rows[1], sides[1])) == []
