"""Probes of TEAM.yaml where a server, a dispatcher or an engine reads it: each is built with fakes around what is asked."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai_fake
import serving
from dispatch_fakes import FakeCrew, admit, dispatching, registry
from dispatch_fakes import asked as dispatched
from dispatch_fakes import team as team_of
from option_probes import Probe, Workspace, beside_default, probes_of
from sartor.core.artifacts import MANIFESTS
from sartor.core.config import load
from sartor.core.errors import SartorError
from sartor.core.model_refs import locate_base
from sartor.core.records import Feedback
from sartor.core.signing import keygen, open_private, open_public, sign
from sartor.inference import llamacpp_engine
from sartor.inference.engine import EngineInfo, GenerateCall
from sartor.serving.admission import admission
from sartor.serving.admission.admission import AdmissionContext
from sartor.serving.commands import vllm_launch
from sartor.serving.dispatch.agent_admin import AgentAdmin
from sartor.serving.feedback_intake import FeedbackIntake
from sartor.serving.http import startup
from sartor.serving.http.auth_middleware import RequestGate
from sartor.serving.http.server import HttpServer, bind, check_bind
from sartor.serving.http.speech_service import SpeechService
from sartor.serving.plans.plan_log import DayFiles, PlanLog
from sartor.serving.registry.version_rules import VersionRules
from sartor.serving.routing import agent_classifier, exemplars
from sartor.serving.routing.exemplars import ExemplarPrompt, Exemplars, Gain
from sartor.serving.routing.router import AutoRouter
from sartor.serving.team_config import (
    AgentOptions,
    FeedbackTerms,
    Http,
    LlamaCppOptions,
    LocalEngineOptions,
    McpTerms,
    OpenAiEngineOptions,
    RequestLimits,
    Rollout,
    Routing,
    SpeechOptions,
    Team,
    WorkerOptions,
)
from sartor.serving.tool_loop import ToolServers
from sartor.serving.types import EmbeddingResult
from sartor.serving.workers.supervisor import Supervisor
from sartor.serving.workers.worker_main import open_engine
from sartor.serving.workers.worker_pool import Hooks, WorkerSlots

# --- the application, asked without a socket


async def _answers(workspace: Workspace, *requests: tuple[str, str, Any], headers: Any = None, **team: Any) -> Any:
    """Status and body of each request, one after the other, by a server that is built anew."""
    made = serving.team(workspace.folder() / "state", **team)
    async with serving.client(serving.house(), made, **(headers or {})) as client:
        answers = [await client.request(method, path, json=body) for method, path, body in requests]
        return [
            (answer.status_code, answer.headers.get("access-control-allow-origin"), _body(answer))
            for answer in answers
        ]


def _body(answer: Any) -> Any:
    body = answer.json() if "json" in answer.headers.get("content-type", "") else answer.text
    return (
        {key: body[key] for key in ("error", "learnable", "skills", "supportedInterfaces") if key in body}
        if isinstance(body, dict)
        else body
    )


CHAT = ("POST", "/v1/chat/completions", serving.chat())
CARD = ("GET", "/.well-known/agent-card.json", None)
MCP = ("POST", "/mcp", {"jsonrpc": "2.0", "id": 1, "method": "ping"})


def _card(values: Any, workspace: Workspace) -> Any:
    from sartor.serving.team_config import CardTerms

    return _answers(workspace, CARD, a2a=load(CardTerms, values))


def _mcp(values: Any, workspace: Workspace) -> Any:
    """Whether a server has what answers MCP, and how many routes."""
    server = HttpServer(serving.house(), serving.team(workspace.folder(), mcp=load(McpTerms, values)))
    server.close()
    return server._tools is not None, len(server.app.routes)


def _cors(values: Any, workspace: Workspace) -> Any:
    origin = {"origin": "https://example.com"}
    return _answers(workspace, CHAT, headers=origin, http={name: tuple(value) for name, value in values.items()})


async def _remembered(values: Any, workspace: Workspace) -> Any:
    """Whether a rating of a reply that was given before can be learnt from."""
    rating = ("POST", "/v1/feedback", {"receipt": "r1", "rating": 1})
    return (await _answers(workspace, CHAT, rating, limits=values))[1]


async def _deadline(values: Any, workspace: Workspace) -> Any:
    """What becomes of embeddings that take a tenth of a second."""

    class SlowCrew(serving.Crew):
        async def embed(self, texts: Any, encoder: str) -> Any:
            await asyncio.sleep(0.1)
            return await super().embed(texts, encoder)

    made = serving.team(workspace.folder() / "state", limits=values)
    async with serving.client(serving.house(workers=SlowCrew()), made) as client:
        return (await client.post("/v1/embeddings", json={"model": "base", "input": "hello"})).status_code


async def _slow_body(values: Any, workspace: Workspace) -> Any:
    """What becomes of a request whose body takes a tenth of a second."""

    async def body() -> Any:
        yield b'{"model": "faq", '
        await asyncio.sleep(0.1)
        yield b'"messages": [{"role": "user", "content": "hello"}]}'

    made = serving.team(workspace.folder() / "state", limits=values)
    async with serving.client(serving.house(), made) as client:
        headers = {"content-type": "application/json"}
        return (await client.post("/v1/chat/completions", content=body(), headers=headers)).status_code


async def _connections(values: Any, workspace: Workspace) -> Any:
    """Whether the eleventh connection is let in."""
    server = HttpServer(serving.house(), serving.team(workspace.folder(), limits=values))
    gate = RequestGate(serving.Doors(), serving.Rates(), Http(), server.team.limits, server.lifetime, lambda: 11)
    server.close()
    scope = {"path": "/v1/models", "method": "GET", "state": {}}
    try:
        await gate.check(scope, {"host": "127.0.0.1"})  # type: ignore[arg-type]
    except SartorError as error:
        return type(error).__name__
    return "let in"


def _bound(values: Any, workspace: Workspace) -> Any:
    """The address that is listened on without keys, or why not."""
    http = Http(**{"port": 0, **values})
    try:
        check_bind(serving.Doors(), http)
        with bind(Team(base="tiny", http=http)) as sock:
            return sock.getsockname()[0], sock.getsockname()[1] == values.get("port", 0)
    except SartorError as error:
        return type(error).__name__


def _free_port() -> int:
    with bind(Team(base="tiny", http=Http(port=0))) as sock:
        return int(sock.getsockname()[1])


async def _drained(values: Any, workspace: Workspace) -> Any:
    """Whether the working time is over a moment after the drain began."""
    server = HttpServer(serving.house(), serving.team(workspace.folder(), http=values))
    server._drain()
    await asyncio.sleep(0.05)
    server.close()
    return server.lifetime.is_over


def _traced(values: Any, workspace: Workspace) -> Any:
    """Whether spans are made, or the package for them is missing."""
    try:
        server = HttpServer(serving.house(), serving.team(workspace.folder(), http=values))
    except SartorError as error:
        return type(error).__name__
    server.close()
    return server._tracer._provider is not None


HTTP_PROBES = (
    *probes_of("CardTerms", _card, {"card": (False, True)}),
    *probes_of(
        "CardTerms",
        lambda values, workspace: _card({"card": True, **values}, workspace),
        {"url": ("", "https://example.com")},
    ),
    *probes_of("McpTerms", _mcp, {"serve": (False, True)}),
    *probes_of("Http", _cors, {"cors": ([], ["https://example.com"])}),
    *probes_of("Http", _bound, {"host": ("127.0.0.1", "0.0.0.0"), "port": (0, _free_port())}),
    *probes_of("Http", _drained, {"drain_s": (30.0, 0.01)}),
    *probes_of("Http", _traced, {"otel": ("", "http://127.0.0.1:9/v1/traces")}),
    *probes_of("RequestLimits", _remembered, {"remembered_bytes": (64_000_000, 0)}),
    *probes_of("RequestLimits", _deadline, {"deadline_s": (120.0, 0.02)}),
    *probes_of("RequestLimits", _slow_body, {"slow_client_s": (30.0, 0.02)}),
    *probes_of("RequestLimits", _connections, {"connections": (2048, 10)}),
    Probe("Team.limits", ({}, {"messages": 0}), lambda value, workspace: _answers(workspace, CHAT, limits=value)),
    Probe("Team.http", ({}, {"cors": ("https://example.com",)}), lambda value, workspace: _cors(value, workspace)),
    Probe("Team.a2a", ({}, {"card": True}), _card),
    Probe("Team.mcp", ({}, {"serve": True}), _mcp),
)

# --- what is kept of what people say, and how long records stay


def _kept(values: Any, workspace: Workspace) -> Any:
    """A correction as the inbox has it."""
    intake = FeedbackIntake(load(FeedbackTerms, values), workspace.folder())
    author = intake.voice("key", "", None)
    stored = intake.keep(
        Feedback("r1", "faq@1", "2026-11-26T10:00:00Z", correction="Call +49 30 1234567 today.", by=author)
    )
    return stored.correction, stored.by.consent


def _pruned(values: Any, workspace: Workspace) -> Any:
    """Whether a log that is ten days old is there after the next line."""
    folder = workspace.folder()
    team = Team(base="tiny", state=str(folder), limits=load(RequestLimits, values))
    log = PlanLog.of(team, lambda: serving.ABOUT)
    old = folder / "plans" / "plans-20200101-old.jsonl"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.touch()
    os.utime(old, (time.time() - 10 * 86_400,) * 2)
    files: DayFiles = log._files
    files.append(b"{}\n")
    return old.exists()


RECORD_PROBES = (
    *probes_of("FeedbackTerms", _kept, {"consent": ("assumed", "required"), "allow": ([], ["+49 30 1234567"])}),
    Probe("Team.feedback", ({}, {"consent": "required"}), _kept),
    *probes_of("RequestLimits", _pruned, {"receipts_days": (0, 3)}),
    Probe(
        "Team.state",
        ("one", "two"),
        lambda value, workspace: Path(Team(base="tiny", state=str(workspace.path / value)).registry_url).parent.name,
    ),
    Probe(
        "Team.registry",
        ("", "sqlite:///other.sqlite"),
        lambda value, workspace: Team(base="tiny", state=str(workspace.path), registry=value).registry_url,
    ),
)

# --- who answers


async def _dispatched(workspace: Workspace, team: Team, *, ill: bool = False) -> Any:
    """Agents of a team that is started anew, and who answers `faq`."""
    crew = FakeCrew()
    if ill:
        crew.breakers = {"faq@1": "quarantined"}
    async with dispatching(team, crew, registry(workspace.folder())) as dispatch:
        await dispatch.served.settle()
        outcome: list[Any] = sorted(dispatch.served.agents)
        try:
            answer = await dispatch.open(dispatched("faq"))
            outcome.append(answer.agent)
            async for _ in answer.events:
                pass
        except SartorError as error:
            outcome.append(type(error).__name__)
        return outcome


def _agent(values: Any, workspace: Workspace) -> Any:
    options = load(AgentOptions, {"name": "faq", "release": "/releases/faq-1", **values})
    return _dispatched(workspace, team_of(workspace.folder(), agents=(options,)))


def _ill_agent(values: Any, workspace: Workspace) -> Any:
    options = load(AgentOptions, {"name": "faq", "release": "/releases/faq-1", **values})
    return _dispatched(workspace, team_of(workspace.folder(), agents=(options,)), ill=True)


def _about(values: Any, workspace: Workspace) -> Any:
    """What the card of a team says of its agents."""
    from sartor.serving.team_config import CardTerms

    options = load(AgentOptions, {"name": "faq", "release": "r", **values})
    return _answers(workspace, CARD, a2a=CardTerms(card=True), agents=(options,))


def _tools_of(values: Any, workspace: Workspace) -> Any:
    """Which tools an agent may call, of a team with one server of them."""
    server = {"name": "small", "command": ["x"]}
    team = {"base": "tiny", "state": str(workspace.path), "tools": [server], **values.get("team", {})}
    agent = {"name": "faq", "release": "r", "tools": ["small"], **values.get("agent", {})}
    servers = ToolServers(load(Team, {**team, "agents": [agent]}))
    for name, connection in servers._connections.items():
        connection.tools = {f"{name}-tool": SimpleNamespace(name=f"{name}-tool")}  # type: ignore[dict-item]
    return sorted(servers.of("faq"))


async def _turns(values: Any, workspace: Workspace) -> Any:
    """The messages that a worker gets for a client's system message, and whether its prompts are kept apart."""
    of_agent, of_team = values.get("agent", {}), {name: values[name] for name in values if name != "agent"}
    agent = load(AgentOptions, {"name": "faq", "release": "/releases/faq-1", **of_agent})
    team = team_of(workspace.folder(), agents=(agent,), **of_team)
    crew = FakeCrew()

    async with dispatching(team, crew, registry(workspace.folder())) as dispatch:
        await dispatch.served.settle()
        request = dispatched("faq", cache_owner="key")
        turns = ({"role": "system", "content": "be rude"}, *request.messages)
        answer = await dispatch.open(replace(request, messages=turns))
        async for _ in answer.events:
            pass
        return crew.calls[-1].messages, bool(crew.calls[-1].cache_salt)


