"""Regression cases of a Release: replies that no later version may give again. No torch.

    RELEASE/cases.jsonl    one case a line; the Release's manifest lists and digests the file

    {"schema": 1, "prompt": [{"role": "user", "content": "..."}], "bad_reply": "...", "corrected_reply": "...",
     "examples": ["3f..."], "why": "...", "by": "Ada", "date": "2026-11-30T05:00:00Z"}

The content of a turn with a picture or a recording is a list of parts, the media as data URLs.

A version fails a case if its greedy reply equals the bad one after `normalized`, or if it gives the bad reply a higher
likelihood than the corrected one: the product of the probabilities of all tokens of the reply and of its end. So a
long reply is less likely than a short one, as it is when the model answers. `case_measurement.py` measures both.

The cases of the Release that a tuning started from are inherited (`inherited_cases`).
"""

from __future__ import annotations

import datetime
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from sartor.core import catalogue, records, strict_json
from sartor.core.artifacts import Artifact, check_file, open_artifact
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.installation import upgrade_command
from sartor.core.records import ROLES, Message, Part, PartKind
from sartor.core.reply_markup import without_reasoning
from sartor.media import content_parts

FILE = "cases.jsonl"
SCHEMA = 1
# of a case: photographs and a minute of sound fit
MOST_LINE_BYTES = 16 << 20
# characters at the ends of a reply that make no other reply
_ENDS = " \t\r\n.,;:!?…\"'`“”„‘’«»"
_TURN_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_TEXTS = ("bad_reply", "corrected_reply", "why", "by", "date", "tools")


@dataclass(frozen=True, kw_only=True)
class RegressionCase:
    """Prompt, the reply that must not come again, and the reply that should.

    prompt: all turns before the reply, with media as data URLs.
    examples: ids of the training rows that caused the bad reply.
    why, by, date: reason, person, and time (UTC, ISO).
    tools: JSON text of the declared tools; empty for none.
    Raises ConfigError for a case that no version could pass or fail.
    """

    prompt: tuple[Message, ...]
    bad_reply: str
    corrected_reply: str
    examples: tuple[str, ...] = ()
    why: str = ""
    by: str = ""
    date: str = ""
    tools: str = ""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("the case has no prompt", '--prompt "what was asked"')
        media = [part.media for message in self.prompt for part in message.content if part.media]
        if not all(url.startswith(content_parts.SCHEME) for url in media):
            raise ConfigError("the prompt has a medium that is no data URL", "--image FILE, or --audio FILE")
        if not (self.bad_reply.strip() and self.corrected_reply.strip()):
            name = "corrected" if self.bad_reply.strip() else "bad"
            raise ConfigError(f"the {name} reply of the case is empty", '--reply "bad" --corrected "right"')
        if normalized(self.bad_reply) == normalized(self.corrected_reply):
            raise ConfigError(
                f"the corrected reply {self.corrected_reply!r:.80} equals the bad one after normalisation",
                '--corrected "another reply"',
            )
        if len(self.line) > MOST_LINE_BYTES:
            raise ConfigError(
                f"the case has {len(self.line):,} bytes; the limit is {MOST_LINE_BYTES:,}",
                "a smaller picture, or a shorter recording or text",
            )

    @cached_property
    def line(self) -> bytes:
        """The line of `cases.jsonl`, with its end."""
        return json.dumps(self.as_json(), ensure_ascii=False).encode() + b"\n"

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the digest of prompt, tools and both replies."""
        prompt = [message.plain() for message in self.prompt]
        return records.digest([prompt, self.tools, self.bad_reply, self.corrected_reply])[:16]

    @property
    def question(self) -> str:
        """Text of the last turn of the prompt, behind a word for each medium."""
        turn = self.prompt[-1]
        return " ".join([*(f"[{part.kind}]" for part in turn.content if part.media), turn.text]).strip()

    def as_json(self) -> dict[str, Any]:
        """Return the content of the line; `case_of` parses it."""
        turns = []
        for message in self.prompt:
            filled = {name: getattr(message, name) for name in _TURN_FIELDS if getattr(message, name)}
            has_media = any(part.media for part in message.content)
            content = [part.plain() for part in message.content] if has_media else message.text
            turns.append({"role": message.role, "content": content, **filled})
        texts = {name: getattr(self, name) for name in _TEXTS if getattr(self, name)}
        return {"schema": SCHEMA, "prompt": turns, **texts, "examples": list(self.examples)}


def now() -> str:
    """Return the current time as a case states it: UTC, ISO, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def normalized(reply: str, *, is_opened: bool = False) -> str:
    """Return the form in which replies are compared.

    The reasoning is left out. A reply that is a JSON object or list becomes its canonical JSON. Any other becomes NFKC
    without case, with single spaces, and without white space, quotation marks and .,;:!?… at its ends.
    is_opened: whether the chat template has opened the reasoning.

    >>> normalized('"Yes,  we do."'), normalized('{"b": 1, "a": 2}')
    ('yes, we do', '{"a":2,"b":1}')
    """
    text = without_reasoning(reply, is_opened=is_opened).strip()
    if text.startswith(("{", "[")):
        try:
            return records.canonical(strict_json.loads(text)).decode()
        except ValueError:
            pass  # prose in brackets, or a reply that was cut
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(_ENDS) or folded


