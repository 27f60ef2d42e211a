"""Health check of a version before activation.

There are three sources of questions: the canaries that a Release ships (its Report's own replies, release.json), the
device's own file, and a callable of the device's program. Each line of a file:

    {"prompt": "...", "expected": {"exact": "..."}}
    {"messages": [{"role": "user", "content": "..."}], "expected": {"json": {"intent": "HassTurnOn"}}}
    {"prompt": "...", "expected": {"contains": "..."}}

A failure is reported by line and kind, never by content: prompts of a device belong to its owner. Canaries whose
replies another arithmetic made (core/numerics.py) must be answered, but their replies are not compared: a difference
is no reason against the version.
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
    """Question with a known answer.

    line: its line in the file.
    is_bare: whether the line has a prompt instead of messages.
    expected: a text, or for `json` field -> value.
    """

    line: int
    messages: tuple[Mapping[str, Any], ...]
    is_bare: bool
    kind: str
    expected: Any

    def call(self, system: Sequence[Mapping[str, Any]]) -> GenerateCall:
        """Return the call: a bare prompt follows the version's system prompt, messages stand alone."""
        messages = (*system, *self.messages) if self.is_bare else self.messages
        return GenerateCall(
            f"line-{self.line}", BASE, messages, sampling=replace(canary_prompts.SAMPLING, max_tokens=256)
        )

    def mismatch(self, reply: str) -> str:
        """Return what is wrong with a reply; empty if nothing is."""
        if self.kind == "exact":
            return "" if reply.strip() == self.expected.strip() else "exact"
        if self.kind == "contains":
            return "" if self.expected in reply else "contains"
        missed = [name for name, value in self.expected.items() if label_of(reply, name) != text_of(value)]
        return f"json: {', '.join(missed)}" if missed else ""


@dataclass(frozen=True)
class Result:
    """Result of a check.

    reasons: each the text of a HealthReason; empty if the version passed.
    not_checked: why the release's own replies were not compared; empty if they were, or if it has none.
    """

    n_prompts: int
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
    """Health check for the store: called with a staged version's path, it raises HealthError with the reasons.

    evaluation: private measure of the device; it gets the path, and raises or returns what is wrong ("" for nothing).
    base: as in `device_runtime.open_runtime`.
    """

    prompts: tuple[HealthPrompt, ...] = ()
    limits: ResourceLimits = LIMITS
    base: str = ""
    evaluation: Callable[[Path], str | None] | None = None
    results: list[Result] = field(default_factory=list, compare=False)

    def __call__(self, release: Path) -> None:
        """Raise HealthError unless the version passes."""
        result = self.check(release)
        self.results.append(result)
        if not result.passed:
            raise HealthError(
                "; ".join(result.reasons),
                "publish a version that passes, or sartor edge sync ... --health with other prompts",
            )

    def check(self, release: Path) -> Result:
        """Return the result for a version.

        Raises MissingError and BudgetError if the check itself cannot be made.
        """
        try:
            manifest = open_artifact(release, ("release", "export")).manifest
            shipped = canary_prompts.canaries_of({"system_prompt": "", **manifest}, BASE)
            if not shipped.recorded:  # one general question then, which only has to be answered
                shipped = canary_prompts.CanaryPrompts(shipped.calls[:1], ())
            device_calls = [prompt.call(system_of(manifest)) for prompt in self.prompts]
            calls = [*shipped.calls, *device_calls]
            events, usage = device_runtime.ask_in_process(release, calls, self.limits, self.base)
        except HealthError as error:
            return Result(0, (error.problem,))
        except InputError as error:
            return Result(0, (HealthReason.OPENS.text(error.problem),))
        reasons = [
            *_canary_failures(shipped, events[: len(shipped.calls)]),
            *self._prompt_failures(events[len(shipped.calls) :]),
        ]
        if self.evaluation and not reasons and (problem := self._evaluate(release)):
            reasons.append(HealthReason.EVALUATION.text(problem))
        return Result(
            len(calls),
            tuple(reasons),
            peak_memory_bytes=usage.peak_bytes,
            wall_s=usage.wall_s,
            not_checked=shipped.not_checked,
        )

    def _prompt_failures(self, events: Sequence[Sequence[Event]]) -> list[str]:
        """Return the failures of the device's own prompts as at most one reason."""
        failures = []
        for prompt, prompt_events in zip(self.prompts, events, strict=True):
            reply = "".join(event.text for event in prompt_events if isinstance(event, TextDelta))
            if problem := _failure(prompt_events) or prompt.mismatch(reply):
                failures.append(f"line {prompt.line} ({problem})")
        if not failures:
            return []
        detail = f"{len(failures)} of {len(self.prompts)} of the device's prompts: {', '.join(failures)}"
        return [HealthReason.CANARY.text(detail)]

    def _evaluate(self, release: Path) -> str:
        """Return what the private measure finds wrong; of a foreign error, only its type."""
        assert self.evaluation
        try:
            return self.evaluation(release) or ""
        except SartorError as error:
            return error.problem
        except Exception as error:  # the device's own program may raise anything
            return type(error).__name__


