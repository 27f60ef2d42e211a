"""Torch runtime of a Release."""

from __future__ import annotations

from collections.abc import Sequence

from sartor.core.artifacts import Artifact
from sartor.core.errors import SartorError
from sartor.inference.engine import Event, Finish, GenerateCall, ReplyDone, ReplyFailed, TextDelta
from sartor.inference.generate import context_tokens, generate
from sartor.inference.prompts import prompt_ids
from sartor.models.tuned_model import open_tuned

# Context of a base whose configuration states none
UNKNOWN_TOKENS = 4096


class TorchRuntime:
    """Runtime of a Release through transformers and torch."""

    name = "sartor"

    def __init__(self, release: Artifact, base: str) -> None:
        self._base, self._model = open_tuned(release, base_name=base)

    def answer(self, calls: Sequence[GenerateCall]) -> list[list[Event]]:
        """Return the events of each call."""
        return [self._events(call) for call in calls]

    def close(self) -> None:
        """Do nothing: the model is freed with the object."""

    def _events(self, call: GenerateCall) -> list[Event]:
        """Return the events of one call."""
        chat = self._base.chat
        try:
            ids = prompt_ids(chat, call, context_tokens(self._model) or UNKNOWN_TOKENS)
            generation = generate(self._model, [ids], stop=chat.stops, pad=chat.pad, sampling=call.sampling)[0]
        except SartorError as error:
            return [ReplyFailed(call.id, error.kind, error.problem, error.remedy)]
        finish: Finish = "length" if generation.finish == "length" else "stop"
        return [
            TextDelta(call.id, chat.decode(generation.ids), len(generation.ids)),
            ReplyDone(call.id, finish, len(ids), len(generation.ids)),
        ]
