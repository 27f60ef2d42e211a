"""Check of a verifier before a run: useless ones are refused, by an interval; edits make replies wrong."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from sartor.core.errors import ConfigError, SourceError
from sartor.core.statistics import area_under_roc
from sartor.inference.verifiers.json_fields import JsonFieldsVerifier
from sartor.inference.verifiers.json_schema import JsonSchemaVerifier
from sartor.inference.verifiers.numeric import NumericVerifier, last_number
from sartor.inference.verifiers.regular_expression import RegexVerifier
from sartor.inference.verifiers.reply_edits import wrong_reply
from sartor.inference.verifiers.submission import Submission
from sartor.inference.verifiers.unit_tests import UnitTestsVerifier
from sartor.inference.verifiers.verifier_check import check_rows, check_verifier

JSON_REPLIES = [
    json.dumps({"intent": intent, "area": area, "level": level})
    for intent in ("on", "off")
    for area in ("hall", "attic", "garage", "patio")
    for level in (10, 20, 30)
]
SCHEMA = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["on", "off"]},
        "area": {"enum": ["hall", "attic", "garage", "patio"]},
        "level": {"type": "integer"},
    },
    "required": ["intent", "area", "level"],
    "additionalProperties": False,
}


def submissions(replies: Sequence[str]) -> list[Submission]:
    return [Submission(f"row{index}", "", reply) for index, reply in enumerate(replies)]


@dataclass(frozen=True)
class PartialVerifier:
    """Passes right replies, and all but some of the wrong ones."""

    failed: int
    kind: str = "partial"

    def missing(self, row: Submission) -> str:
        return ""

    def right_reply(self, row: Submission) -> str:
        return row.reference

    def rewards(self, items: Sequence[Submission]) -> list[float]:
        wrong = [index for index, item in enumerate(items) if item.reply != item.reference]
        return [float(index not in wrong[: self.failed]) for index in range(len(items))]


def test_good_verifiers_pass() -> None:
    for verifier in (JsonSchemaVerifier(SCHEMA), JsonFieldsVerifier()):
        check = check_verifier(verifier, submissions(JSON_REPLIES), 0)
        assert check.replies == 48 and check.low > 0.6 and check.right == 1 > check.wrong
        assert check.kind in str(check) and check.as_json()["auc"] == round(check.auc, 6)
    sums = [f"{n} and {n} are {2 * n}" for n in range(3, 30)]
    assert check_verifier(NumericVerifier(), submissions(sums), 0).auc == 1


def test_a_constant_verifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="regex gives every reply the reward 1, right or wrong") as caught:
        check_verifier(RegexVerifier("."), submissions(JSON_REPLIES), 0)
    assert "row" in caught.value.remedy


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_package\ndef f(): return {n}\nassert f() == {n}", "raised ModuleNotFoundError: No module"),
        ("def f(): return {n}\nassert f() == {n} + 1", r"assert f\(\) == \d+ \+ 1 does not hold"),
        ("while True: pass\nassert {n} == {n}", "took more than 0.2 s"),
        ("print('x' * (2 << 20))\nassert {n} == {n}", "wrote more than 1 MB"),
        ("import os\nos._exit(3)\nassert {n} == {n}", "its process ended by itself"),
    ],
)
def test_why_references_fail_their_own_tests_is_said(code: str, reason: str) -> None:
    """And not that the verifier should be stricter."""
    rows = submissions([code.format(n=n) for n in range(20)])
    with pytest.raises(
        ConfigError, match=f"20 of 20 right replies have less than 1, as that to row row.*: .*{reason}"
    ) as caught:
        check_verifier(UnitTestsVerifier(time_s=0.2), rows, 0)
    assert "mend or leave out rows" in caught.value.remedy and caught.value.option == "objective.verifier"


def test_a_few_references_that_fail_do_not_hide_that_a_verifier_is_lenient() -> None:
    """The row that fails is named, and not one that passes."""
    lenient = [f"x = {n}\nassert True" for n in range(39)]
    with pytest.raises(
        ConfigError, match="1 of 40 right replies have less than 1, as that to row row39: assert x == 2 does"
    ) as caught:
        check_verifier(UnitTestsVerifier(time_s=5), submissions([*lenient, "x = 39\nassert x == 2"]), 0)
    assert "a stricter one" in caught.value.remedy


def test_a_verifier_near_chance_is_refused_with_an_example() -> None:
    with pytest.raises(ConfigError, match=r"AUC 0\.\d+ in .* the lower end must be above 0\.6") as caught:
        check_verifier(JsonSchemaVerifier({"type": "object"}), submissions(JSON_REPLIES), 0)
    assert "does not tell the right reply to row" in caught.value.remedy


@pytest.mark.parametrize(("failed", "passes"), [(8, False), (9, True)])
def test_the_interval_decides_and_not_the_estimate(failed: int, passes: bool) -> None:
    """Of 20 wrong replies 8 that fail make an AUC of 0.7, whose interval reaches below 0.6."""
    rows = submissions(JSON_REPLIES[:20])
    if passes:
        assert check_verifier(PartialVerifier(failed), rows, 0).auc == pytest.approx(0.5 + failed / 40)
    else:
        with pytest.raises(ConfigError, match=r"AUC 0\.70"):
            check_verifier(PartialVerifier(failed), rows, 0)


def test_a_reversed_verifier_is_refused() -> None:
    class Reversed(PartialVerifier):
        def rewards(self, items: Sequence[Submission]) -> list[float]:
            return [float(item.reply != item.reference) for item in items]

    with pytest.raises(ConfigError, match=r"AUC 0\.00"):
        check_verifier(Reversed(0), submissions(JSON_REPLIES), 0)


def test_too_few_replies_are_no_check() -> None:
    with pytest.raises(SourceError, match="19 rows have a reference reply .* 20 are needed"):
        check_verifier(JsonFieldsVerifier(), submissions(JSON_REPLIES[:19]), 0)


def test_rows_that_lack_what_is_needed_are_named() -> None:
    with pytest.raises(SourceError, match="6 of 26 rows lack what the verifier numeric needs, a number in its reply"):
        check_rows(NumericVerifier(), submissions(["many"] * 6 + [str(n) for n in range(20)]))


def test_delong_interval_is_that_of_placements() -> None:
    """DeLong et al. 1988 written out for a small case: S10 and S01 of the placements."""
    right, wrong = [0.9, 0.8, 0.4, 0.4], [0.5, 0.4, 0.1]
    of_right = [sum((a > b) + 0.5 * (a == b) for b in wrong) / 3 for a in right]
    of_wrong = [sum((a > b) + 0.5 * (a == b) for a in right) / 4 for b in wrong]

    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / (len(values) - 1)

    auc, deviation = area_under_roc(right, wrong)
    assert auc == pytest.approx(sum(of_right) / 4)
    assert deviation == pytest.approx((variance(of_right) / 4 + variance(of_wrong) / 3) ** 0.5)


@pytest.mark.parametrize(
    "replies",
    [
        JSON_REPLIES,
        [f"the sum is {n}" for n in range(20)],
        [f"def f(x):\n    return x + {n}" for n in range(20)],
        ["switch the light on", "close the door", "yes", "no"],
        [f'<tool_call>{{"name": "light", "arguments": {{"level": {n}}}}}</tool_call>' for n in range(20)],
        ["}{", '{"a": {}}', '{"": [[]]}', "```python\nx = 1\n```", "aa", "é", "\ud800x y"],
    ],
    ids=["json", "numbers", "code", "text", "calls", "odd"],
)
def test_edits_change_every_reply_and_follow_the_seed(replies: list[str]) -> None:
    found = [wrong_reply(reply, replies, f"0:{index}") for index, reply in enumerate(replies)]
    assert all(edited is not None and edited.strip() != reply for edited, reply in zip(found, replies, strict=True))
    assert found == [wrong_reply(reply, replies, f"0:{index}") for index, reply in enumerate(replies)]
    others = [wrong_reply(reply, replies, f"1:{index}") for index, reply in enumerate(replies)]
    assert len(replies) < 10 or found != others


def test_edits_of_numbers_change_the_last_one() -> None:
    replies = [f"{n} apples of {n} are {2 * n}" for n in range(1, 40)]
    verifier = NumericVerifier()
    rows = [
        Submission("r", str(wrong_reply(reply, replies, f"0:{index}")), reply) for index, reply in enumerate(replies)
    ]
    assert not any(verifier.rewards(rows))


def test_edits_of_json_are_of_several_kinds() -> None:
    edited = [str(wrong_reply(reply, JSON_REPLIES, f"0:{index}")) for index, reply in enumerate(JSON_REPLIES)]
    whole = [text for text in edited if text.endswith("}")]
    assert 0 < len(whole) < len(edited)  # some are cut
    names = {tuple(sorted(json.loads(text))) for text in whole}
    assert len(names) > 2  # keys are renamed and dropped
    assert set(whole) & set(JSON_REPLIES)  # replies of other rows


@pytest.mark.parametrize("reply", ['{"time":"00:00"}', '{"a":"11","b":"22"}', '{"n":1e300}'])
def test_edited_json_has_another_value(reply: str) -> None:
    """Not the same one in other spaces, which is as right as the reply."""
    edited = [str(wrong_reply(reply, ["x"], f"0:{seed}")) for seed in range(60)]
    values = [json.loads(text) for text in edited if text.startswith("{") and text.endswith("}")]
    assert values and json.loads(reply) not in values


def test_code_stays_code_unless_it_is_cut() -> None:
    replies = [f"def f(x):\n    y = x + {n}\n    return y * 2" for n in range(20)]
    edited = [str(wrong_reply(reply, replies, f"0:{index}")) for index, reply in enumerate(replies)]
    assert sum(isinstance(ast.parse(text), ast.Module) for text in edited if "return" in text and "def" in text) > 5


def test_one_reply_alone_has_no_other() -> None:
    assert wrong_reply("a", ["a"], "0") in (None, "")


@pytest.mark.parametrize("rows", [20, 200, 1000])
def test_tolerance_above_every_answer_is_refused(rows: int) -> None:
    replies = [f"It weighs {7 * index % 501}.5 kg." for index in range(rows)]
    assert check_verifier(NumericVerifier(), submissions(replies), seed=0).auc > 0.99
    with pytest.raises(ConfigError, match="0.6|every reply the reward 1"):
        check_verifier(NumericVerifier(tolerance=1e30), submissions(replies), seed=0)


@pytest.mark.parametrize("reply", ["3", "-2.5 m", "+7", "so 1,250.5 in all", "3 of 0.25"])
def test_edited_number_is_another_one(reply: str) -> None:
    others = ["19", "4"]
    edited = {wrong_reply(reply, others, str(seed)) for seed in range(60)}
    assert len(edited) >= 8 and all(last_number(text or "") != last_number(reply) for text in edited)
