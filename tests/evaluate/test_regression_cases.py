"""Regression cases: their file, the comparison of replies, and their measurement on an adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sartor
from release_fixtures import PASSES, keys, probe, release  # noqa: F401
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ArtifactError, ConfigError, GateError
from sartor.core.records import Message, Part
from sartor.evaluate import regression_cases
from sartor.evaluate.case_measurement import measure_cases
from sartor.evaluate.regression_cases import (
    MOST_LINE_BYTES,
    CaseFault,
    CaseResult,
    RegressionCase,
    describe_failures,
    inherited_cases,
    merge_cases,
    normalized,
    parse_cases,
    read_cases,
)
from sartor.media import content_parts
from sartor.release.gate import CaseEvidence, check_cases


def case(bad: str = "on:hall", corrected: str = "on:kitchen", prompt: str = "switch kitchen on") -> RegressionCase:
    return RegressionCase(
        prompt=(Message.of("system", "JSON."), Message.of("user", prompt)),
        bad_reply=bad,
        corrected_reply=corrected,
        examples=("3f",),
        why="mislabelled",
        by="Ada",
        date="2026-11-30T05:00:00Z",
    )


# -- comparison


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Yes,  we\ndo.", "yes, we do"),
        ('"No"', "no!"),
        ("ＯＫ", "ok"),
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}'),
        ("<think>\nhm\n</think>\n\nyes", "yes"),
        ("Straße", "STRASSE"),
    ],
)
def test_replies_are_equal_after_normalisation(first: str, second: str) -> None:
    assert normalized(first) == normalized(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("yes", "no"),
        ('{"a": 1}', '{"a": 2}'),
        ("3.5", "35"),
        ("?!", "..."),
        ("not now", "now"),
        ('{"a": 1', '{"a": 1}'),
    ],
)
def test_other_replies_stay_other(first: str, second: str) -> None:
    assert normalized(first) != normalized(second)


# -- file


def test_cases_survive_their_file() -> None:
    cases = [case(), case("off", "on", "now?")]
    lines = "".join(json.dumps(one.as_json()) + "\n" for one in cases)
    assert parse_cases(lines.encode() * 2, "cases.jsonl") == cases
    # who and when do not make another case
    assert replace(cases[0], by="Ben", date="", why="").id == cases[0].id != cases[1].id
    assert merge_cases(cases, [replace(cases[0], by="Ben")]) == cases


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": True}, "schema True"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"bad_reply": 7}, "no text"),
        ({"examples": [1]}, "no text"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": [{"role": "user", "content": [{}]}]}, "a part of a turn that is no text"),
        ({"prompt": [{"role": "root", "content": "x"}]}, "the role 'root'"),
        ({"prompt": "x"}, "line 2"),
        ({"corrected_reply": "ON:HALL"}, "equals the bad one"),
        ({"corrected_reply": " "}, "corrected reply of the case is empty"),
    ],
)
def test_line_that_is_no_case_is_named(change: dict[str, Any], problem: str) -> None:
    good = json.dumps(case().as_json())
    with pytest.raises(ArtifactError) as raised:
        parse_cases(f"{good}\n{json.dumps({**case().as_json(), **change})}\n".encode(), "cases.jsonl")
    assert problem in raised.value.problem


@pytest.mark.parametrize("line", ['{"schema": 1, "schema": 1}', "[1]", "{", '{"schema": 1, "prompt": NaN}', "\xff"])
def test_line_of_loose_json_is_refused(line: str) -> None:
    with pytest.raises(ArtifactError, match="line 1|schema None"):
        parse_cases(line.encode("latin-1"), "cases.jsonl")


def test_media_of_a_prompt_are_kept_as_data_urls() -> None:
    url = content_parts.url_of(b"picture", "image/png")
    turn = Message("user", (Part("text", "first"), Part("image", media=url), Part("text", "what is it?")))
    seen = replace(case(), prompt=(Message.of("system", "Look."), turn))
    assert parse_cases(seen.line, "cases.jsonl") == [seen] and seen.id != case().id
    assert seen.question == "[image] firstwhat is it?"
    with pytest.raises(ConfigError, match="no data URL"):
        replace(case(), prompt=(Message("user", (Part("image", media="media/1.png"),)),))
    big = Message("user", (Part("audio", media=content_parts.url_of(bytes(MOST_LINE_BYTES), "audio/wav")),))
    with pytest.raises(ConfigError, match="the limit is 16,777,216"):
        replace(case(), prompt=(big,))
    for part in ({"type": "image", "url": url}, {"type": "video", "video": url}, {"type": "text", "text": 1}, "text"):
        line = seen.line.replace(json.dumps(turn.content[1].plain()).encode(), json.dumps(part).encode())
        with pytest.raises(ArtifactError, match="line 1 is no regression case"):
            parse_cases(line, "cases.jsonl")


# -- verdict


@pytest.mark.parametrize(
    ("reply", "bad_nats", "corrected_nats", "faults"),
    [
        ("on:kitchen", 9.0, 1.0, ()),
        ("something else", 9.0, 1.0, ()),
        ("On:Hall.", 9.0, 1.0, (CaseFault.SAYS_IT,)),
        ("on:kitchen", 1.0, 9.0, (CaseFault.PREFERS_IT,)),
        ("on:hall", 1.0, 9.0, (CaseFault.SAYS_IT, CaseFault.PREFERS_IT)),
        ("on:kitchen", 5.0, 5.0, ()),
        ("on:kitchen", float("nan"), 1.0, (CaseFault.PREFERS_IT,)),
    ],
)
def test_case_fails_by_reply_or_likelihood(
    reply: str, bad_nats: float, corrected_nats: float, faults: tuple[CaseFault, ...]
) -> None:
    assert CaseResult(case(), reply, bad_nats, corrected_nats).faults == faults


def test_gate_names_the_cases_that_fail() -> None:
    results = (
        CaseResult(case(), "on:hall", 1.0, 2.0),
        CaseResult(case("a", "b", "a long question " * 9), "b", 3.0, 1.0),
    )
    check = check_cases(CaseEvidence(results), Path("adapter"))["cases"]
    assert check.outcome == "fail" and "1 of 2 regression cases pass" in check.detail
    assert results[0].case.id in check.detail and results[1].case.id not in check.detail
    assert "says the bad reply and the bad reply is likelier" in check.detail
    assert describe_failures([CaseResult(case(), not_asked="it is too long")]) == [
        f"case {case().id} ('switch kitchen on'): it is too long"
    ]


def test_gate_cannot_tell_without_the_release_that_was_tuned_on() -> None:
    check = check_cases(CaseEvidence(unknown_starts=("/gone",)), Path("adapter"))["cases"]
    assert (check.outcome, check.holds_back) == ("cannot tell", True) and "/gone" in check.detail
    assert check_cases(CaseEvidence(), Path("adapter")) == {}


# -- measurement and release


def test_measured_likelihoods_are_those_of_the_evaluation(adapter: Path) -> None:
    from sartor.core.records import Example
    from sartor.evaluate.evaluation import likelihoods

    artifact = open_artifact(adapter)
    plain = replace(case(), prompt=(Message.of("user", "switch kitchen on"),))
    (result,) = measure_cases(artifact, [plain])
    rows = [Example((*plain.prompt, Message.of("assistant", text)), ()) for text in ("on:hall", "on:kitchen")]
    means = likelihoods(adapter, rows)
    assert result.bad_nats / result.corrected_nats != 1 and result.reply
    from sartor.models.base import open_base

    chat = open_base(str(artifact.manifest["base"]["name"])).chat
    counts = [chat.encode(row).supervised_tokens for row in rows]
    expected = [-mean * count for mean, count in zip(means, counts, strict=True)]
    assert [result.bad_nats, result.corrected_nats] == pytest.approx(expected, rel=1e-4)


def test_case_longer_than_the_context_fails_as_not_asked(adapter: Path) -> None:
    """Others are measured all the same."""
    long = replace(case(), prompt=(Message.of("user", "switch " * 600),))
    first, second = measure_cases(open_artifact(adapter), [long, case()])
    assert first.faults == (CaseFault.NOT_ASKED,) and "512 positions" in first.not_asked
    assert second.bad_nats > 0 and second.case == case()


def test_release_keeps_its_cases_and_lists_them(release: Path, adapter: Path, keys: Path) -> None:  # noqa: F811
    """A case that the version fails is a check that can be waived; the case stays."""
    first, second = measure_cases(open_artifact(adapter), [case(), case("on:kitchen", "on:hall")])
    bad = first.case if first.faults else second.case  # of two replies, one is likelier
    with pytest.raises(GateError, match=f"cases: 0 of 1 regression cases pass; case {bad.id}"):
        sartor.release(adapter, name="switch", version="1.1", key=keys, waivers=PASSES, cases=[bad])
    waivers = [*PASSES, sartor.Waiver("cases", "A. Tester", "known")]
    made = sartor.release(adapter, name="switch", version="1.1", key=keys, waivers=waivers, cases=[bad]).release
    assert made.manifest["gate"]["cases"]["outcome"] == "waived"
    assert read_cases(sartor.verify(made.path).release) == [bad]
    assert read_cases(open_artifact(release)) == []
    file = made.path / regression_cases.FILE
    file.write_text(file.read_text().replace("Ada", "Eve"))
    with pytest.raises(ArtifactError, match="was changed"):
        sartor.verify(made.path)


def test_version_tuned_from_a_release_inherits_its_cases(
    release: Path,  # noqa: F811
    adapter: Path,
    keys: Path,  # noqa: F811
    tune_recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Also over an Adapter in between; and nobody knows them once the Release is gone."""
    waivers = [*PASSES, sartor.Waiver("cases", "A. Tester", "known")]
    first = sartor.release(adapter, name="switch", version="2.0", key=keys, waivers=waivers, cases=[case()]).release
    recipe = {**tune_recipe, "budget": {"updates": 1}}
    start = first.path
    for name in ("one", "two"):
        method = {**recipe["method"], "start": str(start)}
        start = sartor.tune({**recipe, "method": method}, tmp_path / name, show=False).adapter.path
    assert inherited_cases(open_artifact(start)).cases == (case(),)
    report = sartor.evaluate(start, most_rows=2).report
    made = sartor.release(start, name="switch", version="2.1", key=keys, waivers=waivers, report=report.path).release
    assert read_cases(made) == [case()] and "cases" in made.manifest["gate"]
    first.path.rename(tmp_path / "elsewhere")
    unknown = inherited_cases(open_artifact(start))
    assert unknown.cases == () and unknown.unknown_starts == (str(first.path),)
    with pytest.raises(GateError, match="cases: .*are not known"):
        sartor.release(start, name="switch", version="2.2", key=keys, waivers=PASSES, report=report.path)
    sartor.index(tmp_path / "elsewhere")
    assert inherited_cases(open_artifact(start)).cases == (case(),)