def case_of(line: bytes) -> RegressionCase:
    """Parse a line of `cases.jsonl`.

    Raises ArtifactError for another schema, ValueError, KeyError, TypeError or ConfigError for a line that is no case.
    """
    entry = strict_json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("no JSON object")
    if type(entry.get("schema")) is not int or entry["schema"] != SCHEMA:
        raise ArtifactError(
            f"a regression case of schema {entry.get('schema')!r:.20}; this reads {SCHEMA}", upgrade_command()
        )
    known_names = {"schema", *(field.name for field in fields(RegressionCase))}
    if unknown_names := sorted(set(entry) - known_names):
        raise ValueError(f"the unknown key {unknown_names[0]!a:.40}")
    texts = {name: entry[name] for name in _TEXTS if name in entry}
    examples = entry.get("examples", [])
    if not all(isinstance(text, str) for text in (*texts.values(), *examples)):
        raise TypeError("a value that is no text")
    prompt = tuple(_message_of(turn) for turn in entry["prompt"])
    return RegressionCase(prompt=prompt, examples=tuple(examples), **texts)


def _message_of(turn: Mapping[str, Any]) -> Message:
    texts = [value for name, value in turn.items() if name != "content"]
    if set(turn) - {"role", "content", *_TURN_FIELDS} or not all(isinstance(text, str) for text in texts):
        raise TypeError("a turn with another key than role and content, or a value that is no text")
    if turn["role"] not in ROLES:
        raise ValueError(f"the role {turn['role']!a:.40}")
    content = turn["content"]
    parts = (
        tuple(map(_part_of, content)) if isinstance(content, list) else (_part_of({"type": "text", "text": content}),)
    )
    return Message(turn["role"], parts, **{name: turn[name] for name in _TURN_FIELDS if name in turn})


def _part_of(part: Mapping[str, Any]) -> Part:
    kind = next((name for name in get_args(PartKind) if name == part.get("type")), None)
    if kind is None or set(part) != {"type", kind} or not isinstance(part[kind], str):
        raise TypeError("a part of a turn that is no text, image or audio")
    return Part(kind, text=part[kind]) if kind == "text" else Part(kind, media=part[kind])


def parse_cases(content: bytes, source: str) -> list[RegressionCase]:
    """Return the cases of a JSONL file's content, each once.

    source: name of the file, for errors.
    Raises ArtifactError with the number of a line that is no case.
    """
    cases: dict[str, RegressionCase] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        if len(line) > MOST_LINE_BYTES:
            raise _line_error(source, number, f"{len(line):,} bytes; the limit is {MOST_LINE_BYTES:,}")
        try:
            case = case_of(line)
        except ConfigError as error:
            raise _line_error(source, number, error.problem) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _line_error(source, number, str(error) or type(error).__name__) from None
        cases.setdefault(case.id, case)
    return list(cases.values())


def _line_error(source: str, number: int, problem: str) -> ArtifactError:
    return ArtifactError(
        f"{source}, line {number} is no regression case: {problem}", "get the Release again from its maker"
    )


