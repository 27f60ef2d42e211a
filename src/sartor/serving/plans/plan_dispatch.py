"""Replies to requests for plans; other requests are passed on.

A request names a plan by its name or `name@digest`; the digest of what the plan declares is its version. The answer
has a receipt of its own besides those of its steps, and its tokens are the sum of theirs.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from sartor.core.errors import (
    BusyError,
    ConfigError,
    DeadlineError,
    KeyRefusedError,
    RequestError,
    SartorError,
    UnavailableError,
    UnknownAgentError,
)
from sartor.core.ipc import error_of
from sartor.inference.engine import BASE, Event, GenerateCall, ReplyDone, ReplyFailed, Sampling, TextDelta
from sartor.serving.dispatch.model_selection import AUTO, BASE_AGENT
from sartor.serving.dispatch.reply_stream import ReplyStream
from sartor.serving.plan_options import DividedPlan, Plan, agents_of_plan, digest
from sartor.serving.plans.plan_log import FinishedRun, PlanLog
from sartor.serving.plans.plan_runner import PlanRunner, allowance_of
from sartor.serving.plans.plan_steps import OpenStep, PlanAllowance, PlanRun, StepLogEntry, StepReplier, StepReply
from sartor.serving.team_config import Team
from sartor.serving.types import AgentListing, AgentReply, AgentRequest, FinishedReply, ReceiptWriter, Replier

# Errors that are passed on unchanged if no step gave a reply, because the client can act on them
_CLIENTS = (RequestError, ConfigError, BusyError, DeadlineError)


@dataclass(frozen=True)
class Single:
    """Members of plans, answered by one Replier."""

    replies: Replier

    async def open(self, request: AgentRequest, step_path: str) -> AgentReply:
        """Begin a step's reply."""
        return await self.replies.open(request)


