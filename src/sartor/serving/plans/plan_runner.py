"""Runner of a plan: chain, parallel, divide, vote, mend.

A step without a usable reply is left out and reported; the answer comes from the others. The best draft passed most
checks, then has the fewest findings, then is the earliest. A mended draft that repeats an earlier one ends the
mending.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sartor.core import records
from sartor.core.errors import SartorError
from sartor.serving.plan_options import (
    ChainPlan,
    Check,
    Critic,
    DividedPlan,
    Mend,
    Merge,
    ParallelPlan,
    Plan,
    PlanStep,
    Rule,
    Vote,
)
from sartor.serving.plans.draft_checks import run_check
from sartor.serving.plans.plan_steps import (
    OpenStep,
    PlanAllowance,
    PlanRun,
    StepLogEntry,
    StepReply,
    StepTask,
    ask,
    begin,
    request_of,
)
from sartor.serving.plans.step_messages import (
    DraftFinding,
    PlanStepInput,
    Role,
    TaskPart,
    is_json,
    parts_schema,
    read_json,
    read_parts,
    read_verdict,
    schema_errors,
    user_text,
)
from sartor.serving.types import AgentRequest

_ABSENT = object()


def comparison_key(text: str, fields: Sequence[str] = ()) -> str:
    """Return the value by which two replies are compared: their JSON, some of its fields, or their words."""
    value = read_json(text)
    if not is_json(value):
        return " ".join(text.casefold().split())
    if fields and isinstance(value, dict):
        value = [[name, name in value, value.get(name)] for name in fields]
    return records.canonical_text(value)


def majority_reply(replies: Sequence[str], vote: Vote) -> tuple[int, int]:
    """Return (index of the first reply of the majority, its votes). In a tie the earliest reply wins."""
    forms = [comparison_key(reply, vote.fields) for reply in replies]
    counts = Counter(forms)
    max_count = max(counts.values())
    return next((index, max_count) for index, form in enumerate(forms) if counts[form] == max_count)


def merge_json_replies(replies: Sequence[str], merge: Merge) -> tuple[str, int]:
    """Return a JSON object joined from the replies that are objects, and their number; ("", 0) for none."""
    values = [value for value in map(read_json, replies) if isinstance(value, dict)]
    rules: dict[str, Rule] = {field.name: field.rule for field in merge.fields}
    names = dict.fromkeys(name for value in values for name in value)
    merged = {name: _merge_field(name, values, rules.get(name, merge.rule)) for name in names}
    fields = {name: value for name, value in merged.items() if value is not _ABSENT}
    return (json.dumps(fields, ensure_ascii=False, separators=(",", ":")), len(values)) if values else ("", 0)


def _merge_field(name: str, values: Sequence[Mapping[str, Any]], rule: Rule) -> Any:
    present = [value[name] for value in values if name in value]
    if rule == "first":
        return present[0]
    if rule == "longest":
        return max(present, key=lambda value: len(value if isinstance(value, str) else records.canonical_text(value)))
    if rule == "union":
        item_by_text: dict[str, Any] = {}
        for value in present:
            for item in value if isinstance(value, list) else [value]:
                item_by_text[records.canonical_text(item)] = item
        return list(item_by_text.values())
    field_values = [value.get(name, _ABSENT) for value in values]
    forms = ["" if value is _ABSENT else records.canonical_text(value) for value in field_values]
    # the most frequent form; of several the first
    counts = Counter(forms)
    most_frequent = max(forms, key=lambda form: counts[form])
    return field_values[forms.index(most_frequent)]


_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Draft:
    """Draft with the number of checks that it `passed`, and the findings of the next one."""

    reply: StepReply
    passed: int
    findings: tuple[DraftFinding, ...]

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key; the smallest is the best draft."""
        return (-self.passed, len(self.findings))


