"""Options of TEAM.yaml."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL

from sartor.core import config
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.media.speech.tts_engines import resolve_voice_path
from sartor.serving import plan_options
from sartor.serving.plan_options import Plan


@dataclass(frozen=True)
class McpTerms:
    """Options of the team as a server of the Model Context Protocol."""

    serve: bool = option(
        False, "answer MCP (streamable HTTP) at /mcp, and at /mcp/AGENT for one agent; needs sartor[mcp]"
    )


@dataclass(frozen=True)
class CardTerms:
    """Options of the team's Agent2Agent card, for discovery."""

    card: bool = option(
        False, "tell at /.well-known/agent-card.json who is here, and by which protocols they are asked"
    )
    url: str = option(
        "", "the address by which others reach this server; by default the one of the socket that they reached"
    )


@dataclass(frozen=True)
class ToolServer:
    """MCP server whose tools agents may call: a program of this machine (`command`) or an address (`url`)."""

    name: str = option(REQUIRED, "what an agent's `tools` calls it")
    command: tuple[str, ...] = option((), "the program and its arguments, run as they stand: there is no shell")
    url: str = option("", "address of its streamable HTTP")
    token_env: str = option("", "of a url: the environment variable whose value is sent as `Authorization: Bearer`")
    env: tuple[str, ...] = option(
        (), "names of environment variables that the program gets, beside HOME, PATH, USER and the like"
    )
    allow: tuple[str, ...] = option((), "the tools of it that may be called; empty is all")
    timeout_s: float = option(20.0, "how long one call, or its opening, may take")
    result_bytes: int = option(16_384, "of one result, of which the rest is cut off and said to be")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.name):
            raise ConfigError(f"tools have the name {self.name!r:.80}", "1 to 64 letters, digits, _ or -")
        if bool(self.command) == bool(self.url):
            raise ConfigError(
                f"the tools {self.name!r} have {'both' if self.url else 'neither'} command and url",
                "command: [PROGRAM, ARGUMENT], or url: https://HOST/mcp",
            )
        if self.url and self.env or self.command and self.token_env:
            raise ConfigError(
                f"the tools {self.name!r} have a setting of the other kind",
                "env goes with command, token_env with url",
            )
        if self.timeout_s <= 0 or self.result_bytes < 1:
            raise ConfigError(
                f"the tools {self.name!r} would never say anything", "timeout_s: 20, result_bytes: 16384"
            )


