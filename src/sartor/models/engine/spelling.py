"""Tokens -> text as a reader may see it: whole characters, no special tokens, nothing that a stop text might begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "�"


class Spelling:
    """The text of one reply, token by token.

    A token is spelt behind the tokens before it, since tokenizers write a space, or a part of a character, by what stands
    there; so the pieces joined are what decoding the whole reply gives. `stop`: texts before which the reply ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context = 0  # tokens before are never looked at again
        self._spelt = 0  # tokens before have been written
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown now that `token` was written. After a stop text (`stopped`) nothing more comes."""
        self._ids.append(token)
        return self._release(self._new_text(whole=True))

    def end(self) -> str:
        """What was held back."""
        text = self._release(self._new_text(whole=False)) + self._held
        self._held = ""
        return "" if self.stopped else text

    def _new_text(self, *, whole: bool) -> str:
        before = self._decode(self._ids[self._context : self._spelt])
        after = self._decode(self._ids[self._context :])
        if whole and after.endswith(_HALF):
            return ""
        self._context, self._spelt = self._spelt, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def token_text(tokenizer: Any, token: int) -> str:
    """A token by itself, for logprobs: with the space that opens it, special ones by name."""
    text = str(tokenizer.decode([token]))
    opens_with_space = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁")
    return f" {text}" if opens_with_space and not text.startswith(" ") else text
