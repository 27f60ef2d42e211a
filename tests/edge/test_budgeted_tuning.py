"""A tuning within a budget goes down the ladder, never in silence, and its receipt says how."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_jobs import job, key  # noqa: F401
from sartor.core.errors import ArtifactError, BudgetError, ModelError, SignatureError
from sartor.core.resource_limits import Killed, ResourceLimits, ResourceUsage
from sartor.core.signing import open_public
from sartor.edge.tuning import budgeted_tuning
from sartor.edge.tuning.budgeted_tuning import DeviceBudget, tune_within_budget, verify_receipt
from sartor.edge.tuning.memory_plan import MemoryBaseline, Planner
from sartor.edge.tuning.tuning_job import TuningJob, read_job

FLOOR = MemoryBaseline(100_000_000, True)
BUDGET = DeviceBudget(memory_bytes=1_000_000_000)


class Tuner:
    """In the place of the process: each call ends as the next of `ends` says."""

    def __init__(self, ends: Sequence[Killed | int | dict[str, str]]) -> None:
        self.ends, self.jobs, self.limits = list(ends), [], []  # type: ignore[var-annotated]

    def run(
        self, command: Sequence[str], limits: ResourceLimits, *, environment: Any, log: Path, stop: Callable[[], bool]
    ) -> ResourceUsage:
        one = read_job(Path(command[-1]))
        self.jobs.append(one)
        self.limits.append(limits)
        out, end = Path(one.out), self.ends.pop(0)
        updates = [{"update": 5 * len(self.jobs)}]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in updates) + '{"upda')
        if end == "stopped":
            assert stop()
        if end == 0:
            (out / "adapter_model.safetensors").write_bytes(b"weights")
            (out / "adapter_config.json").write_bytes(b"{}")
        if isinstance(end, dict):
            log.write_text(f"noise\n{json.dumps({'error': end})}\n")
        killed: Killed = end if isinstance(end, str) else ""
        code = end if isinstance(end, int) else -9 if end == "memory" else 143 if killed else 3
        return ResourceUsage("cgroup v1", limits.memory_bytes, 300_000_000, 10.0, 9.0, code, killed)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tuner]:
    def make(*ends: Any) -> Tuner:
        tuner = Tuner(ends)
        monkeypatch.setattr(budgeted_tuning.resource_limits, "run", tuner.run)
        return tuner

    return make


@pytest.fixture
def one(tiny_base: Path, tmp_path: Path) -> TuningJob:
    return job(tiny_base, tmp_path, updates=40)


def test_what_ends_well_has_a_receipt_that_anyone_can_check(
    ended: Callable[..., Tuner], one: TuningJob, key: Path
) -> None:
    tuner = ended(0)
    receipt = tune_within_budget(one, BUDGET, key=key, planner=Planner(one, FLOOR))
    assert (receipt.outcome, [attempt.rung for attempt in receipt.attempts]) == ("done", ["lora"])
    assert tuner.limits[0].memory_bytes == BUDGET.memory_bytes and receipt.resumed_at == []
    trusted = [open_public(key.with_name("sartor.pub"))]
    assert verify_receipt(Path(one.out), trusted) == receipt
    assert tune_within_budget(one, BUDGET, key=key) == receipt, "what is done is not done again"
    with pytest.raises(SignatureError, match="does not trust"):
        verify_receipt(Path(one.out), [])
    (Path(one.out) / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(SignatureError, match="not the file"):
        verify_receipt(Path(one.out), trusted)
    file = Path(one.out) / "receipt.json"
    file.write_text(file.read_text().replace('"peak_bytes": 300000000', '"peak_bytes": 200000000'))
    with pytest.raises(SignatureError, match="was changed"):
        verify_receipt(Path(one.out), trusted)
    file.write_text("{}")
    with pytest.raises(ArtifactError, match="no receipt"):
        verify_receipt(Path(one.out), trusted)


def test_after_a_kill_it_goes_on_smaller_each_rung_once(
    ended: Callable[..., Tuner], one: TuningJob, key: Path
) -> None:
    # 4: the tuner itself found no memory
    tuner = ended("memory", 4, 0)
    receipt = tune_within_budget(one, BUDGET, key=key, planner=_without_floor(one))
    assert [attempt.rung for attempt in receipt.attempts] == ["lora", "recompute", "layers-1"]
    assert [attempt.reason for attempt in receipt.attempts] == ["memory", "memory", ""]
    peaks = [attempt.predicted_peak_bytes for attempt in receipt.attempts]
    assert peaks == sorted(peaks, reverse=True) and receipt.resumed_at == [5, 10]
    assert [given.recipe["compute"]["recompute"] for given in tuner.jobs] == [False, True, True]
    assert [given.top for given in tuner.jobs] == [0, 0, 1]


def test_ladder_used_up_is_in_the_receipt_and_the_error(
    ended: Callable[..., Tuner], one: TuningJob, key: Path
) -> None:
    """Another call with the same budget fails too; one with more memory tunes again."""
    ended("memory", "memory", "memory", "memory")
    with pytest.raises(BudgetError, match="used up: layers-1, lora, recompute, zeroth"):
        tune_within_budget(one, BUDGET, key=key, planner=_without_floor(one))
    receipt = verify_receipt(Path(one.out), [open_public(key.with_name("sartor.pub"))])
    assert (receipt.outcome, len(receipt.attempts)) == ("failed", 4)
    ended()
    with pytest.raises(BudgetError, match="used up"):
        tune_within_budget(one, BUDGET, key=key, planner=_without_floor(one))
    ended(0)
    more = tune_within_budget(one, replace(BUDGET, memory_bytes=2_000_000_000), key=key, planner=_without_floor(one))
    assert (more.outcome, len(more.attempts), more.attempts[-1].rung) == ("done", 5, "lora")


def test_the_policy_pauses_it_and_the_same_call_goes_on(
    ended: Callable[..., Tuner], one: TuningJob, key: Path
) -> None:
    tuner = ended("stopped", 0)
    answers = ["the battery is at 20 %"]
    planner = Planner(one, FLOOR)
    waiting = tune_within_budget(one, BUDGET, key=key, policy=lambda: answers[0], planner=planner)
    assert (waiting.outcome, waiting.reason, waiting.attempts) == ("paused", answers[0], []) and not tuner.jobs
    asked = iter(["", "the charger was pulled"])
    paused = tune_within_budget(one, BUDGET, key=key, policy=lambda: next(asked), planner=planner)
    assert (paused.outcome, paused.reason) == ("paused", "the charger was pulled")
    done = tune_within_budget(one, BUDGET, key=key, policy=lambda: "", planner=planner)
    assert (done.outcome, done.resumed_at) == ("done", [5])
    assert [attempt.reason for attempt in done.attempts] == ["the charger was pulled", ""]


def test_time_is_of_the_whole_call(ended: Callable[..., Tuner], one: TuningJob, key: Path) -> None:
    tuner = ended("memory", "wall")
    receipt = tune_within_budget(one, replace(BUDGET, wall_s=15.0), key=key, planner=_without_floor(one))
    assert (receipt.outcome, receipt.reason) == ("spent", "wall time is up")
    assert [limit.wall_s for limit in tuner.limits] == [15.0, 5.0]


def test_the_disk_is_planned(ended: Callable[..., Tuner], one: TuningJob, key: Path) -> None:
    ended()
    with pytest.raises(BudgetError, match="of disk; the budget is 1,000"):
        tune_within_budget(one, replace(BUDGET, disk_bytes=1000), key=key, planner=Planner(one, FLOOR))


def test_the_disk_is_watched(ended: Callable[..., Tuner], one: TuningJob, key: Path) -> None:
    ended("stopped")
    Path(one.out).mkdir()
    (Path(one.out) / "big").write_bytes(bytes(3_000_000))
    receipt = tune_within_budget(one, replace(BUDGET, disk_bytes=2_000_000), key=key, planner=Planner(one, FLOOR))
    assert receipt.outcome == "spent" and receipt.reason.startswith("disk: 3,0")


@pytest.mark.parametrize(
    ("end", "why", "outcome", "reason"),
    [
        ("stopped", "the charger was pulled", "paused", "the charger was pulled"),
        ("memory", "the charger was pulled", "paused", "the charger was pulled"),
        (
            "stopped",
            "disk: the card is out",
            "paused",
            "disk: the card is out",
        ),  # the policy's words, whatever they are
        ("stopped", "memory", "paused", "memory"),
        (143, "", "paused", "a signal"),
        ("cpu", "", "spent", "cpu time is up"),
    ],
)
def test_outcome_and_reason_of_an_attempt_are_golden(
    monkeypatch: pytest.MonkeyPatch, one: TuningJob, key: Path, end: Any, why: str, outcome: str, reason: str
) -> None:
    tuner = Tuner([end])

    def run_asking(*arguments: Any, stop: Callable[[], bool], **options: Any) -> ResourceUsage:
        assert stop() == bool(why)
        return tuner.run(*arguments, stop=stop, **options)

    monkeypatch.setattr(budgeted_tuning.resource_limits, "run", run_asking)
    before = iter([""])
    receipt = tune_within_budget(one, BUDGET, key=key, policy=lambda: next(before, why), planner=Planner(one, FLOOR))
    assert (receipt.outcome, receipt.reason) == (outcome, reason)
    assert receipt.attempts[0].reason == (why or ("cpu" if end == "cpu" else ""))


def test_four_bits_are_tuned_on_where_they_are_planned(
    ended: Callable[..., Tuner], one: TuningJob, key: Path, tmp_path: Path
) -> None:
    tuner = ended(0)
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    (narrow / "model.safetensors").write_bytes(bytes(10))
    planner = Planner(one, FLOOR)
    planner.shape = replace(planner.shape, base_bytes=2_000_000_000)
    receipt = tune_within_budget(one, BUDGET, key=key, planner=planner, narrow=narrow)
    assert receipt.attempts[0].is_narrow and tuner.jobs[0].base == str(narrow)
    assert receipt.base["digest"] == one.digest, "an adapter is of the base, whatever form it was read in"


def test_what_the_tuner_said_is_what_is_raised(ended: Callable[..., Tuner], one: TuningJob, key: Path) -> None:
    ended({"kind": "ModelError", "problem": "update 3: the loss is nan", "remedy": "look at these rows"})
    with pytest.raises(ModelError, match="the loss is nan"):
        tune_within_budget(one, BUDGET, key=key, planner=Planner(one, FLOOR))
    receipt = verify_receipt(Path(one.out), [open_public(key.with_name("sartor.pub"))])
    assert (receipt.outcome, receipt.reason) == ("failed", "update 3: the loss is nan")
    ended({"kind": "nothing of ours"})
    with pytest.raises(ArtifactError, match="ended with 3"):
        tune_within_budget(one, BUDGET, key=key, planner=Planner(one, FLOOR))


def _without_floor(one: TuningJob) -> Planner:
    """So that rungs of a tiny base are told apart: what is always there is nothing."""
    return Planner(one, MemoryBaseline(-(6 << 20), True))
