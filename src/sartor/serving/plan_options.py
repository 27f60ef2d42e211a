"""Options of multi-agent plans in TEAM.yaml.

A plan may stand wherever an agent may, so plans can contain plans. Errors that show in the file alone are refused when
it is read: a plan that contains itself, one that is nested deeper than its budget, a mend without a check.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import regex

from sartor.core import config, records
from sartor.core import config as names
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.text.json_schema import check_schema

Given = Literal["request", "draft", "findings"]
Rule = Literal["vote", "first", "union", "longest"]
DIGEST_DIGITS = 12


@dataclass(frozen=True)
class PlanStep:
    """Agent that is asked in a plan, and its input."""

    agent: str = option(REQUIRED, "who is asked: an agent, name@version, base, auto, or another plan")
    gets: tuple[Given, ...] = option(
        (), "what of request, draft and findings it is given; empty is what its place needs"
    )
    form: Literal["json", "turns"] = option("json", "how: one JSON object, or the conversation gone on")
    system: str = option("", "system prompt; empty is the client's, else the Release's own")
    schema: Any = option(
        "", "JSON Schema that its reply obeys, a mapping or a file of one; empty is the client's, if any"
    )
    temperature: float = option(-1.0, "of its sampling; -1 is as the client, else the Release has it")
    max_tokens: int = option(0, "of its reply; 0 is as the client, else the Release has it")
    seconds: float = option(0.0, "after which it is left out; 0 is what the plan has left")

    def __post_init__(self) -> None:
        if isinstance(self.schema, Mapping):
            check_schema(self.schema)


@dataclass(frozen=True)
class Json:
    """Check that the reply is one JSON value, of a schema if one is given."""

    kind: Literal["json"] = "json"
    schema: Any = option("", "JSON Schema, a mapping or a file of one; empty takes any JSON")

    def __post_init__(self) -> None:
        if isinstance(self.schema, Mapping):
            check_schema(self.schema)


@dataclass(frozen=True)
class PatternCheck:
    """Check that a regular expression matches the reply somewhere, or does not."""

    pattern: str = option(REQUIRED, "regular expression")
    kind: Literal["pattern"] = "pattern"
    holds: bool = option(True, "false: the reply must not hold it")

    def __post_init__(self) -> None:
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ConfigError(
                f"{self.pattern!r} is no regular expression: {error}",
                f"pattern: {regex.escape(self.pattern)!r} finds these characters as they stand",
            ) from None


@dataclass(frozen=True)
class Arithmetic:
    """Check that every equation in the reply is true."""

    kind: Literal["arithmetic"] = "arithmetic"
    least: int = option(0, "so many equations the reply must hold")


@dataclass(frozen=True)
class Citations:
    """Check that citations occur in their sources, ignoring case and white space."""

    kind: Literal["citations"] = "citations"
    fields: tuple[str, ...] = option(
        (), "what is cited: the texts of these fields of a JSON reply, those that are there"
    )
    pattern: str = option(r'"([^"]+)"|“([^”]+)”', "what is cited where no fields are named: its groups")
    sources: tuple[str, ...] = option((), "text files that are cited; none: the request")
    least: int = option(0, "so many citations the reply must hold")

    def __post_init__(self) -> None:
        PatternCheck(pattern=self.pattern)


@dataclass(frozen=True)
class Critic(PlanStep):
    """Agent that judges a draft. It is asked only if the checks before it found nothing."""

    kind: Literal["agent"] = "agent"


Check = Json | PatternCheck | Arithmetic | Citations | Critic


@dataclass(frozen=True)
class Mend(PlanStep):
    """Agent that corrects a draft in which a check found something."""

    times: int = option(1, "so often at most")
    repeats: int = option(
        0, "how often a reply may come again; above it the plan goes round in circles and is stopped"
    )


@dataclass(frozen=True)
class PlanBudget:
    """Limits of one request to a plan, including the plans within it."""

    tokens: int = option(
        8192, "of prompts and replies together; looked at before each step, whose reply is held to the rest"
    )
    seconds: float = option(60.0, "from the request to the answer")
    depth: int = option(1, "of plans within plans: 1 has none within")

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.seconds <= 0 or self.depth < 1:
            raise ConfigError(
                f"tokens is {self.tokens}, seconds {self.seconds:g}, depth {self.depth}; all are above 0",
                "budget: {tokens: 8192, seconds: 60, depth: 1}",
            )


@dataclass(frozen=True)
class Vote:
    """Reply that most members give; in a tie, the one whose first member comes first."""

    kind: Literal["vote"] = "vote"
    fields: tuple[str, ...] = option(
        (), "replies are alike when these fields of their JSON are; none: when all of it is"
    )


@dataclass(frozen=True)
class FieldRule:
    """Rule for joining one field of JSON replies."""

    name: str = option(REQUIRED, "the field")
    rule: Rule = option("vote", "vote: what most say, absence included; first; union of lists; longest text")


@dataclass(frozen=True)
class Merge:
    """JSON object joined field by field from the members' replies."""

    kind: Literal["merge"] = "merge"
    rule: Rule = option("vote", "of the fields that are not named")
    fields: tuple[FieldRule, ...] = option((), "fields with a rule of their own")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """Options that every plan has."""

    name: str = option(REQUIRED, "what clients ask for as `model`")
    budget: PlanBudget = option(PlanBudget(), "what one request may take")
    log: Literal["digests", "content"] = option("digests", "what the log holds of what was asked and said")


