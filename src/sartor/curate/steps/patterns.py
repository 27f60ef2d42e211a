"""A person's own regular expressions, by the `regex` library: checked when the recipe is read, and with a limit in time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sartor.core.errors import ConfigError, need
from sartor.core.records import Drop, Example, dropped

TIMEOUT_S = 2.0  # of processor time for all patterns of a step on one row; ordinary ones take microseconds


class RuleTimeout(Exception):
    """The patterns took longer than their limit on a row."""


@dataclass
class Clock:
    """What a row may cost: processor time, since a machine's other work is not the row's fault."""

    limit_s: float = TIMEOUT_S
    end: float = field(init=False)

    def __post_init__(self) -> None:
        self.end = time.process_time() + self.limit_s

    @property
    def left_s(self) -> float:
        """Seconds left; never quite none, so that the search itself says that there is no time."""
        return max(self.end - time.process_time(), 0.001)


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern. `search` and `sub` raise RuleTimeout when the clock of the row runs out."""

    compiled: Any

    def search(self, text: str, clock: Clock) -> Any:
        """The first match, or None."""
        try:
            return self.compiled.search(text, timeout=clock.left_s)
        except TimeoutError:
            raise self._late(clock) from None

    def sub(self, template: str, text: str, clock: Clock) -> str:
        """The text with every match replaced; `template` may refer to groups of it by number or name."""
        try:
            return str(self.compiled.sub(template, text, timeout=clock.left_s))
        except TimeoutError:
            raise self._late(clock) from None

    def _late(self, clock: Clock) -> RuleTimeout:
        return RuleTimeout(f"the pattern {self.compiled.pattern[:80]!r} ran out of the row's {clock.limit_s:g} s")


def compiled(pattern: str, where: str, template: str = "") -> Pattern:
    """The Pattern. Raises ConfigError naming `where` and the position of the mistake, in the pattern or in the template."""
    whole, problem = _compile(pattern, template)
    if problem:
        raise ConfigError(f"{where} {problem}", "mend it; a literal ( ) [ ] * + ? . is written with a backslash before it")
    return Pattern(whole)


@cache
def _compile(pattern: str, template: str) -> tuple[Any, str]:
    """(compiled pattern, what is wrong with it)."""
    try:
        import regex
    except ImportError:
        raise need("regex") from None
    try:
        whole = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        at = f" at character {error.pos + 1}" if isinstance(error, regex.error) and error.pos is not None else ""
        return None, f"is {pattern!r}, no regular expression{at}: {getattr(error, 'msg', error)}"
    if "\\" in template:
        try:
            # the same groups in a pattern that matches the empty text, so that the template is read now
            regex.compile(f"|{pattern}").sub(template, "")
        except (regex.error, IndexError) as error:
            return None, f"is replaced with {template!r}: {error}"
    return whole, ""


def timed_out(example: Example, timeout: RuleTimeout, step: str) -> Drop:
    """The Drop of a row on which the patterns ran out of time."""
    return dropped(example, "rule_timeout", str(timeout), step=step)
