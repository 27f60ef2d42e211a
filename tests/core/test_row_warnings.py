"""What a set of rows lacks is said with numbers and a remedy; a sound set is warned of nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import sartor
from sample_data import write_jsonl
from sartor.core.row_warnings import DataWarning, evaluation_warnings, reply_warnings, swap_warnings
from sartor.curate.pipeline import Curated

LABELS = ["refund", "delivery", "complaint"]


def curate_warnings(folder: Path, replies: list[str], eval_fraction: float = 0.25) -> list[DataWarning]:
    rows = [{"question": f"question {number}", "answer": reply} for number, reply in enumerate(replies)]
    source = {"path": str(write_jsonl(folder / "rows.jsonl", rows)), "licence": "CC0-1.0"}
    recipe = {"sources": [source], "split": {"eval_fraction": eval_fraction}}
    curated = sartor.curate(recipe, folder / "dataset")
    assert [warning["reason"] for warning in curated.as_json()["warnings"]] == [
        item.reason for item in curated.warnings
    ]
    return curated.warnings


def test_sound_rows_have_no_warning(tmp_path: Path) -> None:
    assert curate_warnings(tmp_path, LABELS * 20) == []


def test_five_rows_are_too_few(tmp_path: Path) -> None:
    (warning,) = curate_warnings(tmp_path, [*LABELS, "other", "none"])
    assert (
        warning.reason == "few_rows"
        and "5 rows of 5 groups" in warning.problem
        and "6 held-out groups" in warning.remedy
    )


def test_few_held_out_groups_name_the_fraction_that_does(tmp_path: Path) -> None:
    (warning,) = curate_warnings(tmp_path, LABELS * 10, eval_fraction=0.1)
    assert warning.reason == "few_groups" and "3 groups of 30" in warning.problem
    assert "split.eval_fraction: 0.19" in warning.remedy


def curate_groups(folder: Path, sizes: list[int], split: dict[str, float], declared: str = "") -> Curated:
    """Curate groups of these numbers of rows. declared: split of the source."""
    rows = []
    for group, size in enumerate(sizes):
        for number in range(size):
            rows.append(
                {
                    "question": f"question {number} of {group}",
                    "answer": LABELS[(group + number) % 3],
                    "group": f"g{group}",
                }
            )
    file = write_jsonl(folder / "rows.jsonl", rows)
    recipe = {"sources": [{"path": str(file), "licence": "CC0-1.0", "split": declared}], "split": split}
    return sartor.curate(recipe, folder / "dataset", replace=True)


@pytest.mark.parametrize(
    ("sizes", "split"),
    [
        ([30, *[1] * 12], {"eval_fraction": 0.1}),
        ([1] * 60, {"eval_fraction": 0.005}),
        ([1] * 60, {"test_fraction": 0.05}),
        ([1] * 60, {"eval_fraction": 0.02, "test_fraction": 0.05}),
        ([7, 5, 1] * 12, {"eval_fraction": 0.02, "test_fraction": 0.01}),
    ],
)
def test_fractions_of_the_remedy_do_when_typed(tmp_path: Path, sizes: list[int], split: dict[str, float]) -> None:
    """Each split then has six groups, and half of the rows remain for training."""
    remedies = {warning.remedy for warning in curate_groups(tmp_path, sizes, split).warnings}
    (remedy,) = remedies
    typed = {name: float(value) for name, value in re.findall(r"split\.(\w+): ([\d.]+)", remedy)}
    assert typed
    curated = curate_groups(tmp_path, sizes, {**split, **typed})
    assert curated.warnings == [] and 2 * curated.counts["splits"]["train"] >= sum(sizes)


def test_split_without_a_row_is_warned_of(tmp_path: Path) -> None:
    """A fraction of 0 asks for no split."""
    (warning,) = curate_groups(tmp_path, [1] * 60, {"eval_fraction": 0.005}).warnings
    assert warning.reason == "few_groups" and "0 groups of 60 held out" in warning.problem
    assert curate_groups(tmp_path, [1] * 60, {"eval_fraction": 0.0}).warnings == []


def test_small_test_split_is_warned_of(tmp_path: Path) -> None:
    (warning,) = curate_groups(tmp_path, [1] * 60, {"test_fraction": 0.05}).warnings
    assert warning.reason == "few_groups" and "3 groups of 60 in the test split" in warning.problem


def test_remedy_without_a_fraction_names_groups_to_add(tmp_path: Path) -> None:
    """Two splits of six groups and half of the rows need 24 groups of equal size; 16 are there."""
    split = {"eval_fraction": 0.1, "test_fraction": 0.1}
    remedies = {warning.remedy for warning in curate_groups(tmp_path, [1] * 16, split).warnings}
    (remedy,) = remedies
    assert remedy.startswith("add rows of about 8 more groups")


def test_declared_split_gets_no_fraction_as_remedy(tmp_path: Path) -> None:
    (warning,) = curate_groups(tmp_path, [1] * 60, {"eval_fraction": 0.1}, "train").warnings
    assert warning.reason == "few_groups" and warning.remedy.startswith("add held-out rows of 6 groups or more")


def test_dataset_for_evaluation_alone_is_not_warned_of(tmp_path: Path) -> None:
    assert curate_groups(tmp_path, [1] * 12, {"eval_fraction": 0.1}, "eval").warnings == []


def test_one_class_teaches_nothing(tmp_path: Path) -> None:
    (warning,) = curate_warnings(tmp_path, ["refund"] * 60)
    assert warning.reason == "one_reply" and "all 60 replies are 'refund'" in warning.problem


def test_labels_in_two_spellings_are_named_with_counts(tmp_path: Path) -> None:
    replies = LABELS * 20 + ["Refund", "refund.", "DELIVERY"]
    (warning,) = curate_warnings(tmp_path, replies)
    assert warning.reason == "spellings" and "2 labels stand in more than one spelling" in warning.problem
    assert "'refund' (20) and 'Refund' (1) and 'refund.' (1)" in warning.problem and "'refund'" in warning.remedy


@pytest.mark.parametrize(
    "replies",
    [
        ["a sentence that is far too long to be a label, whatever else it may be said to be"] * 5 + ["Yes", "yes"],
        ["card_arrival", "card arrival time"] * 10,
        ["3", "-3"] * 10,
        ["1.5", "15", "1,5"] * 10,
        ["5", ".5"] * 10,
    ],
)
def test_what_is_no_spelling_is_not_named(replies: list[str]) -> None:
    assert reply_warnings(replies) == []


def test_spellings_in_a_field_of_json_replies_are_named() -> None:
    """The replies differ in another field, so that whole replies show nothing."""
    replies = [
        json.dumps({"intent": ("Refund", "refund", "delivery")[number % 3], "city": f"c{number}", "unit": "km"})
        for number in range(21)
    ]
    (warning,) = reply_warnings(replies)
    assert warning.reason == "spellings" and "1 label of the field 'intent' stands" in warning.problem
    assert "'Refund' (7) and 'refund' (7)" in warning.problem and "'Refund'" in warning.remedy
    assert reply_warnings([reply.replace("Refund", "refund") for reply in replies]) == []
    assert reply_warnings([*replies, "no JSON"]) == []


@pytest.mark.parametrize("values", [[f"c{number // 2}" for number in range(100)], [*"abcdefgh", "A"]])
def test_field_of_names_has_no_spellings(values: list[str]) -> None:
    """A field with many values, or whose values do not recur, copies what the prompt says."""
    replies = [json.dumps({"name": value, "row": index}) for index, value in enumerate([*values, "C1"])]
    assert reply_warnings(replies) == []


def test_rows_that_call_differently_are_not_one_reply(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"light {number} on"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "on", "arguments": {"light": number}}}],
                },
            ]
        }
        for number in range(60)
    ]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "licence": "CC0-1.0"}
    assert sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, tmp_path / "dataset").warnings == []


def test_rehearsal_does_not_hide_that_own_rows_are_few(tmp_path: Path) -> None:
    own = [{"question": f"question {number}", "answer": "yes"} for number in range(5)]
    talk = [{"question": f"small talk {number}", "answer": f"reply {number}"} for number in range(200)]
    sources = [
        {"path": str(write_jsonl(tmp_path / "own.jsonl", own)), "licence": "CC0-1.0"},
        {"path": str(write_jsonl(tmp_path / "talk.jsonl", talk)), "licence": "CC0-1.0", "rehearsal": True},
    ]
    curated = sartor.curate({"sources": sources}, tmp_path / "dataset")
    assert [warning.reason for warning in curated.warnings] == ["few_rows", "one_reply"]


def test_few_documents_are_warned_of(tmp_path: Path) -> None:
    rows = [{"text": f"a page about machine {number}"} for number in range(5)]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "licence": "CC0-1.0"}
    assert [warning.reason for warning in sartor.curate({"sources": [source]}, tmp_path / "dataset").warnings] == [
        "few_rows"
    ]


def test_evaluation_rows_need_six_groups() -> None:
    replies = LABELS * 2
    assert evaluation_warnings(replies, list("abcdef")) == []
    assert [warning.reason for warning in evaluation_warnings(replies, list("abcdee"))] == ["few_groups"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("R\u00fcckgabe", "Ru\u0308ckgabe"),  # the same characters, composed and not
        ("iade", "\u0130ade"),  # Turkish, with the dot of the capital
        ("refund", "refund\u200b"),
        ('{"intent": "Refund"}', '{"intent":"refund"}'),
    ],
)
def test_spellings_that_look_alike_are_one_label(first: str, second: str) -> None:
    replies = [first] * 20 + [second] * 5 + ["other"] * 20
    (warning,) = reply_warnings(replies)
    assert warning.reason == "spellings"
    (warning,) = reply_warnings([*replies, "one reply is a long text among labels, " * 4])
    assert warning.reason == "spellings", "a long reply among labels hides none"
    assert not reply_warnings([first] * 20 + ["other"] * 20)


def test_prompt_and_reply_that_changed_places_are_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": LABELS[number % 3], "completion": f"what became of my order {number}, please?"}
        for number in range(60)
    ]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "licence": "CC0-1.0"}
    reasons = {
        warning.reason: warning for warning in sartor.curate({"sources": [source]}, tmp_path / "dataset").warnings
    }
    warning = reasons["swapped"]
    assert "60 rows have 3 prompts, such as 'refund' (20), and 60 replies" in warning.problem
    source["fields"] = {"prompt": "completion", "completion": "prompt"}
    turned = sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, tmp_path / "turned")
    assert turned.warnings == []


@pytest.mark.parametrize(
    "pairs",
    [
        [("tell a joke", f"a joke about machine {number}") for number in range(60)],
        [(f"question {number // 2}", f"one of two answers, {number}") for number in range(60)],
        [(LABELS[number % 3], LABELS[(number + 1) % 3]) for number in range(60)],
        [
            (f"describe in a few words the goods of group {number % 3}, as a shop would", f"{number}")
            for number in range(60)
        ],
    ],
)
def test_rows_that_did_not_change_places_are_not_named(pairs: list[tuple[str, str]]) -> None:
    assert swap_warnings(pairs) == []
