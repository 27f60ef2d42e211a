"""A retrain with stages that are made up: kills, triggers, locks, what becomes of a version on trial. Nothing is tuned here."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import sartor
from sartor import cli
from sartor.core import database
from sartor.core.errors import ConfigError, GateError, ModelError
from sartor.core.filesystem import write_file_atomic
from sartor.core.records import Feedback, FeedbackAuthor
from sartor.learn import promotion_checks, triggers
from sartor.learn.retrain import retrain
from sartor.learn.run_record import RetrainContext, RetrainOptions, RunRecord, list_runs, next_version, retrain_lock
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.team_config import NotWorse, Team, load

GAIN = {"of": "feedback", "estimate": 0.5, "low": 0.3, "high": 0.7}


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    """`faq` with version 1 live and 2 registered, and nothing said of it yet."""
    monkeypatch.setattr(database, "SYNCHRONOUS", "off")
    (tmp_path / "team.yaml").write_text(
        "base: starter\nretrain: {key: keys, at_least: {corrections: 4, ratings: 20}}\n"
    )
    made = load(tmp_path / "team.yaml")
    Path(made.state).mkdir()
    registry = Registry.open(made.registry_url)
    for number in ("1", "2"):
        registry.add(AgentVersion("faq", number, f"/faq-{number}", f"id-{number}", f"faq-{number}"))
    registry.close()
    return made


def say(team: Team, count: int, *, agent: str = "faq@1", key: str = "k", **fields: Any) -> None:
    """So many lines of the inbox, the newest behind those that are there."""
    file = Path(team.state) / "inbox" / "feedback-2026-01-01.jsonl"
    file.parent.mkdir(exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    for number in range(len(lines), len(lines) + count):
        messages = ({"role": "user", "content": f"question {number}"},)
        known = {"date": "2026-01-01T00:00:00Z", "messages": messages, "reply": "no", "by": FeedbackAuthor(key)}
        said = Feedback(f"r{number}", agent, **{**known, **fields})
        lines.append(json.dumps(said.as_json()))
    file.write_text("\n".join([*lines, ""]))


Stage = Callable[[RetrainContext], Mapping[str, Any]]


def stages(killed_at: str = "", fault: Exception | None = None) -> dict[str, Stage]:
    """Four stages that draw a number each and write it to a file: `NAME:inside` is killed after that file, before the record."""

    def made(name: str, more: Callable[[RetrainContext], dict[str, Any]]) -> Stage:
        def stage(job: RetrainContext) -> Mapping[str, Any]:
            if killed_at == f"{name}:before":
                os.kill(os.getpid(), signal.SIGKILL)
            file = job.at(f"{name}.txt")
            if not file.exists():
                before = [fact["drawn"] for fact in job.run.record.stages.values()]
                write_file_atomic(file, str(random.Random(f"{name}{before}").random()).encode())
                with job.at("worked.txt").open("a") as stream:
                    stream.write(f"{name}\n")
            if killed_at == f"{name}:inside":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault and name == "tune":
                raise fault
            return {"drawn": float(file.read_text()), **more(job)}

        return stage

    last = {"decision": "promoted", "reason": "better"}
    return {
        "curate": made("curate", lambda job: {}),
        "tune": made("tune", lambda job: {}),
        "gate": made(
            "gate", lambda job: {"gain": GAIN, "checks": {"gain over live": {"outcome": "pass", "detail": ""}}}
        ),
        "release": made("release", lambda job: {"version": "2"}),
        "bring in": made("bring in", lambda job: last),
    }


def run_in_child(work: Callable[[], object]) -> int:
    """The status of a process that does it: it may be killed."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_retrain_that_is_killed_anywhere_comes_to_the_same(team: Team) -> None:
    say(team, 4, correction="yes")
    retrain(team, "faq", stages=stages())
    (whole,) = list_runs(Path(team.state), "faq")
    names = list(stages())
    for name in names:
        for moment in ("inside",) if name != "curate" else ("before", "inside"):
            wishes = RetrainOptions(anyway=True)
            status = run_in_child(lambda at=f"{name}:{moment}": retrain(team, "faq", wishes=wishes, stages=stages(at)))
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            cut = list_runs(Path(team.state), "faq")[-1]
            assert cut.is_open and list(cut.record.stages) == names[: names.index(name)]
            found = retrain(team, "faq", stages=stages())
            assert found.folder == str(cut.folder) and found.decision == "promoted" and found.gain == GAIN
            again = RunRecord.open(cut.folder)
            assert again.record.stages == whole.record.stages
            # what was finished before the kill was not done again
            assert (cut.folder / "worked.txt").read_text().split("\n")[:-1] == names
            assert not list(cut.folder.glob(".*"))