@dataclass(frozen=True, kw_only=True)
class ChainPlan(Declared):
    """Plan in which each step gets the draft of the one before it; the last draft is checked and mended."""

    kind: Literal["sequence"] = "sequence"
    steps: tuple[PlanStep, ...] = option(
        REQUIRED, "who drafts, in order: the first gets the request, the others the draft too"
    )
    check: tuple[Check, ...] = option((), "what the draft must pass, in order")
    mend: Mend | None = option(None, "who mends a draft that a check found something in")

    def __post_init__(self) -> None:
        _check_steps(self.steps, "steps", 1)
        _check_mend(self.check, self.mend)


@dataclass(frozen=True, kw_only=True)
class ParallelPlan(Declared):
    """Plan in which all members get the same request in parallel, and their replies are joined."""

    kind: Literal["parallel"] = "parallel"
    members: tuple[PlanStep, ...] = option(
        REQUIRED, "who is asked; sampled replies of one agent differ by their seeds"
    )
    join: Vote | Merge = option(Vote(), "how their replies become one")

    def __post_init__(self) -> None:
        _check_steps(self.members, "members", 2)


@dataclass(frozen=True, kw_only=True)
class DividedPlan(Declared):
    """Plan in which a planner divides the request into parts for the members.

    Their replies are put together and checked.
    """

    kind: Literal["verify"] = "verify"
    plan: PlanStep = option(REQUIRED, "who divides the request")
    members: tuple[PlanStep, ...] = option(REQUIRED, "who may be given a part")
    most: int = option(4, "parts at most")
    answer: PlanStep | None = option(None, "who makes one answer of the parts; nobody: they stand below each other")
    check: tuple[Check, ...] = option((), "what the answer must pass, in order")
    mend: Mend | None = option(None, "who mends an answer that a check found something in")

    def __post_init__(self) -> None:
        _check_steps(self.members, "members", 1)
        _check_mend(self.check, self.mend)
        if self.most < 1:
            raise ConfigError(f"most is {self.most}; a request has at least one part", "most: 4")


Plan = ChainPlan | ParallelPlan | DividedPlan


def agents_of_plan(plan: Plan) -> tuple[PlanStep, ...]:
    """Return every step of a plan that asks an agent."""
    if isinstance(plan, ParallelPlan):
        return plan.members
    critics = [check for check in plan.check if isinstance(check, Critic)]
    after = (*critics, *((plan.mend,) if plan.mend else ()))
    if isinstance(plan, ChainPlan):
        return (*plan.steps, *after)
    return (plan.plan, *plan.members, *((plan.answer,) if plan.answer else ()), *after)


def within(plan: Plan, plan_names: Collection[str]) -> list[str]:
    """Return the names of the plans that a plan asks directly, sorted."""
    return sorted({step.agent for step in agents_of_plan(plan)} & set(plan_names))


