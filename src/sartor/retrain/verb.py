"""The verb: begin a retrain, go on with one that was killed, or see what became of one that was on trial."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import AdmissionError, ConfigError, ConflictError, GateError, LicenceError
from sartor.core.resource_limits import limit_data
from sartor.retrain import news
from sartor.retrain.job import Job, Notice, Stage, Wishes, live_version, settle
from sartor.retrain.stages import STAGES
from sartor.retrain.work import Live, Work, held
from sartor.serving.team_config import Retraining, Team, load

# Somebody's rule says no: an answer, and the end of this retrain. Other errors leave it to be gone on with.
REFUSALS = (GateError, LicenceError, AdmissionError)


@dataclass(frozen=True)
class Retrained:
    """What a retrain came to. folder: of its record; "" where none was begun."""

    decision: str
    reason: str
    gain: Mapping[str, Any] | None
    agent: str
    folder: str = ""
    version: str = ""
    checks: Mapping[str, str] | None = None
    wall_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        return {**vars(self), "gain": dict(self.gain) if self.gain else None, "wall_s": round(self.wall_s, 1)}

    @classmethod
    def of(cls, work: Work, began: float) -> Retrained:
        """As the record has it."""
        record = work.record
        checks = {name: one["outcome"] for name, one in record.stages.get("gate", {}).get("checks", {}).items()}
        version = record.stages.get("release", {}).get("version", "")
        decided = (record.decision, record.reason, record.gain, record.agent)
        return cls(*decided, str(work.folder), version, checks or None, time.monotonic() - began)


def retrain(
    team: Team | Path | str,
    agent: str,
    *,
    wishes: Wishes | None = None,
    flags: Sequence[str] = (),
    steps_back: bool = False,
    stages: Mapping[str, Stage] = STAGES,
    notice: Notice = lambda line: None,
) -> Retrained:
    """Let an agent learn from what was said of it: a new version, on trial or live, or a refusal with reasons.

    One that was killed is gone on with; one on trial is looked after, and none is begun before it is decided. Too little to
    learn from is a refusal that says how much is lacking. `steps_back` gives this process the priority and the memory that
    `retrain:` of TEAM.yaml says, for good. `stages`: by name, in their order. Raises ConfigError while another process retrains
    the agent, UnknownAgentError, and what the stages raise; the same call goes on then.
    """
    began = time.monotonic()
    made = team if isinstance(team, Team) else load(Path(team), flags)
    if not made.retrain.key:
        raise ConfigError(
            "retrain.key is not set: nobody would sign the new Release", "retrain: {key: keys}, of sartor keygen keys"
        )
    if steps_back:
        _step_back(made.retrain)
    wishes, state = wishes or Wishes(), Path(made.state)
    live = live_version(made, agent)
    with held(state, agent):
        work = news.last(state, agent)
        if work is not None and not work.is_open:
            settle(made, work)
        if work is not None and work.record.decision == "canary":
            return Retrained.of(work, began)
        if work is not None and work.is_open and work.record.live.release_id != live.release_id:
            _overtaken(work, live)
            if work.record.decision == "promoted":
                return Retrained.of(work, began)
        if work is None or not work.is_open:
            due = news.due(state, agent, made.retrain, news.routed(state, agent, live.release_id))
            if not (due.triggers or wishes.anyway):
                return Retrained("refused", due.lacking, None, agent)
            notice(f"retraining {agent}@{live.version}: {'; '.join(due.triggers) or 'asked for'}")
            work = Work.begun(state, agent, live)
        else:
            notice(f"going on with {work.folder}, after {list(work.record.stages) or 'nothing'}")
        _run(Job(made, work, wishes, notice), stages)
        return Retrained.of(work, began)


def _overtaken(work: Work, live: Live) -> None:
    """Another version is live than the one that it was held against: its own, if it was killed right behind the promotion."""
    name = f"{work.record.agent}@{live.version}"
    if work.done("release") and work.facts("release")["version"] == live.version:
        work.decide("promoted", f"{name} is live", work.facts("gate")["gain"])
    else:
        work.decide("refused", f"{name} has become live since; it was held against {work.record.live.version}")


def _run(job: Job, stages: Mapping[str, Stage]) -> None:
    """Every stage that is not done; the record says after each that it is, and in the end what came of it."""
    work = job.work
    for name, stage in stages.items():
        if work.done(name):
            continue
        job.notice(f"{name}")
        try:
            work.finish(name, stage(job))
        except REFUSALS as error:
            work.decide("refused", f"{name}: {error.problem} (try: {error.remedy})")
            return
        except ConflictError as error:  # somebody changed the agent meanwhile: what was found is of another version
            work.decide("refused", f"{name}: {error.problem}")
            return
        if refused := work.facts(name).get("refused"):
            work.decide("refused", refused, work.facts(name).get("gain"))
            return
    last = work.facts(list(stages)[-1])
    found = work.facts("gate")
    work.decide(last["decision"], last["reason"], found["gain"])


def _step_back(rules: Retraining) -> None:
    """For this process and what it starts: who serves goes first, and memory has an end."""
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), rules.nice))
    if rules.memory_bytes:
        limit_data(rules.memory_bytes)
