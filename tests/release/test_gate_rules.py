"""Rules of one's own: which rows they are about, what offends, and that they are signed into the Release."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from scipy.stats import binomtest

import sartor
from sartor.cli import main
from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ConfigError, GateError
from sartor.evaluate.audit import probes
from sartor.evaluate.limits import Check
from sartor.release.gate import SliceRule, open_rules, upper_bound

RULE = {"name": "no_repair", "where": {"severity": "critical"}, "forbid": {"action": ["mend", "cut"]}}
WANTED = [{"severity": "critical", "action": "stop"}] * 8 + [{"severity": "minor", "action": "mend"}] * 4


def report(tmp_path: Path, replies: list[Any], wanted: list[Any] = WANTED, groups: Sequence[str] = ()) -> Artifact:
    """A Report's rows; without groups each row is one."""
    texts = [said if isinstance(said, str) else json.dumps(said) for said in replies]
    table = [
        {
            "id": f"row{n}",
            "group": groups[n] if groups else "",
            "reference": json.dumps(reference),
            "tuned_reply": text,
        }
        for n, (reference, text) in enumerate(zip(wanted, texts, strict=True))
    ]
    parquet_io.write_rows(tmp_path / "rows.parquet", pa.Table.from_pylist(table).schema, table)
    return Artifact(tmp_path, {})


def judged(found: Artifact, **rule: Any) -> Check:
    (check,) = open_rules({"slices": [{**RULE, **rule}]}).judged(found).values()
    return check


def test_forbidden_reply_fails_only_inside_its_slice(tmp_path: Path) -> None:
    """The detail counts the replies and names the row; at_most=0.125 lets 1 of 8 pass."""
    assert judged(report(tmp_path, WANTED)).outcome == "pass"
    replies: list[Any] = [*WANTED[:3], {"severity": "minor", "action": "cut"}, *WANTED[4:]]
    found = judged(report(tmp_path, replies))
    assert (
        found.outcome == "fail" and "1 of 8 replies offend (1 by what they say, 0 unreadable): 0.125" in found.detail
    )
    assert "row3" in found.detail
    assert judged(report(tmp_path, replies), at_most=0.125).outcome == "pass"


def test_upper_bound_of_a_slice_is_over_groups(tmp_path: Path) -> None:
    """Eight rows of four groups, two of one of which offend; the outcome stays by rows."""
    replies: list[Any] = [*[{"severity": "critical", "action": "cut"}] * 2, *WANTED[2:]]
    groups = ["a", "a", "b", "b", "c", "c", "d", "d", *"efgh"]
    found = judged(report(tmp_path, replies, groups=groups), at_most=0.25)
    assert found.outcome == "pass"
    # 1 of 4 groups: of scipy.stats.binomtest(1, 4, alternative="less").proportion_ci(0.95).high
    assert "2 of 8 replies offend" in found.detail and "0.250; in 1 of 4 groups of rows, below 0.751" in found.detail
    assert judged(report(tmp_path, replies, groups=groups), at_most=0.24).outcome == "fail"
    found = judged(report(tmp_path, replies), at_most=0.25)
    assert "0.250, below 0.600" in found.detail, "each row is a group"


@pytest.mark.parametrize("reply", ["STOP", "", '{"action": "st', '{"severity": "critical"}', "[1]"])
def test_a_reply_that_cannot_be_read_offends(tmp_path: Path, reply: str) -> None:
    found = judged(report(tmp_path, [reply, *WANTED[1:]]))
    assert found.outcome == "fail" and "(0 by what they say, 1 unreadable)" in found.detail


@pytest.mark.parametrize("beginning", ["<think>\nIt is critical.\n</think>\n\n", "It is critical.\n</think>\n\n"])
def test_reasoning_before_an_answer_is_not_judged(tmp_path: Path, beginning: str) -> None:
    replies = [beginning + json.dumps(reply) for reply in WANTED]
    assert judged(report(tmp_path, replies), forbid=None, require={"action": "stop"}).outcome == "pass"


def test_what_is_required_must_be_there(tmp_path: Path) -> None:
    replies: list[Any] = [{"action": "wait"}, *WANTED[1:]]
    assert judged(report(tmp_path, replies)).outcome == "pass"
    assert judged(report(tmp_path, replies), forbid=None, require={"action": "stop"}).outcome == "fail"


def test_a_slice_without_a_row_fails(tmp_path: Path) -> None:
    found = judged(report(tmp_path, WANTED), where={"severity": "fatal"})
    assert found.outcome == "fail" and "nothing was asked of it" in found.detail
    assert "severity, action" in found.remedy