def read_cases(release: Artifact) -> list[RegressionCase]:
    """Return the cases of a Release; none for one without. Raises ArtifactError for a changed or malformed file."""
    if FILE not in release.manifest["files"]:
        return []
    check_file(release, FILE)
    return parse_cases((release.path / FILE).read_bytes(), str(release.path / FILE))


def write_cases(folder: Path, cases: Iterable[RegressionCase]) -> None:
    """Write `cases.jsonl` into a folder that will be sealed."""
    (folder / FILE).write_bytes(b"".join(case.line for case in cases))


def merge_cases(*groups: Iterable[RegressionCase]) -> list[RegressionCase]:
    """Return the cases of all groups in their order, each once."""
    merged: dict[str, RegressionCase] = {}
    for group in groups:
        for case in group:
            merged.setdefault(case.id, case)
    return list(merged.values())


@dataclass(frozen=True)
class InheritedCases:
    """Cases of the Releases that a tuning started from.

    unknown_starts: paths of Adapters and Releases that it started from and that are gone or were changed: their cases
        are not known.
    """

    cases: tuple[RegressionCase, ...] = ()
    unknown_starts: tuple[str, ...] = ()


def inherited_cases(adapter: Artifact) -> InheritedCases:
    """Return the cases of the Release that an Adapter's tuning started from (`method.start`).

    A start that is an Adapter inherits from its own start. A Release has those of its predecessors already.
    """
    cases: list[RegressionCase] = []
    unknown_starts: list[str] = []
    waiting = [adapter]
    while waiting:
        for parent in waiting.pop().manifest.get("parents", []):
            if parent["kind"] not in ("adapter", "release"):
                continue
            path = catalogue.locate(parent["id"], parent.get("path", ""))
            start: Artifact | None = None
            if path is not None:
                try:
                    start = open_artifact(path, ("adapter", "release"))
                except ArtifactError:  # changed since
                    start = None
            if start is None:
                unknown_starts.append(parent.get("path") or parent["id"])
            elif start.kind == "release":
                cases += read_cases(start)
            else:
                waiting.append(start)
    return InheritedCases(tuple(merge_cases(cases)), tuple(unknown_starts))


class CaseFault(StrEnum):
    """Way in which a version fails a case."""

    SAYS_IT = "it says the bad reply"
    PREFERS_IT = "the bad reply is likelier than the corrected one"
    NOT_ASKED = "it could not be asked"


@dataclass(frozen=True)
class CaseResult:
    """Measurement of one case.

    reply: greedy reply of the version.
    bad_nats, corrected_nats: negative log-likelihood of each reply, nats, summed over its tokens and its end.
    is_opened: whether the chat template opens the reasoning of replies.
    not_asked: reason why the base cannot read the case, which fails it; empty otherwise.
    """

    case: RegressionCase
    reply: str = ""
    bad_nats: float = 0.0
    corrected_nats: float = 0.0
    is_opened: bool = False
    not_asked: str = ""

    @property
    def faults(self) -> tuple[CaseFault, ...]:
        """Ways in which the version fails the case; empty if it passes. A loss that is NaN fails."""
        if self.not_asked:
            return (CaseFault.NOT_ASKED,)
        says_it = normalized(self.reply, is_opened=self.is_opened) == normalized(self.case.bad_reply)
        prefers_it = not self.bad_nats >= self.corrected_nats
        faults = ((CaseFault.SAYS_IT, says_it), (CaseFault.PREFERS_IT, prefers_it))
        return tuple(fault for fault, is_found in faults if is_found)

    def as_json(self) -> dict[str, Any]:
        """Return the measurement for a command's JSON."""
        return {
            "id": self.case.id,
            "fails": [fault.name.lower() for fault in self.faults],
            "reply": self.reply,
            "bad_nats": round(self.bad_nats, 3),
            "corrected_nats": round(self.corrected_nats, 3),
        }


def describe_failures(results: Sequence[CaseResult]) -> list[str]:
    """Return a sentence for each case that fails: its id, its question and the faults."""
    lines = []
    for result in results:
        if not result.faults:
            continue
        question = " ".join(result.case.question.split())
        shown = question if len(question) <= 60 else f"{question[:57]}..."
        faults = " and ".join(result.not_asked or fault.value for fault in result.faults)
        lines.append(f"case {result.case.id} ({shown!r}): {faults}")
    return lines
