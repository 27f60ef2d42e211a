r"""Step rules: user regular expressions with a time limit.

The syntax is that of the `regex` library (https://pypi.org/project/regex: Python's `re` and more, such as `\p{Lu}`).
All rules together have two seconds of processor time a row. A row that needs more (a pattern that backtracks without
end) is a Drop, `rule_timeout`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError, missing_package
from sartor.core.records import Drop, Example, drop_of
from sartor.curate.step import RowFunction
from sartor.text.example_text import FIELD_TEXT, Field, rewritten, texts

TIMEOUT_S = 2.0  # processor time for all patterns of a step on one row; usual patterns take microseconds


class RuleTimeout(Exception):
    """Error for patterns that took longer than their limit on a row."""


@dataclass
class Clock:
    """Time limit of a row, in processor time, so that other load on the machine does not count."""

    limit_s: float = TIMEOUT_S
    end: float = field(init=False)

    def __post_init__(self) -> None:
        self.end = time.process_time() + self.limit_s

    @property
    def left_s(self) -> float:
        """Seconds left, at least 0.001, so that the search itself raises the timeout."""
        return max(self.end - time.process_time(), 0.001)


@dataclass(frozen=True)
class BoundedPattern:
    """Compiled pattern. `search` and `sub` raise RuleTimeout when the clock of the row runs out."""

    compiled: Any

    def search(self, text: str, clock: Clock) -> Any:
        """Return the first match, or None."""
        try:
            return self.compiled.search(text, timeout=clock.left_s)
        except TimeoutError:
            raise self._late(clock) from None

    def sub(self, template: str, text: str, clock: Clock) -> str:
        """Return the text with every match replaced; `template` may refer to its groups by number or name."""
        try:
            return str(self.compiled.sub(template, text, timeout=clock.left_s))
        except TimeoutError:
            raise self._late(clock) from None

    def _late(self, clock: Clock) -> RuleTimeout:
        return RuleTimeout(f"the pattern {self.compiled.pattern[:80]!r} ran out of the row's {clock.limit_s:g} s")


def compiled(pattern: str, where: str, template: str = "") -> BoundedPattern:
    """Compile a pattern.

    Raises ConfigError that names `where` and the position of the error, in the pattern or in the template.
    """
    compiled_pattern, problem = _compile(pattern, template)
    if problem:
        raise ConfigError(
            f"{where} {problem}", "mend it; a literal ( ) [ ] * + ? . is written with a backslash before it"
        )
    return BoundedPattern(compiled_pattern)


@cache
def _compile(pattern: str, template: str) -> tuple[Any, str]:
    """Return (compiled pattern, error message), with an empty message for a valid pattern."""
    try:
        import regex
    except ImportError:
        raise missing_package("regex") from None
    try:
        compiled_pattern = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        at = f" at character {error.pos + 1}" if isinstance(error, regex.error) and error.pos is not None else ""
        return None, f"is {pattern!r}, no regular expression{at}: {getattr(error, 'msg', error)}"
    if "\\" in template:
        try:
            # a pattern with the same groups that matches the empty text, so that the template is parsed now
            regex.compile(f"|{pattern}").sub(template, "")
        except (regex.error, IndexError) as error:
            return None, f"is replaced with {template!r}: {error}"
    return compiled_pattern, ""


def timed_out(example: Example, timeout: RuleTimeout, step: str) -> Drop:
    """Return the Drop of a row on which the patterns ran out of time."""
    return drop_of(example, "rule_timeout", str(timeout), step=step)


_NAME = re.compile(r"[a-z0-9_-]{1,40}")


@dataclass(frozen=True)
class RegexRule:
    """One regular expression with its action."""

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
        self.pattern  # noqa: B018  # raises for an invalid pattern while the recipe is read

    @property
    def pattern(self) -> BoundedPattern:
        """Compiled pattern. Raises ConfigError."""
        return compiled(self.match, "match", self.with_)


@dataclass(frozen=True)
class RegexRules:
    """Drop rows or replace text by regular expressions, in order."""

    rules: tuple[RegexRule, ...] = option(REQUIRED, "a list of {match, action: drop | replace, with, field, name}")
    kind: Literal["rules"] = "rules"

    def __post_init__(self) -> None:
        if not self.rules:
            raise ConfigError("the step has no rule", "rules: [{match: '(?i)lorem ipsum'}]")

    def open(self, folder: Path) -> RowFunction:
        """Return the row function."""
        numbered = [(rule.name or str(number), rule, rule.pattern) for number, rule in enumerate(self.rules, 1)]

        def apply(example: Example) -> Example | Drop:
            clock = Clock()
            try:
                return self._applied(example, numbered, clock)
            except RuleTimeout as timeout:
                return timed_out(example, timeout, self.kind)

        return apply

    def _applied(
        self, example: Example, numbered: Sequence[tuple[str, RegexRule, BoundedPattern]], clock: Clock
    ) -> Example | Drop:
        for name, rule, pattern in numbered:
            if rule.action == "replace":
                outcome = rewritten(example, partial(pattern.sub, rule.with_, clock=clock), rule.field, self.kind)
                if isinstance(outcome, Drop):
                    return outcome
                example = outcome
                continue
            for text in texts(example, rule.field):
                if match := pattern.search(text, clock):
                    return drop_of(
                        example, f"rule:{name}", f"{match.group()[:80]!r} matches {rule.match[:80]!r}", step=self.kind
                    )
        return example
