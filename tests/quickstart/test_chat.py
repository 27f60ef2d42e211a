"""sartor chat: what a person types, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import sartor
from sartor.core.artifacts import Artifact
from sartor.core.errors import ConfigError, ModelError
from sartor.quickstart import chat as verb
from sartor.quickstart.chat import Chat


class Echo:
    """A partner that says what it was asked, a word at a time."""

    name = "echo"
    artifact: Artifact | None = None

    def __init__(self) -> None:
        self.asked: list[tuple[list[dict[str, Any]], bool]] = []
        self.is_closed = False

    def reply(self, messages: list[dict[str, Any]], *, by_base: bool = False) -> Iterator[str]:
        self.asked.append((messages, by_base))
        text = messages[-1]["content"]
        if text == "fail" or not isinstance(text, str):
            yield "half a re"
            raise ModelError("a logit is not finite", "another adapter")
        for word in str(text).split():
            yield f"{word.upper()} "

    def close(self) -> None:
        self.is_closed = True


def talk(*lines: str) -> tuple[Echo, Chat, str]:
    partner, written = Echo(), list[str]()
    with Chat(partner, written.append) as conversation:
        conversation.run(f"{line}\n" for line in lines)
    assert partner.is_closed
    return partner, conversation, "".join(written)


def test_conversation_goes_on_from_what_was_said() -> None:
    partner, conversation, written = talk("hello there", "", "and you")
    assert "echo> HELLO THERE \n" in written and len(partner.asked) == 2
    assert [turn["role"] for turn in partner.asked[1][0]] == ["user", "assistant", "user"]
    assert conversation.messages[-1] == {"role": "assistant", "content": "AND YOU "}


def test_line_with_a_backslash_goes_on_in_the_next() -> None:
    partner, _, _ = talk("one\\", "two", "/quit", "never asked")
    assert [messages[-1]["content"] for messages, _ in partner.asked] == ["one\ntwo"]


def test_base_answers_beside_it_until_told_otherwise() -> None:
    partner, _, written = talk("/compare", "hi", "/compare", "ho")
    assert [by_base for _, by_base in partner.asked] == [True, False, False]
    assert "base> HI \necho> HI \n" in written


def test_question_behind_a_command_is_asked() -> None:
    """Behind /compare it is the one that the base answers too, and behind /new the first of its conversation."""
    partner, conversation, written = talk("/compare hi there", "ho", "/new hello", "/why is that")
    assert [(messages[-1]["content"], by_base) for messages, by_base in partner.asked] == [
        ("hi there", True),
        ("hi there", False),
        ("ho", False),
        ("hello", False),
    ]
    assert [turn["content"] for turn in conversation.messages] == ["hello", "HELLO "]
    assert "/why takes no text: 'is that' was not asked" in written


def test_failed_reply_leaves_the_conversation_as_it_was() -> None:
    _, conversation, written = talk("hi", "fail", "ho")
    assert "ModelError: a logit is not finite\n  try: another adapter" in written
    assert [turn["content"] for turn in conversation.messages] == ["hi", "HI ", "ho", "HO "]


def test_saved_conversation_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    talk("hi", f"/save {file}", "ho", f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [2, 4]
    made = sartor.curate({"sources": [{"path": str(file)}], "split": {"eval_fraction": 0.0}}, tmp_path / "data")
    assert made.kept == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/save", "needs a file"),
        ("/save x.jsonl", "ask something first"),
        ("/why", "no rows"),
        ("/foo", "there is no /foo"),
        ("/quit now", "/quit takes no text"),
        ("/image no.png", "cannot be read"),
        ("/image", "cannot be read"),
    ],
)
def test_command_that_cannot_be_done_says_why(line: str, said: str) -> None:
    partner, _, written = talk(line, "hi")
    assert said in written and len(partner.asked) == 1


@pytest.mark.parametrize("file", ["/", "no/such/folder/rows.jsonl", "~nobody-of-that-name/rows.jsonl"])
def test_file_that_cannot_be_written_to_ends_no_conversation(file: str) -> None:
    partner, _, written = talk("hi", f"/save {file}", "ho")
    assert "cannot be written to" in written and len(partner.asked) == 2


def test_media_that_were_refused_are_not_sent_again(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    partner, conversation, _ = talk(f"/image {tmp_path / 'a.png'}", "fail", "hi")
    assert conversation.messages[0] == {"role": "user", "content": "hi"} and len(conversation.messages) == 2


def test_new_forgets_what_was_said() -> None:
    partner, _, _ = talk("hi", "/new", "ho")
    assert len(partner.asked[1][0]) == 1


def test_adapter_answers_in_pieces_and_its_base_beside_it(adapter: Path) -> None:
    """The whole is what `ask` says; /why names rows of its Dataset."""
    written: list[str] = []
    lines = ["switch attic on", "/compare", "switch attic on", "/why"]
    sartor.chat(str(adapter), [f"{line}\n" for line in lines], written.append, sampling={"max_tokens": 6})
    text = "".join(written)
    asked = sartor.ask(adapter, lines[0], sampling={"max_tokens": 6}).reply
    assert f"{adapter.parent.name} (unreleased)> {asked}\n" in text and "base> " in text
    assert "CC-BY-4.0)" in text and len(written) > 8


def test_base_alone_answers(tiny_base: Path) -> None:
    written: list[str] = []
    sartor.chat(str(tiny_base), ["hi\n"], written.append, sampling={"max_tokens": 3})
    assert written[0].startswith(f"{tiny_base.name}: /compare") and f"{tiny_base.name}> " in written


def test_server_that_is_not_there_is_said() -> None:
    written: list[str] = []
    sartor.chat("http://127.0.0.1:9", ["hi\n"], written.append)
    assert "the server cannot be reached" in "".join(written)
    assert verb.ServerPartner("http://127.0.0.1:9/v1/", "auto", "", {})._client.base_url == "http://127.0.0.1:9"


def test_address_that_is_none_is_said() -> None:
    with pytest.raises(ConfigError, match="no address of a server"):
        sartor.chat("http://127.0.0.1:80a0", [], print)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b'{"error": {"message": "no key", "remedy": "a key"}}', "no key\n  try: a key"),
        (404, b'{"error": "model not found"}', "model not found"),
        (502, b"<html>Bad gateway</html>", "the server answers 502"),
        (500, b"[]", "the server answers 500"),
        (
            200,
            b'data: {"choices": [{"delta": {"content": "half"}}]}\n\ndata: {"error": {"message": "it broke"}}\n\n',
            "it broke",
        ),
        (200, b"data: [1]\n\n", "cannot be reached"),
    ],
)
def test_error_of_a_server_ends_a_reply_and_no_more(status: int, body: bytes, said: str) -> None:
    """In OpenAI's form, as other servers write it, and behind the beginning of a reply."""
    partner = verb.ServerPartner("http://server", "auto", "", {})
    handler = httpx.MockTransport(lambda request: httpx.Response(status, content=body))
    partner._client = httpx.Client(base_url="http://server", transport=handler)
    written: list[str] = []
    with Chat(partner, written.append) as conversation:
        conversation.run(["hi\n"])
    assert said in "".join(written) and conversation.messages == []


def test_server_s_pieces_are_a_reply() -> None:
    partner = verb.ServerPartner("http://server", "auto", "", {})
    body = (
        b': ping\n\ndata: {"choices": [{"delta": {"role": "assistant"}}]}\n\ndata:{"choices": [{"delta": {"content": "so"}}]}\n\n'
        + (b'data: {"choices": [{"delta": null}]}\n\ndata: {"choices": []}\n\ndata: [DONE]\n\n')
    )
    handler = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    partner._client = httpx.Client(base_url="http://server", transport=handler)
    assert "".join(partner.reply([{"role": "user", "content": "hi"}])) == "so"


def test_interrupt_stops_the_reply_and_not_the_conversation() -> None:
    class Slow(Echo):
        def reply(self, messages: list[dict[str, Any]], *, by_base: bool = False) -> Iterator[str]:
            if messages[-1]["content"] == "long":
                yield "on and "
                raise KeyboardInterrupt
            yield from super().reply(messages, by_base=by_base)

    written = list[str]()
    with Chat(Slow(), written.append) as conversation:
        conversation.run(["long\n", "short\n"])
    assert "the reply was stopped" in "".join(written)
    assert [turn["content"] for turn in conversation.messages] == ["short", "SHORT "], "what was stopped is not kept"