class PlanRunner:
    """Runner of one plan for one request.

    allowance: its budget.
    parent_path: position of the step that the plan stands for, if it is within another plan.
    """

    def __init__(
        self, run: PlanRun, plan: Plan, request: AgentRequest, allowance: PlanAllowance, parent_path: str = ""
    ) -> None:
        self._run, self._plan, self._request, self._allowance, self._parent_path = (
            run,
            plan,
            request,
            allowance,
            parent_path,
        )

    async def follow(self, streams: bool = False) -> StepReply | OpenStep | None:
        """Return the answer; None if no step gave a reply.

        streams: return an OpenStep if the last step's reply is the answer, so that it can be streamed.
        """
        plan = self._plan
        if isinstance(plan, ChainPlan):
            return await self._chain(plan, streams)
        if isinstance(plan, ParallelPlan):
            return await self._parallel(plan)
        return await self._divided(plan, streams)

    async def _chain(self, plan: ChainPlan, streams: bool) -> StepReply | OpenStep | None:
        draft: StepReply | None = None
        for index, step in enumerate(plan.steps):
            task = self._task(
                step, "draft", f"steps.{index}", PlanStepInput(self._request.messages, draft.text if draft else "")
            )
            is_last = index == len(plan.steps) - 1
            if streams and is_last and not plan.check and step.agent not in self._run.plans:
                return await self._open_step(task) or draft
            draft = await self._ask(task) or draft
        return await self._verified(draft, plan.check, plan.mend)

    async def _parallel(self, plan: ParallelPlan) -> StepReply | None:
        step_input = PlanStepInput(self._request.messages)
        tasks = [
            self._task(step, "draft", f"members.{index}", step_input, number=index)
            for index, step in enumerate(plan.members)
        ]
        replies = [reply for reply in await self._together(tasks) if reply]
        if not replies:
            return None
        texts = [reply.text for reply in replies]
        if isinstance(plan.join, Merge):
            text, objects = merge_json_replies(texts, plan.join)
            problems = []
            if text and self._request.schema:
                problems = await asyncio.to_thread(schema_errors, read_json(text), read_json(self._request.schema))
            if text and not problems:
                self._note(f"merged from {objects} of {len(plan.members)}")
                return StepReply(text, ", ".join(dict.fromkeys(reply.agent for reply in replies)))
            self._note(f"a vote instead of a merge: {problems[0] if problems else 'no reply is a JSON object'}")
        index, votes = majority_reply(texts, plan.join if isinstance(plan.join, Vote) else Vote())
        self._note(f"{votes} of {len(plan.members)} say what {replies[index].agent} says")
        return replies[index]

    async def _divided(self, plan: DividedPlan, streams: bool) -> StepReply | OpenStep | None:
        parts = await self._parts(plan)
        steps = {step.agent: step for step in plan.members}
        full_input = PlanStepInput(self._request.messages)
        tasks = []
        for index, part in enumerate(parts):
            part_input = PlanStepInput(({"role": "user", "content": part.task},)) if part.task else full_input
            tasks.append(self._task(steps[part.agent], "part", f"parts.{index}", part_input, number=index))
        replies = await self._together(tasks)
        answered_parts = [(part, reply) for part, reply in zip(parts, replies, strict=True) if reply]
        if not answered_parts:
            return None
        joined = StepReply(
            _BETWEEN.join(reply.text for _, reply in answered_parts),
            ", ".join(dict.fromkeys(reply.agent for _, reply in answered_parts)),
        )
        joined = answered_parts[0][1] if len(answered_parts) == 1 else joined
        if plan.answer is None or not parts[0].task:
            return await self._verified(joined, plan.check, plan.mend)
        findings = tuple(DraftFinding(part.task, reply.text) for part, reply in answered_parts)
        task = self._task(
            plan.answer, "answer", "answer", PlanStepInput(self._request.messages, joined.text, findings)
        )
        if streams and not plan.check and plan.answer.agent not in self._run.plans:
            return await self._open_step(task) or joined
        return await self._verified(await self._ask(task) or joined, plan.check, plan.mend)

    async def _parts(self, plan: DividedPlan) -> list[TaskPart]:
        """Return the planner's parts; without valid ones, one part without a task for the first member."""
        names = [step.agent for step in plan.members]
        step_input = PlanStepInput(self._request.messages)
        task = replace(self._task(plan.plan, "plan", "plan", step_input), form=parts_schema(names, plan.most))
        reply = await self._ask(task)
        parts = read_parts(reply.text, names, plan.most) if reply else []
        if not parts:
            self._note(f"not divided: all of it is for {names[0]}")
        return parts or [TaskPart(names[0], "")]

    async def _verified(self, reply: StepReply | None, checks: Sequence[Check], mend: Mend | None) -> StepReply | None:
        """Return the best draft after the checks and as many mends as are allowed and needed."""
        if reply is None or not checks:
            return reply
        best = await self._judged(reply, checks, 0)
        text_counts = Counter([reply.text])
        for attempt in range(1, mend.times + 1 if mend else 1):
            if not best.findings:
                break
            assert mend is not None
            step_input = PlanStepInput(self._request.messages, best.reply.text, best.findings)
            mended = await self._ask(self._task(mend, "mend", f"mend.{attempt}", step_input, number=attempt))
            if mended is None:
                break
            text_counts[mended.text] += 1
            if text_counts[mended.text] > 1 + mend.repeats:
                self._note(f"stopped at mend.{attempt}: what is said was said before")
                break
            if text_counts[mended.text] == 1:
                best = min(best, await self._judged(mended, checks, attempt), key=lambda draft: draft.rank)
        if best.findings:
            self._note(f"answered although {best.findings[0].check} found {len(best.findings)}")
        return best.reply

    async def _judged(self, reply: StepReply, checks: Sequence[Check], mends: int) -> Draft:
        """Return a draft with the findings of the first check that has any.

        A critic without a verdict is noted and skipped.
        """
        request_text = user_text(self._run.request.messages)
        for index, check in enumerate(checks):
            step_path = f"check.{mends}.{index}"
            if isinstance(check, Critic):
                findings = await self._criticised(check, reply, step_path)
            else:
                findings = await asyncio.to_thread(run_check, check, reply.text, request_text)
                line = StepLogEntry(
                    self._at(step_path), "check", check.kind, "found" if findings else "passed", reply=reply.text
                )
                self._run.lines.append(replace(line, findings=tuple(findings)))
            if findings:
                name = f"{index} {check.kind}"
                self._note(f"{name} found {len(findings)} in {reply.agent}'s draft")
                return Draft(reply, index, tuple(DraftFinding(name, item) for item in findings))
        self._note(f"nothing was found in {reply.agent}'s draft")
        return Draft(reply, len(checks), ())

    async def _criticised(self, check: Critic, reply: StepReply, step_path: str) -> list[str]:
        critic_reply = await self._ask(
            self._task(check, "check", step_path, PlanStepInput(self._request.messages, reply.text))
        )
        verdict = read_verdict(critic_reply.text) if critic_reply else None
        if critic_reply and verdict is None:
            self._note(f"{critic_reply.agent} gave no verdict at {step_path}")
        return [] if verdict is None or verdict.right else [*verdict.findings] or ["it is not right"]

    async def _together(self, tasks: Sequence[StepTask]) -> list[StepReply | None]:
        """Return the replies to tasks run in parallel, each with an equal share of the remaining tokens."""
        share = max(1, self._allowance.remaining_tokens // len(tasks))
        async with asyncio.TaskGroup() as group:
            step_tasks = [
                group.create_task(
                    self._ask(task, PlanAllowance(share, self._allowance.deadline, part_of=self._allowance))
                )
                for task in tasks
            ]
        return [step_task.result() for step_task in step_tasks]

    async def _ask(self, task: StepTask, allowance: PlanAllowance | None = None) -> StepReply | None:
        allowance = allowance or self._allowance
        plan = self._run.plans.get(task.step.agent)
        if plan is not None:
            return await self._within(plan, task, allowance)
        reply = await ask(self._run, allowance, self._request, task)
        if reply and task.role != "check":
            self._note(f"{reply.agent} {_DOES[task.role]}")
        return reply

    async def _within(self, plan: Plan, task: StepTask, allowance: PlanAllowance) -> StepReply | None:
        """Return the answer of a plan that is a step of this one, within both budgets."""
        request = request_of(task, self._request, allowance, self._run.max_tokens)
        inner_allowance = allowance_of(plan, request.deadline_s, allowance)
        runner = PlanRunner(
            self._run,
            plan,
            request=replace(request, openable=self._request.openable),
            allowance=inner_allowance,
            parent_path=task.step_path,
        )
        reply = await runner.follow()
        assert not isinstance(reply, OpenStep), "only the outermost plan streams"
        return reply

    async def _open_step(self, task: StepTask) -> OpenStep | None:
        """Begin a step whose reply is the answer; return None, with a note, if it cannot begin."""
        try:
            open_step = await begin(self._run, self._allowance, self._request, task)
        except SartorError as error:
            self._run.leave_out(StepLogEntry(task.step_path, task.role, task.step.agent, "said"), error)
            return None
        self._note(f"{open_step.agent} answers")
        return open_step

    def _task(
        self, step: PlanStep, role: Role, step_path: str, step_input: PlanStepInput, *, number: int = 0
    ) -> StepTask:
        return StepTask(step, role, step_path=self._at(step_path), step_input=step_input, number=number)

    def _at(self, step_path: str) -> str:
        return f"{self._parent_path}/{step_path}" if self._parent_path else step_path

    def _note(self, note: str) -> None:
        self._run.notes.append(note)


_DOES: dict[Role, str] = {
    "draft": "drafts",
    "mend": "mends",
    "plan": "divides",
    "part": "answers a part",
    "answer": "answers",
}


def allowance_of(plan: Plan, deadline_s: float, part_of: PlanAllowance | None = None) -> PlanAllowance:
    """Return the allowance of a plan that starts now."""
    return PlanAllowance(plan.budget.tokens, time.monotonic() + min(plan.budget.seconds, deadline_s), part_of)
