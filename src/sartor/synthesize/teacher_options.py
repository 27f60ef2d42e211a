"""Options of the teachers that a recipe may name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.inference.endpoint_client import Access, Patience, RequestThrottle, key_of
from sartor.synthesize.openai_teacher import EndpointTeacher
from sartor.synthesize.teacher import Teacher, TeacherAnswer, TeacherQuestion, open_local

Notice = Callable[[str], object]
MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Price:
    """Price of a teacher's tokens, in any currency. The cost is reported in the same."""

    input: float = option(0.0, "per million tokens of questions")
    output: float = option(0.0, "per million tokens of answers")
    most: float = option(0.0, "stop before another question once this is spent; 0 is no limit")


@dataclass(frozen=True)
class Endpoint:
    """A model behind OpenAI's protocol (/chat/completions): a hosted one, vLLM, llama-server, `sartor serve`."""

    url: str = option(REQUIRED, "address up to and with /v1")
    model: str = option(REQUIRED, "the model's name there")
    key_env: str = option("", "environment variable that holds the key; empty sends none")
    at_once: int = option(4, "questions at once, 1 to 64")
    requests_per_minute: int = option(0, "at most; 0 is no limit")
    tokens_per_minute: int = option(0, "at most, of questions and answers; 0 is no limit")
    price: Price = option(Price(), "for the cost that is reported")
    tries: int = option(6, "of one question, before the run stops; the same command goes on later")
    pause_s: float = option(
        1.0, "before the second try, doubled for each further one, unless the endpoint says how long"
    )
    timeout_s: float = option(120.0, "silence after which a question is asked again")
    licence: str = option(
        "", "SPDX licence or LicenseRef under which the teacher's answers may be used; joined to that of the seeds"
    )
    kind: Literal["endpoint"] = "endpoint"

    def __post_init__(self) -> None:
        _check_at_once(self.at_once)
        if self.tries < 1 or self.timeout_s <= 0 or self.pause_s < 0:
            problem = (
                f"tries is {self.tries}, timeout_s {self.timeout_s:g}, pause_s {self.pause_s:g}; at least 1, above 0, "
                "0"
            )
            raise ConfigError(problem, "leave them out for the defaults")

    def open(self, notice: Notice) -> Teacher:
        """Open the endpoint as a teacher.

        Raises ConfigError for an invalid address, KeyRefusedError if the key is not set.
        """
        access = Access(self.url, self.model, key_of(self.key_env))
        pace = RequestThrottle(self.requests_per_minute, self.tokens_per_minute)
        return EndpointTeacher(
            access,
            pace,
            patience=Patience(self.tries, self.pause_s, self.timeout_s),
            at_once=self.at_once,
            notice=notice,
        )


@dataclass(frozen=True)
class LocalTeacherOptions:
    """A base on this machine, run by the embedded engine, so no data leaves it. Needs `sartor[tune]`."""

    base: str = option("starter", "starter, or the path or hub name of a base")
    at_once: int = option(4, "questions in one batch, 1 to 64")
    licence: str = option("", "as of an endpoint; empty takes none, most bases claim nothing of what they write")
    kind: Literal["local"] = "local"

    def __post_init__(self) -> None:
        _check_at_once(self.at_once)

    def open(self, notice: Notice) -> Teacher:
        """Open the base as a teacher. Raises what opening a base raises."""
        return open_local(self.base, self.at_once, notice)


@dataclass(frozen=True)
class Fake:
    """No model: answers are runs of words of the question, drawn by its seed. For tests of recipes, never for data."""

    at_once: int = option(1, "questions at once, 1 to 64")
    licence: str = option("", "as of an endpoint")
    kind: Literal["fake"] = "fake"

    def open(self, notice: Notice) -> Teacher:
        """Return the fake teacher; this never fails."""
        return FakeTeacher(self.at_once)


AnyTeacher = Endpoint | LocalTeacherOptions | Fake


def _check_at_once(count: int) -> None:
    if not 1 <= count <= MOST_AT_ONCE:
        raise ConfigError(f"at_once is {count}; it must be from 1 to {MOST_AT_ONCE}", "at_once: 4")


class FakeTeacher:
    """Teacher of `Fake`. The same question has the same answer in every process."""

    name = "fake"

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        """Return JSON that fits the question's schema, or words if it has none."""
        draw = random.Random(question.digest(self.name))
        material = question.last.partition("<<<")[2].partition(">>>")[0].strip() or question.last
        if question.schema:
            text = json.dumps(_filled(json.loads(question.schema), draw, material), ensure_ascii=False)
        else:
            text = _run_of(material, draw)
        return TeacherAnswer(text, "stop", len(question.last.split()), len(text.split()))


def _run_of(text: str, draw: random.Random) -> str:
    """Return a run of 3 to 12 words of a text, including the white space between them."""
    starts = [
        index for index, item in enumerate(text) if not item.isspace() and (index == 0 or text[index - 1].isspace())
    ]
    first = draw.randrange(max(1, len(starts) - 3)) if starts else 0
    last = first + draw.randint(3, 12)
    end = starts[last] if last < len(starts) else len(text)
    return text[starts[first] if starts else 0 : end].strip()


def _filled(schema: Any, draw: random.Random, text: str) -> Any:
    """Return a value for a JSON Schema of objects, lists, texts, numbers and enums."""
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kind = schema.get("type", "string")
    if kind == "object":
        return {name: _filled(inner, draw, text) for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        count = max(1, int(schema.get("minItems", 1)))
        return [_filled(schema.get("items", {}), draw, text) for _ in range(count)]
    if kind in ("integer", "number"):
        return draw.randint(int(schema.get("minimum", 0)), int(schema.get("maximum", 100)))
    if kind == "boolean":
        return draw.random() < 0.5
    return None if kind == "null" else _run_of(text, draw)