def test_retrain_killed_after_promotion_is_promoted(team: Team) -> None:
    """The next call completes the same retrain and begins no other."""

    def promoting(job: RetrainContext) -> Mapping[str, Any]:
        sartor.promote_agent(team, "faq", "2", expected="1")
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    say(team, 4, correction="yes")
    run_in_child(lambda: retrain(team, "faq", stages={**stages(), "bring in": promoting}))
    assert list_runs(Path(team.state), "faq")[0].is_open
    found = retrain(team, "faq", stages=stages())
    assert (found.decision, found.gain, len(list_runs(Path(team.state), "faq"))) == ("promoted", GAIN, 1)


def test_retrain_lock_is_per_agent_and_released_by_a_kill(team: Team) -> None:
    say(team, 4, correction="yes")
    with retrain_lock(Path(team.state), "faq"):
        with pytest.raises(ConfigError, match="another process retrains faq"):
            retrain(team, "faq", stages=stages())
        with retrain_lock(Path(team.state), "other"):
            pass
    run_in_child(lambda: retrain(team, "faq", stages=stages("tune:inside")))
    assert retrain(team, "faq", stages=stages()).decision == "promoted"


def test_too_little_feedback_is_refused_with_the_shortfall(team: Team) -> None:
    """No run begins; feedback before the last retrain does not count again; anyway overrides the limit."""
    say(team, 3, correction="yes")
    say(team, 9, rating=1.0)
    say(team, 50, rating=-1.0, agent="other@1")
    found = retrain(team, "faq", stages=stages())
    assert (found.decision, found.folder) == ("refused", "")
    assert "1 more corrections or 11 more ratings" in found.reason and list_runs(Path(team.state), "faq") == []
    say(team, 1, correction="yes")
    assert retrain(team, "faq", stages=stages()).decision == "promoted"
    # what was said before it is not counted again
    assert "0 corrections and 0 ratings" in retrain(team, "faq", stages=stages()).reason
    assert retrain(team, "faq", wishes=RetrainOptions(anyway=True), stages=stages()).decision == "promoted"


def test_refusal_ends_a_run_and_another_error_leaves_it_open(team: Team) -> None:
    """The next call continues an open run; a refusal is recorded with its reason."""
    say(team, 4, correction="yes")
    with pytest.raises(ModelError):
        retrain(team, "faq", stages=stages(fault=ModelError("the loss is not finite", "a lower rate")))
    found = retrain(team, "faq", stages=stages(fault=GateError("the gate refuses: forgetting", "tune slower")))
    assert found.decision == "refused" and "tune: the gate refuses: forgetting (try: tune slower)" in found.reason
    refusing = {
        **stages(),
        "gate": lambda job: {"drawn": 0, "gain": GAIN, "checks": {}, "refused": "slice:a=b: 1 -> 0"},
    }
    found = retrain(team, "faq", wishes=RetrainOptions(anyway=True), stages=refusing)
    assert (found.decision, found.reason, found.gain) == ("refused", "slice:a=b: 1 -> 0", GAIN)
    assert [work.record.decision for work in list_runs(Path(team.state), "faq")] == ["refused", "refused"]


