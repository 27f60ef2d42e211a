"""One plan step within a token and time budget."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from sartor.core.errors import BudgetError, DeadlineError, SartorError, UnavailableError
from sartor.core.ipc import error_of
from sartor.core.remedies import REQUEST_AGAIN
from sartor.inference.engine import Event, Finish, ReplyDone, ReplyFailed, TextDelta
from sartor.serving.dispatch.model_selection import AUTO
from sartor.serving.plan_options import Plan, PlanStep
from sartor.serving.plans.step_messages import VERDICT, PlanStepInput, Role
from sartor.serving.types import AgentReply, AgentRequest

# Roles with a reply format of their own, to which the client's options do not apply
_OWN_FORM = ("check", "plan")


class StepReplier(Protocol):
    """Source of the steps' replies: `dispatch` or a substitute.

    step_path: position of the step in its plan, as in the log.
    """

    async def open(self, request: AgentRequest, step_path: str) -> AgentReply:
        """Begin a reply, as `Replier.open` does."""
        ...


@dataclass
class PlanAllowance:
    """Remaining budget of a plan.

    deadline: of the monotonic clock.
    part_of: the allowance of the outer plan, which is charged too.
    """

    tokens: int
    deadline: float
    part_of: PlanAllowance | None = None
    prompt: int = 0
    reply: int = 0
    cached: int = 0

    @property
    def remaining_tokens(self) -> int:
        """Tokens that are left here and in the outer plan."""
        remaining = self.tokens - self.prompt - self.reply
        return remaining if self.part_of is None else min(remaining, self.part_of.remaining_tokens)

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def spend(self, prompt: int, reply: int, cached: int) -> None:
        """Charge the tokens of a step."""
        self.prompt, self.reply, self.cached = self.prompt + prompt, self.reply + reply, self.cached + cached
        if self.part_of is not None:
            self.part_of.spend(prompt, reply, cached)

    def check(self) -> None:
        """Raise BudgetError without tokens left, DeadlineError without time left."""
        if self.remaining_tokens <= 0:
            raise BudgetError(f"the budget of {self.tokens} tokens is used up", "raise budget.tokens of the plan")
        if self.remaining_s <= 0:
            raise DeadlineError("the plan's time is used up", "raise budget.seconds of the plan")


@dataclass(frozen=True)
class StepLogEntry:
    """Log entry of a step.

    step_path: position in the plan (`steps.0`; `check.1.0` is the first check after one mend).
    agent: the exact version, or a check's kind.
    outcome: said, passed, found, or left out.
    error: the reason why it was left out.
    request_fields, reply: content; the plan declares how much of it is written.
    """

    step_path: str
    role: Role | Literal["request"]
    agent: str
    outcome: str
    error: SartorError | None = None
    request_fields: Mapping[str, Any] = field(default_factory=dict)
    reply: str = ""
    findings: tuple[str, ...] = ()
    receipt: str = ""
    tokens: Mapping[str, int] = field(default_factory=dict)
    took_s: float = 0.0


@dataclass
class PlanRun:
    """State of one request in a plan and the plans within it.

    request: the client's.
    plans: every plan of the team by name.
    max_tokens: the server's limit of one reply.
    """

    id: str
    request: AgentRequest
    members: StepReplier
    plans: Mapping[str, Plan]
    max_tokens: int
    lines: list[StepLogEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[SartorError] = field(default_factory=list)

    @property
    def receipts(self) -> tuple[str, ...]:
        """Receipts of the steps that were begun, in the order of their ends."""
        return tuple(line.receipt for line in self.lines if line.receipt)

    def leave_out(self, line: StepLogEntry, error: SartorError) -> None:
        """Record a step that gave no usable reply."""
        self.lines.append(replace(line, outcome="left out", error=error))
        self.notes.append(f"{line.agent} is left out of {line.step_path}: {error.problem}")
        self.errors.append(error)


@dataclass(frozen=True)
class StepTask:
    """Task of a step.

    number: offset of its seed from the client's.
    form: JSON Schema of its reply, if the step itself has none.
    """

    step: PlanStep
    role: Role
    step_path: str
    step_input: PlanStepInput
    number: int = 0
    form: Mapping[str, Any] | None = None

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """JSON Schema of the reply, as far as the plan declares one."""
        return self.step.schema or self.form or (VERDICT if self.role == "check" else None)


@dataclass(frozen=True)
class StepReply:
    """Reply of a step."""

    text: str
    agent: str
    finish: Finish = "stop"


def request_of(
    task: StepTask, client_request: AgentRequest, allowance: PlanAllowance, max_tokens: int
) -> AgentRequest:
    """Return the request for a step's agent.

    A client that may use the plan may use every agent that it names; `auto` chooses among the client's agents.
    """
    step = task.step
    has_own_form = task.role in _OWN_FORM
    sampling = {} if has_own_form else dict(client_request.sampling)
    if step.temperature >= 0:
        sampling["temperature"] = step.temperature
    if step.max_tokens:
        sampling["max_tokens"] = step.max_tokens
    if allowance.remaining_tokens < sampling.get("max_tokens", max_tokens):
        sampling["max_tokens"] = allowance.remaining_tokens
    sampling["seed"] = int(client_request.sampling.get("seed", 0)) + task.number
    schema = "" if has_own_form else client_request.schema
    if task.schema:
        schema = json.dumps(task.schema, sort_keys=True)
    return AgentRequest(
        model=step.agent,
        messages=task.step_input.messages(step, task.role),
        sampling=sampling,
        schema=schema,
        openable=client_request.openable if step.agent == AUTO else None,
        deadline_s=min(step.seconds or allowance.remaining_s, allowance.remaining_s),
        key=client_request.key,
        cache_owner=client_request.cache_owner,
        has_team_system=bool(step.system),
    )


class OpenStep:
    """Step that has begun. Its events can be iterated once; its log entry is written when they end."""

    def __init__(
        self,
        run: PlanRun,
        allowance: PlanAllowance,
        request: AgentRequest,
        task: StepTask,
        answer: AgentReply,
        began: float,
    ) -> None:
        self._run, self._allowance, self._began = run, allowance, began
        self.agent = answer.agent
        self._events = answer.events
        self._line = replace(line_of(task, request), agent=answer.agent, receipt=answer.receipt)
        self._text, self._tokens = "", 0
        self._is_logged = False

    def __aiter__(self) -> OpenStep:
        return self

    async def __anext__(self) -> Event:
        event = await anext(self._events)
        if isinstance(event, TextDelta):
            self._text += event.text
            self._tokens += event.tokens
        elif isinstance(event, ReplyFailed):
            self.leave_out(error_of(event.kind, event.problem, event.remedy))
        elif event.finish != "cancelled":
            self._is_logged = True
            self._allowance.spend(event.prompt_tokens, event.reply_tokens, event.cached_tokens)
            tokens = {"prompt": event.prompt_tokens, "reply": event.reply_tokens, "cached": event.cached_tokens}
            took_s = time.monotonic() - self._began
            self._run.lines.append(replace(self._line, reply=self._text, tokens=tokens, took_s=took_s))
        return event

    async def aclose(self) -> None:
        """Cancel the step."""
        await self._events.aclose()

    async def whole(self) -> StepReply:
        """Return the complete reply. Raises the error of a ReplyFailed, and UnavailableError if it was cut."""
        async with aclosing(self):
            async for event in self:
                if isinstance(event, ReplyFailed):
                    raise error_of(event.kind, event.problem, event.remedy)
                if isinstance(event, ReplyDone) and event.finish != "cancelled":
                    return StepReply(self._text, self.agent, event.finish)
        raise UnavailableError("the reply stopped before its end", REQUEST_AGAIN)

    def leave_out(self, error: SartorError) -> None:
        """Log the step as one without a usable reply, and charge its tokens so far."""
        if not self._is_logged:
            self._is_logged = True
            self._allowance.spend(0, self._tokens, 0)
            self._run.leave_out(replace(self._line, took_s=time.monotonic() - self._began), error)


def line_of(task: StepTask, request: AgentRequest) -> StepLogEntry:
    """Return the log entry of a step at its start."""
    request_fields = {"messages": list(request.messages), "sampling": dict(request.sampling), "schema": request.schema}
    return StepLogEntry(task.step_path, task.role, task.step.agent, "said", request_fields=request_fields)


async def begin(run: PlanRun, allowance: PlanAllowance, client_request: AgentRequest, task: StepTask) -> OpenStep:
    """Begin a step, and return when its first event is there.

    Raises what `StepReplier.open` raises, BudgetError and DeadlineError.
    """
    allowance.check()
    began = time.monotonic()
    request = request_of(task, client_request, allowance, run.max_tokens)
    answer = await run.members.open(request, task.step_path)
    return OpenStep(run, allowance, request=request, task=task, answer=answer, began=began)


async def ask(
    run: PlanRun, allowance: PlanAllowance, client_request: AgentRequest, task: StepTask
) -> StepReply | None:
    """Return the complete reply of a step; None if it has none, which is recorded with the reason."""
    open_step: OpenStep | None = None
    line = StepLogEntry(task.step_path, task.role, task.step.agent, "said")
    try:
        limit_s = min(task.step.seconds or allowance.remaining_s, allowance.remaining_s)
        async with asyncio.timeout(max(limit_s, 0)):
            open_step = await begin(run, allowance, client_request, task)
            return await open_step.whole()
    except TimeoutError:
        error: SartorError = DeadlineError(
            f"it took longer than {limit_s:.3g} s", "raise `seconds` of the step or the budget"
        )
    except SartorError as step_error:
        error = step_error
    if open_step is not None:
        open_step.leave_out(error)
    else:
        run.leave_out(line, error)
    return None
