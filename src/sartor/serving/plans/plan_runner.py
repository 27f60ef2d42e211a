"""Runs a plan: chain, parallel, divide, vote, mend.

A step that gives nothing is left out and said; what the others gave is the answer. The best draft is the one that got furthest
through the checks, then the one with the fewest findings, then the earliest. A mended draft that was there before means that
the plan goes round in circles, which ends it.
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
    asked_in,
    is_json,
    parts_schema,
    read_json,
    read_parts,
    read_verdict,
    schema_errors,
)
from sartor.serving.types import AgentRequest

_ABSENT = object()


def comparison_key(text: str, fields: Sequence[str] = ()) -> str:
    """What two replies have equal where they count as the same: their JSON, or some fields of it, else their words."""
    value = read_json(text)
    if not is_json(value):
        return " ".join(text.casefold().split())
    if fields and isinstance(value, dict):
        value = [[name, name in value, value.get(name)] for name in fields]
    return records.canonical_text(value)


def majority_reply(replies: Sequence[str], vote: Vote) -> tuple[int, int]:
    """(place of the reply that stands for the majority, how many say so). Of equally many the one that stands first."""
    forms = [comparison_key(reply, vote.fields) for reply in replies]
    counts = Counter(forms)
    most = max(counts.values())
    return next((place, most) for place, form in enumerate(forms) if counts[form] == most)


def merge_json_replies(replies: Sequence[str], merge: Merge) -> tuple[str, int]:
    """(a JSON object as text, of how many replies it is made): those that are objects. ("", 0) where none is."""
    values = [value for value in map(read_json, replies) if isinstance(value, dict)]
    rules: dict[str, Rule] = {field.name: field.rule for field in merge.fields}
    names = dict.fromkeys(name for value in values for name in value)
    made = {name: _united(name, values, rules.get(name, merge.rule)) for name in names}
    kept = {name: value for name, value in made.items() if value is not _ABSENT}
    return (json.dumps(kept, ensure_ascii=False, separators=(",", ":")), len(values)) if values else ("", 0)


def _united(name: str, values: Sequence[Mapping[str, Any]], rule: Rule) -> Any:
    given = [value[name] for value in values if name in value]
    if rule == "first":
        return given[0]
    if rule == "longest":
        return max(given, key=lambda one: len(one if isinstance(one, str) else records.canonical_text(one)))
    if rule == "union":
        items = [item for one in given for item in (one if isinstance(one, list) else [one])]
        return list({records.canonical_text(item): item for item in items}.values())
    said = [value.get(name, _ABSENT) for value in values]
    forms = ["" if one is _ABSENT else records.canonical_text(one) for one in said]
    counts = Counter(forms)
    return said[next(place for place, form in enumerate(forms) if counts[form] == max(counts.values()))]


_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Draft:
    """A draft, and how far through the checks it got: `passed` of them, then `findings`."""

    said: StepReply
    passed: int
    findings: tuple[DraftFinding, ...]

    @property
    def rank(self) -> tuple[int, int]:
        """Less is better."""
        return (-self.passed, len(self.findings))


class PlanRunner:
    """One plan for one request. purse: what it may take; above: the place of the step that it stands for, if it is one."""

    def __init__(self, course: PlanRun, plan: Plan, request: AgentRequest, purse: PlanAllowance, above: str = "") -> None:
        self._course, self._plan, self._request, self._purse, self._above = course, plan, request, purse, above

    async def follow(self, streams: bool = False) -> StepReply | OpenStep | None:
        """The answer; None where no step gave anything. streams: one that has only to be passed on may come as it is made."""
        plan = self._plan
        if isinstance(plan, ChainPlan):
            return await self._chain(plan, streams)
        if isinstance(plan, ParallelPlan):
            return await self._parallel(plan)
        return await self._divided(plan, streams)

    async def _chain(self, plan: ChainPlan, streams: bool) -> StepReply | OpenStep | None:
        draft: StepReply | None = None
        for number, step in enumerate(plan.steps):
            task = self._task(
                step, "draft", f"steps.{number}", PlanStepInput(self._request.messages, draft.text if draft else "")
            )
            is_last = number == len(plan.steps) - 1
            if streams and is_last and not plan.check and step.agent not in self._course.known:
                return await self._begun(task) or draft
            draft = await self._ask(task) or draft
        return await self._verified(draft, plan.check, plan.mend)

    async def _parallel(self, plan: ParallelPlan) -> StepReply | None:
        handover = PlanStepInput(self._request.messages)
        tasks = [
            self._task(step, "draft", f"members.{number}", handover, number=number) for number, step in enumerate(plan.members)
        ]
        replies = [said for said in await self._together(tasks) if said]
        if not replies:
            return None
        texts = [said.text for said in replies]
        if isinstance(plan.join, Merge):
            text, objects = merge_json_replies(texts, plan.join)
            wrong = schema_errors(read_json(text), read_json(self._request.schema)) if text and self._request.schema else []
            if text and not wrong:
                self._note(f"merged from {objects} of {len(plan.members)}")
                return StepReply(text, ", ".join(dict.fromkeys(said.agent for said in replies)))
            self._note(f"a vote instead of a merge: {wrong[0] if wrong else 'no reply is a JSON object'}")
        place, votes = majority_reply(texts, plan.join if isinstance(plan.join, Vote) else Vote())
        self._note(f"{votes} of {len(plan.members)} say what {replies[place].agent} says")
        return replies[place]

    async def _divided(self, plan: DividedPlan, streams: bool) -> StepReply | OpenStep | None:
        parts = await self._parts(plan)
        steps = {step.agent: step for step in plan.members}
        whole = PlanStepInput(self._request.messages)
        tasks = [
            self._task(steps[part.agent], "part", f"parts.{number}", _of_part(part) if part.task else whole, number=number)
            for number, part in enumerate(parts)
        ]
        replies = await self._together(tasks)
        given = [(part, said) for part, said in zip(parts, replies, strict=True) if said]
        if not given:
            return None
        joined = StepReply(
            _BETWEEN.join(said.text for _, said in given), ", ".join(dict.fromkeys(said.agent for _, said in given))
        )
        joined = given[0][1] if len(given) == 1 else joined
        if plan.answer is None or not parts[0].task:
            return await self._verified(joined, plan.check, plan.mend)
        findings = tuple(DraftFinding(part.task, said.text) for part, said in given)
        task = self._task(plan.answer, "answer", "answer", PlanStepInput(self._request.messages, joined.text, findings))
        if streams and not plan.check and plan.answer.agent not in self._course.known:
            return await self._begun(task) or joined
        return await self._verified(await self._ask(task) or joined, plan.check, plan.mend)

    async def _parts(self, plan: DividedPlan) -> list[TaskPart]:
        """What the planner made of the request; where it is not divided, one part without a task, the first member's."""
        names = [step.agent for step in plan.members]
        handover = PlanStepInput(self._request.messages)
        task = replace(self._task(plan.plan, "plan", "plan", handover), form=parts_schema(names, plan.most))
        said = await self._ask(task)
        parts = read_parts(said.text, names, plan.most) if said else []
        if not parts:
            self._note(f"not divided: all of it is for {names[0]}")
        return parts or [TaskPart(names[0], "")]

    async def _verified(self, said: StepReply | None, checks: Sequence[Check], mend: Mend | None) -> StepReply | None:
        """The best draft that there is, after as many mends as are allowed and called for."""
        if said is None or not checks:
            return said
        best = await self._judged(said, checks, 0)
        seen = Counter([said.text])
        for number in range(1, mend.times + 1 if mend else 1):
            if not best.findings:
                break
            assert mend is not None
            handover = PlanStepInput(self._request.messages, best.said.text, best.findings)
            made = await self._ask(self._task(mend, "mend", f"mend.{number}", handover, number=number))
            if made is None:
                break
            seen[made.text] += 1
            if seen[made.text] > 1 + mend.repeats:
                self._note(f"stopped at mend.{number}: what is said was said before")
                break
            if seen[made.text] == 1:
                best = min(best, await self._judged(made, checks, number), key=lambda draft: draft.rank)
        if best.findings:
            self._note(f"answered although {best.findings[0].check} found {len(best.findings)}")
        return best.said

    async def _judged(self, said: StepReply, checks: Sequence[Check], mends: int) -> Draft:
        """A draft with what the first check that finds something finds. A critic that says nothing is noted and passed over."""
        request = asked_in(self._course.request.messages)
        for number, check in enumerate(checks):
            place = f"check.{mends}.{number}"
            if isinstance(check, Critic):
                found = await self._criticised(check, said, place)
            else:
                found = run_check(check, said.text, request)
                line = StepLogEntry(self._at(place), "check", check.kind, "found" if found else "passed", said=said.text)
                self._course.lines.append(replace(line, findings=tuple(found)))
            if found:
                name = f"{number} {check.kind}"
                self._note(f"{name} found {len(found)} in {said.agent}'s draft")
                return Draft(said, number, tuple(DraftFinding(name, one) for one in found))
        self._note(f"nothing was found in {said.agent}'s draft")
        return Draft(said, len(checks), ())

    async def _criticised(self, check: Critic, said: StepReply, place: str) -> list[str]:
        verdict = await self._ask(self._task(check, "check", place, PlanStepInput(self._request.messages, said.text)))
        read = read_verdict(verdict.text) if verdict else None
        if verdict and read is None:
            self._note(f"{verdict.agent} gave no verdict at {place}")
        return [] if read is None or read.right else [*read.findings] or ["it is not right"]

    async def _together(self, tasks: Sequence[StepTask]) -> list[StepReply | None]:
        """The replies to tasks side by side, each with an equal share of what is left."""
        share = max(1, self._purse.left // len(tasks))
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(self._ask(task, PlanAllowance(share, self._purse.due, part_of=self._purse))) for task in tasks
            ]
        return [one.result() for one in running]

    async def _ask(self, task: StepTask, purse: PlanAllowance | None = None) -> StepReply | None:
        purse = purse or self._purse
        plan = self._course.known.get(task.step.agent)
        if plan is not None:
            return await self._within(plan, task, purse)
        said = await ask(self._course, purse, self._request, task)
        if said and task.role != "check":
            self._note(f"{said.agent} {_DOES[task.role]}")
        return said

    async def _within(self, plan: Plan, task: StepTask, purse: PlanAllowance) -> StepReply | None:
        """The answer of a plan that is a step of this one, within both budgets."""
        request = request_of(task, self._request, purse, self._course.most_tokens)
        inner = purse_of(plan, request.deadline_s, purse)
        run = PlanRunner(self._course, plan, replace(request, openable=self._request.openable), inner, task.place)
        said = await run.follow()
        assert not isinstance(said, OpenStep), "only the outermost plan streams"
        return said

    async def _begun(self, task: StepTask) -> OpenStep | None:
        """A step that has begun and whose reply is the answer; None for one that could not begin, which is noted."""
        try:
            opened = await begin(self._course, self._purse, self._request, task)
        except SartorError as error:
            self._course.leave_out(StepLogEntry(task.place, task.role, task.step.agent, "said"), error)
            return None
        self._note(f"{opened.agent} answers")
        return opened

    def _task(self, step: PlanStep, role: Role, place: str, handover: PlanStepInput, *, number: int = 0) -> StepTask:
        return StepTask(step, role, self._at(place), handover, number)

    def _at(self, place: str) -> str:
        return f"{self._above}/{place}" if self._above else place

    def _note(self, what: str) -> None:
        self._course.notes.append(what)


_DOES: dict[Role, str] = {"draft": "drafts", "mend": "mends", "plan": "divides", "part": "answers a part", "answer": "answers"}


def _of_part(part: TaskPart) -> PlanStepInput:
    return PlanStepInput(({"role": "user", "content": part.task},))


def purse_of(plan: Plan, deadline_s: float, part_of: PlanAllowance | None = None) -> PlanAllowance:
    """What a plan may take from now on."""
    return PlanAllowance(plan.budget.tokens, time.monotonic() + min(plan.budget.seconds, deadline_s), part_of)
