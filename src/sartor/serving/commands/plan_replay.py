"""Verb agents replay: logged plans run again.

Where the log has the words (`log: content`) they are compared, else the digests, and the words of the request are given. A
greedy step says the same to the bit on the machine that it was made on, and a sampled one by its seed. What was left out then
is left out again, so that the steps after it can be compared; time plays no part. A run that another arithmetic made
(core/numerics.py) is not made again: where it would differ says nothing of it.
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
from sartor.serving.commands.ask_team import unheard
from sartor.serving.commands.receipt_verification import question_in
from sartor.serving.dispatch.model_selection import BASE_AGENT
from sartor.serving.http.startup import build_services
from sartor.serving.plan_options import Plan, digest
from sartor.serving.plans.plan_dispatch import PlanDispatcher, Replier
from sartor.serving.plans.plan_log import PlanLog, Ran, read_runs, response_format
from sartor.serving.receipts import Digest, RequestDigestInput, team_digest
from sartor.serving.team_config import Team, load
from sartor.serving.types import AgentReply, AgentRequest

_PATIENCE_S = 3600.0
_LEFT_OUT = "left out"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """Where a run went another way: the first place, in the log's order. what: asked, said, findings or outcome."""

    step: str
    agent: str
    what: str
    then: Any
    now: Any


@dataclass(frozen=True)
class Replayed:
    """One run. note: why it was not made again; "" where it was."""

    run: str
    plan: str
    steps: int
    differs: Difference | None = None
    note: str = ""

    @property
    def is_same(self) -> bool:
        """Whether it was made again, and is what it was."""
        return not self.note and self.differs is None


@dataclass(frozen=True)
class Replay:
    """All runs that were looked at."""

    runs: Sequence[Replayed]

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        told = [
            {"run": one.run, "plan": one.plan, "steps": one.steps, "same": one.is_same,
             **({"differs": vars(one.differs)} if one.differs else {}), **({"note": one.note} if one.note else {})}
            for one in self.runs
        ]  # fmt: skip
        return {"same": all(one.is_same for one in self.runs), "runs": told}

    def table(self) -> list[tuple[str, str]]:
        """A line a run."""
        return [(one.run, f"{one.plan}, {one.steps} steps: {_sentence(one)}") for one in self.runs] or [("runs", "none")]


def _sentence(one: Replayed) -> str:
    if one.differs:
        return (
            f"{one.differs.step} ({one.differs.agent}): {one.differs.what} {one.differs.then!r} then, {one.differs.now!r} now"
        )
    return one.note or "the same"


@dataclass(frozen=True)
class Pinned:
    """The members of a plan as they were: each place of the log is answered by the version that answered there."""

    replies: Replier
    rows: Mapping[str, Mapping[str, Any]]

    async def open(self, request: AgentRequest, place: str) -> AgentReply:
        """See Members. A step that was left out, or never came to pass, is not asked."""
        row = self.rows.get(place)
        if row is not None and row["outcome"] == _LEFT_OUT:
            raise UnavailableError(f"{place} was left out", "see `why` in the log")
        agent = str(row["agent"]) if row else request.model
        name = BASE_AGENT if agent.startswith(f"{BASE_AGENT}@") else agent
        return await self.replies.open(replace(request, model=name))


class ComparingLog(PlanLog):
    """A log that is held against another and not written."""

    def __init__(self) -> None:
        self.lost = 0
        self.ran: list[Ran] = []

    def write(self, ran: Ran) -> None:
        """Keep it."""
        self.ran.append(ran)


@dataclass(frozen=True)
class Remaking:
    """What makes runs again: a team whose plans have time, who answers, and the key of the log's digests.

    about: the engine that answers; a log of before logs stated their engine is taken for this one's.
    """

    team: Team
    replies: Replier
    digest: Digest
    messages: Mapping[str, Any] = field(default_factory=dict)
    about: EngineInfo | None = None

    async def remake(self, rows: Rows) -> Replayed:
        """One run, by its lines. Raises ConfigError for a plan that was declared otherwise, ArtifactError for other words."""
        opens, ends = rows[0], rows[-1]
        head = (str(opens["run"]), str(opens["plan"]), len(rows) - 2)
        _check_plan(self.team.plans, head[1])
        if ends["outcome"] == "cancelled":
            return Replayed(*head, note="its client left before the end; it was not made again")
        engine = self.about.made_by["engine"] if self.about else None
        if found := numerics_difference({"engine": engine, **opens}):
            return Replayed(*head, note=f"not checked: made by {found}")
        content = RequestDigestInput.of_request(_words(opens, self.messages))
        self._check_words(opens, content)
        log = ComparingLog()
        by_place = {row["step"]: row for row in rows[1:-1]}
        plans = PlanDispatcher(_patient(self.team), self.replies, log, members=Pinned(self.replies, by_place))
        name = head[1].partition("@")[0]
        sampling = {key: tuple(value) if key == "stop" else value for key, value in opens["sampling"].items()}
        request = AgentRequest(name, (*content.system, *content.messages), sampling=sampling, schema=content.schema)
        await _to_the_end(plans, replace(request, deadline_s=_PATIENCE_S))
        return Replayed(*head, differs=_difference(rows, log.ran[0], self.digest))

    def _check_words(self, opens: Mapping[str, Any], content: RequestDigestInput) -> None:
        if "content" not in opens and self.digest("asked", content.digests(self.digest)) != opens["asked"]:
            raise ArtifactError(
                f"the messages are not those of the run {opens['run']}", "give them as they were, and --run for one of several"
            )


