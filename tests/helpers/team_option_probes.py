"""Probes of TEAM.yaml: plans, breakers and restarts, rates, rollouts, limits of requests, tools, triggers of retrains."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import media_files
import serving
from clock import Clock
from option_probes import Observer, Probe, Workspace, beside_default, probes_of
from plan_fakes import DIGEST, FakeReplies, asked, opened, planned, told
from sartor.core.config import load
from sartor.core.errors import SartorError
from sartor.core.records import Feedback, FeedbackAuthor
from sartor.learn import triggers
from sartor.learn.run_record import Live, RunRecord
from sartor.serving.dispatch.rollout import ObservedReply, Rollouts
from sartor.serving.mcp_client import McpConnection
from sartor.serving.plans.plan_log import PlanLog
from sartor.serving.rate_limits import FeedbackRates, RateLimiter
from sartor.serving.registry.registry_schema import Agent
from sartor.serving.team_config import (
    CircuitBreakerOptions,
    FeedbackTerms,
    RequestLimits,
    Retraining,
    Rollout,
    Team,
    ToolServer,
    WorkerOptions,
)
from sartor.serving.workers.agent_health import AgentQueues, CircuitBreaker, Restarts
from sartor.serving.workers.supervisor import Supervisor

# --- plans: several agents for one request, each of which says what the probe has written

ROOM = {"type": "object", "properties": {"room": {"enum": ["hall", "attic"]}}, "required": ["room"]}
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
VERDICT = json.dumps({"right": False, "findings": ["it is too short"]})
PARTS = json.dumps({"parts": [{"agent": "home", "task": f"part {index}"} for index in range(3)]})


def _script() -> dict[str, Any]:
    return {
        "home": lambda request: '{"room": "hall", "n": 1, "tags": ["a"]}',
        "faq": lambda request: '{"room": "attic", "n": 2, "tags": ["b"], "more": "one"}',
        "last": lambda request: '{"room": "attic", "n": 3, "tags": ["c"], "more": "two words"}',
        "prose": lambda request: 'The law says "1 m" and 2 + 2 = 4.',
        "slow": 0.05,
        "critic": lambda request: VERDICT,
        "planner": lambda request: PARTS,
    }


async def _answer(workspace: Workspace, *plans: dict[str, Any], script: dict[str, Any] | None = None) -> Any:
    """What the first of some plans answers, why, and what its members were asked."""
    replies = FakeReplies(**{**_script(), **(script or {})})
    team = planned(workspace.path, *plans)
    dispatcher = opened(team, replies)
    try:
        answer = await told(dispatcher, asked(plans[0]["name"]))
        outcome = answer.text, answer.reason, getattr(answer.end, "kind", ""), getattr(answer.end, "problem", "")
    except SartorError as error:
        outcome = ("", type(error).__name__, error.problem, "")
    finally:
        await dispatcher.close()
    return outcome, [(each.model, each.messages, each.schema, dict(each.sampling)) for each in replies.asked]


CHAIN: dict[str, Any] = {"name": "plan", "kind": "sequence", "steps": ["home", "faq"]}


def _chain(values: Any, workspace: Workspace) -> Any:
    return _answer(workspace, {**CHAIN, **values})


def _parallel(values: Any, workspace: Workspace) -> Any:
    return _answer(workspace, {"name": "plan", "kind": "parallel", "members": ["home", "faq", "last"], **values})


DIVIDED: dict[str, Any] = {"name": "plan", "kind": "verify", "plan": "planner", "members": ["home", "faq"]}


def _divided(values: Any, workspace: Workspace) -> Any:
    return _answer(workspace, {**DIVIDED, **values})


def _within(make: Callable[[Any], dict[str, Any]]) -> Observer:
    """Observe the answer of the plan that a value is put into."""
    return lambda values, workspace: _answer(workspace, make(values))


def _logged(plan: dict[str, Any]) -> Observer:
    """Observe whether the log of a plan's run holds words."""

    async def observe(values: Any, workspace: Workspace) -> Any:
        from sartor.serving.plans.plan_dispatch import PlanDispatcher

        folder = workspace.folder()
        team = planned(folder, {**plan, **values})
        dispatcher = PlanDispatcher(team, FakeReplies(**_script()), PlanLog(folder / "plans", DIGEST))
        await told(dispatcher, asked("plan"))
        await dispatcher.close()
        lines = [
            json.loads(line) for file in (folder / "plans").glob("*.jsonl") for line in file.read_text().splitlines()
        ]
        return [sorted(line) for line in lines]

    return observe


