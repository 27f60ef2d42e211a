"""Verb agents replay: logged plans run again.

A log with texts (`log: content`) is compared by its texts. Another log is compared by digests, and the caller supplies
the request's messages. On the same machine a greedy step is reproduced to the bit, and a sampled one by its seed. A
step that was left out is left out again, so that the later steps can be compared; time limits play no part. A run of
another version of the arithmetic (core/numerics.py) is not repeated, because a difference would prove nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sartor.core import config
from sartor.core.errors import ArtifactError, ConfigError, SartorError, UnavailableError
from sartor.inference.engine import EngineInfo, numerics_difference
from sartor.serving.commands.ask_team import without_http
from sartor.serving.commands.receipt_verification import question_in
from sartor.serving.dispatch.model_selection import BASE_AGENT
from sartor.serving.http.startup import build_services
from sartor.serving.plan_options import Plan, digest
from sartor.serving.plans.plan_dispatch import PlanDispatcher
from sartor.serving.plans.plan_log import FinishedRun, PlanLog, read_runs, response_format
from sartor.serving.receipts import Digest, RequestDigestInput, team_digest
from sartor.serving.team_config import Team, load
from sartor.serving.types import AgentReply, AgentRequest, Replier

_PATIENCE_S = 3600.0
_LEFT_OUT = "left out"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """First difference between a run and its log, in the log's order.

    what: asked, said, findings or outcome.
    then, now: the values in the log and in the new run.
    """

    step: str
    agent: str
    what: str
    then: Any
    now: Any


@dataclass(frozen=True)
class Replayed:
    """Replay of one run.

    note: the reason if it was not repeated, else empty.
    """

    run: str
    plan: str
    steps: int
    differs: Difference | None = None
    note: str = ""

    @property
    def is_same(self) -> bool:
        """Whether the run was repeated and is unchanged."""
        return not self.note and self.differs is None


@dataclass(frozen=True)
class Replay:
    """Replays of all runs."""

    runs: Sequence[Replayed]

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        runs = [
            {
                "run": run.run,
                "plan": run.plan,
                "steps": run.steps,
                "same": run.is_same,
                **({"differs": vars(run.differs)} if run.differs else {}),
                **({"note": run.note} if run.note else {}),
            }
            for run in self.runs
        ]
        return {"same": all(run.is_same for run in self.runs), "runs": runs}

    def table(self) -> list[tuple[str, str]]:
        """Return one line for each run."""
        return [(run.run, f"{run.plan}, {run.steps} steps: {_sentence(run)}") for run in self.runs] or [
            ("runs", "none")
        ]


def _sentence(run: Replayed) -> str:
    if run.differs:
        return (
            f"{run.differs.step} ({run.differs.agent}): {run.differs.what} {run.differs.then!r} then, "
            f"{run.differs.now!r} now"
        )
    return run.note or "the same"


@dataclass(frozen=True)
class Pinned:
    """Members of a plan that answer each step with the logged version."""

    replies: Replier
    rows: Mapping[str, Mapping[str, Any]]

    async def open(self, request: AgentRequest, step_path: str) -> AgentReply:
        """Begin a step's reply. A step that was left out in the log raises UnavailableError."""
        row = self.rows.get(step_path)
        if row is not None and row["outcome"] == _LEFT_OUT:
            raise UnavailableError(f"{step_path} was left out", "see `why` in the log")
        agent = str(row["agent"]) if row else request.model
        name = BASE_AGENT if agent.startswith(f"{BASE_AGENT}@") else agent
        return await self.replies.open(replace(request, model=name))


class ComparingLog(PlanLog):
    """PlanLog that keeps runs for comparison and writes nothing."""

    def __init__(self) -> None:
        self.lost = 0
        self.ran: list[FinishedRun] = []

    def write(self, ran: FinishedRun) -> None:
        """Keep a finished run."""
        self.ran.append(ran)


@dataclass(frozen=True)
class Remaking:
    """Everything needed to repeat runs: a team, its replies, and the key of the log's digests.

    messages: the request, if the log has no texts.
    about: the engine that answers; it is assumed for a log that does not state its engine.
    """

    team: Team
    replies: Replier
    digest: Digest
    messages: Mapping[str, Any] = field(default_factory=dict)
    about: EngineInfo | None = None

    async def remake(self, rows: Rows) -> Replayed:
        """Repeat one run, given by its log lines.

        Raises ConfigError for a plan whose declaration changed, ArtifactError for other messages.
        """
        opens, ends = rows[0], rows[-1]
        head = (str(opens["run"]), str(opens["plan"]), len(rows) - 2)
        _check_plan(self.team.plans, head[1])
        if ends["outcome"] == "cancelled":
            return Replayed(*head, note="its client left before the end; it was not made again")
        engine = self.about.made_by["engine"] if self.about else None
        if difference := numerics_difference({"engine": engine, **opens}):
            return Replayed(*head, note=f"not checked: made by {difference}")
        content = RequestDigestInput.of_request(_words(opens, self.messages))
        if "content" not in opens and self.digest("asked", content.digests(self.digest)) != opens["asked"]:
            raise ArtifactError(
                f"the messages are not those of the run {opens['run']}",
                "give them as they were, and --run for one of several",
            )
        log = ComparingLog()
        by_place = {row["step"]: row for row in rows[1:-1]}
        plans = PlanDispatcher(_patient(self.team), self.replies, log, members=Pinned(self.replies, by_place))
        name = head[1].partition("@")[0]
        sampling = {key: tuple(value) if key == "stop" else value for key, value in opens["sampling"].items()}
        request = AgentRequest(name, (*content.system, *content.messages), sampling=sampling, schema=content.schema)
        await _to_the_end(plans, replace(request, deadline_s=_PATIENCE_S))
        return Replayed(*head, differs=_difference(rows, log.ran[0], self.digest))


