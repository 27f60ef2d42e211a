"""Which turns keep their reasoning, and the empty thinking block of replies without any."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import marked
import sartor
import tiny
from sample_data import write_jsonl
from sartor.core.errors import SourceError
from sartor.core.records import Example, Message, Origin, Part
from sartor.models.chat import ChatTokenizer
from sartor.models.reasoning_rules import with_reasoning_rule
from sartor.tune.dataset_encoding import encode_rows
from tool_prompts import TEMPLATES


@cache
def chat_of(name: str) -> ChatTokenizer:
    return TEMPLATES[name].chat()


QWEN_3, QWEN_2 = "qwen 3's form", "qwen 2.5's form"


def thought(text: str, reasoning: str, **fields: Any) -> Message:
    return Message("assistant", (Part("text", text),), reasoning_content=reasoning, **fields)


def talk(*replies: Message) -> Example:
    turns: list[Message] = []
    for index, reply in enumerate(replies):
        turns += [Message.of("user", f"what {index}"), reply]
    return Example(tuple(turns), (Origin("s", "1"),))


TWO = talk(thought("sky", "since one"), thought("blue", "since two"))
CALL = [
    {"id": "123456789", "type": "function", "function": {"name": "find", "arguments": {"n": 1, "x": 1.0, "q": "1"}}}
]
LOOP = Example(
    (
        Message.of("user", "first"),
        thought("", "since one", tool_calls=json.dumps(CALL)),
        Message("tool", (Part("text", "3"),), tool_call_id="123456789"),
        thought("done", "since two"),
        Message.of("user", "second"),
        thought("", "since three", tool_calls=json.dumps(CALL)),
        Message("tool", (Part("text", "4"),), tool_call_id="123456789"),
        thought("done again", "since four"),
    ),
    (Origin("s", "1"),),
)


def reasoned(example: Example) -> list[str]:
    return [message.reasoning_content for message in example.messages if message.role == "assistant"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("keep", ["since one", "since two", "since three", "since four"]),
        ("last", ["", "", "since three", "since four"]),
        ("drop", ["", "", "", ""]),
    ],
)
def test_rule_decides_which_turns_keep_reasoning(rule: Any, expected: list[str]) -> None:
    counts: Counter[str] = Counter()
    result = with_reasoning_rule(LOOP, rule, chat_of(QWEN_2), counts)
    assert reasoned(result) == expected and result.id == LOOP.id
    assert counts["kept"] == (rule != "drop") and counts["dropped"] == (rule != "keep")


def test_last_is_what_the_template_does_itself() -> None:
    """Rows that were encoded before the rule was there have the same ids under the default."""
    chat = chat_of(QWEN_3)
    for row in (TWO, LOOP):
        ruled = with_reasoning_rule(row, "last", chat, Counter())
        assert ruled is not row and chat.encode(ruled).ids == chat.encode(row).ids


def test_keep_refuses_what_the_template_leaves_out() -> None:
    with pytest.raises(SourceError, match="data.reasoning=keep keeps; take last, or drop"):
        with_reasoning_rule(TWO, "keep", chat_of(QWEN_3), Counter())
    with_reasoning_rule(TWO, "keep", chat_of(QWEN_2), Counter())


def test_rows_without_reasoning_are_untouched() -> None:
    counts: Counter[str] = Counter()
    row = talk(Message.of("assistant", "blue"))
    assert with_reasoning_rule(row, "drop", chat_of(QWEN_3), counts) is row and not counts


def test_template_without_a_place_writes_it_as_text_and_counts_it() -> None:
    counts: Counter[str] = Counter()
    chat = ChatTokenizer(tiny.tokenizer())
    row = with_reasoning_rule(TWO, "last", chat, counts)
    assert counts == {"dropped": 1, "kept": 1, "written_as_text": 1}
    text = chat.tokenizer.decode(chat.encode(row).ids)
    assert "since one" not in text and "<think>\nsince two\n</think>\n\nblue<|im_end|>" in text


def test_rejected_reply_keeps_reasoning_as_the_chosen_one() -> None:
    pair = replace(talk(thought("blue", "since")), rejected=(thought("red", "as"),))
    kept = with_reasoning_rule(pair, "last", chat_of(QWEN_3), Counter())
    dropped = with_reasoning_rule(pair, "drop", chat_of(QWEN_3), Counter())
    assert kept is pair and not dropped.rejected[0].reasoning_content


# the empty block


def learnt(chat: ChatTokenizer, row: Example) -> str:
    encoded = chat.encode(row)
    return str(chat.tokenizer.decode([token for token, on in zip(encoded.ids, encoded.learnt, strict=True) if on]))


def test_empty_block_is_learnt_or_left_out() -> None:
    """Left out, the reply follows the prompt of a request at once."""
    chat = chat_of(QWEN_3)
    row = talk(Message.of("assistant", "sky"), Message.of("assistant", "blue"))
    assert learnt(chat, row) == "sky<|im_end|><think>\n\n</think>\n\nblue<|im_end|>"
    without = chat.without_empty_think()
    assert learnt(without, row) == "sky<|im_end|>blue<|im_end|>"
    encoded = without.encode(row)
    assert encoded.ids[: encoded.last_reply[0]] == chat.prompt_ids(row.prompt)


def test_block_with_reasoning_stays() -> None:
    chat = chat_of(QWEN_3).without_empty_think()
    assert learnt(chat, talk(thought("blue", "since"))) == "<think>\nsince\n</think>\n\nblue<|im_end|>"


def test_template_without_the_block_is_not_changed() -> None:
    chat = ChatTokenizer(tiny.tokenizer(marked.PLAIN_CHATML))
    row = talk(Message.of("assistant", "sky"), Message.of("assistant", "blue"))
    assert chat.without_empty_think().encode(row) == chat.encode(row)


# calls in several turns


def test_calls_of_earlier_rounds_are_learnt_as_the_template_writes_them() -> None:
    """Qwen 3's form leaves thinking out of earlier turns, so what is before a later user turn is written otherwise."""
    text = learnt(chat_of(QWEN_3), LOOP)
    call = '<tool_call>\n{"name": "find", "arguments": {"n": 1, "x": 1.0, "q": "1"}}\n</tool_call><|im_end|>'
    assert text == (
        f"{call}done<|im_end|><think>\nsince three\n</think>\n\n{call}<think>\nsince four\n</think>\n\ndone again<|im_end|>"
    )