STEP_VALUES: dict[str, tuple[Any, Any]] = {
    "agent": ("home", "faq"),
    "gets": (["request"], ["request", "draft"]),
    "form": ("json", "turns"),
    "system": ("", "Be brief."),
    "schema": ("", NUMBER),
    "temperature": (-1.0, 0.25),
    "max_tokens": (0, 7),
}


def _step(values: Any, workspace: Workspace) -> Any:
    """The last step of a chain."""
    return _answer(workspace, {**CHAIN, "steps": ["prose", {"agent": "last", "gets": ["request", "draft"], **values}]})


def _slow_step(values: Any, workspace: Workspace) -> Any:
    return _answer(workspace, {**CHAIN, "steps": [{"agent": "slow", **values}]})


def _check(values: Any, workspace: Workspace) -> Any:
    """A critic of a draft, and an agent that mends it."""
    return _answer(
        workspace, {**CHAIN, "steps": ["home"], "check": [{"agent": {"agent": "critic", **values}}], "mend": "faq"}
    )


def _mend(values: Any, workspace: Workspace) -> Any:
    return _answer(workspace, {**CHAIN, "steps": ["prose"], "check": ["json"], "mend": {"agent": "prose", **values}})


CHECKED = {**CHAIN, "steps": ["prose"]}
CRITIC_VALUES = {name: values for name, values in STEP_VALUES.items() if name not in ("agent", "gets")}

