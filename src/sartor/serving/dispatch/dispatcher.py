"""Dispatch of a request to a reply: version, fallback, receipt."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from sartor.core.errors import (
    ArtifactError,
    ConflictError,
    DeadlineError,
    ModelError,
    RefusedError,
    RequestError,
    SartorError,
    UnavailableError,
    UnknownAgentError,
)
from sartor.inference.engine import BASE, GenerateCall, ReplyDone, ReplyFailed, Sampling
from sartor.media.content_parts import kinds_in
from sartor.serving.admission import release_copies
from sartor.serving.dispatch.adapter_leases import AdapterLeases, Admit
from sartor.serving.dispatch.client_turns import FOLDED, SYSTEM_ROLES, check_no_tool_turns, fold_system
from sartor.serving.dispatch.model_selection import (
    BASE_AGENT,
    CandidateList,
    Reason,
    ReasonKind,
    join_reasons,
    select_candidates,
)
from sartor.serving.dispatch.personal_versions import UserVersionSelector
from sartor.serving.dispatch.reply_stream import ReplyStream
from sartor.serving.dispatch.rollout import (
    ObservedReply,
    Rollouts,
    RolloutVerdict,
    Shadow,
    ShadowOutcome,
    Shadows,
    in_fraction,
    is_json,
)
from sartor.serving.dispatch.served_agents import ServedAgents
from sartor.serving.receipts import Digest, team_digest
from sartor.serving.registry.registry import ChangeCause, Registry
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.registry.user_versions import SUFFIX, UserVersionStore
from sartor.serving.registry.version_rules import VersionRules
from sartor.serving.team_config import Team
from sartor.serving.types import (
    AgentReply,
    AgentRequest,
    EventStream,
    FinishedReply,
    ReceiptWriter,
    Router,
    WorkerBackend,
)

_OPTIONS = frozenset(option.name for option in fields(Sampling))
SALT_CHARACTERS = 32


@dataclass(frozen=True)
class CallTerms:
    """What the team decides of the calls of an agent.

    fixes_system: whether a client's system messages stand below the Release's system prompt, in user turns.
    tools: tools that the team runs, offered if the client declares none; empty for those of the Release.
    cache_salt: as in `GenerateCall`.
    """

    max_tokens: int
    fixes_system: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    cache_salt: str = ""


def build_call(request: AgentRequest, version: AgentVersion | None, id: str, terms: CallTerms) -> GenerateCall:
    """Return the engine call of a request for a version, or for the base (None).

    Sampling options and tools of the client replace those of the Release, and so does a system message unless the
    terms fix that of the Release.
    Raises RequestError for an unknown option or more than `terms.max_tokens` tokens; ConfigError for a value out of
    range.
    """
    facts = version.facts if version else {}
    messages, has_own_system = _with_system(request, str(facts.get("system_prompt", "")), terms.fixes_system)
    may_call = request.tools is None and not request.schema and bool(request.messages)
    tools = terms.tools if may_call and terms.tools else tuple(facts.get("tools", ()))
    return GenerateCall(
        id=id,
        adapter=version.adapter if version else BASE,
        messages=messages,
        text=request.text,
        sampling=_sampling(request, dict(facts.get("sampling", {})), terms.max_tokens),
        schema=request.schema,
        tools=tools if request.tools is None else request.tools,
        must_call=request.must_call,
        top_logprobs=request.top_logprobs,
        cache_salt=terms.cache_salt,
        public_system=has_own_system and request.tools is None,
    )


def _with_system(
    request: AgentRequest, released: str, fixes_system: bool
) -> tuple[tuple[Mapping[str, Any], ...], bool]:
    """Return the messages with their system message, and whether that is the Release's or the team's own."""
    messages = request.messages
    if not messages or request.has_team_system:
        return messages, request.has_team_system
    if fixes_system:
        messages = fold_system(messages)
    if not released or any(message.get("role") in SYSTEM_ROLES for message in messages):
        return messages, False
    return ({"role": "system", "content": released}, *messages), True


def _sampling(request: AgentRequest, released: dict[str, Any], max_tokens: int) -> Sampling:
    if unknown := sorted(set(request.sampling) - _OPTIONS):
        raise RequestError(f"there is no sampling option {unknown[0]!r}", f"one of {', '.join(sorted(_OPTIONS))}")
    if request.sampling.get("max_tokens", 0) > max_tokens:
        requested_tokens = request.sampling["max_tokens"]
        raise RequestError(
            f"max_tokens is {requested_tokens}; the limit of this server is {max_tokens}", f"max_tokens: {max_tokens}"
        )
    released_options = {name: value for name, value in released.items() if name in _OPTIONS}
    merged = {"max_tokens": Sampling().max_tokens, **released_options, **request.sampling}
    return Sampling(**{**merged, "max_tokens": min(merged["max_tokens"], max_tokens)})


# Errors after which the next candidate is tried: the agent's own fault, or an agent out of service. Other errors are
# the request's, or those of capacity and deadlines.
STEPS_IN = (ModelError, ArtifactError, UnavailableError)
AGENT_FAULTS = ("ModelError", "ArtifactError")


@dataclass(frozen=True)
class _PendingReply:
    """Reply in progress, with the facts that its receipt will need."""

    receipt: str  # id
    request: AgentRequest
    call: GenerateCall
    agent: str  # exact version, or "base"
    reported_agent: str  # as the client sees it
    reason: str
    release_id: str  # empty for the base
    scores: Mapping[str, float]  # of the router
    began: float  # Unix time, s
    in_flight: int  # replies running when this one started
    person: str  # keyed digest; empty unless a personal version answers
    terms: CallTerms


class Dispatcher:
    """Dispatcher between HTTP and the workers, used in one event loop.

    Call `start` before the first request and `close` at the end.
    in_flight: number of replies that run.
    receipts_lost: number of receipts that could not be written.
    """

    def __init__(
        self,
        team: Team,
        workers: WorkerBackend,
        registry: Registry,
        admit: Admit,
        *,
        router: Router | None = None,
        receipts: ReceiptWriter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._team = team
        self._workers = workers
        self._router = router
        self._receipts = receipts
        self._admit = admit
        self.leases = AdapterLeases(workers, admit, release_copies.folder(Path(team.state)))
        self.rollouts = Rollouts(team.rollout, clock)
        self.served = ServedAgents(
            registry,
            workers,
            leases=self.leases,
            rollouts=self.rollouts,
            router=router,
            revoked_ids=VersionRules.of(team).revoked_ids,
        )
        self.user_versions = UserVersionSelector(
            UserVersionStore(registry.database),
            leases=self.leases,
            workers=workers,
            state=Path(team.state),
            max_loaded=team.personal.held,
        )
        self.served.followers.append(self.user_versions.follow)
        self.shadows = Shadows(
            workers,
            has_room=lambda: self.in_flight <= self._workers.about.rows // 4,
            leased=self.leases.leased,
            report=self._on_shadow_outcome,
            deadline_s=team.limits.deadline_s,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self.in_flight = 0
        self.receipts_lost = 0
        self._digest: Digest | None = None
        # returns the tools that the team runs for an agent, by the agent's name
        self.team_tools: Callable[[str], tuple[Mapping[str, Any], ...]] = lambda name: ()

    async def start(self) -> None:
        """Register new agents of TEAM.yaml, load the served versions, and follow the registry.

        An agent that cannot be admitted or loaded is reported by `health`. Its fallbacks answer if it was ever
        admitted.
        Raises an error if the registry cannot be opened.
        """
        self._digest = await asyncio.to_thread(team_digest, Path(self._team.state))
        await self.served.register({member.name: member for member in self._team.agents}, self._admit)
        await self.served.reload()
        await self.served.settle()
        self._loops = [asyncio.ensure_future(self.served.keep_fresh()), asyncio.ensure_future(self.shadows.run())]

    async def close(self) -> None:
        """Stop following the registry and unload. Running replies continue; the workers end them."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.served.close()
        await self.user_versions.close()
        await self.leases.close()

    async def open(self, request: AgentRequest) -> AgentReply:
        """Begin a reply; return it when its first event is there.

        Raises UnknownAgentError, KeyRefusedError, RequestError, ConfigError, BusyError, DeadlineError;
        UnavailableError if
        neither the agent nor any of its fallbacks can answer now.
        """
        receipt = secrets.token_hex(16)
        deadline = time.monotonic() + request.deadline_s
        try:
            async with asyncio.timeout(request.deadline_s):
                public_request = self.user_versions.public_request(request)
                selection = await select_candidates(
                    public_request, self.served.agents, router=self._router, id=receipt, reads=self.served.reads
                )
                selection = await self.user_versions.select(
                    selection, request, self.served.agents, self.served.versions
                )
        except TimeoutError:
            raise DeadlineError(
                f"no agent was chosen within {request.deadline_s:g} s", "name an agent, or allow more time"
            ) from None
        errors: list[SartorError] = []
        for index, candidate in enumerate(selection.candidates):
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise DeadlineError(
                    f"{request.deadline_s:g} s were over before anybody answered",
                    f"limits.deadline_s: {2 * request.deadline_s:g} in the team's file, or a smaller max_tokens",
                )
            reasons = candidate.reasons
            if errors:
                reasons = (*selection.candidates[0].reasons, Reason(ReasonKind.FAILED, errors[0].problem), *reasons)
            try:
                return await self._begin(
                    replace(request, deadline_s=remaining_s),
                    selection=selection,
                    index=index,
                    receipt=receipt,
                    reason=join_reasons(reasons),
                )
            except STEPS_IN as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        problems = "; ".join(dict.fromkeys(error.problem for error in errors))
        raise UnavailableError(
            f"{request.model} cannot answer now, nor who may step in: {problems}", "ask again in a few seconds"
        )

    def health(self) -> dict[str, Any]:
        """Return the state of agents, troubles and counts, for /health."""
        shadows = {"answered": self.shadows.answered, "left_out": self.shadows.left_out}
        counts = {"in_flight": self.in_flight, "receipts_lost": self.receipts_lost, "shadows": shadows}
        return {**self.served.health(), **counts}

    def hear(self, agent: str, rating: float, key: str = "") -> None:
        """Count a user's rating of a reply by this exact version: -1 bad to 1 good.

        key: id of the API key that rates.
        """
        self._follow(self.rollouts.observe_rating(agent, rating < 0, key))

    async def _begin(
        self, request: AgentRequest, selection: CandidateList, index: int, receipt: str, reason: str
    ) -> AgentReply:
        candidate = selection.candidates[index]
        version = candidate.personal_version or self.served.version(candidate.agent)
        terms = self._terms(request, candidate.agent)
        is_folded = terms.fixes_system and not request.has_team_system
        if is_folded and any(message.get("role") in SYSTEM_ROLES for message in request.messages):
            reason = f"{reason}; {FOLDED}"
        call = build_call(request, version, f"{receipt}-{index}" if index else receipt, terms)
        reported_agent = candidate.agent if version else f"{BASE_AGENT}@{self._workers.about.base_digest[:12]}"
        with ExitStack() as stack:
            stack.enter_context(self.leases.leased(call.adapter))
            stack.enter_context(self._counted())
            released_version = version
            if candidate.personal_version:  # the Release on which the personal adapter was tuned
                released_version = self.served.version(candidate.agent.removesuffix(SUFFIX))
            pending = _PendingReply(
                receipt=receipt,
                request=request,
                call=call,
                agent=candidate.agent,
                reported_agent=reported_agent,
                reason=reason,
                release_id=released_version.release_id if released_version else "",
                scores=selection.scores,
                began=time.time(),
                in_flight=self.in_flight,
                person=request.person if candidate.personal_version else "",
                terms=terms,
            )
            began = time.monotonic()
            try:
                events = cast(EventStream, await self._workers.reply(call, candidate.agent, request.deadline_s))
            except SartorError as error:
                self._failed(candidate.agent, error.kind, request.key)
                raise
            cleanup = stack.pop_all()
        took_s = time.monotonic() - began
        stream = ReplyStream(events, cleanup.close, lambda stream, event: self._ended(pending, stream, event), took_s)
        return AgentReply(reported_agent, reason, receipt, stream)

    def _terms(self, request: AgentRequest, agent: str) -> CallTerms:
        """Return the terms of an exact version's calls.

        Raises RequestError for turns and raw texts that the agent does not take from a client.
        """
        name = agent.partition("@")[0]
        options = self._team.agent(name)
        fixes_system = options is not None and options.fixes_system
        if fixes_system and not request.messages:
            raise RequestError(
                f"{name} has a fixed system prompt, and a raw text has no place for it",
                "POST /v1/chat/completions with messages",
            )
        if options is not None and options.tools and request.tools is None:
            check_no_tool_turns(request.messages[: len(request.messages) - request.server_turns], name)
        return CallTerms(
            self._team.limits.reply_tokens, fixes_system, tools=self.team_tools(name), cache_salt=self._salt(request)
        )

    def _salt(self, request: AgentRequest) -> str:
        """Return the salt of a request's cached prompts: a keyed digest, from which no owner can be guessed."""
        if self._team.prefix_cache == "shared" or not request.cache_owner:
            return ""
        assert self._digest is not None, "start() was awaited"
        return self._digest("prefix cache", request.cache_owner)[:SALT_CHARACTERS]

    async def _ended(self, pending: _PendingReply, stream: ReplyStream, event: ReplyDone | ReplyFailed) -> None:
        """Count a reply that has ended, shadow it if it was live, and write its receipt."""
        if isinstance(event, ReplyFailed):
            self._failed(pending.agent, event.kind, pending.request.key)
        elif event.finish != "cancelled":
            tokens = event.reply_tokens or stream.tokens
            self._observe_reply(
                pending.agent,
                text=stream.text,
                is_call=bool(event.tool_calls),
                token_s=stream.took_s / max(1, tokens),
                in_flight=pending.in_flight,
                key=pending.request.key,
            )
            self._shadow(pending, stream.text)
        if self._receipts is not None:
            done = event if isinstance(event, ReplyDone) else None
            finished = FinishedReply(
                receipt=pending.receipt,
                agent=pending.reported_agent,
                reason=pending.reason,
                release_id=pending.release_id,
                call=pending.call,
                text=stream.text,
                done=done,
                scores=pending.scores,
                began=pending.began,
                person=pending.person,
            )
            # shielded: a client that disconnects now must not prevent the receipt
            await asyncio.shield(self._spawn(self._keep(finished)))

    async def _keep(self, finished: FinishedReply) -> None:
        assert self._receipts is not None
        try:
            await asyncio.to_thread(self._receipts.write, finished)
        except (SartorError, OSError):  # a full disk must not fail the reply; /health counts lost receipts
            self.receipts_lost += 1

    def _shadow(self, pending: _PendingReply, reply: str) -> None:
        """Repeat the call with the agent's version on trial, if the request falls into the shadow fraction."""
        agent = self.served.agents.get(pending.agent.partition("@")[0])
        if agent is None or not agent.candidate or pending.agent != f"{agent.name}@{agent.live}":
            return
        name = f"{agent.name}@{agent.candidate}"
        if not in_fraction(agent.shadow_fraction, f"shadow of {name}", pending.receipt):
            return
        if not set(kinds_in(pending.request.messages)) <= set(self.served.reads(name)):
            return
        with suppress(SartorError):  # a version that is not held is reported in the troubles already
            version = self.served.version(name)
            id = f"{pending.receipt}-shadow"
            call = build_call(pending.request, version, id, pending.terms)
            self.shadows.offer(Shadow(call, name, reply, pending.request.key))

    def _on_shadow_outcome(self, outcome: ShadowOutcome) -> None:
        shadow, event = outcome.shadow, outcome.event
        if isinstance(event, ReplyFailed):
            self._failed(shadow.agent, event.kind, shadow.key)
        elif event.finish != "cancelled":
            token_s = outcome.took_s / max(1, event.reply_tokens or outcome.tokens)
            self.rollouts.observe_comparison(shadow.agent, outcome.text == shadow.live_reply)
            self._observe_reply(
                shadow.agent,
                text=outcome.text,
                is_call=bool(event.tool_calls),
                token_s=token_s,
                in_flight=self.in_flight + 1,
                key=shadow.key,
            )

    def _observe_reply(self, agent: str, text: str, is_call: bool, token_s: float, in_flight: int, key: str) -> None:
        self._follow(
            self.rollouts.observe_reply(
                ObservedReply(
                    agent,
                    failed=False,
                    is_json=is_call or is_json(text),
                    token_s=token_s,
                    in_flight=in_flight,
                    key=key,
                )
            )
        )

    def _failed(self, agent: str, kind: str, key: str) -> None:
        if kind in AGENT_FAULTS:
            self._follow(self.rollouts.observe_reply(ObservedReply(agent, True, key=key)))
        elif kind == "UnavailableError":
            health = self._workers.health().get("agents", {}).get(agent, {})
            if health.get("breaker") == "quarantined":
                self._follow(self.rollouts.condemn(agent, "its breaker put it into quarantine", key))

    def _follow(self, verdict: RolloutVerdict | None) -> None:
        if verdict is not None:
            self._spawn(self._execute(verdict))

    async def _execute(self, verdict: RolloutVerdict) -> None:
        """Carry out a verdict of the monitors, unless the agent has been changed since."""
        agent = self.served.agents.get(verdict.agent)
        if agent is None:
            return
        cause = ChangeCause("monitors", verdict.reason, verdict.numbers)
        registry = self.served.registry
        try:
            if verdict.action == "promote":
                await asyncio.to_thread(
                    registry.promote, agent.name, verdict.version, expected=agent.live, heeds_freeze=True, cause=cause
                )
            elif verdict.action == "freeze":
                await self._freeze(agent, verdict)
            else:
                trial = verdict.version if agent.candidate == verdict.version else ""
                await asyncio.to_thread(registry.rollback, agent.name, expected=agent.live, trial=trial, cause=cause)
        except (ConflictError, UnknownAgentError):
            return
        except RefusedError as error:  # the version to go to is below `min_version`, or its Release was revoked
            await self._ask_admin(agent, verdict, error)
        except SartorError:  # a full disk, a locked file
            self.rollouts.undecided(agent.name)

    async def _freeze(self, agent: Agent, verdict: RolloutVerdict, *, renews: bool = False) -> None:
        """Record a freeze. Raises as `Registry.freeze`."""
        await asyncio.to_thread(
            self.served.registry.freeze,
            agent.name,
            verdict.version,
            expected=agent.live,
            trial=verdict.version if agent.candidate == verdict.version else "",
            renews=renews,
            cause=ChangeCause("monitors", verdict.reason, verdict.numbers),
        )

    async def _ask_admin(self, agent: Agent, verdict: RolloutVerdict, error: SartorError) -> None:
        """Record once that a verdict cannot be carried out under the team's rules; it is not tried until that ends."""
        reason = f"{verdict.action} refused: {error.problem}; the alarm was: {verdict.reason}"
        try:
            await self._freeze(agent, replace(verdict, reason=reason), renews=True)
        except (ConflictError, UnknownAgentError):
            return
        except SartorError:
            self.rollouts.undecided(agent.name)
            return
        self.rollouts.refuse(agent.name)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