def test_one_that_was_overtaken_is_refused_and_a_new_one_begins(team: Team) -> None:
    say(team, 4, correction="yes")
    run_in_child(lambda: retrain(team, "faq", stages=stages("gate:before")))
    sartor.promote_agent(team, "faq", "2")
    say(team, 4, correction="yes", date="2126-01-01T00:00:00Z")
    assert retrain(team, "faq", stages=stages()).folder.endswith("/2")
    first, second = list_runs(Path(team.state), "faq")
    assert first.record.decision == "refused" and "faq@2 has become live since" in first.record.reason
    assert (second.record.live.version, second.record.decision) == ("2", "promoted")


@pytest.mark.parametrize(("then", "decision"), [("promote", "promoted"), ("rollback", "rolled back"), ("", "canary")])
def test_a_trial_is_looked_after_before_anything_new_begins(team: Team, then: str, decision: str) -> None:
    say(team, 4, correction="yes")
    trying = {**stages(), "bring in": lambda job: {"drawn": 0, "decision": "canary", "reason": "faq@2 is on trial"}}
    assert retrain(team, "faq", stages=trying).decision == "canary"
    sartor.promote_agent(team, "faq", "2", canary=0.2)
    if then == "promote":
        sartor.promote_agent(team, "faq", "2")
    if then == "rollback":
        sartor.rollback_agent(team, "faq")
    say(team, 4, correction="yes", date="2126-01-01T00:00:00Z")
    (row,) = triggers.list_due(Path(team.state).parent / "team.yaml").rows
    assert list_runs(Path(team.state), "faq")[0].record.decision == decision
    assert row["due"] is (decision != "canary")
    found = retrain(team, "faq", stages=stages())
    assert len(list_runs(Path(team.state), "faq")) == (1 if decision == "canary" else 2) and found.decision in (
        "canary",
        "promoted",
    )


def test_triggers(team: Team) -> None:
    state, rules = Path(team.state), team.retrain

    def why(**changes: Any) -> tuple[str, ...]:
        return triggers.check_triggers(state, "faq", replace(rules, **changes)).triggers

    say(team, 30, rating=1.0, date="2026-01-01T00:00:00Z")
    assert why() == ("30 ratings",) and why(every_hours=1.0) == ("30 ratings", "never retrained")
    RunRecord.create(state, "faq", news_live()).decide("refused", "for the test")
    assert why() == () and why(every_hours=1e-9) == ()  # time alone is no reason: nothing was said
    say(team, 15, rating=-1.0, date="2126-01-01T00:00:00Z")
    assert why() == ("bad ratings: 0 of 30 before, 15 of 15 since",)
    assert why(drift=replace(rules.drift, bad_ratings=1.0)) == ()
    assert why(every_hours=1e-9)[-1].endswith("hours")
    assert triggers.feedback_counts(state / "inbox", "faq", "").ratings.seen == 45


def news_live() -> Any:
    from sartor.learn.run_record import Live

    return Live("1", "/faq-1", "a" * 64)


def test_drift_of_router_scores_is_a_trigger(team: Team) -> None:
    """Only lower scores count, and only beyond the drift limit."""
    say(team, 10, rating=1.0)
    draw = random.Random(0)
    before, after = ([draw.gauss(mean, 0.1) for _ in range(200)] for mean in (0.8, 0.6))
    state, rules = Path(team.state), team.retrain
    (found,) = triggers.check_triggers(state, "faq", rules, (before, after)).triggers
    assert found.startswith("input: ")
    assert triggers.check_triggers(state, "faq", rules, (before, before[::-1])).triggers == ()
    assert triggers.check_triggers(state, "faq", rules, (after, before)).triggers == ()
    assert (
        triggers.check_triggers(
            state, "faq", replace(rules, drift=replace(rules.drift, input=1.0)), (before, after)
        ).triggers
        == ()
    )
    assert triggers.router_scores(state, "faq", "x") == ([], [])