async def _promoted(values: Any, workspace: Workspace) -> Any:
    """The live version, the candidate and its fractions after a promotion."""
    options = AgentOptions("faq", "/releases/faq-1")
    team = team_of(workspace.folder(), agents=(options,), rollout=load(Rollout, values))
    crew = FakeCrew()
    async with dispatching(team, crew, registry(workspace.folder())) as dispatch:
        await dispatch.served.settle()
        await AgentAdmin(dispatch, crew, admit, team.rollout).promote("faq", "/releases/faq-2", "", None)
        agent = dispatch.served.agents["faq"]
        return agent.live, agent.candidate, agent.canary_fraction, agent.shadow_fraction


def _smallest_version(values: Any, workspace: Workspace) -> Any:
    """Which versions of the agent may be served."""
    team = team_of(workspace.folder(), agents=(load(AgentOptions, {"name": "faq", "release": "r", **values}),))
    try:
        VersionRules.of(team).check("faq", "1.1", "id")
    except SartorError as error:
        return error.check
    return "served"


AGENT_PROBES = (
    *probes_of("AgentOptions", _smallest_version, {"min_version": ("1.0", "1.2")}),
    *probes_of("AgentOptions", _agent, {"name": ("faq", "help"), "release": ("/releases/faq-1", "/releases/bad-1")}),
    *probes_of("AgentOptions", _ill_agent, {"fallback": (["previous", "base"], [])}),
    *probes_of("AgentOptions", _about, {"about": ("", "Opening hours.")}),
    Probe("AgentOptions.system", ({"agent": {"system": "fixed"}}, {"agent": {"system": "default"}}), _turns),
    Probe("Team.prefix_cache", ({"prefix_cache": "by_key"}, {"prefix_cache": "shared"}), _turns),
    Probe("AgentOptions.tools", ({"agent": {"tools": ["small"]}}, {"agent": {"tools": []}}), _tools_of),
    Probe(
        "Team.tools",
        ({"team": {"tools": [{"name": "small", "command": ["x"]}]}}, {"team": {"tools": []}}),
        _tools_of,
        may_refuse=True,
    ),
    *beside_default("Rollout", _promoted, {"canary_fraction": 0.2}),
    *beside_default(
        "Rollout",
        lambda values, workspace: _promoted({"canary_fraction": 0.2, **values}, workspace),
        {"shadow_fraction": 0.3},
    ),
    Probe("Team.rollout", ({}, {"canary_fraction": 0.2}), _promoted, repeats=False),
    Probe(
        "Team.agents",
        (("faq",), ("faq", "home")),
        lambda value, workspace: _dispatched(
            workspace,
            team_of(workspace.folder(), agents=tuple(AgentOptions(name, f"/releases/{name}-1") for name in value)),
        ),
    ),
)

