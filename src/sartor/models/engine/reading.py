"""A base as engines need it whose weights are elsewhere: its tokenizer and template, and what its files say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from sartor.core import model_refs
from sartor.core.errors import ModelError, RequestError
from sartor.models.base import convert, open_chat
from sartor.models.chat import Chat
from sartor.models.engine.contract import Call
from sartor.models.engine.grammar import Constraint, Grammar
from sartor.models.engine.prompts import prompt_ids
from sartor.models.engine.tools import reply_schema
from sartor.models.loading import quiet


@dataclass
class Reader:
    """A base without its weights. context_tokens: most of a prompt and its reply."""

    ref: model_refs.BaseRef
    chat: Chat
    config: Mapping[str, Any]
    context_tokens: int
    _grammar: Grammar | None = None

    def within(self, most_tokens: int) -> Reader:
        """The same with a context of at most so many tokens; 0 is no limit."""
        return replace(self, context_tokens=min(self.context_tokens, most_tokens or self.context_tokens))

    def prompt(self, call: Call) -> list[int]:
        """Token ids of a call's prompt. Raises RequestError for one that is malformed or leaves no room for a reply."""
        ids = prompt_ids(self.chat, call, self.context_tokens)
        if len(ids) >= self.context_tokens:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; prompt and reply together may have {self.context_tokens}",
                "shorten the prompt",
            )
        return ids

    def text(self, text: str) -> list[int]:
        """Token ids of a text that is to become a vector. Raises RequestError, which says which, where it is too long."""
        try:
            return self.prompt(Call("text", text=text))
        except RequestError as error:
            problem = f"the text that begins with {text[:40]!a} cannot be embedded whole: {error.problem}"
            raise RequestError(problem, "split it: nothing of it is left out") from None

    def constraint(self, call: Call, *, loose: bool = False) -> Constraint | None:
        """What the reply must obey, if anything. loose: with any white space, to check what another server wrote.

        Raises RequestError for a schema that cannot be obeyed.
        """
        schema = reply_schema(call)
        if not schema:
            return None
        if self._grammar is None:
            self._grammar = Grammar(self.chat.tokenizer, self.chat.stops, int(self.config["vocab_size"]))
        return self._grammar.constraint(schema, loose=loose)


def open_reader(base: str, most_tokens: int) -> Reader:
    """The base that a name means. Raises what `bases.locate` and `open_chat` do, ModelError for a config that is not whole."""
    ref = model_refs.locate_base(base)
    if ref.is_converted:
        convert(ref)
    try:
        config = json.loads((ref.path / "config.json").read_text(encoding="utf-8"))
        trained = int(config["max_position_embeddings"])
        int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{ref.path / 'config.json'} is not whole: {error}", "restore it from a copy") from None
    return Reader(ref, open_chat(ref.path, _generation(ref.path)), config, min(trained, most_tokens))


def _generation(path: Path) -> Any:
    """What a base says of how its replies end; None where it says nothing."""
    if not (path / "generation_config.json").is_file():
        return None
    with quiet():
        return transformers.GenerationConfig.from_pretrained(str(path), local_files_only=True)
