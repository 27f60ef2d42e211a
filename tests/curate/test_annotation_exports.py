"""Tables with one row a turn, and what annotation tools export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example
from sartor.curate.sources.planner import plan_reading, read_all
from sartor.curate.sources.source_files import PIECE_BYTES
from sartor.curate.sources.types import Columns, SourceOptions

TURNS = Columns(conversation="ticket", role="who", content="said")


def read(file: Path, **options: Any) -> list[Example | Drop]:
    return list(read_all(SourceOptions(path=str(file), **options), 1 << 20, file.parent / "media"))


def turns_file(folder: Path, *turns: tuple[str, str, str]) -> Path:
    file = folder / "turns.csv"
    file.write_text("ticket,who,said\n" + "".join(f"{','.join(turn)}\n" for turn in turns))
    return file


def said(row: Example | Drop) -> list[tuple[str, str]]:
    assert isinstance(row, Example), row
    return [(message.role, message.text) for message in row.messages]


def test_one_row_a_turn_becomes_one_row_a_conversation(tmp_path: Path) -> None:
    file = turns_file(
        tmp_path,
        ("1", "user", "hi"),
        ("1", "assistant", "hello"),
        ("2", "system", "be short"),
        ("2", "user", "x"),
        ("2", "bot", "y"),
    )
    first, second = read(file, fields=TURNS, system="be kind")
    assert said(first) == [("system", "be kind"), ("user", "hi"), ("assistant", "hello")]
    assert said(second) == [("system", "be short"), ("user", "x"), ("assistant", "y")]
    assert isinstance(first, Example) and first.origins[0].locator == "turns.csv:2-3"


def test_who_speaks_last_is_the_assistant_where_no_role_says_so(tmp_path: Path) -> None:
    file = turns_file(
        tmp_path, ("7", "Frau Meier", "Hallo"), ("7", "Frau Meier", "Ist jemand da?"), ("7", "Support", "Ja.")
    )
    (row,) = read(file, fields=TURNS)
    assert said(row) == [("user", "Hallo\nIst jemand da?"), ("assistant", "Ja.")]


def test_conversation_in_two_places_is_no_conversation(tmp_path: Path) -> None:
    file = turns_file(
        tmp_path, ("1", "user", "a"), ("1", "bot", "b"), ("2", "user", "c"), ("2", "bot", "d"), ("1", "user", "e")
    )
    found = read(file, fields=TURNS)
    assert [row.reason if isinstance(row, Drop) else "" for row in found] == ["", "", "split_conversation"]


def test_broken_turn_takes_its_conversation_along(tmp_path: Path) -> None:
    file = turns_file(
        tmp_path,
        ("1", "user", "a"),
        ("1", "bot", "b", "too many"),
        ("1", "bot", "c"),
        ("2", "user", "d"),
        ("2", "bot", "e"),
    )  # type: ignore[arg-type]
    found = read(file, fields=TURNS)
    assert [row.reason if isinstance(row, Drop) else "" for row in found] == ["field_count", ""]


def test_large_table_is_not_cut_in_the_midst_of_a_conversation(tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl"
    with file.open("w") as lines:
        for number in range(3000):
            for who, text in (("user", "u" * 2000), ("assistant", "a" * 2000)):
                lines.write(json.dumps({"ticket": number, "who": who, "said": text}) + "\n")
    assert file.stat().st_size > PIECE_BYTES
    assert len(plan_reading([SourceOptions(path=str(file), fields=TURNS)], 1 << 20).chunks) == 1
    found = read(file, fields=TURNS)
    assert len(found) == 3000 and all(isinstance(row, Example) for row in found)


def test_turns_need_all_three_columns() -> None:
    with pytest.raises(ConfigError, match="needs conversation, role and content"):
        Columns(conversation="ticket", role="who")


def label_studio(text: str, *results: list[dict[str, Any]], cancelled: int = 0) -> dict[str, Any]:
    annotations = [{"result": result, "was_cancelled": number < cancelled} for number, result in enumerate(results)]
    return {"id": 1, "data": {"text": text, "source": "mail"}, "annotations": annotations, "predictions": []}


def choice(name: str) -> list[dict[str, Any]]:
    return [{"from_name": "kind", "to_name": "text", "type": "choices", "value": {"choices": [name]}}]


def test_export_of_label_studio(tmp_path: Path) -> None:
    span = [
        {
            "type": "labels",
            "value": {"start": 0, "end": 3, "text": "Ada", "labels": ["PER"]},
            "from_name": "l",
            "to_name": "text",
        }
    ]
    text = [{"type": "textarea", "value": {"text": ["An answer."]}, "from_name": "a", "to_name": "text"}]
    tasks = [
        label_studio("my card is gone", choice("lost_card")),
        label_studio("two of three agree", choice("a"), choice("b"), choice("a")),
        label_studio("the first was cancelled", choice("a"), choice("b"), cancelled=1),
        label_studio("Ada is here", span),
        label_studio("what is it?", text),
        label_studio("they disagree", choice("a"), choice("b")),
        label_studio("nobody has ended it"),
    ]
    file = tmp_path / "project.json"
    file.write_text(json.dumps(tasks))
    found = read(file)
    assert [row.reply for row in found if isinstance(row, Example)] == [
        "lost_card",
        "a",
        "b",
        '[{"end": 3, "labels": ["PER"], "start": 0, "text": "Ada"}]',
        "An answer.",
    ]
    assert [row.reason for row in found if isinstance(row, Drop)] == ["annotators_disagree", "not_labelled"]


def test_export_of_argilla(tmp_path: Path) -> None:
    def record(*values: Any, status: str = "submitted", **more: Any) -> dict[str, Any]:
        responses = {
            "label": [
                {"value": value, "user_id": str(number), "status": status} for number, value in enumerate(values)
            ]
        }
        return {
            "id": "1",
            "status": "completed",
            "fields": {"text": "my card is gone"},
            "responses": {**responses, **more},
        }

    records = [
        record("lost_card"),
        record("a", "b", "a"),
        record(["a", "b"]),
        record("a", "b"),
        record("a", status="draft"),
        record("a", why=[{"value": "because", "status": "submitted"}]),
    ]
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records))
    found = read(file)
    assert [row.reply for row in found if isinstance(row, Example)] == ["lost_card", "a", '["a", "b"]']
    assert [row.reason for row in found if isinstance(row, Drop)] == [
        "annotators_disagree",
        "not_labelled",
        "bad_field",
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_and_tool_calls_are_kept(tmp_path: Path, name: str) -> None:
    """Under the name of DeepSeek and older vLLM, and that of newer vLLM and OpenRouter."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    turns = [
        {"role": "user", "content": "weather in Ulm?"},
        {"role": "assistant", "content": None, "tool_calls": [call], name: "I must look it up."},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "It rains.", name: "The tool says rain."},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"dialogue": turns, "tools": [{"type": "function", "function": {"name": "weather"}}]}) + "\n"
    )
    (row,) = read(file, fields=Columns(messages="dialogue"))
    assert isinstance(row, Example)
    as_object = {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
    assert (
        json.loads(row.messages[1].tool_calls) == [as_object]
        and row.messages[1].reasoning_content == "I must look it up."
    )
    assert row.messages[3].reasoning_content == "The tool says rain." and row.messages[2].tool_call_id == "c1"


def test_two_reasonings_of_a_turn_must_agree(tmp_path: Path) -> None:
    def turns(**reasoning: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", **reasoning}]}

    rows = [turns(reasoning="add", reasoning_content="add"), turns(reasoning="add", reasoning_content="guess")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    kept, refused = read(file)
    assert isinstance(kept, Example) and kept.messages[1].reasoning_content == "add"
    assert isinstance(refused, Drop) and refused.reason == "bad_field"
    assert refused.detail == "`reasoning_content` and `reasoning` of turn 2 differ; one has to go"