# --- speech


class _Voice:
    """A voice that says nothing, and notes how long it may take."""

    def __init__(self, name: str, terms: Any) -> None:
        self.name, self.patience_s = name, terms.patience_s

    def close(self) -> None:
        """End nothing."""


async def _speech(values: Any, workspace: Workspace) -> Any:
    """Voices by name, how long each may take, how many pieces are spoken at once, which lengths and how many texts pass."""
    workspace.patch.setattr("sartor.serving.http.speech_service.open_voice", _Voice)
    service = SpeechService(load(SpeechOptions, {"voice": "one", **values}))
    outcomes = []
    for attempt in (lambda: service.check_length("a" * 100), lambda: service.voice("two")):
        try:
            attempt()
            outcomes.append("passes")
        except SartorError as error:
            outcomes.append(type(error).__name__)
    taken = 0
    slots = []
    try:
        for _ in range(40):
            slot = service._slot()
            slot.__enter__()
            slots.append(slot)
            taken += 1
    except SartorError:
        pass
    patience_s = [voice.patience_s for voice in service._voices.values()]
    await service.close()
    return service.default, patience_s, service._pool._max_workers, outcomes, taken


SPEECH_PROBES = (
    *probes_of(
        "SpeechOptions",
        _speech,
        {
            "voice": ("one", "off"),
            "voices": ([], ["two"]),
            "at_once": (1, 3),
            "waiting": (32, 4),
            "characters": (4096, 50),
            "patience_s": (20.0, 5.0),
        },
    ),
    Probe("Team.speech", ({"voice": "one"}, {"voice": "off"}), _speech),
)