class PlanDispatcher:
    """Replier for the plans of a team; it passes other requests on.

    known: returns the agents that are served now.
    """

    def __init__(
        self,
        team: Team,
        replies: Replier,
        log: PlanLog,
        *,
        members: StepReplier | None = None,
        receipts: ReceiptWriter | None = None,
        known: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._replies, self._members = replies, members or Single(replies)
        self._log, self._receipts, self._known = log, receipts, known
        self._max_tokens = team.limits.reply_tokens
        self._plans: dict[str, Plan] = {plan.name: plan for plan in team.plans}
        self._digests = {name: digest(plan, self._plans) for name, plan in self._plans.items()}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.receipts_lost = 0

    @property
    def listed(self) -> list[AgentListing]:
        """Plans as entries of the model list."""
        return [
            AgentListing(name, version, (version,), {"plan": self._plans[name].kind})
            for name, version in self._digests.items()
        ]

    @property
    def troubles(self) -> dict[str, str]:
        """Problems of plans by name, and the number of records that could not be written."""
        known_names = {*self._known(), *self._plans, BASE_AGENT, AUTO}
        result = {}
        for name, plan in self._plans.items():
            if missing := sorted(
                {step.agent for step in agents_of_plan(plan) if step.agent.partition("@")[0] not in known_names}
            ):
                result[name] = f"nobody of its steps is called {', '.join(missing)}"
            elif name in self._known():
                result[name] = "an agent has its name too, and the plan answers"
        if self._log.lost or self.receipts_lost:
            result["plans"] = f"{self._log.lost} runs and {self.receipts_lost} receipts could not be written"
        return result

    async def open(self, request: AgentRequest) -> AgentReply:
        """Begin an answer, and return when its first event is there.

        Raises what `Replier.open` raises; for a plan RequestError for an unsupported request, and UnavailableError if
        no step gave a reply.
        """
        name, separator, version = request.model.partition("@")
        plan = self._plans.get(name)
        if plan is None:
            return await self._replies.open(request)
        self._check(plan, request, version if separator else self._digests[name])
        run = PlanRun(
            secrets.token_hex(16), request, members=self._members, plans=self._plans, max_tokens=self._max_tokens
        )
        return await self._open_plan(run, plan)

    async def close(self) -> None:
        """Wait until pending writes are done."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check(self, plan: Plan, request: AgentRequest, version: str) -> None:
        if version != self._digests[plan.name]:
            problem = f"the plan {plan.name} has no version {version[:80]!r}; it is {self._digests[plan.name]}"
            raise UnknownAgentError(problem, f'"model": "{plan.name}"')
        if request.openable is not None and plan.name not in request.openable:
            raise KeyRefusedError(
                f"this key does not open {plan.name!r}", f"sartor agents key {plan.name} makes one that does"
            )
        if not request.messages:
            raise RequestError(f"the plan {plan.name} answers a conversation", "POST /v1/chat/completions")
        if request.tools or request.must_call:
            raise RequestError(f"the plan {plan.name} calls no tools", "ask an agent, or leave `tools` out")
        if request.top_logprobs >= 0:
            raise RequestError(f"the plan {plan.name} tells no logprobs", "ask an agent, or leave `logprobs` out")
        if request.schema and isinstance(plan, DividedPlan) and plan.answer is None:
            raise RequestError(
                f"the plan {plan.name} puts answers below each other, which obey no schema",
                "declare who makes one: `answer`",
            )

    async def _open_plan(self, run: PlanRun, plan: Plan) -> AgentReply:
        """Run the plan. It is logged in every case."""
        allowance = allowance_of(plan, run.request.deadline_s)
        active = _ActiveRun(run, plan, f"{plan.name}@{self._digests[plan.name]}", allowance)
        try:
            step_reply = await PlanRunner(run, plan, run.request, allowance).follow(run.request.streams)
            if step_reply is None:
                if run.errors and isinstance(run.errors[0], _CLIENTS):
                    raise run.errors[0]  # the client can do something about it
                problems = "; ".join(dict.fromkeys(error.problem for error in run.errors))
                raise UnavailableError(
                    f"no step of the plan {plan.name} gave anything: {problems}", "ask again in a few seconds"
                )
        except asyncio.CancelledError:
            self._spawn(self._write(active.finished_run("", "cancelled")))
            raise
        except SartorError as error:
            await asyncio.shield(self._spawn(self._write(active.finished_run("", "failed", error))))
            raise
        active.reason = "; ".join([f"plan {plan.name}", *run.notes])
        events = _PlanEvents(
            step_reply, run.id, allowance, lambda: self._spawn(self._write(active.finished_run("", "cancelled")))
        )
        stream = ReplyStream(events, lambda: None, lambda stream, event: self._ended(active, stream.text, event))
        return AgentReply(active.version, active.reason, run.id, stream)

    async def _ended(self, active: _ActiveRun, text: str, event: ReplyDone | ReplyFailed) -> None:
        """Write the receipt of a finished answer, and log its run."""
        run = active.run
        done = event if isinstance(event, ReplyDone) else None
        error = error_of(event.kind, event.problem, event.remedy) if isinstance(event, ReplyFailed) else None
        call = GenerateCall(
            run.id, BASE, run.request.messages, sampling=Sampling(**run.request.sampling), schema=run.request.schema
        )
        finished = FinishedReply(
            receipt=run.id,
            agent=active.version,
            reason=active.reason,
            release_id="",
            call=call,
            text=text,
            done=done,
            scores={},
            began=active.began,
            steps=run.receipts,
        )
        # shielded, so that a client that disconnects now does not prevent either write
        await asyncio.shield(self._spawn(self._keep(finished)))
        await asyncio.shield(
            self._spawn(self._write(active.finished_run(text, "failed" if error else "answered", error)))
        )

    async def _keep(self, finished: FinishedReply) -> None:
        if self._receipts is None:
            return
        try:
            await asyncio.to_thread(self._receipts.write, finished)
        except (SartorError, OSError):  # a full disk does not affect the answer; /health counts lost receipts
            self.receipts_lost += 1

    async def _write(self, finished_run: FinishedRun) -> None:
        await asyncio.to_thread(self._log.write, finished_run)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@dataclass
class _ActiveRun:
    """Plan that is being run, with what its log needs at the end.

    began: seconds since the epoch.
    """

    run: PlanRun
    plan: Plan
    version: str
    allowance: PlanAllowance
    reason: str = ""
    began: float = field(default_factory=time.time)

    def finished_run(self, text: str, outcome: str, error: SartorError | None = None) -> FinishedRun:
        """Return the run for the log."""
        request = self.run.request
        request_fields = {
            "messages": list(request.messages),
            "sampling": dict(request.sampling),
            "schema": request.schema,
        }
        tokens = {"prompt": self.allowance.prompt, "reply": self.allowance.reply, "cached": self.allowance.cached}
        took_s = time.time() - self.began
        last_entry = StepLogEntry(
            step_path="",
            role="answer",
            agent=self.version,
            outcome=outcome,
            error=error,
            reply=text,
            receipt=self.run.id,
            tokens=tokens,
            took_s=took_s,
        )
        first_entry = StepLogEntry("", "request", request.model, "asked", request_fields=request_fields)
        return FinishedRun(
            self.run.id,
            plan=self.version,
            request_entry=first_entry,
            steps=self.run.lines,
            answer_entry=last_entry,
            content=self.plan.log == "content",
            began=self.began,
            person=request.person,
        )


class _PlanEvents:
    """Events of an answer: all of it at once, or those of the last step as they come.

    The token counts are those of all steps.
    on_cancel: called if the client cancels the answer.
    """

    def __init__(
        self, source: StepReply | OpenStep, id: str, allowance: PlanAllowance, on_cancel: Callable[[], object]
    ) -> None:
        self._source, self._id, self._allowance, self._on_cancel = source, id, allowance, on_cancel
        self._has_begun = False

    def __aiter__(self) -> _PlanEvents:
        return self

    async def __anext__(self) -> Event:
        if not self._has_begun:
            self._has_begun = True
            text = self._source.text if isinstance(self._source, StepReply) else ""
            # counts the tokens of the earlier steps, whose text is not sent
            return TextDelta(self._id, text, self._allowance.reply)
        event: Event
        if isinstance(self._source, StepReply):
            event = ReplyDone(self._id, self._source.finish, 0, 0)
        else:
            event = await anext(self._source)
        if isinstance(event, ReplyDone):
            return ReplyDone(
                self._id,
                event.finish,
                prompt_tokens=self._allowance.prompt,
                reply_tokens=self._allowance.reply,
                cached_tokens=self._allowance.cached,
            )
        return replace(event, call=self._id)

    async def aclose(self) -> None:
        """Cancel the answer."""
        self._on_cancel()
        if isinstance(self._source, OpenStep):
            await self._source.aclose()