def test_watch_starts_due_retrain_once_and_waits_after_error(team: Team) -> None:
    file, started, told = Path(team.state).parent / "team.yaml", [], []

    def start(command: Any) -> int:
        started.append(command[3:])
        return 1

    assert triggers.watch(file, every_s=0.0, looks=2, start=start, notice=told.append) == 0
    say(team, 4, correction="yes")
    assert triggers.watch(file, every_s=0.0, looks=5, start=start, notice=told.append) == 1
    assert started == [["retrain", str(file), "--agent", "faq"]] and "ended with 1" in told[-1]


def rows(count: int, live: float, new: float, **fields: str) -> Iterator[dict[str, Any]]:
    """So many rows, of which the live and the new version have these fractions right."""
    for number in range(count):
        right = {"live": float(number < live * count), "new": float(number < new * count)}
        yield {"id": f"{fields}{number}", "group": f"{fields}{number}", "reference": json.dumps(fields), **right}


def test_a_slice_of_too_few_rows_is_named_and_never_passes() -> None:
    lost = [*rows(5, 1.0, 0.0, intent="off"), *rows(40, 1.0, 1.0, intent="on")]
    assert list(promotion_checks.slices(lost, NotWorse())) == ["slice:intent=on"]
    assert promotion_checks.unjudged(lost, NotWorse()) == "intent=off (5 rows)"
    asked = promotion_checks.slices(lost, NotWorse(slice_rows=5))["slice:intent=off"]
    assert (
        asked.outcome == "cannot tell"
        and asked.holds_back
        and "over 5 groups of rows; 6 are the least" in asked.detail
    )
    of_one_group = [
        dict(row, group="one") if "off" in row["id"] else row for row in [*lost, *rows(9, 1.0, 0.0, intent="off")]
    ]
    assert promotion_checks.slices(of_one_group, NotWorse())["slice:intent=off"].outcome == "cannot tell"
    even = [*rows(5, 1.0, 1.0, intent="off"), *rows(40, 1.0, 1.0, intent="on")]
    assert list(promotion_checks.slices(even, NotWorse(slice_rows=5))) == ["slice:intent=on"]
    assert promotion_checks.unjudged(even, NotWorse(slice_rows=5)) == "intent=off (5 rows)"


def test_an_equal_average_with_a_broken_slice_fails() -> None:
    rules = NotWorse()
    broken = [
        *rows(40, 0.8, 0.95, intent="on"),
        *rows(40, 0.8, 0.95, intent="off"),
        *rows(15, 0.8, 0.0, intent="lock"),
    ]
    assert promotion_checks.of_rows(broken).difference == pytest.approx(0.0, abs=0.01)
    found = promotion_checks.slices(broken, rules)
    assert {name: check.outcome for name, check in found.items()} == {
        "slice:intent=lock": "fail",
        "slice:intent=off": "pass",
        "slice:intent=on": "pass",
    }
    assert "15 rows" in found["slice:intent=lock"].detail and found["slice:intent=lock"].remedy
    even = [*rows(40, 0.8, 0.8, intent="on"), *rows(15, 0.8, 0.75, intent="lock")]
    assert all(check.outcome == "pass" for check in promotion_checks.slices(even, rules).values())
    assert not list(promotion_checks.slice_rows([*rows(20, 1, 1)], (), 5)) and not list(
        promotion_checks.slice_rows(broken, (), 50)
    )
    named = [dict(row, reference=json.dumps({"intent": "on", "name": str(n)})) for n, row in enumerate(broken)]
    assert {name for name, _ in promotion_checks.slice_rows([*named, *broken], (), 5)} == {
        "intent=on",
        "intent=off",
        "intent=lock",
    }