# --- workers and engines


def _opening(values: Any, workspace: Workspace) -> Any:
    """What a worker is opened with, and how many of them there are."""
    team = load(Team, {"base": "tiny", "state": str(workspace.path), **values})
    supervisor = Supervisor(team)
    return supervisor.opening(), len(supervisor.health()["workers"])


def _workers(values: Any, workspace: Workspace) -> Any:
    return _opening({"workers": values}, workspace)[1]


def _slots(values: Any, workspace: Workspace) -> Any:
    """Whether a worker that is silent for 5 s, takes 400 bytes and is not ready yet is ended, and by what."""
    killed: list[str] = []
    rules = load(WorkerOptions, values)
    slots = WorkerSlots(rules, lambda: None, Hooks(None, None, None, None))  # type: ignore[arg-type, return-value]
    outcomes = []
    for state in ("starting", "ready"):
        worker = _Worker(state, killed)
        slot = slots._slots[0]
        slot.worker = worker  # type: ignore[assignment]
        slots._silent = {worker}  # type: ignore[arg-type]
        killed.clear()
        slots._watch(slot, worker, 0.0)  # type: ignore[arg-type]
        outcomes.append((state, list(killed)))
    return outcomes


class _Worker:
    """A worker that takes 400 bytes, has work, and said nothing for 5 s."""

    is_open = has_work = is_serving = True
    memory_bytes = 400
    calls = ()

    def __init__(self, state: str, killed: list[str]) -> None:
        self.state, self._killed, self.heard_at = state, killed, time.monotonic() - 5.0

    def measure(self) -> None:
        """Take as much as before."""

    def ping(self) -> None:
        """Say nothing."""

    def kill(self, end: Any, reason: str) -> None:
        """Note why."""
        self._killed.append(end.label)