PLAN_PROBES = (
    *probes_of("PlanStep", _step, STEP_VALUES),
    *probes_of("PlanStep", _slow_step, {"seconds": (0.0, 0.001)}),
    *probes_of("Critic", _check, {**CRITIC_VALUES, "agent": ("critic", "prose"), "gets": (["request"], ["draft"])}),
    *probes_of(
        "Critic", lambda values, workspace: _check({"agent": "slow", **values}, workspace), {"seconds": (0.0, 0.001)}
    ),
    *probes_of("Mend", _mend, {**STEP_VALUES, "gets": (["draft"], ["findings"])}),
    *probes_of("Mend", lambda values, workspace: _mend({"repeats": 9, **values}, workspace), {"times": (1, 2)}),
    *probes_of("Mend", lambda values, workspace: _mend({"times": 4, **values}, workspace), {"repeats": (0, 2)}),
    *probes_of(
        "Mend", lambda values, workspace: _mend({"agent": "slow", **values}, workspace), {"seconds": (0.0, 0.001)}
    ),
    *probes_of(
        "ChainPlan",
        _chain,
        {
            "budget": ({"tokens": 8192}, {"tokens": 1}),
            "steps": (["home"], ["faq"]),
            "check": ([], [{"json": {"schema": NUMBER}}, {"pattern": "attic"}]),
        },
    ),
    *probes_of(
        "ChainPlan",
        lambda values, workspace: _chain({"check": [{"pattern": "den"}], **values}, workspace),
        {"mend": (None, "last")},
    ),
    *probes_of("ChainPlan", _logged(CHAIN), {"log": ("digests", "content")}),
    Probe("ChainPlan.name", ("plan", "other"), lambda value, workspace: _names(workspace, {**CHAIN, "name": value})),
    *probes_of(
        "ParallelPlan",
        _parallel,
        {
            "budget": ({"tokens": 8192}, {"tokens": 1}),
            "members": (["home", "faq"], ["faq", "home"]),
            "join": ("vote", {"kind": "merge", "rule": "first"}),
        },
    ),
    *probes_of(
        "ParallelPlan",
        _logged({"name": "plan", "kind": "parallel", "members": ["home", "faq"]}),
        {"log": ("digests", "content")},
    ),
    Probe(
        "ParallelPlan.name",
        ("plan", "other"),
        lambda value, workspace: _names(workspace, {"name": value, "kind": "parallel", "members": ["home", "faq"]}),
    ),
    *probes_of(
        "DividedPlan",
        _divided,
        {
            "budget": ({"tokens": 8192}, {"tokens": 1}),
            "plan": ("planner", {"agent": "planner", "system": "Divide."}),
            "members": (["home", "faq"], ["faq", "last"]),
            "most": (4, 1),
            "answer": (None, "last"),
            "check": ([], ["json"]),
        },
    ),
    *probes_of(
        "DividedPlan",
        lambda values, workspace: _divided({"check": ["json"], **values}, workspace),
        {"mend": (None, "last")},
    ),
    *probes_of("DividedPlan", _logged(DIVIDED), {"log": ("digests", "content")}),
    Probe(
        "DividedPlan.name", ("plan", "other"), lambda value, workspace: _names(workspace, {**DIVIDED, "name": value})
    ),
    *probes_of(
        "Vote",
        _within(
            lambda values: {
                "name": "plan",
                "kind": "parallel",
                "members": ["home", "faq", "last"],
                "join": {"kind": "vote", **values},
            }
        ),
        {"fields": ([], ["room"])},
    ),
    *probes_of(
        "Merge",
        _within(
            lambda values: {
                "name": "plan",
                "kind": "parallel",
                "members": ["home", "faq", "last"],
                "join": {"kind": "merge", **values},
            }
        ),
        {"rule": ("vote", "first"), "fields": ([], [{"name": "tags", "rule": "union"}])},
    ),
    *probes_of(
        "FieldRule",
        _within(
            lambda values: {
                "name": "plan",
                "kind": "parallel",
                "members": ["home", "faq", "last"],
                "join": {"kind": "merge", "fields": [{"name": "more", "rule": "longest", **values}]},
            }
        ),
        {"name": ("more", "n"), "rule": ("longest", "first")},
    ),
    *probes_of(
        "Json",
        _within(lambda values: {**CHAIN, "check": [{"json": values}]}),
        {"schema": ("", {**ROOM, "required": ["no"]})},
    ),
    *probes_of(
        "PatternCheck",
        _within(lambda values: {**CHECKED, "check": [{"pattern": {"pattern": "law", **values}}]}),
        {"pattern": ("law", "rule"), "holds": (True, False)},
    ),
    *probes_of(
        "Arithmetic", _within(lambda values: {**CHECKED, "check": [{"arithmetic": values}]}), {"least": (0, 3)}
    ),
    *probes_of(
        "Citations",
        _within(lambda values: {**CHECKED, "check": [{"citations": values}]}),
        {"pattern": ('"([^"]+)"', "(The)"), "least": (0, 3)},
    ),
    *probes_of(
        "Citations",
        _within(lambda values: {**CHAIN, "steps": ["last"], "check": [{"citations": values}]}),
        {"fields": ([], ["more"])},
    ),
    Probe("Citations.sources", (["hall"], ["The law is: 1 m"]), lambda value, workspace: _cited(value, workspace)),
    *probes_of("PlanBudget", _within(lambda values: {**CHAIN, "budget": values}), {"tokens": (8192, 1)}),
    *probes_of(
        "PlanBudget",
        _within(lambda values: {**CHAIN, "steps": ["slow"], "budget": values}),
        {"seconds": (60.0, 0.001)},
    ),
    *probes_of(
        "PlanBudget",
        lambda values, workspace: _answer(
            workspace, {**CHAIN, "steps": ["inner"], "budget": values}, {**CHAIN, "name": "inner"}
        ),
        {"depth": (2, 1)},
        may_refuse=True,
    ),
)


async def _names(workspace: Workspace, plan: dict[str, Any]) -> Any:
    """Whether a plan answers to the name `plan`."""
    replies = FakeReplies(**_script())
    dispatcher = opened(planned(workspace.path, plan), replies)
    try:
        return (await told(dispatcher, asked("plan"))).text
    except (SartorError, KeyError) as error:
        return type(error).__name__
    finally:
        await dispatcher.close()


def _cited(sources: list[str], workspace: Workspace) -> Any:
    file = workspace.folder() / "law.txt"
    file.write_text(sources[0])
    return _answer(workspace, {**CHECKED, "check": [{"citations": {"sources": [str(file)]}}]})


# --- breakers, restarts, queues: state machines by a clock


