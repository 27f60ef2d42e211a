from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from plan_fakes import DIGEST, FakeReplies, planned
from plan_logs import PLAN, WORDS, again, logged, script
from sartor.core.errors import ArtifactError, ConfigError, MissingError, ModelError, UnavailableError
from sartor.serving.commands.plan_replay import replay_plans
from sartor.serving.plans.plan_log import FinishedRun, PlanLog, read_runs
from sartor.serving.plans.plan_steps import StepLogEntry
from sartor.serving.types import AgentRequest


async def test_every_step_is_a_line_and_no_word_is_in_it(tmp_path: Path) -> None:
    rows = await logged(tmp_path, planned(tmp_path, PLAN), script())
    steps = [(row["role"], row["step"], row["agent"], row["outcome"]) for row in rows]
    version = rows[0]["plan"]
    assert steps == [
        ("request", "", "checked", "asked"),
        ("draft", "steps.0", "home@1", "said"),
        ("check", "check.0.0", "json", "found"),
        ("mend", "mend.1", "fixer@1", "said"),
        ("check", "check.1.0", "json", "passed"),
        ("check", "check.1.1", "critic@1", "said"),
        ("answer", "", version, "answered"),
    ]
    (file,) = (tmp_path / "state/plans").iterdir()
    text = file.read_text()
    assert (
        not any(word in text for word in ("hall", "light", "not JSON", "right"))
        and file.stat().st_mode & 0o777 == 0o600
    )
    assert rows[-1]["tokens"] == {"prompt": 30, "reply": 7, "cached": 6} and rows[0]["sampling"] == {
        "seed": 5,
        "stop": ["END"],
    }
    assert rows[2]["findings"] == 1 and len(rows[1]["said"]) == 64 and rows[1]["receipt"] == "r1"
    assert len({row["run"] for row in rows}) == 1 and rows[-1]["receipt"] == rows[0]["run"]


def test_old_files_are_removed_when_receipts_are(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    for days, name in ((3, "plans-old.jsonl"), (1, "plans-young.jsonl")):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - days * 86_400 - 60,) * 2)
    line = StepLogEntry("", "answer", "p@1", "answered")
    log = PlanLog(folder, DIGEST, days=2)
    log.write(FinishedRun("r", "p@1", line, (), line, content=False, began=0.0))
    assert log.lost == 0 and len(list(folder.iterdir())) == 2 and not (folder / "plans-old.jsonl").exists()


async def test_a_plan_that_declares_it_keeps_the_words(tmp_path: Path) -> None:
    rows = await logged(tmp_path, planned(tmp_path, {**PLAN, "log": "content"}), script())
    assert rows[0]["content"]["asked"]["messages"] == WORDS["messages"] and rows[2]["findings"] == ["it is not JSON"]
    assert rows[-1]["content"]["said"] == '{"on": true}'


@pytest.mark.parametrize(
    ("log", "step", "answer"),
    [
        ("digests", "ModelError", "UnavailableError"),
        (
            "content",
            "ModelError: it broke: twice",
            "UnavailableError: no step of the plan checked gave anything: it broke: twice",
        ),
    ],
)
async def test_why_of_a_step_that_is_left_out_is_golden(tmp_path: Path, log: str, step: str, answer: str) -> None:
    """The error's kind alone, where the plan keeps no words."""
    team = planned(tmp_path, {**PLAN, "log": log})
    with pytest.raises(UnavailableError):
        await logged(tmp_path, team, script(home=ModelError("it broke: twice", "mend it")))
    rows = list(read_runs(next((tmp_path / "state/plans").iterdir())))[-1]
    assert [(row["step"], row["outcome"], row["why"]) for row in rows] == [
        ("", "asked", ""),
        ("steps.0", "left out", step),
        ("", "failed", answer),
    ]


