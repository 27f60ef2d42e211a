"""What a Release says of its rows: counted over a Dataset, deterministic, nothing of masked rows."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact
from sartor.core.splits import LEAST_GROUPS
from sartor.evaluate import training_facts
from training_examples import example, facts


def test_what_most_rows_have_is_what_the_release_says() -> None:
    made = facts(
        *(example(f"q{n}", '{"a": 1}', tools='[{"type": "function"}]') for n in range(3)),
        example("q", "x", system="Be long."),
    )
    assert made.system_prompt == "Be brief."
    assert made.most_tools == [{"type": "function"}]
    assert made.format == "text"
    assert facts(*(example(f"q{n}", "[1]") for n in range(3))).format == "json"
    empty = facts()
    assert (empty.system_prompt, empty.most_tools, empty.format) == ("", [], "text")


def test_exemplars_cover_both_splits_and_skip_masked_rows(tmp_path: Path) -> None:
    """Of 30 distinct texts 8 are held out; masked and long prompts are skipped."""
    made = facts(
        *(example(f"train {n}", "r") for n in range(40)),
        *(example(f"eval {n}", "r", "eval") for n in range(20)),
        example("call [PHONE]", "r", steps=("personal_data",)),
        example("long " * 200, "r"),
        example("train 1", "r", "eval"),
    )
    assert training_facts.write_exemplars(made, tmp_path, 30) == 30
    lines = [json.loads(line) for line in (tmp_path / training_facts.EXEMPLARS).read_text().splitlines()]
    texts = [line["text"] for line in lines]
    assert len(set(texts)) == 30 and not any(text.startswith(("call", "long")) for text in texts)
    assert sum(line["split"] == "eval" for line in lines) == 8
    assert training_facts.write_exemplars(made, tmp_path / "none", 0) == 0 and not (tmp_path / "none").exists()


def test_rehearsal_rows_are_only_negative_exemplars(tmp_path: Path) -> None:
    """They have the split `other`, are never held out, and count for neither rows nor format."""
    made = facts(
        *(example(f"train {n}", "[1]", system="") for n in range(20)), example("good morning", "r", "eval", system="")
    )
    for text in ("good morning", "how are you"):
        made.rehearse(example(text, "fine", system=""))
    assert (made.format, made.rows) == ("json", 20)
    training_facts.write_exemplars(made, tmp_path, 40)
    lines = [json.loads(line) for line in (tmp_path / training_facts.EXEMPLARS).read_text().splitlines()]
    assert {line["text"] for line in lines if line["split"] == "other"} == {"good morning", "how are you"}
    assert not [line for line in lines if line["split"] == "eval"], "what was rehearsed is not held out"


def test_general_and_personal_prompts_are_no_agent_exemplars(tmp_path: Path) -> None:
    """Training rows without a system prompt become `other`; a prompt with an e-mail address is skipped."""
    made = facts(
        *(example(f"train {n}", "r") for n in range(20)),
        example("another prompt", "r", system="Be long."),
        example("mail me at bob.smith@example.com", "r"),
        *(example(f"hello {n}", "hi", system="") for n in range(3)),
        example("good morning", "hi", "eval", system=""),
        example("switch it off", "r", "eval"),
    )
    training_facts.write_exemplars(made, tmp_path, 300)
    lines = [json.loads(line) for line in (tmp_path / training_facts.EXEMPLARS).read_text().splitlines()]
    by_split = {
        split: {line["text"] for line in lines if line["split"] == split} for split in ("train", "eval", "other")
    }
    assert by_split["train"] == {*(f"train {n}" for n in range(20)), "another prompt"}
    assert by_split["eval"] == {"switch it off"}
    assert by_split["other"] == {"hello 0", "hello 1", "hello 2"}


def test_half_of_general_exemplars_resemble_agent_prompts(tmp_path: Path) -> None:
    """Of 44 general prompts 10 are written, among them the 4 that resemble the agent's prompts."""
    made = facts(*(example(f"switch on lamp {n} in the hall", "[1]") for n in range(80)))
    for n in range(40):
        made.rehearse(example(f"tell me a story about {n} ducks", "once", system=""))
    near = {f"who invented the lamp of hall {n}" for n in range(4)}
    for text in near:
        made.rehearse(example(text, "somebody", system=""))
    training_facts.write_exemplars(made, tmp_path, 50)
    lines = [json.loads(line) for line in (tmp_path / training_facts.EXEMPLARS).read_text().splitlines()]
    others = [line["text"] for line in lines if line["split"] == "other"]
    assert len(others) == len(set(others)) == 10 and near <= set(others)
    assert sum("ducks" in text for text in others) >= 5


def test_canaries_are_short_distinct_and_asked_as_they_were(tmp_path: Path) -> None:
    held_out = [example(f"q{n}", "r" * n, "eval", system="Own.") for n in range(1, 8)]
    table = [{"id": one.id, "prompt": one.prompt[-1].text, "tuned_reply": one.reply} for one in held_out]
    table += [
        {"id": "other", "prompt": "from a file", "tuned_reply": "z"},
        {"id": "same", "prompt": "p", "tuned_reply": "z"},
    ]
    parquet_io.write_rows(tmp_path / "rows.parquet", pa.Table.from_pylist(table).schema, table)
    found = training_facts.recorded_canaries(facts(example("q", "r"), *held_out), Artifact(tmp_path, {}))
    assert sorted(one["reply"] for one in found) == sorted([*("r" * n for n in range(1, 8)), "z"])
    by_reply = {one["reply"]: one["messages"] for one in found}
    assert by_reply["r"] == [{"role": "system", "content": "Own."}, {"role": "user", "content": "q1"}]
    assert by_reply["z"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("replies", [1, 2, 3])
def test_canaries_suffice_for_a_probe_when_replies_are_few(replies: int, tmp_path: Path) -> None:
    """Rows with 1, 2 or 3 distinct replies still give CANARIES distinct prompts."""
    table = [{"id": f"row{n}", "prompt": f"q{n // 2}", "tuned_reply": "yn."[n // 2 % replies]} for n in range(40)]
    parquet_io.write_rows(tmp_path / "rows.parquet", pa.Table.from_pylist(table).schema, table)
    found = training_facts.recorded_canaries(facts(example("q", "r")), Artifact(tmp_path, {}))
    assert len({json.dumps(one["messages"]) for one in found}) == len(found) == training_facts.CANARIES >= LEAST_GROUPS
    assert len({one["reply"] for one in found}) == replies