def replay_plans(
    team: Team | Path | str,
    log: Path | str,
    *,
    run: str = "",
    messages: Path | str | None = None,
    notice: Callable[[str], object] = lambda line: None,
) -> Replay:
    """Repeat the runs of a log, or the one with the id `run`, and report the first difference of each.

    messages: file with the messages of the request or its whole body, if the log has no texts.
    One worker is started, and stopped at the end.
    Raises ArtifactError for a log or messages that do not fit, ConfigError for a plan whose declaration changed.
    """
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    runs = [rows for rows in read_runs(Path(log)) if run in ("", rows[0]["run"])]
    if run and not runs:
        raise ArtifactError(f"{log} has no run {run[:64]!r}", "the id is the receipt of the answer")
    question = question_in(Path(messages)) if messages is not None else {}
    notice(f"making {len(runs)} runs anew")
    return Replay(asyncio.run(_replay(without_http(loaded_team), runs, question)))


async def _replay(team: Team, runs: Sequence[Rows], question: Mapping[str, Any]) -> list[Replayed]:
    async with build_services(team) as services:
        remaking = Remaking(
            team,
            replies=services.replies,
            digest=team_digest(Path(team.state)),
            messages=question,
            about=services.workers.about,
        )
        return [await remaking.remake(rows) for rows in runs]


async def _to_the_end(plans: PlanDispatcher, request: AgentRequest) -> None:
    """Run a plan to its end. An error is ignored, because the logged run may have ended with it too."""
    try:
        answer = await plans.open(request)
        async for _ in answer.events:
            pass
    except SartorError:
        pass
    await plans.close()


def _words(opens: Mapping[str, Any], question: Mapping[str, Any]) -> Mapping[str, Any]:
    if "content" not in opens:
        if not question:
            raise ConfigError(
                f"the log has no words of the run {opens['run']}", "--messages FILE, or log: content in the plan"
            )
        return question
    request = opens["content"]["asked"]
    return {"messages": request["messages"], "response_format": response_format(request["schema"])}


def _check_plan(plans: Sequence[Plan], version: str) -> None:
    plans_by_name = {plan.name: plan for plan in plans}
    name, _, logged_digest = version.partition("@")
    if name not in plans_by_name:
        raise ConfigError(f"the team has no plan {name!r}", "--team with the file as it was")
    if (current_digest := digest(plans_by_name[name], plans_by_name)) != logged_digest:
        raise ConfigError(
            f"the plan {name} was {logged_digest} and is {current_digest}: it is declared otherwise",
            "--team with the file as it was",
        )


def _patient(team: Team) -> Team:
    """Return the team with ample time limits for its plans and steps."""

    def eased(value: Any) -> Any:
        if isinstance(value, list):
            return [eased(item) for item in value]
        if not isinstance(value, dict):
            return value
        fields = {key: inner if key == "schema" else eased(inner) for key, inner in value.items()}
        return {**fields, "seconds": _PATIENCE_S} if "seconds" in fields else fields

    return replace(team, plans=tuple(config.load(type(plan), eased(config.dump(plan))) for plan in team.plans))


def _difference(logged: Rows, ran: FinishedRun, digest: Digest) -> Difference | None:
    """Return the first line of the log that differs in the new run, or None."""
    current = {(row["role"], row["step"]): row for row in ran.rows(digest)}
    keeps = "content" in logged[0]
    expected = replace(ran, content=True).rows(digest) if keeps else []
    words = {(row["role"], row["step"]): row for row in expected}
    for row in logged:
        key = (row["role"], row["step"])
        if key not in current:
            return Difference(
                step=row["step"],
                agent=row["agent"],
                what="outcome",
                then=row["outcome"],
                now="it did not come to pass",
            )
        if change := _compared(row, words[key] if keeps else current[key]):
            return Difference(row["step"] or row["role"], row["agent"], *change)
    return None


def _compared(logged: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the difference of a line as (what, then, now), or None."""
    if logged["outcome"] != current["outcome"]:
        return "outcome", logged["outcome"], current["outcome"]
    if logged["outcome"] == _LEFT_OUT:
        return None
    for name in ("asked", "said"):
        old, new = (row["content"][name] if "content" in row else row[name] for row in (logged, current))
        if old != new:
            return name, old, new
    return ("findings", logged["findings"], current["findings"]) if logged["findings"] != current["findings"] else None