@pytest.mark.parametrize("log", ["digests", "content"])
async def test_a_run_is_made_again_by_the_versions_that_answered(tmp_path: Path, log: str) -> None:
    team = planned(tmp_path, {**PLAN, "log": log})
    schema = json.dumps({"type": "object"})
    rows = await logged(tmp_path, team, script(), schema=schema)
    words = {**WORDS, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}}
    replies = script()
    done = await again(team, rows, replies, words if log == "digests" else None)
    assert done.is_same and done.steps == 5
    assert [request.model for request in replies.asked] == ["home@1", "fixer@1", "critic@1"]
    assert replies.asked[0].sampling == {"seed": 5, "stop": ("END",)} and replies.asked[0].schema
    other = await again(team, rows, script(fixer='{"on": false}'), words if log == "digests" else None)
    assert other.differs and (other.differs.step, other.differs.agent, other.differs.what) == (
        "mend.1",
        "fixer@1",
        "said",
    )
    if log == "content":
        assert (other.differs.then, other.differs.now) == ('{"on": true}', '{"on": false}')
    assert not list(read_runs(next((tmp_path / "state/plans").iterdir())))[1:], "a replay is not logged"


async def test_replay_names_the_first_difference(tmp_path: Path) -> None:
    """Another reply and another outcome are differences, also where the replay takes other steps."""
    team = planned(tmp_path, {**PLAN, "log": "content"})
    rows = await logged(tmp_path, team, script())
    shorter = (await again(team, rows, script(home='{"on": 1}'))).differs
    assert shorter and (shorter.step, shorter.what, shorter.now) == ("steps.0", "said", '{"on": 1}')
    gone = (await again(team, rows, script(fixer=ModelError("it broke", "-")))).differs
    assert gone and (gone.step, gone.what) == ("mend.1", "outcome")


async def test_what_was_left_out_is_left_out_again(tmp_path: Path) -> None:
    team = planned(tmp_path, {**PLAN, "log": "content"})
    rows = await logged(tmp_path, team, script(fixer=ModelError("it broke", "-")))
    replies = script()
    assert (await again(team, rows, replies)).is_same and [request.model for request in replies.asked] == ["home@1"]


async def test_steps_side_by_side_are_compared_by_their_places(tmp_path: Path) -> None:
    plan = {"name": "checked", "kind": "parallel", "members": ["base", "home"], "log": "content"}
    team = planned(tmp_path, plan)

    def slow(request: AgentRequest) -> str:
        return f"seed {request.sampling['seed']}"

    rows = await logged(tmp_path, team, FakeReplies(base=slow, home=slow))
    replies = FakeReplies(base=slow, home=slow)
    assert (await again(team, rows, replies)).is_same
    assert sorted(request.model for request in replies.asked) == ["base", "home@1"]


async def test_what_cannot_be_made_again_is_said(tmp_path: Path) -> None:
    team = planned(tmp_path, PLAN)
    rows = await logged(tmp_path, team, script())
    with pytest.raises(ConfigError, match="no words") as caught:
        await again(team, rows, script())
    assert "--messages" in caught.value.remedy
    with pytest.raises(ArtifactError, match="not those of the run"):
        await again(team, rows, script(), {"messages": [{"role": "user", "content": "light in the attic"}]})
    changed = planned(tmp_path, {**PLAN, "mend": "base"})
    with pytest.raises(ConfigError, match="declared otherwise"):
        await again(changed, rows, script(), WORDS)
    with pytest.raises(ConfigError, match="no plan 'checked'"):
        await again(planned(tmp_path), rows, script(), WORDS)
    left = await again(team, [*rows[:-1], {**rows[-1], "outcome": "cancelled"}], script(), WORDS)
    assert not left.is_same and "client left" in left.note


async def test_a_log_that_is_none_or_not_whole_is_refused(tmp_path: Path) -> None:
    await logged(tmp_path, planned(tmp_path, PLAN), script())
    (file,) = (tmp_path / "state/plans").iterdir()
    lines = file.read_text().splitlines()
    for number, wrong in enumerate(("{}", lines[0][:40], "\n".join(lines[:3]), "\n".join([lines[0], *lines[2:]]))):
        part = tmp_path / f"{number}.jsonl"
        part.write_text(wrong)
        with pytest.raises(ArtifactError):
            list(read_runs(part))
    newer = tmp_path / "newer.jsonl"
    newer.write_text(lines[0].replace('"schema": 1', '"schema": 2', 1))
    with pytest.raises(ArtifactError, match="schema 2"):
        list(read_runs(newer))
    with pytest.raises(MissingError):
        list(read_runs(tmp_path / "gone.jsonl"))
    with pytest.raises(ArtifactError, match="no run 'x'"):
        replay_plans(planned(tmp_path, PLAN), file, run="x")
