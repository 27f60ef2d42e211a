"""What the gate makes of a Report's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sartor.core.artifacts import Artifact
from sartor.evaluate import limits
from sartor.release import gate

COST = {"base": 0.4, "tuned": 0.8, "difference": 0.4, "low": 0.2, "high": 0.6}
NONE = {**COST, "difference": 0.1, "low": -0.1}


@pytest.mark.parametrize(
    ("metric", "groups", "needed"),
    [
        ({"base": 0.5, "tuned": 0.5, "difference": 0.0, "low": -1.0, "high": 1.0}, 3, "6 groups or more"),
        ({"base": 0.1, "tuned": 0.3, "difference": 0.2, "low": 0.0, "high": 0.4}, 22, "about 23 groups"),
    ],
)
def test_gain_remedy_with_a_test_split_enlarges_it(metric: dict[str, float], groups: int, needed: str) -> None:
    """No other rows replace the test split, so `--data FILE` is no remedy there."""
    remedy = gate.check_gain("exact_match", metric, groups=groups, has_test_split=True).remedy
    assert "larger split.test_fraction" in remedy and needed in remedy and "--data" not in remedy
    assert "--data FILE" in gate.check_gain("exact_match", metric, groups=groups).remedy


def modality(report: dict[str, Any], *towers: str) -> limits.Check | None:
    return gate.check_modality(Artifact(Path("a"), {"base": {"towers": dict.fromkeys(towers)}}), report).get(
        "modality"
    )


def of(**kinds: dict[str, Any]) -> dict[str, Any]:
    ablation = {
        kind: {"rows": 9, "metric": "macro_f1", "shuffled": cost, "blank": COST} for kind, cost in kinds.items()
    }
    return {"modalities": {"text": 0, **dict.fromkeys(kinds, 9)}, "ablation": ablation}


def test_what_reads_text_alone_has_no_check_of_media() -> None:
    assert modality({"modalities": {"text": 9, "image": 0, "audio": 0}, "ablation": {}}) is None
    assert modality({}) is None


@pytest.mark.parametrize(
    ("report", "towers", "outcome", "said"),
    [
        (of(image=COST), ["image"], "pass", "a picture of another row cost: macro_f1 +0.400"),
        (of(image=NONE), ["image"], "fail", "other pictures: it does not look"),
        (of(audio=NONE), ["audio"], "fail", "it does not listen"),
        (of(image=COST, audio=NONE), ["image", "audio"], "fail", "it does not listen"),
        (of(image=NONE), [], "fail", "it does not look"),
        (of(image=COST), ["image", "audio"], "fail", "no row of the Report holds a recording"),
        ({}, ["image"], "fail", "no ablation"),
    ],
)
def test_each_kind_of_media_must_matter(report: dict[str, Any], towers: list[str], outcome: str, said: str) -> None:
    found = modality(report, *towers)
    assert found is not None and (found.outcome, bool(found.remedy)) == (outcome, outcome == "fail")
    assert said in found.detail


def test_modality_passes_if_only_exact_match_needs_it() -> None:
    """The audio may matter to the rest of the reply and not to the label."""
    report = of(audio=NONE)
    report["ablation"]["audio"] |= {"exact_match": {"shuffled": COST, "blank": COST}, "tail": 0.0125}
    found = modality(report, "audio")
    assert found is not None and found.outcome == "pass"


def test_modality_of_an_older_report_is_the_primary_metric_alone() -> None:
    """Its two intervals are each at the whole level, so that the better of them proves less."""
    report = of(audio=NONE)
    report["ablation"]["audio"]["exact_match"] = {"shuffled": COST, "blank": COST}
    found = modality(report, "audio")
    assert found is not None and found.outcome == "fail" and "exact_match" not in found.detail


def test_of_an_error_rate_a_gain_is_a_fall() -> None:
    assert gate.check_gain("f1", COST).outcome == "pass"
    assert gate.check_gain("wer", COST).outcome == "fail"
    assert gate.check_gain("wer", {**COST, "low": -0.5, "high": -0.1}).outcome == "pass"
    assert gate.check_gain("wer", {**COST, "low": -0.5, "high": 0.1}).outcome == "fail"