def _local_engine(values: Any, workspace: Workspace) -> Any:
    """The context and rows of an engine on the tiny base, its arithmetic, and how many calls it takes."""
    import torch

    threads = torch.get_num_threads()
    options = load(LocalEngineOptions, {"threads": threads, "cache_tokens": 1024, **values})
    opening = {"engine": {"kind": "local", **vars(options)}, "base": str(workspace.fixture("tiny_base"))}
    try:
        engine = open_engine(opening)
        taken = 0
        try:
            for index in range(6):
                engine.submit(GenerateCall(f"c{index}", "", text="hello"))
                taken += 1
        except SartorError:
            pass
        about, bits = engine.about, engine._base.as_manifest()["bits"]
        engine.close()
        return about.context_tokens, about.rows, about.dtype, bits, taken, torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)


def _vllm(values: Any, workspace: Workspace) -> Any:
    """The command that serves a team by vLLM."""
    team = Team(base="tiny", engine=load(OpenAiEngineOptions, values))
    command = vllm_launch.command(team, workspace.path, [])
    return command.argv, dict(command.environment)


class _LlamaCppServer:
    """A server of llama.cpp that computes nothing."""

    def __init__(self, file: Path, adapters: Any, bounds: Any) -> None:
        self.file, self.bounds = file, bounds


