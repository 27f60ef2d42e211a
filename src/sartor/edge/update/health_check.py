"""Checks a version before activation.

Three sources of questions: the canaries that a Release ships (its Report's own replies, release.json), the device's own file,
and a callable of the device's program. Each line of a file:

    {"prompt": "...", "expected": {"exact": "..."}}
    {"messages": [{"role": "user", "content": "..."}], "expected": {"json": {"intent": "HassTurnOn"}}}
    {"prompt": "...", "expected": {"contains": "..."}}

What went wrong is said by line and kind, never by content: prompts of a device are its owner's. Canaries whose replies
another arithmetic made (core/numerics.py) have to be answered and are compared with nothing: that is no reason against the
version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sartor.core.artifacts import open_artifact
from sartor.core.errors import AdmissionError, ConfigError, HealthError, InputError, SartorError
from sartor.core.resource_limits import ResourceLimits
from sartor.edge.health_reason import HealthReason
from sartor.edge.runtime import device_runtime
from sartor.edge.runtime.device_runtime import system_of
from sartor.evaluate.reply_labels import label_of, text_of
from sartor.inference.engine import BASE, Event, GenerateCall, ReplyFailed, TextDelta
from sartor.release import canary_prompts

# Opening a base takes minutes on a slow device
LIMITS = ResourceLimits(wall_s=900.0)
KINDS = ("exact", "contains", "json")


@dataclass(frozen=True)
class HealthPrompt:
    """A question whose answer is known. `line`: where it stands. `wanted`: a text, or for `json` field -> value."""

    line: int
    messages: tuple[Mapping[str, Any], ...]
    is_bare: bool
    kind: str
    wanted: Any

    def call(self, system: Sequence[Mapping[str, Any]]) -> GenerateCall:
        """As it is asked: a bare prompt after the version's system prompt, messages as they stand."""
        messages = (*system, *self.messages) if self.is_bare else self.messages
        return GenerateCall(f"line-{self.line}", BASE, messages, sampling=replace(canary_prompts.SAMPLING, max_tokens=256))

    def wrong(self, reply: str) -> str:
        """What is wrong with a reply; empty: nothing."""
        if self.kind == "exact":
            return "" if reply.strip() == self.wanted.strip() else "exact"
        if self.kind == "contains":
            return "" if self.wanted in reply else "contains"
        missed = [name for name, value in self.wanted.items() if label_of(reply, name) != text_of(value)]
        return f"json: {', '.join(missed)}" if missed else ""


@dataclass(frozen=True)
class Result:
    """What a check found. `reasons`: each the text of a HealthReason; empty: it passed.

    not_checked: why the release's own replies were not compared; empty where they were, or where it has none.
    """

    asked: int
    reasons: tuple[str, ...] = ()
    peak_memory_bytes: int = 0
    wall_s: float = 0.0
    not_checked: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.reasons