def _breaker(values: Any, workspace: Workspace) -> Any:
    """States of a breaker whose agent fails every 8 s, and always again."""
    clock = Clock()
    breaker = CircuitBreaker("a@1", load(CircuitBreakerOptions, {"failures": 3, "window_s": 30.0, **values}), clock)
    states = []
    for _ in range(30):
        try:
            breaker.fail("NaN", breaker.enter())
        except SartorError:
            states.append("refused")
        states.append(breaker.state)
        clock.now += 8.0
    return states


def _restarts(values: Any, workspace: Workspace) -> Any:
    """Waits before each of twelve restarts of a worker that dies every 5 s."""
    clock = Clock()
    restarts = Restarts(load(WorkerOptions, values), clock, lambda: 0.5)
    waits = []
    for _ in range(14):
        waits.append((restarts.ended(), restarts.is_given_up))
        clock.now += 5.0
    return waits


def _queue(values: Any, workspace: Workspace) -> Any:
    """How many calls of one agent are let in."""
    queues = AgentQueues(load(RequestLimits, values).per_agent)
    for count in range(200):
        try:
            queues.enter("a@1", 4)
        except SartorError:
            return count
    return 200


# --- rates


def _request_rates(values: Any, workspace: Workspace) -> Any:
    """How many requests of one key are let in, each of a hundred tokens."""
    rates = RateLimiter(load(RequestLimits, values), Clock())
    for count in range(50):
        try:
            rates.begin("key")
        except SartorError as error:
            return count, error.problem
        rates.count("key", 100)
    return 50


def _feedback_rates(values: Any, workspace: Workspace) -> Any:
    rates = FeedbackRates(load(FeedbackTerms, {"per_minute": 0, "per_day": 0, **values}), Clock())
    for count in range(50):
        try:
            rates.begin("key")
        except SartorError as error:
            return count, error.problem
    return 50


# --- rollouts


def _rollout(values: Any, workspace: Workspace) -> Any:
    """What becomes of a candidate that is a little worse by every measure, and how soon."""
    clock = Clock()
    rules = load(Rollout, {"least_requests": 20, **values})
    outcomes = []
    for bad in ("failed", "is_json", "token_s", "rating", ""):
        rollouts = Rollouts(rules, clock)
        rollouts.follow(Agent("faq", "1"), None)
        rollouts.follow(Agent("faq", "1", candidate="2", canary_fraction=0.5), Agent("faq", "1"))
        verdict, replies = None, 0
        while verdict is None and replies < 400:
            is_bad = replies % 3 == 0
            for version in ("1", "2"):
                is_worse = is_bad and version == "2"
                reply = ObservedReply(
                    f"faq@{version}",
                    failed=bad == "failed" and is_worse,
                    is_json=not (bad == "is_json" and is_worse),
                    token_s=0.025 if bad == "token_s" and version == "2" else 0.01,
                )
                verdict = rollouts.observe_reply(reply) or verdict
                verdict = rollouts.observe_rating(f"faq@{version}", bad == "rating" and is_worse) or verdict
            replies += 1
        outcomes.append((bad, replies, verdict.action if verdict else ""))
    return outcomes


def _watch(values: Any, workspace: Workspace) -> Any:
    """Whether a version that fails 100 s after its promotion is rolled back."""
    clock = Clock()
    rollouts = Rollouts(load(Rollout, values), clock)
    rollouts.follow(Agent("faq", "1"), None)
    rollouts.follow(Agent("faq", "2", earlier=("1",)), Agent("faq", "1"))
    clock.now += 100.0
    verdicts = [rollouts.observe_reply(ObservedReply("faq@2", failed=True)) for _ in range(60)]
    return [verdict.action for verdict in verdicts if verdict]