def test_values_that_are_no_text_and_paths_and_whole_replies(tmp_path: Path) -> None:
    wanted = [{"at": {"zone": 3}, "stop": True}, {"at": {"zone": 4}, "stop": True}]
    found = report(tmp_path, [{"stop": False}, {"stop": True}], wanted)
    assert judged(found, where={"at.zone": [3, 5], "stop": True}, forbid={"stop": False}).outcome == "fail"
    assert judged(found, where={"at.zone": 4, "stop": True}, forbid={"stop": False}).outcome == "pass"
    assert judged(found, where={}, forbid={".": "go on"}).outcome == "pass"


@pytest.mark.parametrize(("count", "of"), [(0, 8), (1, 40), (7, 9), (5, 5)])
def test_the_upper_bound_is_the_exact_one_of_scipy(count: int, of: int) -> None:
    assert upper_bound(count, of) == pytest.approx(binomtest(count, of, alternative="less").proportion_ci(0.95).high)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"forbit": {}}, "'forbid' was probably meant"),
        ({"forbid": None}, "neither forbids nor requires"),
        ({"where": "critical"}, "no mapping"),
        ({"at_most": 2.0}, "no fraction"),
        ({"name": "two words"}, "the name of the slice"),
        ({"forbid": ["mend"]}, "no mapping"),
        ({"metric": "loss", "at_least": 0.8}, "metric of no_repair is 'loss'"),
        ({"metric": "wer", "at_least": 0.8}, "metric of no_repair is 'wer'"),
        ({"metric": "f1", "at_least": 80.0}, "outside 0..1"),
        ({"metric": "f1"}, "one of metric and at_least"),
    ],
)
def test_a_wrong_rule_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_rules({"slices": [{**RULE, **change}]})


def test_absent_score_names_the_scores_that_are_there(tmp_path: Path) -> None:
    """Columns that no floor may use, as the loss, are not offered."""
    table = [{"id": "r", "reference": "{}", "tuned_reply": "{}", "tuned_loss": 0.2, "tuned_f1": 1.0}]
    parquet_io.write_rows(tmp_path / "rows.parquet", pa.Table.from_pylist(table).schema, table)
    floor = {"where": {}, "forbid": None, "at_least": 0.8}
    found = judged(Artifact(tmp_path, {}), **floor, metric="accuracy")
    assert (found.outcome, found.remedy) == ("fail", "metric: f1")
    assert judged(Artifact(tmp_path, {}), **floor, metric="f1").outcome == "pass"


def test_two_slices_of_one_name_or_none_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="two slices"):
        open_rules({"slices": [RULE, RULE]})
    with pytest.raises(ConfigError, match="say nothing"):
        open_rules({"slices": []})
    with pytest.raises(ConfigError, match="say nothing"):
        open_rules({})


def test_the_rules_of_the_textile_line_can_be_read() -> None:
    (one,) = open_rules(Path(__file__).parents[2] / "examples/media/textile/rules.yaml").slices
    assert isinstance(one, SliceRule)
    assert one.holds('{"severity": "critical"}') and not one.holds('{"severity": "minor"}')
    assert one.verdict('{"action": "R2: mend by hand"}') == "wrong"


def test_rules_become_gate_checks_and_are_signed(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed slice stops the release until it is waived by name; the manifest has the rules' text."""
    monkeypatch.setattr(
        probes, "chitchat_rows", lambda: list(parquet_io.read_examples(open_artifact(tmp_path / "dataset"), "eval"))
    )
    keys = tmp_path / "keys"
    sartor.keygen(keys, trust=True)
    sartor.evaluate(adapter)
    rules = tmp_path / "rules.yaml"
    rules.write_text("slices:\n  - {name: polite, where: {}, require: {.: 'on:kitchen'}}  # as it stood\n")
    command = [
        "release",
        str(adapter),
        "--name",
        "switch",
        "--version",
        "1",
        "--key",
        str(keys),
        "--rules",
        str(rules),
        "--json",
    ]
    waived = [word for check in ("gain", "forgetting") for word in ("--waive", check)]
    with pytest.raises(SystemExit) as ended:
        main([*command, *waived, "--by", "me", "--reason", "tiny"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == GateError.exit_code and "slice:polite: " in said["error"]["problem"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *waived, "--waive", "slice:polite", "--by", "me", "--reason", "tiny"])
    assert ended.value.code == 0, capsys.readouterr()
    manifest = open_artifact(tmp_path / "switch-1", "release").manifest
    assert manifest["gate"]["slice:polite"]["outcome"] == "waived"
    assert manifest["rules"]["text"] == rules.read_text() and len(manifest["rules"]["sha256"]) == 64
