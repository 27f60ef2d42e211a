r"""`rules`: a person's own regular expressions: drop the row, or replace what matches. In order; each sees what the last one
left.

The syntax is that of the `regex` library (https://pypi.org/project/regex: Python's `re` and more, such as `\\p{Lu}`). All
rules together have two seconds of processor time a row; one that needs more (a pattern that backtracks without end) makes the
row a Drop, `rule_timeout`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, dropped
from sartor.curate.steps.contract import RowFunction
from sartor.curate.steps.patterns import Clock, Pattern, RuleTimeout, compiled, timed_out
from sartor.text.example_text import FIELD_TEXT, Field, rewritten, texts

_NAME = re.compile(r"[a-z0-9_-]{1,40}")


@dataclass(frozen=True)
class Rule:
    """One regular expression and what it does."""

    match: str = option(REQUIRED, "regular expression, searched for anywhere in a text; (?i) before it ignores case")
    action: Literal["drop", "replace"] = option("drop", "drop the row, or replace every match")
    with_: str = option("", "what replaces a match; \\1 or \\g<name> is a group of it")
    field: Field = option("all", FIELD_TEXT)
    name: str = option("", "stands in the Drop's reason, `rule:<name>`; by default the rule's number")

    def __post_init__(self) -> None:
        if not self.match:
            raise ConfigError("match is empty, and would match everywhere", "match: '...'")
        if self.action == "drop" and self.with_:
            raise ConfigError(f"a rule that drops replaces nothing, but has with: {self.with_!r}", "action: replace")
        if self.name and not _NAME.fullmatch(self.name):
            raise ConfigError(f"name is {self.name!r}; it must be a-z, 0-9, _ and -, at most 40", "name: promotion")
        self.pattern  # noqa: B018  # a mistake in it is one of the recipe

    @property
    def pattern(self) -> Pattern:
        """The compiled pattern. Raises ConfigError."""
        return compiled(self.match, "match", self.with_)


@dataclass(frozen=True)
class Rules:
    """Drop rows or replace text by regular expressions, in order."""

    rules: tuple[Rule, ...] = option(REQUIRED, "a list of {match, action: drop | replace, with, field, name}")
    kind: Literal["rules"] = "rules"

    def __post_init__(self) -> None:
        if not self.rules:
            raise ConfigError("the step has no rule", "rules: [{match: '(?i)lorem ipsum'}]")

    def open(self, folder: Path) -> RowFunction:
        """See RowStep."""
        numbered = [(rule.name or str(number), rule, rule.pattern) for number, rule in enumerate(self.rules, 1)]

        def apply(example: Example) -> Example | Drop:
            clock = Clock()
            try:
                return self._applied(example, numbered, clock)
            except RuleTimeout as timeout:
                return timed_out(example, timeout, self.kind)

        return apply

    def _applied(self, example: Example, numbered: Sequence[tuple[str, Rule, Pattern]], clock: Clock) -> Example | Drop:
        for name, rule, pattern in numbered:
            if rule.action == "replace":
                outcome = rewritten(example, partial(_replaced, rule, pattern, clock), rule.field, self.kind)
                if isinstance(outcome, Drop):
                    return outcome
                example = outcome
                continue
            for text in texts(example, rule.field):
                if match := pattern.search(text, clock):
                    return dropped(
                        example, f"rule:{name}", f"{match.group()[:80]!r} matches {rule.match[:80]!r}", step=self.kind
                    )
        return example


def _replaced(rule: Rule, pattern: Pattern, clock: Clock, text: str) -> str:
    return pattern.sub(rule.with_, text, clock)
