"""The page of a Report: what the facts say is shown, and nothing of them becomes markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from page_markup import HOSTILE, Tags
from sartor.core.artifacts import Artifact
from sartor.evaluate import limits, report_page
from sartor.evaluate.limits import Check

OURS = """html meta title style body h1 h2 p strong div b span table tr th td code svg text line circle img details
summary"""
BETTER = {"base": 0.25, "tuned": 0.75, "difference": 0.5, "low": 0.25, "high": 1.5}
WORSE = {"base": 0.5, "tuned": 0.25, "difference": -0.25, "low": -0.5, "high": -0.125}
PICTURE = "data:image/jpeg;base64,AAAA"


def facts(text: str) -> dict[str, Any]:
    """Facts of a Report in which each free text is `text`."""
    metric = text[:60]
    return {
        "name": text,
        "base": {"name": text, "digest": text},
        "primary": metric,
        "rows": 5,
        "licence": text,
        "chosen": {"sentence": text},
        "warnings": [{"problem": text, "remedy": text}],
        "metrics": {metric: BETTER, "exact_match": BETTER, "loss": WORSE, "f1": WORSE, "ece": {**BETTER, "low": -1.0}},
        "probes": {metric: WORSE, "small_talk": {"skipped": "no rows"}},
        "forgetting": {**WORSE, "probe": metric},
        "ablation": {
            metric: {
                "rows": 4,
                "metric": metric,
                "shuffled": BETTER,
                "blank": {**WORSE, "high": 0.25},
                "exact_match": {"shuffled": BETTER, "blank": BETTER},
            }
        },
        "audit": {
            "benchmarks": {metric: {"all": {**BETTER, "what": text}, "none": "skipped"}, "skipped": text},
            "refusals": {metric: BETTER, "unknown": {"skipped": text}},
        },
        "sources": [{"path": text, "sha256": text, "licence": text, "form": text, "kept": 1234, "read": 5678}],
    }


def rows(text: str) -> list[dict[str, Any]]:
    """Rows of a Report: one right, two wrong of which one has media, one without a score."""
    row = {
        "prompt": text,
        "reference": text,
        "base_reply": text,
        "tuned_reply": text,
        "media": "",
        f"tuned_{text[:60]}": 1.0,
    }
    wrong = {**row, f"tuned_{text[:60]}": 0.0, "base_is_cut": True}
    return [row, wrong, {**wrong, "media": text, "tuned_is_cut": True}, {**row, f"tuned_{text[:60]}": None}]


def page_of(text: str, folder: Path, **changes: Any) -> str:
    run = {"trainable_fraction": 0.0125, text: text, "rows": 12345, "rate": 0.000123456, "none": None, "on": True}
    recipe = {"sources": [{"path": text}], text: {text: [text, 1]}}
    adapter = Artifact(folder, {"id": "ab" * 32, "kind": "adapter", "created": text, "run": run, "recipe": recipe})
    return report_page.render({**facts(text), **changes}, adapter, rows(text), {1: PICTURE})


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit's checks say what it says of its benchmarks."""
    monkeypatch.setattr(
        limits,
        "audit_checks",
        lambda audit, *_: {
            "bias": Check("fail", str(audit["benchmarks"]["skipped"]), ""),
            "memorisation": Check("pass", "fine", ""),
        },
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"png")
    html = page_of(text, tmp_path)
    page = Tags(html)
    assert {tag for tag, _ in page.tags} <= set(OURS.split())
    assert page.acting({"href"}) == set()
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert sources == ["data:image/png;base64,cG5n", PICTURE]
    assert "\x00" not in html and "\u202e" not in html


def test_page_shows_numbers_and_verdicts(tmp_path: Path) -> None:
    text = Tags(page_of("name", tmp_path)).text
    for line in (
        "5 held-out rows, from 1 source file(s); licence name; adapter abababababab, tuned name",
        "0.25 name, base 0.75 name, tuned +0.50 gain, in [+0.25, +1.50] -0.250 nats per token forgotten (name, the worst probe) "
        "1.2% of the parameters trained",
        "name 0.250 0.750 0.500 0.250 1.500 better exact match",
        "loss 0.500 0.250 -0.250 -0.500 -0.125 better f1 0.500 0.250 -0.250 -0.500 -0.125 worse",
        "ece 0.250 0.750 0.500 -1.000 1.500 cannot tell name loss (forgetting) 0.500",
        "name shuffled name 0.750 0.250 0.500 0.250 1.500 it matters",
        "name blank name 0.250 0.500 -0.250 -0.500 0.250 no cost shown",
        "bias fail name memorisation pass fine",
        "name: name 0.250 0.750 0.500 0.250 1.500 refused of what name be 0.250",
        "the loss curve lies with the adapter",
        "1 right, 2 wrong; all of them are in rows.parquet",
        "name (cut: its scores were decided) name (cut: its scores were decided)",
        "1,234 of 5,678",
        "base name (name) trainable fraction 0.0125 name name rows 12,345 rate 0.0001235 none none on yes",
        "sources path name",
    ):
        assert line in text


def test_parts_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    skipped = {"skipped": "no rows"}
    text = Tags(page_of("name", tmp_path, ablation={}, audit={}, forgetting=skipped, warnings=[])).text
    assert "not measured nats per token forgotten" in text
    assert not any(title in text for title in ("look and listen", "learnt by heart", "Warning"))


def judge_and_tasks(text: str) -> dict[str, Any]:
    """Facts of a judge and of tasks in which each free text is `text`."""
    judge = {"outcome": "accepted", "sentence": text, "rubric": text, "comparison": BETTER}
    bleu = {**BETTER, "low": None, "high": None, "verdict": "cannot tell"}
    metrics = {text: {**BETTER, "verdict": "better"}, "bleu": bleu}
    tasks = {"version": text, "clipped": 3, "tasks": {text: {"rows": 9, "of": 12, "metrics": metrics}}}
    return {"judge": judge, "tasks": tasks}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_of_judge_and_tasks_stays_text(text: str, tmp_path: Path) -> None:
    html = page_of(text, tmp_path, **judge_and_tasks(text))
    page = Tags(html)
    assert {tag for tag, _ in page.tags} <= set(OURS.split())
    assert page.acting({"href"}) == set() and "\x00" not in html and "\u202e" not in html


def test_judge_and_tasks_are_shown_where_asked(tmp_path: Path) -> None:
    text = Tags(page_of("name", tmp_path, **judge_and_tasks("name"))).text
    for line in (
        "Which reply a judge prefers name Each pair was asked in both orders",
        "preferred (a tie is half) 0.250 0.750 0.500 0.250 1.500",
        "lm-eval name, without the chat template; each document is a group. 3 contexts were cut at their beginning.",
        "name: name 9 of 12 0.250 0.750 0.500 0.250 1.500 better",
        "name: bleu 9 of 12 0.250 0.750 0.500 none none cannot tell",
    ):
        assert line in text
    failure = {"failure": {"kind": "ConfigError", "problem": "no task today", "remedy": ""}}
    refused = {"outcome": "refused", "sentence": "The judge was refused", "rubric": "name"}
    text = Tags(page_of("name", tmp_path, judge=refused, tasks=failure)).text
    assert "The judge was refused" in text and "The tasks failed: no task today" in text
    assert "preferred (a tie is half)" not in text
    assert "judge" not in Tags(page_of("name", tmp_path)).text