def _taken(engine: Any) -> int:
    """How many of six calls an engine takes that works on none."""
    for count in range(6):
        try:
            engine.submit(GenerateCall(f"c{count}", "", text="hello"))
        except SartorError:
            return count
    return 6


def _llamacpp(values: Any, workspace: Workspace) -> Any:
    """The file and the slots that a server of llama.cpp is started with, and how many calls wait."""
    base, folder = workspace.fixture("tiny_base"), workspace.folder()
    workspace.patch.setattr(llamacpp_engine, "LlamaCppServer", _LlamaCppServer)
    workspace.patch.setattr(llamacpp_engine, "check_tokens", lambda server, chat: None)
    file = llamacpp_engine.f16_file(locate_base(str(base)))
    shutil.copyfile(file, folder / "other.gguf")
    options = load(LlamaCppOptions, values)
    if options.gguf:
        options = replace(options, gguf=str(folder / options.gguf))
    engine = open_engine({"engine": {"kind": "llamacpp", **vars(options)}, "base": str(base)})
    try:
        server = engine._inner  # type: ignore[attr-defined]
        return server.file.name, server.bounds.rows, engine.about.rows, _taken(engine)
    finally:
        engine.close()


def _remote(values: Any, workspace: Workspace) -> Any:
    """How many calls are sent side by side to a server, and how many wait."""
    with openai_fake.serving(openai_fake.Fake()) as server:
        options = load(OpenAiEngineOptions, {"url": server.url, **values})
        engine = open_engine(
            {"engine": {"kind": "openai", **vars(options)}, "base": str(workspace.fixture("tiny_base"))}
        )
        try:
            return engine.about.rows, _taken(engine)
        finally:
            engine.close()


def _trusted(values: Any, workspace: Workspace) -> Any:
    """Who may have signed what a team serves."""
    folder = workspace.folder()
    for name in ("ours", "theirs"):
        keygen(folder / name)
    (folder / MANIFESTS["release"]).write_bytes(b"release")
    (folder / "signature").write_text(sign(b"release", open_private(folder / "ours")))
    team = Team(
        base=str(workspace.fixture("tiny_base")), trust=str(folder / values["trust"]) if values["trust"] else ""
    )
    context = AdmissionContext.of(team, EngineInfo("local", "tiny", "b", "t", 512, 4))
    try:
        trusted = [open_public(context.trust)] if context.trust else None
        return bool(admission._signer(folder, folder, trusted))
    except SartorError as error:
        return type(error).__name__, error.problem.partition(":")[0]


# --- who answers a request that names nobody

GENERAL = exemplars.general()


class _Embedder:
    """Vectors by which words there are."""

    async def embed(self, texts: Any, encoder: str) -> EmbeddingResult:
        """Embed texts by three words."""
        return EmbeddingResult([[float(word in text) + 0.01 for word in ("switch", "lamp", "the")] for text in texts])


def _small_talk(workspace: Workspace) -> list[str]:
    """Have a router know a few general prompts alone, and return those."""
    talk = {kind: prompts[:3] for kind, prompts in GENERAL.items()}
    workspace.patch.setattr(exemplars, "general", lambda: talk)
    workspace.patch.setattr(agent_classifier, "general", lambda: talk)
    return [prompt.text for prompts in talk.values() for prompt in prompts]