MACHINE_PROBES = (
    *probes_of(
        "CircuitBreakerOptions",
        _breaker,
        {"failures": (3, 4), "window_s": (30.0, 7.0), "open_s": (10.0, 60.0), "quarantine": (3, 1)},
    ),
    *probes_of(
        "WorkerOptions",
        _restarts,
        {"backoff_s": (0.2, 0.4), "backoff_most_s": (30.0, 1.0), "restarts": (8, 2), "window_s": (60.0, 11.0)},
    ),
    *probes_of("RequestLimits", _queue, {"per_agent": (64, 3)}),
    *probes_of("RequestLimits", _request_rates, {"requests_per_minute": (0, 5), "tokens_per_minute": (0, 1000)}),
    *probes_of("FeedbackTerms", _feedback_rates, {"per_minute": (0, 5), "per_day": (0, 7)}),
    *beside_default(
        "Rollout",
        _rollout,
        {
            "least_requests": 100,
            "error_margin": 0.9,
            "latency_factor": 9.0,
            "format_margin": 0.9,
            "feedback_margin": 0.9,
            "canary_requests": 40,
        },
    ),
    *probes_of("Rollout", _watch, {"watch_s": (3600.0, 50.0)}),
)

# --- what one request may hold


async def _asked(workspace: Workspace, body: dict[str, Any], path: str = "/v1/chat/completions", **team: Any) -> Any:
    """Status and error of one request to the application itself."""
    made = serving.team(workspace.path, **team)
    async with serving.client(serving.house(), made) as client:
        response = await client.post(path, json=body)
        return response.status_code, response.json().get("error", {}).get("message", "")


def _limit(body: dict[str, Any]) -> Observer:
    return lambda values, workspace: _asked(workspace, body, limits=values)


def _media(*parts: dict[str, Any]) -> Observer:
    from sartor.serving.team_config import MediaLimits

    body = {"model": "faq", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]}
    return lambda values, workspace: _asked(workspace, body, media=load(MediaLimits, values))


PICTURE = media_files.image_part(media_files.png())
REQUEST_PROBES = (
    *probes_of("RequestLimits", _limit(serving.chat("a" * 2000)), {"body_bytes": (2_000_000, 1000)}),
    *probes_of(
        "RequestLimits",
        _limit(
            {
                "model": "faq",
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
                + [{"role": "user", "content": "c"}],
            }
        ),
        {"messages": (256, 3)},
    ),
    *probes_of("RequestLimits", _limit(serving.chat(max_tokens=500)), {"reply_tokens": (1024, 100)}),
    *probes_of("MediaLimits", _media(PICTURE), {"bytes": (10_000_000, 50), "pixels": (50_000_000, 100)}),
    *probes_of("MediaLimits", _media(PICTURE, PICTURE), {"parts": (16, 1)}),
    *probes_of("MediaLimits", _media(media_files.audio_part(media_files.sound(0.5))), {"seconds": (300.0, 0.1)}),
)

# --- tools: what a program is started with, and what is taken of it


async def _tool_connection(values: Any, workspace: Workspace) -> Any:
    """What a tool server is opened with, by its trouble: whoever opens it here only says so."""

    @asynccontextmanager
    async def by_stdio(parameters: Any, log: Any) -> Any:
        raise OSError(f"{parameters.command} {parameters.args} {sorted(parameters.env)} {log.name.rpartition('/')[2]}")
        yield

    @asynccontextmanager
    async def by_http(url: str, http_client: Any) -> Any:
        raise OSError(f"{url} {http_client.headers.get('authorization')}")
        yield

    workspace.patch.setattr("mcp.client.stdio.stdio_client", by_stdio)
    workspace.patch.setattr("mcp.client.streamable_http.streamable_http_client", by_http)
    workspace.patch.setenv("PROBE_TOKEN", "secret")
    connection = McpConnection(load(ToolServer, values), workspace.path / "tools")
    await connection.start()
    troubles = dict(connection.troubles)
    await connection.close()
    return troubles


async def _offered(values: Any, workspace: Workspace) -> Any:
    """Tools that are offered of those of a server, and what a call of one gives."""

    async def slow(name: str, arguments: Any) -> Any:
        await asyncio.sleep(0.02)
        return SimpleNamespace(content=[SimpleNamespace(type="text", text="x" * 100)], is_error=False)

    connection = McpConnection(load(ToolServer, {"name": "small", "command": ["x"], **values}), workspace.path)
    connection._offer(
        [SimpleNamespace(name=name, description="", input_schema={"type": "object"}) for name in ("one", "two")]
    )
    connection._session = SimpleNamespace(call_tool=slow)  # type: ignore[assignment]
    try:
        result = await connection.call("one", {}, 10.0)
    except SartorError as error:
        result = error.problem
    return sorted(connection.tools), result


