from __future__ import annotations

import json
from pathlib import Path

import pytest

from sartor.core.errors import ConfigError
from sartor.serving.plan_options import Arithmetic, Citations, FieldRule, Json, Merge, PatternCheck, Vote
from sartor.serving.plans.draft_checks import SEARCH_S, run_check
from sartor.serving.plans.plan_runner import majority_reply, merge_json_replies

ROOMS = {
    "type": "object",
    "properties": {"room": {"enum": ["hall"]}},
    "required": ["room"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        ('{"room": "hall"}', []),
        ("hall", ["it is not JSON"]),
        ('{"room": "hall"} it is', ["it is not JSON"]),
        ('{"room": "attic", "on": 1}', ["at $: Additional properties", "at $.room: 'attic' is not one of"]),
        ("[" * 100_000, ["it is not JSON"]),
    ],
)
def test_json(draft: str, said: list[str]) -> None:
    found = run_check(Json(schema=ROOMS), draft, "")
    assert len(found) == len(said) and all(one.startswith(start) for one, start in zip(found, said, strict=True))
    assert bool(run_check(Json(), draft, "")) == ("it is not JSON" in said)


def test_a_schema_fetches_nothing() -> None:
    assert run_check(Json(schema={"$ref": "http://127.0.0.1:1/x"}), "{}", "") == [
        "the schema refers to 'http://127.0.0.1:1/x', which is not in it"
    ]


def test_pattern_check_requires_or_forbids_and_times_out() -> None:
    """A search longer than SEARCH_S seconds is a finding."""
    assert run_check(PatternCheck(r"\bkr\b"), "12 kr", "") == [] and run_check(PatternCheck(r"\bkr\b"), "12", "") == [
        "it must hold '\\\\bkr\\\\b'"
    ]
    assert run_check(PatternCheck("sorry", holds=False), "so sorry", "") == ["it must not hold 'sorry'"]
    (late,) = run_check(PatternCheck(r"(a|aa)+$"), "a" * 60 + "b", "")
    assert f"longer than {SEARCH_S:g} s" in late


@pytest.mark.parametrize(
    ("draft", "wrong"),
    [
        ("17 + 25 = 42.", []),
        ("17 + 25 = 43", ["17 + 25 is 42, not 43"]),
        ("so 3 x 4 = 12, and 12 / 5 = 2.4", []),
        ("2 × (3 + 4) = 15", ["2 × (3 + 4) is 14, not 15"]),
        ("10 / 3 = 3.33", []),
        ("10 / 3 = 3.34", ["10 / 3 is 3.333333333, not 3.34"]),
        ("10 / 3 = 3", ["10 / 3 is 3.333333333, not 3"]),
        ("1,200 + 300 = 1,500", []),
        ("0.1 + 0.2 = 0.3", []),
        ("2 + 3 = 5 = 4 + 1", []),
        ("2 + 3 = 5 = 4 + 2", ["2 + 3 is 5, not 4 + 2"]),
        ("-3 - -4 = 1", []),
        ("1 / 0 = 7", []),  # nothing that can be computed: no finding, and `least` counts it not
        ("on 2024-01-02 = x, 9 = 9", []),
        ("9" * 5000 + " + 1 = 2", []),
        ("(" * 3000 + "1 + 1 = 2", []),
    ],
)
def test_arithmetic(draft: str, wrong: list[str]) -> None:
    assert run_check(Arithmetic(), draft, "") == wrong


def test_arithmetic_that_is_not_there() -> None:
    assert run_check(Arithmetic(least=1), "I do not know; 1 / 0 = 7", "") == ["it holds 0 equations; at least 1"]
    assert run_check(Arithmetic(least=1), "1 + 1 = 2", "") == []


def test_citations_of_fields_of_the_request(tmp_path: Path) -> None:
    check = Citations(fields=("room", "names"))
    request = "turn on Dusty in the  Living\nroom"
    assert run_check(check, '{"room": "living room", "names": ["dusty"], "on": "kitchen"}', request) == []
    assert run_check(check, '{"room": "living"}', "the livingroom") == ["'living' is not in the request"]
    assert run_check(check, '{"room": "attic", "names": ["dusty", "bob"]}', request) == [
        "'attic' is not in the request",
        "'bob' is not in the request",
    ]
    assert run_check(check, "attic", request) == ["it is no JSON object"] == run_check(check, "3", request)
    assert run_check(Citations(fields=("room",), least=1), "{}", request) == ["it cites 0 times; at least 1"]


def test_citations_of_files(tmp_path: Path) -> None:
    (tmp_path / "law.txt").write_text("§ 8. A railing is at least 1.1 m high.")
    check = Citations(sources=(str(tmp_path / "law.txt"),))
    assert run_check(check, 'It says "a railing is at least\n1.1 m high".', "") == []
    assert run_check(check, "“a railing is 2 m high”", "") == ["'a railing is 2 m high' is not in the sources"]
    numbered = Citations(sources=check.sources, pattern=r"§ \d+", least=1)
    assert run_check(numbered, "see § 8", "") == [] and run_check(numbered, "see § 9", "") == [
        "'§ 9' is not in the sources"
    ]
    with pytest.raises(ConfigError, match="gone"):
        run_check(Citations(sources=(str(tmp_path / "gone.txt"),)), '"x"', "")


def test_votes_count_what_means_the_same() -> None:
    assert majority_reply(["No", "yes ", "YES"], Vote()) == (1, 2)
    assert majority_reply(["a", "b"], Vote()) == (0, 1)
    assert majority_reply(['{"a":1,"b":2}', '{"b":3,"a":1.0}', '{"a":2}'], Vote(fields=("a",))) == (0, 1)
    assert majority_reply(['{"a":1,"b":2}', '{"a":2}', '{"b":3,"a":1}'], Vote(fields=("a",))) == (0, 2)
    assert majority_reply(['{"a":null}', "{}", "{}"], Vote(fields=("a",))) == (1, 2)


def test_fields_are_merged_by_their_rules() -> None:
    replies = [
        '{"room":"hall","tags":["a"],"note":"x"}',
        '{"room":"attic","tags":["b","a"],"note":"xyz","odd":1}',
        '{"room":"attic"}',
    ]
    rules = Merge(fields=(FieldRule("tags", "union"), FieldRule("note", "longest")))
    text, count = merge_json_replies([*replies, "no JSON", "[1]"], rules)
    assert (
        json.loads(text) == {"room": "attic", "tags": ["a", "b"], "note": "xyz"} and count == 3
    )  # `odd` is said by one of three
    assert json.loads(merge_json_replies(replies, Merge(rule="first"))[0]) == {
        "room": "hall",
        "tags": ["a"],
        "note": "x",
        "odd": 1,
    }
    assert merge_json_replies(["no", "none"], Merge()) == ("", 0)