def replay_plans(
    team: Team | Path | str,
    log: Path | str,
    *,
    run: str = "",
    messages: Path | str | None = None,
    notice: Callable[[str], object] = lambda line: None,
) -> Replay:
    """Make the runs in a log again, or the one with that id, and say of each whether it is the same, else where it differs.

    messages: the words of the request, or its whole body, where the log has none. One worker is started, and ended again.
    Raises ArtifactError for a log or words that do not fit, ConfigError for a plan that was declared otherwise.
    """
    made = team if isinstance(team, Team) else load(Path(team))
    found = [rows for rows in read_runs(Path(log)) if run in ("", rows[0]["run"])]
    if run and not found:
        raise ArtifactError(f"{log} has no run {run[:64]!r}", "the id is the receipt of the answer")
    asked = question_in(Path(messages)) if messages is not None else {}
    notice(f"making {len(found)} runs anew")
    return Replay(asyncio.run(_replay(unheard(made), found, asked)))


async def _replay(team: Team, runs: Sequence[Rows], asked: Mapping[str, Any]) -> list[Replayed]:
    async with build_services(team) as house:
        remaking = Remaking(team, house.replies, team_digest(Path(team.state)), asked, house.crew.about)
        return [await remaking.remake(rows) for rows in runs]


async def _to_the_end(plans: PlanDispatcher, request: AgentRequest) -> None:
    """Follow a plan; that no step gave anything may be what happened then, too."""
    try:
        answer = await plans.open(request)
        async for _ in answer.events:
            pass
    except SartorError:
        pass
    await plans.close()


def _words(opens: Mapping[str, Any], asked: Mapping[str, Any]) -> Mapping[str, Any]:
    if "content" not in opens:
        if not asked:
            raise ConfigError(f"the log has no words of the run {opens['run']}", "--messages FILE, or log: content in the plan")
        return asked
    said = opens["content"]["asked"]
    return {"messages": said["messages"], "response_format": response_format(said["schema"])}


def _check_plan(plans: Sequence[Plan], version: str) -> None:
    known = {plan.name: plan for plan in plans}
    name, _, then = version.partition("@")
    if name not in known:
        raise ConfigError(f"the team has no plan {name!r}", "--team with the file as it was")
    if (now := digest(known[name], known)) != then:
        raise ConfigError(
            f"the plan {name} was {then} and is {now}: it is declared otherwise", "--team with the file as it was"
        )


def _patient(team: Team) -> Team:
    """The same team, whose plans and steps have as much time as they need."""

    def eased(value: Any) -> Any:
        if isinstance(value, list):
            return [eased(item) for item in value]
        if not isinstance(value, dict):
            return value
        said = {key: inner if key == "schema" else eased(inner) for key, inner in value.items()}
        return {**said, "seconds": _PATIENCE_S} if "seconds" in said else said

    return replace(team, plans=tuple(config.load(type(plan), eased(config.dump(plan))) for plan in team.plans))


def _difference(then: Rows, ran: Ran, digest: Digest) -> Difference | None:
    """The first line of the log that is another now."""
    now = {(row["role"], row["step"]): row for row in ran.rows(digest)}
    keeps = "content" in then[0]
    wanted = replace(ran, content=True).rows(digest) if keeps else []
    words = {(row["role"], row["step"]): row for row in wanted}
    for row in then:
        place = (row["role"], row["step"])
        if place not in now:
            return Difference(row["step"], row["agent"], "outcome", row["outcome"], "it did not come to pass")
        if found := _compared(row, words[place] if keeps else now[place]):
            return Difference(row["step"] or row["role"], row["agent"], *found)
    return None


def _compared(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """What of a line is another: (what, then, now)."""
    if then["outcome"] != now["outcome"]:
        return "outcome", then["outcome"], now["outcome"]
    if then["outcome"] == _LEFT_OUT:
        return None
    for name in ("asked", "said"):
        one, other = (row["content"][name] if "content" in row else row[name] for row in (then, now))
        if one != other:
            return name, one, other
    return ("findings", then["findings"], now["findings"]) if then["findings"] != now["findings"] else None