async def _routed(values: Any, workspace: Workspace) -> Any:
    """The encoder and the threshold of a router of one agent, of whose prompts some are small talk; and what it makes of one."""
    talk = _small_talk(workspace)
    own = [
        f"switch {word} the {thing}" for thing in ("lamp", "fan", "oven", "radio") for word in ("on", "off", "over")
    ]
    prompts = tuple(ExemplarPrompt(f"home:{index}", text) for index, text in enumerate([*own, *talk[:6]]))
    agent = Exemplars(prompts[::2], prompts[1::2], gain=Gain(False, "no gain"))
    router = AutoRouter(_Embedder(), load(Routing, values), workspace.folder())  # type: ignore[arg-type]
    fitted = await router._fit_one({"home": agent}, (router._encoders() or ["tfidf"])[0])
    await router.close()
    return fitted.space.encoder, round(fitted.threshold, 4), dict(fitted.unproven)


class _Opened(Exception):
    """The router of a team that is being opened."""


async def _team_router(values: Any, workspace: Workspace) -> Any:
    """Which encoders the router of a served team looks at."""

    class Crew(FakeCrew):
        about = EngineInfo("local", "tiny", "b", "t", 512, 4)

        async def start(self) -> None:
            """Start nothing."""

        async def close(self) -> None:
            """End nothing."""

    def opened(*arguments: Any, router: Any, receipts: Any) -> Any:
        raise _Opened(router._encoders())

    workspace.patch.setattr(startup, "Supervisor", lambda team: Crew())
    workspace.patch.setattr(startup, "Dispatcher", opened)
    team = load(Team, {"base": "tiny", "state": str(workspace.folder()), "http": {"port": 0}, "router": values})

    try:
        async with startup.build_services(team):
            pass
    except _Opened as team_opened:
        return team_opened.args


ROUTER_PROBES = (
    Probe("Team.router", ({"encoder": "tfidf"}, {"encoder": "base"}), _team_router),
    *beside_default(
        "Routing",
        lambda values, workspace: _routed({"encoder": "tfidf", **values}, workspace),
        {"encoder": "base", "lift": "ignored"},
    ),
    *probes_of(
        "Routing",
        lambda values, workspace: _routed({"encoder": "tfidf", "risk": 1.0, **values}, workspace),
        {"target": (0.0, 1.0)},
    ),
    *probes_of(
        "Routing",
        lambda values, workspace: _routed({"encoder": "tfidf", "target": 0.0, **values}, workspace),
        {"risk": (1.0, 0.0)},
    ),
)

ENGINE_PROBES = (
    *probes_of("LlamaCppOptions", _llamacpp, {"gguf": ("", "other.gguf"), "rows": (4, 2), "waiting": (256, 3)}),
    *probes_of("OpenAiEngineOptions", _remote, {"rows": (64, 2), "waiting": (1024, 3)}),
    *probes_of("Team", _trusted, {"trust": ("ours", "theirs")}),
    *probes_of("WorkerOptions", _workers, {"count": (1, 3), "spare": (1, 0)}),
    *probes_of("WorkerOptions", _slots, {"memory_bytes": (0, 100), "start_s": (120.0, 1.0), "hang_s": (20.0, 1.0)}),
    *probes_of(
        "LocalEngineOptions",
        _local_engine,
        {"rows": (16, 2), "waiting": (256, 3), "cache_tokens": (1024, 128), "bits": ("auto", 4), "threads": (1, 2)},
    ),
    *probes_of(
        "OpenAiEngineOptions",
        _vllm,
        {
            "url": ("http://127.0.0.1:8000/v1", "http://127.0.0.1:9000/v1"),
            "key_env": ("", "KEY"),
            "loads_adapters": (False, True),
        },
    ),
    *probes_of(
        "Team", _opening, {"engine": ("local", {"kind": "local", "rows": 2}), "workers": ({"count": 1}, {"count": 3})}
    ),
    Probe("Team.base", ({"base": "tiny"}, {"base": "other"}), _opening),
)

PROBES: tuple[Probe, ...] = (
    *HTTP_PROBES,
    *RECORD_PROBES,
    *AGENT_PROBES,
    *SPEECH_PROBES,
    *ROUTER_PROBES,
    *ENGINE_PROBES,
)
