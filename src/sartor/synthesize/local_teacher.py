"""Local base as a teacher.

Every thread that waits for its answer drives the engine for all of them, so concurrent questions are answered in one
batch. Answers obey the question's schema if llguidance is installed; otherwise they are unconstrained.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

from sartor.core.errors import ExtraError, ModelError, RequestError
from sartor.core.ipc import error_of
from sartor.inference.engine import GenerateCall, ReplyDone, ReplyFailed, Sampling, TextDelta
from sartor.inference.local.local_engine import LocalEngine
from sartor.models.base import open_base
from sartor.synthesize.teacher import TeacherAnswer, TeacherQuestion


class LocalTeacher:
    """Teacher that runs a base on this machine."""

    def __init__(self, base: str, at_once: int, notice: Callable[[str], object] = lambda line: None) -> None:
        opened = open_base(base, notice=notice)
        # only the directory's name: the whole path would reveal this machine's folders
        self.name = f"{Path(base).name if Path(base).is_dir() else base}@{opened.ref.digest[:12]}"
        self.at_once = at_once
        self._engine = LocalEngine(opened, rows=at_once)
        self._notice, self._is_strict = notice, True
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._texts: dict[str, list[str]] = {}
        self._final_events: dict[str, ReplyDone | ReplyFailed] = {}

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        """Return the answer to a question, as `Teacher.answer`.

        It is `refused` if the question leaves no room for an answer in the base's context.
        """
        try:
            with self._lock:
                name = self._submit(question)
        except RequestError:  # it does not fit the context; other questions may
            return TeacherAnswer("", "refused")
        while True:
            with self._lock:
                if name in self._final_events:
                    return self._answered(name)
                for event in self._engine.step():
                    if isinstance(event, TextDelta):
                        self._texts[event.call].append(event.text)
                    else:
                        self._final_events[event.call] = event

    def _submit(self, question: TeacherQuestion) -> str:
        name = str(next(self._numbers))
        sampling = Sampling(question.max_tokens, question.temperature, seed=question.seed)
        messages = tuple({"role": role, "content": text} for role, text in question.messages)
        self._texts[name] = []
        try:
            self._engine.submit(
                GenerateCall(
                    name, messages=messages, sampling=sampling, schema=question.schema if self._is_strict else ""
                )
            )
        except ExtraError as error:
            if not self._is_strict:
                raise
            self._is_strict = False
            self._notice(f"answers are not held to their schema: {error.problem}")
            return self._submit(question)
        return name

    def _answered(self, name: str) -> TeacherAnswer:
        final_event, text = self._final_events.pop(name), "".join(self._texts.pop(name))
        if isinstance(final_event, ReplyFailed):
            raise error_of(final_event.kind, final_event.problem, final_event.remedy, ModelError)
        return TeacherAnswer(
            text,
            "length" if final_event.finish == "length" else "stop",
            final_event.prompt_tokens,
            final_event.reply_tokens,
        )