def _check_steps(steps: Sequence[PlanStep], option_name: str, min_steps: int) -> None:
    if len(steps) < min_steps:
        raise ConfigError(
            f"{option_name} names {len(steps)}; at least {min_steps}",
            f"{option_name}: [{', '.join(['base'] * min_steps)}]",
        )


def _check_mend(checks: Sequence[Check], mend: Mend | None) -> None:
    if mend and not checks:
        raise ConfigError("there is a mend and no check, so that nothing ever calls for it", "check: [json]")
    if mend and (mend.times < 1 or mend.repeats < 0):
        raise ConfigError(f"mend.times is {mend.times}, mend.repeats {mend.repeats}", "mend.times: 1, mend.repeats: 0")


def check_plans(plans: Sequence[Plan], members: Collection[str], reserved: Collection[str]) -> None:
    """Raise ConfigError for a plan with an invalid name, within itself, or deeper than its budget."""
    plans_by_name: dict[str, Plan] = {}
    for plan in plans:
        if plan.name in plans_by_name or plan.name in members or plan.name in reserved:
            raise ConfigError(
                f"a plan cannot have the name {plan.name!r}, which another has", f"name: {plan.name}-plan"
            )
        if not names.is_valid_name(plan.name):
            raise ConfigError(f"{plan.name!r} cannot be a plan's name", "small letters, digits, '.', '_' and '-'")
        plans_by_name[plan.name] = plan
    for plan in plans:
        if (depth := _depth(plan.name, plans_by_name, ())) > plan.budget.depth:
            raise ConfigError(
                f"the plan {plan.name!r} holds plans {depth} deep; its budget.depth is {plan.budget.depth}",
                f"budget: {{depth: {depth}}}",
            )


def _depth(name: str, plans_by_name: Mapping[str, Plan], parents: tuple[str, ...]) -> int:
    if name in parents:
        path = " -> ".join([*parents[parents.index(name) :], name])
        raise ConfigError(
            f"a plan comes back to itself: {path}", f"name an agent instead of {name!r} in the plan {parents[-1]!r}"
        )
    return 1 + max(
        (_depth(item, plans_by_name, (*parents, name)) for item in within(plans_by_name[name], plans_by_name)),
        default=0,
    )


def seen_from(plan: Plan, root: Path) -> Plan:
    """Return a plan with its schemas loaded and its source paths absolute.

    Raises ConfigError for a missing file or an invalid schema.
    """
    return config.load(type(plan), _seen(config.dump(plan), root))


def _seen(value: Any, root: Path) -> Any:
    if isinstance(value, list):
        return [_seen(item, root) for item in value]
    if not isinstance(value, Mapping):
        return value
    fields = {key: inner if key == "schema" else _seen(inner, root) for key, inner in value.items()}
    if isinstance(fields.get("schema"), str) and fields["schema"]:
        fields["schema"] = _schema_in(root / fields["schema"])
    if fields.get("kind") == "citations":
        paths = [root / source for source in fields["sources"]]
        for path in paths:
            if not path.is_file():
                raise ConfigError(f"there is no file {path} to cite from", "sources: [a text file]")
        fields["sources"] = [str(path) for path in paths]
    return fields


def _schema_in(file: Path) -> Any:
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} holds no JSON Schema: {error}", "give a file of one, or write it into the plan"
        ) from None
    if not isinstance(schema, Mapping):
        raise ConfigError(f"{file} holds no JSON Schema but {type(schema).__name__}", '{"type": "object"}')
    return schema


def digest(plan: Plan, plans_by_name: Mapping[str, Plan]) -> str:
    """Return the version of a plan, 12 hex digits.

    It covers all declared options except `log`, the plans within it, and the texts that it cites from.
    """
    check: tuple[Check, ...] = () if isinstance(plan, ParallelPlan) else plan.check
    source_paths = [source for item in check if isinstance(item, Citations) for source in item.sources]
    texts = [Path(source).read_text(encoding="utf-8") for source in source_paths]
    options = config.dump(replace(plan, log="digests"))
    return records.digest(
        [options, [digest(plans_by_name[name], plans_by_name) for name in within(plan, plans_by_name)], texts]
    )[:DIGEST_DIGITS]