def check_tools(servers: Sequence[str], members: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError if two tool servers share a name or an agent lists an unknown one."""
    if duplicate := next((name for name in servers if servers.count(name) > 1), ""):
        raise ConfigError(f"two servers of tools have the name {duplicate!r}", f"name: {duplicate}-2 for one of them")
    for agent, listed in members.items():
        if unknown := next((name for name in listed if name not in servers), ""):
            raise ConfigError(
                f"{agent} lists the tools {unknown!r}, and there are {', '.join(servers) or 'none'}", "see `tools`"
            )


def _fraction(section: str, **fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{section}{name} is {value}, no fraction", f"{section}{name}: a number in 0..1")


@dataclass(frozen=True)
class AtLeast:
    """Amounts of new feedback that make a retrain due; either is enough."""

    corrections: int = option(20, "corrections since the last retrain of the agent")
    ratings: int = option(100, "ratings since then; a retrain on fewer says nothing that an interval would bear out")

    def __post_init__(self) -> None:
        if min(self.corrections, self.ratings) < 2:
            raise ConfigError(
                f"at_least is {self.corrections} corrections, {self.ratings} ratings; one of two is held out",
                "at_least: {corrections: 20, ratings: 100}",
            )


@dataclass(frozen=True)
class Drift:
    """Further causes of a retrain, if there is at least a quarter of `at_least` to learn from."""

    bad_ratings: float = option(0.1, "the rate of bad ratings has risen by more since the last retrain; 1 never")
    input: float = option(0.3, "what the router finds of the agent's requests has moved by so much (0..1); 1 never")

    def __post_init__(self) -> None:
        _fraction("drift.", bad_ratings=self.bad_ratings, input=self.input)


@dataclass(frozen=True)
class NotWorse:
    """Gate of a new version against the live one, besides the gate of every Release."""

    margin: float = option(0.02, "the held-out mean may fall by at most this, at the lower end of what is likely")
    slice_margin: float = option(0.1, "in no slice may it fall by more than this, where the interval excludes 0")
    slices: tuple[str, ...] = option(
        (), "fields of the JSON replies that cut the rows into slices; empty takes all of few values"
    )
    slice_rows: int = option(6, "a slice of fewer rows is not judged, and named; fewer than six cannot tell")
    rows: int = option(400, "most held-out rows that the versions are compared on")

    def __post_init__(self) -> None:
        _fraction("gate.", margin=self.margin, slice_margin=self.slice_margin)
        if min(self.slice_rows, self.rows) < 2:
            raise ConfigError(
                f"gate has slice_rows {self.slice_rows} and rows {self.rows}", "gate: {slice_rows: 6, rows: 400}"
            )


@dataclass(frozen=True)
class Retraining:
    """Options of retraining from feedback. Relative paths are relative to the file's directory."""

    agents: tuple[str, ...] = option((), "those that learn; by default all of the team")
    key: str = option("", "private key, or the directory that keygen made: what signs the new Release")
    at_least: AtLeast = option(AtLeast(), "how much has to be said anew")
    drift: Drift = option(Drift(), "what makes it due sooner")
    every_hours: float = option(0.0, "due after so many hours, if anything was said; 0 never by time alone")
    tuning: Any = option(
        None, "options of the tuning recipe that differ from the live version's: {budget: {epochs: 2}}"
    )
    rehearsal: float = option(
        4.0, "rows of the live version's own Dataset for each row of feedback, against forgetting"
    )
    eval_fraction: float = option(0.25, "of the feedback, held out")
    gate: NotWorse = option(NotWorse(), "what the new version is held to against the live one")
    canary: float = option(0.1, "of the requests, answered by the new version until the monitors or a person decide")
    nice: int = option(10, "how far the command steps back for everybody else, 0..19")
    memory_bytes: int = option(0, "most memory of the command; 0 is no limit but the machine's")

    def __post_init__(self) -> None:
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction is {self.eval_fraction}; some has to be held out", "eval_fraction: 0.25")
        if not 0 < self.canary <= 1:
            raise ConfigError(f"canary is {self.canary}, no fraction of the requests", "canary: 0.1")
        if not 0 <= self.nice <= 19 or self.rehearsal < 0 or self.every_hours < 0 or self.memory_bytes < 0:
            values = (self.nice, self.rehearsal, self.every_hours, self.memory_bytes)
            problem = f"nice, rehearsal, every_hours and memory_bytes are {values}; one is out of range"
            raise ConfigError(problem, "nice: 10, rehearsal: 2.0, every_hours: 0, memory_bytes: 0")


MOST_OWN_RANKS = 4
RESERVED = ("base", "auto", "previous", "speech")


@dataclass(frozen=True)
class AgentOptions:
    """Options of an agent: its name for clients, and its first live Release."""

    name: str = option(REQUIRED, "what clients ask for as `model`")
    release: str = option(REQUIRED, "directory of the Release that is live until the registry says otherwise")
    fallback: tuple[str, ...] = option(
        ("previous", "base"),
        "who answers while this agent is out of service, in order: previous (version), base, or nobody",
    )
    about: str = option("", "what it is for, in a sentence: told to who asks by MCP, and by the A2A card")
    tools: tuple[str, ...] = option((), "the servers of the team's `tools` whose tools it may call")
    min_version: str = option(
        "", "smallest version that may be served; an older one is not admitted, also by rollback"
    )
    system: Literal["auto", "fixed", "default"] = option(
        "auto",
        "fixed: a client's system message is read as the user's, below the Release's signed prompt; default: it "
        "replaces that prompt; auto: fixed if the agent has `tools`, else default",
    )

    def __post_init__(self) -> None:
        if self.min_version and not config.is_valid_name(self.min_version):
            raise ConfigError(f"{self.name} has the min_version {self.min_version!r:.80}", 'min_version: "1.2"')
        if unknown := next((step for step in self.fallback if step not in ("previous", "base")), ""):
            raise ConfigError(f"{self.name} cannot fall back to {unknown!r}", "fallback: [previous, base]")

    @property
    def fixes_system(self) -> bool:
        """Whether no client's system message replaces the Release's system prompt."""
        return self.system == "fixed" or (self.system == "auto" and bool(self.tools))


@dataclass(frozen=True)
class LocalEngineOptions:
    """Sartor's own engine, with different adapters in one batch, on a CPU or CUDA."""

    kind: Literal["local"] = "local"
    rows: int = option(16, "replies that are made side by side; more wait")
    waiting: int = option(256, "calls that may wait; above it the answer is 429")
    cache_tokens: int = option(
        32_768, "tokens of all prompts and replies held as keys and values, reused prefixes included"
    )
    threads: int = option(0, "threads of a worker; 0 is all cores, shared by the workers")
    bits: Literal[4, 8, 16, "auto"] = option("auto", "of the base's weights: 4, 8, 16, or auto as in a tuning recipe")


@dataclass(frozen=True)
class LlamaCppOptions:
    """llama.cpp through xllamacpp, for GGUF bases and adapters; different adapters do not share a batch."""

    kind: Literal["llamacpp"] = "llamacpp"
    gguf: str = option(
        "", "GGUF file of the base; empty is the one that the base was converted from, or one made in F16"
    )
    rows: int = option(4, "slots: replies that are made side by side")
    waiting: int = option(256, "calls that may wait")
    threads: int = option(0, "threads of a worker; 0 is all cores")


@dataclass(frozen=True)
class OpenAiEngineOptions:
    """Server with OpenAI's protocol: vLLM, SGLang, llama-server."""

    kind: Literal["openai"] = "openai"
    url: str = option("http://127.0.0.1:8000/v1", "its address, with /v1")
    key_env: str = option("", "environment variable that holds its API key")
    loads_adapters: bool = option(
        False, "vLLM's run-time load and unload routes are on (VLLM_ALLOW_RUNTIME_LORA_UPDATING)"
    )
    rows: int = option(64, "calls sent side by side")
    waiting: int = option(1024, "calls that may wait")


@dataclass(frozen=True)
class WorkerOptions:
    """Options of the processes that run the engine, and of their restarts."""

    count: int = option(1, "workers that answer; each holds the base and every adapter")
    spare: int = option(1, "workers that are loaded and wait to step in")
    memory_bytes: int = option(0, "resident memory of one worker above which it is restarted; 0 is no limit")
    start_s: float = option(120.0, "a worker that has not said that it is ready by then is killed")
    hang_s: float = option(20.0, "a worker with work that says nothing for so long is killed")
    backoff_s: float = option(
        0.2, "wait before the first restart; doubled each time, with jitter, up to backoff_most_s"
    )
    backoff_most_s: float = option(30.0, "longest wait before a restart")
    restarts: int = option(
        8, "restarts within window_s after which a worker's place is given up until the window has passed"
    )
    window_s: float = option(60.0, "see restarts")


@dataclass(frozen=True)
class CircuitBreakerOptions:
    """Conditions under which an agent is taken out of service."""

    failures: int = option(
        3, "failures of one agent within window_s that open its breaker; a client's own fault is none"
    )
    window_s: float = option(30.0, "see failures")
    open_s: float = option(
        10.0, "how long it stays open before one call may try; doubled at each relapse, up to 16 times"
    )
    quarantine: int = option(
        3, "relapses after which only a promote, rollback or release from quarantine brings it back"
    )


@dataclass(frozen=True)
class RequestLimits:
    """Limits per request, per key and per agent."""

    body_bytes: int = option(2_000_000, "of a request; above it the answer is 413")
    messages: int = option(256, "turns of one conversation")
    reply_tokens: int = option(1024, "most that max_tokens may ask for")
    deadline_s: float = option(120.0, "from a request's arrival to the end of its reply; then 504")
    per_agent: int = option(64, "requests of one agent at once, waiting or answered; above it 429 (a bulkhead)")
    requests_per_minute: int = option(0, "of one key; 0 is no limit")
    tokens_per_minute: int = option(0, "prompt and reply tokens of one key; 0 is no limit")
    remembered_bytes: int = option(
        64_000_000, "of prompts and replies kept in memory, so that feedback on one can be learnt from; 0 keeps none"
    )
    connections: int = option(2048, "open connections; above it 503")
    receipts_days: int = option(0, "receipts older than that are removed, a file at a time; 0 keeps them")
    slow_client_s: float = option(30.0, "a client that does not take what is sent to it for so long is cut off")


# A request with its media is one line to a worker (channel.MOST_FRAME_BYTES); base64 makes media a third larger
MOST_MEDIA_BYTES = 40_000_000


@dataclass(frozen=True)
class MediaLimits:
    """Limits of the images and recordings of one request."""

    bytes: int = option(
        10_000_000,
        "of all of them, decoded from base64 and beside limits.body_bytes; above it 413. A process that reads so much "
        "takes at "
        "most 64 MiB for it, and about five times media.bytes where that is more",
    )
    parts: int = option(16, "so many; above it 400")
    pixels: int = option(50_000_000, "of one picture; above it 400")
    seconds: float = option(300.0, "of one recording; above it 400")

    def __post_init__(self) -> None:
        if not 0 <= self.bytes <= MOST_MEDIA_BYTES:
            raise ConfigError(
                f"media.bytes is {self.bytes}; a worker is sent at most {MOST_MEDIA_BYTES}",
                f"media.bytes: {MOST_MEDIA_BYTES}",
            )


@dataclass(frozen=True)
class Http:
    """Options of the HTTP server. Beyond loopback it needs keys (`sartor agents key NAME`)."""

    host: str = option("127.0.0.1", "address")
    port: int = option(8440, "port; 0 takes a free one and says which")
    cors: tuple[str, ...] = option((), "origins that a browser's page may ask from; none by default")
    drain_s: float = option(30.0, "on SIGTERM: how long running replies may take to end")
    otel: str = option("", "OTLP/HTTP endpoint for traces, without content; needs sartor[otel]")


@dataclass(frozen=True)
class Routing:
    """Options of `auto`, the choice of an agent for a request that names none."""

    encoder: str = option("auto", "minilm, tfidf, base, or a directory; auto is the best of those on this machine")
    target: float = option(0.9, "fraction of foreign prompts that must go to the base where the threshold is chosen")
    risk: float = option(
        0.05, "most of the prompts that get an agent that may get a wrong one where the threshold is chosen"
    )
    lift: Literal["measured", "ignored"] = option(
        "measured", "measured: an agent gets what its Report shows a gain over the base for; ignored: whatever fits it"
    )


@dataclass(frozen=True)
class Rollout:
    """Options for the introduction of a new version, and for its rollback."""

    shadow_fraction: float = option(0.0, "of requests, also answered by the candidate, whose reply nobody sees")
    canary_fraction: float = option(0.0, "of requests, answered by the candidate; 0 promotes at once")
    least_requests: int = option(20, "of a canary before it is judged")
    error_margin: float = option(0.05, "a candidate whose failures exceed the live version's by more is rolled back")
    latency_factor: float = option(
        2.0, "a candidate that takes this many times the live version's median time per token is rolled back"
    )
    format_margin: float = option(
        0.05, "as error_margin, for replies that are not of the live version's format (JSON, schema)"
    )
    feedback_margin: float = option(0.1, "as error_margin, for bad ratings")
    canary_requests: int = option(
        0,
        "replies of a canary without alarm, no key above a third, after which it is live; 0 leaves that to a person",
    )
    watch_s: float = option(3600.0, "how long after a promotion the monitors may still roll it back")


@dataclass(frozen=True)
class FeedbackTerms:
    """Rules for storing feedback, and its rate limits."""

    consent: Literal["assumed", "required"] = option(
        "assumed", "required: words are kept only of feedback that says consent: true; assumed: unless it says false"
    )
    per_minute: int = option(600, "feedback of one key; above it 429; 0 is no limit")
    per_day: int = option(20_000, "feedback of one key; above it 429; 0 is no limit")
    allow: tuple[str, ...] = option(
        (), "values that are not personal and stay, as in curate's personal_data: +49 30 1234567"
    )


@dataclass(frozen=True)
class PersonalTerms:
    """Personal versions: a few ranks per user on top of an agent's live version."""

    held: int = option(
        16, "personal adapters that a worker holds at once; the one that was asked for longest ago goes first"
    )
    rank: int = option(2, "ranks of a user's own, 1 to 4")
    most_worse: float = option(
        0.05,
        "nats a token by which it may be worse than the live version on the user's held-out rows, at the interval's "
        "end",
    )
    most_elsewhere: float = option(0.1, "the same on the live version's own held-out rows")
    backups: tuple[str, ...] = option((), "where copies of `state` and the registry are kept: forget names them")

    def __post_init__(self) -> None:
        if self.held < 1 or not 1 <= self.rank <= MOST_OWN_RANKS:
            problem = f"personal.held is {self.held}, personal.rank {self.rank}"
            raise ConfigError(problem, f"held: 16, and a rank of 1 to {MOST_OWN_RANKS}")


@dataclass(frozen=True)
class SpeechOptions:
    """Options of the voices, which run in processes of lower priority than the workers."""

    voice: str = option(
        "auto",
        "who speaks where a client names nobody: espeak, espeak:de, espeak:en-us+f3, piper:joe, piper:FILE.onnx, off; "
        "auto is espeak where espeak-ng is installed, else off",
    )
    voices: tuple[str, ...] = option(
        (), "who else a client may name; with a voice of espeak's, that is any of espeak's"
    )
    at_once: int = option(2, "pieces of a sentence or two that are spoken side by side")
    waiting: int = option(32, "texts that are spoken or wait; above it the answer is 429")
    characters: int = option(4096, "of one text that a client sends; above it the answer is 400")
    patience_s: float = option(20.0, "a voice that has not said a piece by then is killed")

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise ConfigError(
                f"speech.at_once is {self.at_once}, and nobody would speak", "1 or more; voice: off speaks nothing"
            )


@dataclass(frozen=True)
class Basis:
    """Base of a team, its agents, and the place of its records."""

    base: str = option(REQUIRED, "starter, a directory, a GGUF file or a hub name")
    agents: tuple[AgentOptions, ...] = option((), "the agents that are registered at the first start")
    engine: LocalEngineOptions | LlamaCppOptions | OpenAiEngineOptions = option(LocalEngineOptions(), "what computes")
    state: str = option("", "directory of registry, receipts and inbox; by default .NAME beside the file")
    registry: str = option(
        "", "SQLAlchemy URL; by default SQLite in `state`. A password stands in the environment: ${NAME}"
    )
    trust: str = option("", "public key that Releases must be signed by; by default those in SARTOR_HOME/trusted")
    mcp: McpTerms = option(McpTerms(), "the team as an MCP server (docs/tools.md)")
    tools: tuple[ToolServer, ...] = option((), "MCP servers whose tools the team runs for its agents (docs/tools.md)")
    a2a: CardTerms = option(CardTerms(), "the team's A2A card (docs/tools.md)")


@dataclass(frozen=True)
class Team(Basis):
    """Complete TEAM.yaml. Relative paths are relative to the file's directory."""

    workers: WorkerOptions = option(WorkerOptions(), "the processes")
    breaker: CircuitBreakerOptions = option(CircuitBreakerOptions(), "when an agent is taken out of service")
    limits: RequestLimits = option(RequestLimits(), "what one request, key or agent may take")
    media: MediaLimits = option(MediaLimits(), "pictures and recordings of a request")
    http: Http = option(Http(), "where it listens")
    router: Routing = option(Routing(), "how `auto` chooses")
    rollout: Rollout = option(Rollout(), "how a new version comes in")
    speech: SpeechOptions = option(SpeechOptions(), "who speaks")
    retrain: Retraining = option(Retraining(), "how agents learn from what is said of them")
    plans: tuple[Plan, ...] = option(
        (), "several agents for one request: sequence, parallel or verify (docs/collaboration.md)"
    )
    feedback: FeedbackTerms = option(FeedbackTerms(), "what is kept of what people say of replies")
    personal: PersonalTerms = option(PersonalTerms(), "versions of users' own")
    prefix_cache: Literal["by_key", "shared"] = option(
        "by_key",
        "who uses what a worker keeps of earlier prompts: by_key: the same API key (and the same user, where a key "
        "speaks for users); shared: every key, which tells each what others ask",
    )

    def __post_init__(self) -> None:
        names = [member.name for member in self.agents]
        if duplicate := next((name for name in names if names.count(name) > 1), ""):
            raise ConfigError(f"two agents have the name {duplicate!r}", f"name: {duplicate}-2 for one of them")
        if reserved_name := next((name for name in names if name in RESERVED), ""):
            raise ConfigError(
                f"an agent cannot have the name {reserved_name!r}, which means something else",
                f"name: {reserved_name}-agent",
            )
        plan_options.check_plans(self.plans, names, RESERVED)
        check_tools([server.name for server in self.tools], {member.name: member.tools for member in self.agents})

    def agent(self, name: str) -> AgentOptions | None:
        """Return the options of an agent; None if the file does not name it."""
        return next((member for member in self.agents if member.name == name), None)

    @property
    def registry_url(self) -> str:
        """SQLAlchemy URL of the registry: the configured one, or SQLite in `state`."""
        file = str(Path(self.state).absolute() / "registry.sqlite")
        return self.registry or URL.create("sqlite", database=file).render_as_string(hide_password=False)


def load(path: Path, flags: Sequence[str] = ()) -> Team:
    """Return the team in a YAML file, with absolute paths. Raises ConfigError with the option's name."""
    team = config.load_any(Team, path, flags)
    root = path.absolute().parent
    engine = team.engine
    if isinstance(engine, LlamaCppOptions) and engine.gguf:
        engine = replace(engine, gguf=str(root / engine.gguf))
    return replace(
        team,
        engine=engine,
        base=str(root / team.base) if os.path.exists(root / team.base) else team.base,
        agents=tuple(replace(member, release=str(root / member.release)) for member in team.agents),
        state=str(root / (team.state or f".{path.stem}")),
        trust=str(root / team.trust) if team.trust else "",
        retrain=replace(team.retrain, key=str(root / team.retrain.key) if team.retrain.key else ""),
        speech=replace(
            team.speech,
            voice=resolve_voice_path(team.speech.voice, root),
            voices=tuple(resolve_voice_path(voice, root) for voice in team.speech.voices),
        ),
        plans=tuple(plan_options.seen_from(plan, root) for plan in team.plans),
    )