def test_worse_is_not_let_pass() -> None:
    even = promotion_checks.of_rows(list(rows(60, 0.8, 0.8)))
    assert promotion_checks.not_worse(even, 0.02).outcome == "pass"
    assert promotion_checks.not_worse(promotion_checks.of_rows(list(rows(60, 0.8, 0.5))), 0.02).outcome == "fail"
    unchanged = promotion_checks.not_worse(promotion_checks.of_rows(list(rows(39, 1.0, 1.0))), 0.02)
    assert unchanged.outcome == "fail" and "held-out rows of 40 groups or more to tell" in unchanged.remedy


def test_better_is_better_by_an_interval() -> None:
    better = {"held_out": [row | {"id": str(n)} for n, row in enumerate(rows(60, 0.5, 0.8))]}
    judgement = promotion_checks.judge(better, {}, NotWorse())
    assert judgement.checks["gain over live"].outcome == "pass" and judgement.decisive.kind == "held_out"
    even = promotion_checks.judge({"held_out": list(rows(60, 0.8, 0.8))}, {}, NotWorse())
    assert "no interval lies above 0" in even.refused
    with pytest.raises(GateError, match="too few rows"):
        promotion_checks.judge({"held_out": []}, {}, NotWorse())


def test_key_with_inverted_ratings_fails_the_check() -> None:
    """Keys that rate alike pass, and so do a believed key and a single key."""

    def said(flips: str) -> list[tuple[str, float]]:
        draw, found = random.Random(3), []
        for number in range(200):
            key, rating = f"k{number % 5}", 1.0 if draw.random() < 0.8 else -1.0
            found.append((key, -rating if key == flips else rating))
        return found

    assert promotion_checks.check(promotion_checks.by_key(said(""))).outcome == "pass"
    check = promotion_checks.check(promotion_checks.by_key(said("k3")))
    assert (
        check.outcome == "fail" and check.detail.startswith("k3 found") and "--ignore or --believe k3" in check.remedy
    )
    assert promotion_checks.check(promotion_checks.by_key(said("k3")), ["k3"]).outcome == "pass"
    assert promotion_checks.check(promotion_checks.by_key([("only", -1.0)] * 50)).outcome == "pass"


def test_versions_go_up() -> None:
    assert [next_version(one, ["1.1", "2.0-b"]) for one in ("1.0", "1.9", "2.0-a", "first", "3")] == [
        "1.2",
        "1.10",
        "2.1-a",
        "first.1",
        "4",
    ]


def test_the_commands_say_json(
    team: Team, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(Path(team.state).parent / "team.yaml")
    monkeypatch.setattr("sartor.learn.retrain._step_back", lambda rules: None)

    def run(*arguments: str) -> tuple[int, Any]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["retrain", file, *arguments, "--json"])
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])

    code, said = run("--due")
    assert (
        code == 0
        and said["due"] == []
        and said["rows"][0] | {"why": ""}
        == {
            "agent": "faq",
            "since": "",
            "corrections": 0,
            "ratings": 0,
            "bad_ratings": 0,
            "not_learnable": 0,
            "due": False,
            "why": "",
            "live": "1",
        }
    )
    code, said = run("--agent", "faq")
    assert (
        code == 0 and said["decision"] == "refused" and said["gain"] is None and "4 more corrections" in said["reason"]
    )
    assert run("--agent", "nobody")[0] == 6 and run()[0] == 2
    assert (
        run("--agent", "faq", "--retrain.canary", "7")[1]["error"]["problem"]
        == "retrain: canary is 7.0, no fraction of the requests"
    )
    code, said = run("--agent", "faq", "--retrain.key", "")
    assert code == 2 and "retrain.key" in said["error"]["problem"]


def test_records_come_back_and_damaged_ones_say_so(team: Team) -> None:
    work = RunRecord.create(Path(team.state), "faq", news_live())
    work.finish("curate", {"a": [1]})
    work.decide("refused", "no", GAIN)
    again = RunRecord.open(work.folder)
    assert again.record == work.record and asdict(again.record)["live"]["version"] == "1"
    (work.folder / "retrain.json").write_text("{")
    with pytest.raises(sartor.SartorError, match="no whole record"):
        list_runs(Path(team.state), "faq")