@dataclass(frozen=True)
class Health:
    """A check as the store takes it: called with a staged version's path, it raises HealthError with the reasons.

    evaluation: the device's private measure; gets the path, and raises or returns what is wrong ("" for nothing).
    base: as `runtime.opened` takes it.
    """

    prompts: tuple[HealthPrompt, ...] = ()
    limits: ResourceLimits = LIMITS
    base: str = ""
    evaluation: Callable[[Path], str | None] | None = None
    results: list[Result] = field(default_factory=list, compare=False)

    def __call__(self, release: Path) -> None:
        """Raise HealthError unless the version passes."""
        found = self.check(release)
        self.results.append(found)
        if not found.passed:
            raise HealthError("; ".join(found.reasons), "publish a version that passes, or mend the prompts")

    def check(self, release: Path) -> Result:
        """What is wrong with a version. Raises MissingError, BudgetError where the check itself cannot be made."""
        try:
            manifest = open_artifact(release, ("release", "export")).manifest
            shipped = _shipped(manifest)
            own = [prompt.call(system_of(manifest)) for prompt in self.prompts]
            calls = [*shipped.calls, *own]
            events, used = device_runtime.ask_in_process(release, calls, self.limits, self.base)
        except HealthError as error:
            return Result(0, (error.problem,))
        except InputError as error:
            return Result(0, (HealthReason.OPENS.text(error.problem),))
        reasons = [*_judged(shipped, events[: len(shipped.calls)]), *self._told(events[len(shipped.calls) :])]
        if self.evaluation and not reasons and (wrong := self._evaluated(release)):
            reasons.append(HealthReason.EVALUATION.text(wrong))
        return Result(len(calls), tuple(reasons), used.peak_bytes, used.wall_s, shipped.not_checked)

    def _told(self, events: Sequence[Sequence[Event]]) -> list[str]:
        wrong = [
            f"line {prompt.line} ({said})"
            for prompt, told in zip(self.prompts, events, strict=True)
            if (said := _failure(told) or prompt.wrong(_text(told)))
        ]
        if not wrong:
            return []
        detail = f"{len(wrong)} of {len(self.prompts)} of the device's prompts: {', '.join(wrong)}"
        return [HealthReason.CANARY.text(detail)]

    def _evaluated(self, release: Path) -> str:
        assert self.evaluation
        try:
            return self.evaluation(release) or ""
        except SartorError as error:
            return error.problem
        except Exception as error:  # a program of the device's own
            return type(error).__name__


def _shipped(manifest: Mapping[str, Any]) -> canary_prompts.CanaryPrompts:
    """The Release's own canaries; where it ships none, one general question, which only has to be answered."""
    found = canary_prompts.canaries_of({"system_prompt": "", **manifest}, BASE)
    return found if found.recorded else canary_prompts.CanaryPrompts(found.calls[:1], ())


def _judged(shipped: canary_prompts.CanaryPrompts, events: Sequence[Sequence[Event]]) -> list[str]:
    if not shipped.recorded:
        return [HealthReason.CANARY.text(said) for told in events if (said := _failure(told))]
    try:
        canary_prompts.judge_canaries(shipped, events)
    except AdmissionError as error:
        reason = HealthReason.DEGENERATE if error.check == "degenerate" else HealthReason.CANARY
        return [reason.text(f"of the release's own prompts: {error.brief}")]
    return []


def _failure(events: Sequence[Event]) -> str:
    end = events[-1]
    return f"no answer: {end.kind}" if isinstance(end, ReplyFailed) else ""


def _text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def read_prompts(file: Path) -> tuple[HealthPrompt, ...]:
    """The prompts of a JSONL file. Raises ConfigError naming the line that is none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", "a JSONL file of prompts") from None
    found = tuple(_prompt(file, place, line) for place, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise ConfigError(f"{file} holds no prompt", '{"prompt": "...", "expected": {"contains": "..."}}')
    return found


def _prompt(file: Path, line: int, text: str) -> HealthPrompt:
    try:
        said = json.loads(text)
        if not isinstance(said, dict):
            raise TypeError("a JSON object is due")
        if unknown := set(said) - {"prompt", "messages", "expected"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}: prompt or messages, and expected")
        if ("prompt" in said) == ("messages" in said):
            raise ValueError("give prompt or messages, one of them")
        kind, wanted = _expected(said.get("expected"))
        messages = said.get("messages", [{"role": "user", "content": said.get("prompt")}])
        if not messages or not all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in messages):
            raise ValueError("prompt is a text, messages a list of role and content")
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}, line {line}: {error}", '{"prompt": "...", "expected": {"exact": "..."}}') from None
    return HealthPrompt(line, tuple(messages), "prompt" in said, kind, wanted)


def _expected(said: Any) -> tuple[str, Any]:
    if isinstance(said, str):
        return "exact", said
    if not isinstance(said, dict) or len(said) != 1 or next(iter(said)) not in KINDS:
        raise ValueError(f'expected is one of {", ".join(KINDS)}, as {{"exact": "..."}}')
    kind, wanted = next(iter(said.items()))
    if not (isinstance(wanted, dict) and wanted if kind == "json" else isinstance(wanted, str) and wanted):
        raise ValueError(f"{kind} takes {'fields with their values' if kind == 'json' else 'a text'}")
    return kind, wanted