TOOL_PROBES = (
    *probes_of(
        "ToolServer",
        lambda values, workspace: _tool_connection({"name": "small", "command": ["run"], **values}, workspace),
        {"name": ("small", "large"), "command": (["run"], ["walk", "fast"]), "env": ([], ["PROBE_TOKEN"])},
    ),
    *probes_of(
        "ToolServer",
        lambda values, workspace: _tool_connection(
            {"name": "small", "url": "http://127.0.0.1:9/mcp", **values}, workspace
        ),
        {"url": ("http://127.0.0.1:9/mcp", "http://127.0.0.1:9/other"), "token_env": ("", "PROBE_TOKEN")},
    ),
    *probes_of(
        "ToolServer", _offered, {"allow": ([], ["one"]), "timeout_s": (20.0, 0.001), "result_bytes": (16_384, 10)}
    ),
)

# --- when a retrain is due


def _due(values: Any, workspace: Workspace) -> Any:
    """Whether a retrain is due by 30 corrections, 30 ratings of which most are bad, and requests unlike those before.

    The last retrain, if any, was between 40 good ratings and these.
    """
    state = workspace.folder()
    (state / "inbox").mkdir()
    lines = []
    for index in range(100):
        more: dict[str, Any] = (
            {"correction": "better"} if index < 30 else {"rating": -1.0 if index % 3 and index < 60 else 1.0}
        )
        author = FeedbackAuthor("k1", "", "given")
        messages = ({"role": "user", "content": f"q{index}"},)
        date = "2026-11-26T10:00:00Z" if index < 60 else "2026-11-26T08:00:00Z"
        lines.append(Feedback(f"r{index}", "faq@1", date, by=author, messages=messages, reply="a", **more))
    (state / "inbox" / "feedback-2026-11-26.jsonl").write_text(
        "".join(json.dumps(line.as_json()) + "\n" for line in lines)
    )
    workspace.patch.setattr("sartor.learn.run_record.now", lambda: "2026-11-26T09:00:00Z")
    RunRecord.create(state, "faq", Live("1", "", ""))
    scores = [0.9] * 40, [0.1 + 0.02 * index for index in range(42)]
    return triggers.check_triggers(state, "faq", load(Retraining, values), scores).triggers


def _due_by(part: str) -> Observer:
    base = {"at_least": {"corrections": 100, "ratings": 100}}
    return lambda values, workspace: _due({**base, part: {**base.get(part, {}), **values}}, workspace)


TRIGGER_PROBES = (
    *probes_of("AtLeast", _due_by("at_least"), {"corrections": (100, 20), "ratings": (100, 20)}),
    *probes_of("Drift", _due_by("drift"), {"bad_ratings": (0.1, 1.0), "input": (0.3, 1.0)}),
    *probes_of(
        "Retraining",
        _due,
        {
            "at_least": ({"corrections": 20, "ratings": 100}, {"corrections": 100, "ratings": 100}),
            "drift": ({"input": 0.3}, {"input": 1.0}),
            "every_hours": (0.0, 1.0),
        },
    ),
)


def _tripped(values: Any, workspace: Workspace) -> Any:
    """The state of an agent that failed twice, by the supervisor of a team."""
    supervisor = Supervisor(load(Team, {"base": "tiny", "state": str(workspace.path), "breaker": values}))
    for _ in range(2):
        supervisor.blame("faq@1", "NaN")
    return supervisor.health()["agents"]["faq@1"]["breaker"]


SECTION_PROBES = (
    Probe("Team.breaker", ({"failures": 3}, {"failures": 2}), _tripped),
    Probe("Team.media", ({}, {"parts": 0}), lambda value, workspace: _media(PICTURE)(value, workspace)),
    Probe(
        "Team.plans", ([CHAIN], [{**CHAIN, "steps": ["last"]}]), lambda value, workspace: _answer(workspace, *value)
    ),
)

PROBES: tuple[Probe, ...] = (
    *SECTION_PROBES,
    *PLAN_PROBES,
    *MACHINE_PROBES,
    *REQUEST_PROBES,
    *TOOL_PROBES,
    *TRIGGER_PROBES,
)