def _canary_failures(shipped: canary_prompts.CanaryPrompts, events: Sequence[Sequence[Event]]) -> list[str]:
    """Return the reasons against the version from the Release's own canaries."""
    if not shipped.recorded:
        return [HealthReason.CANARY.text(problem) for prompt_events in events if (problem := _failure(prompt_events))]
    try:
        canary_prompts.judge_canaries(shipped, events)
    except AdmissionError as error:
        reason = HealthReason.DEGENERATE if error.check == "degenerate" else HealthReason.CANARY
        return [reason.text(f"of the release's own prompts: {error.brief}")]
    return []


def _failure(events: Sequence[Event]) -> str:
    """Return the kind of error that ended a reply, or ""."""
    end = events[-1]
    return f"no answer: {end.kind}" if isinstance(end, ReplyFailed) else ""


def read_prompts(file: Path) -> tuple[HealthPrompt, ...]:
    """Return the prompts of a JSONL file. Raises ConfigError naming a line that is no prompt."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}",
            f'ls -l {file}; a line is {{"prompt": "...", "expected": {{"contains": "..."}}}}',
        ) from None
    result = tuple(_prompt(file, index, line) for index, line in enumerate(lines, 1) if line.strip())
    if not result:
        raise ConfigError(f"{file} holds no prompt", '{"prompt": "...", "expected": {"contains": "..."}}')
    return result


def _prompt(file: Path, line: int, text: str) -> HealthPrompt:
    """Return the prompt of a line. Raises ConfigError."""
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError("a JSON object is due")
        if unknown := set(fields) - {"prompt", "messages", "expected"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}: prompt or messages, and expected")
        if ("prompt" in fields) == ("messages" in fields):
            raise ValueError("give prompt or messages, one of them")
        kind, expected = _expected(fields.get("expected"))
        messages = fields.get("messages", [{"role": "user", "content": fields.get("prompt")}])
        if not messages or not all(
            isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages
        ):
            raise ValueError("prompt is a text, messages a list of role and content")
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}, line {line}: {error}", '{"prompt": "...", "expected": {"exact": "..."}}') from None
    return HealthPrompt(line, tuple(messages), is_bare="prompt" in fields, kind=kind, expected=expected)


def _expected(expected: Any) -> tuple[str, Any]:
    """Return the kind and the expected value. Raises ValueError."""
    if isinstance(expected, str):
        return "exact", expected
    if not isinstance(expected, dict) or len(expected) != 1 or next(iter(expected)) not in KINDS:
        raise ValueError(f'expected is one of {", ".join(KINDS)}, as {{"exact": "..."}}')
    kind, value = next(iter(expected.items()))
    if not (isinstance(value, dict) and value if kind == "json" else isinstance(value, str) and value):
        raise ValueError(f"{kind} takes {'fields with their values' if kind == 'json' else 'a text'}")
    return kind, value
