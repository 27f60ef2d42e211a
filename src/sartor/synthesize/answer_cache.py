"""Teacher answers on disk, by question digest; spending limit.

    FOLDER/ab/ab12....json      text, finish, tokens

The thread that gets an answer writes it atomically before anything reads it. A damaged file is asked for again.
Answers may quote the seeds, including personal data. The folder is therefore readable by its owner only, and is
removed once the Dataset is complete, unless the recipe names a folder to keep.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import BudgetError
from sartor.core.filesystem import write_file_atomic
from sartor.synthesize.teacher import Teacher, TeacherAnswer, TeacherQuestion
from sartor.synthesize.teacher_options import Price

SCHEMA = 1
_COUNTED = ("calls", "cached", "tokens_in", "tokens_out", "estimated")
PER = 1_000_000  # prices are per this many tokens


@dataclass(frozen=True)
class Spent:
    """Questions and costs of a run.

    calls: questions to the teacher. cached: questions answered from disk.
    estimated: calls whose tokens the teacher did not count. Tokens and cost are those of `calls`.
    """

    calls: int
    cached: int
    tokens_in: int
    tokens_out: int
    estimated: int
    cost: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields for the command's JSON."""
        return {**asdict(self), "cost": round(self.cost, 6)}


class AnswerCache:
    """Cache in front of a teacher; used from many threads."""

    def __init__(self, teacher: Teacher, folder: Path, price: Price) -> None:
        self.teacher, self.folder, self.price = teacher, folder, price
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._under_way: list[float] = []  # highest possible costs of the calls in progress

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        """Return the answer from disk or from the teacher.

        Raises what the teacher raises, and BudgetError once `price.most` is spent.
        """
        name = question.digest(self.teacher.name)
        file = self.folder / name[:2] / f"{name}.json"
        if (cached := _read(file)) is not None:
            self._count(cached=1)
            return cached
        with self._paid(question):
            answer = self.teacher.answer(question)
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.parent.mkdir(exist_ok=True, mode=0o700)
            content = {"schema": SCHEMA, **asdict(answer)}
            write_file_atomic(file, json.dumps(content).encode(), mode=0o600)
            counts = {
                "tokens_in": answer.tokens_in,
                "tokens_out": answer.tokens_out,
                "estimated": int(answer.is_estimated),
            }
            self._count(calls=1, **counts)
        return answer

    @property
    def spent(self) -> Spent:
        """Questions and costs so far."""
        with self._lock:
            calls, cached, tokens_in, tokens_out, estimated = (self._counts[name] for name in _COUNTED)
            return Spent(
                calls, cached, tokens_in=tokens_in, tokens_out=tokens_out, estimated=estimated, cost=self._cost()
            )

    def _cost(self) -> float:
        paid = self._counts["tokens_in"] * self.price.input + self._counts["tokens_out"] * self.price.output
        return paid / PER

    @contextlib.contextmanager
    def _paid(self, question: TeacherQuestion) -> Iterator[None]:
        """Hold room for a call under `price.most`, beside the calls in progress.

        A call that finds no other in progress may exceed the limit.
        """
        # a text has at most as many tokens as bytes
        prompt_bytes = sum(len(text.encode()) for _, text in question.messages)
        may_cost = (prompt_bytes * self.price.input + question.max_tokens * self.price.output) / PER
        with self._room:
            while self._under_way and self._cost() + sum(self._under_way) + may_cost > (self.price.most or math.inf):
                self._room.wait()
            if self.price.most and (cost := self._cost()) >= self.price.most:
                problem = f"{cost:.4f} is spent, and price.most is {self.price.most:g}; what was answered is kept"
                raise BudgetError(problem, f"--teacher.price.most {2 * self.price.most:g}")
            self._under_way.append(may_cost)
        try:
            yield
        finally:
            with self._room:
                self._under_way.remove(may_cost)
                self._room.notify_all()

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)


def _read(file: Path) -> TeacherAnswer | None:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields.pop("schema") != SCHEMA:
            return None
        return TeacherAnswer(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