def test_rows_of_a_dataset_are_counted(tmp_path: Path) -> None:
    """A plan, the lines of a run and `sartor.json` show these counts."""
    rows = []
    for index in range(8):
        turns = [{"role": "user", "content": f"what {index}"}, {"role": "assistant", "content": "sky", "weight": 0}]
        turns += [{"role": "user", "content": "and"}, {"role": "assistant", "content": f"blue {index}"}]
        if index % 2:
            turns[1]["reasoning_content"], turns[3]["reasoning_content"] = f"since {index}", f"as {index}"
        rows.append({"messages": turns})
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "licence": "CC0-1.0"}
    dataset = sartor.curate({"sources": [source], "split": {"eval_fraction": 0.0}}, tmp_path / "data").dataset
    chat = chat_of(QWEN_3)

    def encoded(**options: str) -> Any:
        data = {"path": str(dataset.path), "eval_fraction": 0.0, **options}
        return encode_rows(dataset, sartor.load_recipe({"base": "starter", "data": data}), chat)

    default = encoded()
    assert default.reasoning == {"dropped": 4, "kept": 4} and not default.left_out
    texts = [
        chat.tokenizer.decode([token for token, on in zip(row.ids, row.learnt, strict=True) if on])
        for row in default.train
    ]
    assert all("blue" in text and "sky" not in text for text in texts)
    kept = encoded(reasoning="keep")
    assert len(kept.train) == 4 and [len(ids) for ids in kept.left_out.values()] == [4]
    assert next(iter(kept.left_out)).startswith("template: it leaves out reasoning that data.reasoning=keep keeps")
    assert encoded(reasoning="drop").reasoning == {"dropped": 4}
    assert encoded(empty_think="drop").supervised_tokens < default.supervised_tokens
