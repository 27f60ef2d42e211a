"""Teacher behind an OpenAI-compatible endpoint (`inference/endpoint_client.py`).

An answer that the endpoint refuses for its question alone is `refused`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from sartor.inference.endpoint_client import (
    Access,
    EndpointClient,
    IncompleteResponseError,
    Patience,
    QuestionRefused,
    RequestThrottle,
    bounded_lines,
    json_body,
)
from sartor.synthesize.teacher import Finish, TeacherAnswer, TeacherQuestion

DONE = "[DONE]"


def read_body(lines: Iterable[bytes], content_type: str) -> TeacherAnswer:
    """Return the answer in a body of that content type. Raises IncompleteResponseError."""
    if "event-stream" in content_type:
        return _streamed(lines)
    body = json_body(b"".join(bounded_lines(lines)).decode("utf-8", "replace"))
    choice = _choice(body)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    return _answer(text if isinstance(text, str) else "", choice.get("finish_reason"), body.get("usage"))


def _streamed(lines: Iterable[bytes]) -> TeacherAnswer:
    pieces: list[str] = []
    finish: Any = None
    usage: Any = None
    for line in bounded_lines(lines):
        text = line.decode("utf-8", "replace").strip()
        if not text.startswith("data:"):
            continue
        data = text.removeprefix("data:").strip()
        if data == DONE:
            break
        event = json_body(data)
        usage = event.get("usage") or usage
        if not event.get("choices"):
            continue  # the usage arrives in a separate event
        choice = _choice(event)
        delta = choice.get("delta")
        content = delta.get("content") if isinstance(delta, dict) else None
        pieces.append(content if isinstance(content, str) else "")
        finish = choice.get("finish_reason") or finish
    return _answer("".join(pieces), finish, usage)


def _choice(value: dict[str, Any]) -> dict[str, Any]:
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise IncompleteResponseError("there is no choice in it")
    return choices[0]


def _answer(text: str, finish: Any, usage: Any) -> TeacherAnswer:
    if not isinstance(finish, str):
        raise IncompleteResponseError("it ended without saying why")
    finish_names: dict[str, Finish] = {"length": "length", "content_filter": "refused"}
    counts = usage if isinstance(usage, dict) else {}
    tokens = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if all(isinstance(count, int) for count in tokens):
        return TeacherAnswer(text, finish_names.get(finish, "stop"), int(tokens[0] or 0), int(tokens[1] or 0))
    return TeacherAnswer(text, finish_names.get(finish, "stop"), 0, 0, is_estimated=True)


CHARACTERS_PER_TOKEN = 4  # for estimates, if a server reports no counts


class EndpointTeacher:
    """Teacher that calls an endpoint. notice: gets a line for each retry."""

    def __init__(
        self,
        access: Access,
        pace: RequestThrottle,
        patience: Patience,
        at_once: int,
        notice: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._client = EndpointClient(access, pace, patience, route="/chat/completions", notice=notice)
        self.access, self.at_once, self.name = access, at_once, self._client.name

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        """Return the answer to a question, with retries, as `Teacher.answer`.

        Raises BusyError or UnavailableError once all tries are used, KeyRefusedError, ConfigError.
        """
        body, size = self._body(question)
        answer = self._client.ask(body, size, read_body, seed=question.digest(self.name))
        if isinstance(answer, QuestionRefused):
            return TeacherAnswer("", "refused")
        if not answer.is_estimated:
            return answer
        tokens_out = len(answer.text) // CHARACTERS_PER_TOKEN + 1
        return replace(answer, tokens_in=_tokens(question), tokens_out=tokens_out)

    def _body(self, question: TeacherQuestion) -> tuple[bytes, int]:
        """Return the request body and its approximate number of tokens, including the answer."""
        fields: dict[str, Any] = {
            "model": self.access.model,
            "messages": [{"role": role, "content": text} for role, text in question.messages],
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            "seed": question.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if question.schema:
            form = {"name": "answer", "schema": json.loads(question.schema)}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}
        return json.dumps(fields).encode(), _tokens(question) + question.max_tokens


def _tokens(question: TeacherQuestion) -> int:
    return sum(len(text) for _, text in question.messages) // CHARACTERS_PER_TOKEN + 1
