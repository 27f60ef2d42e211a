"""Token masks for a JSON Schema by llguidance.

    grammar = Grammar(chat.tokenizer, chat.stops, vocabulary=logits.shape[-1])  # once per base
    constraint = grammar.constraint(call.schema)  # once per call; schemas.JSON_OBJECT is OpenAI's json_object
    logits.masked_fill_(~constraint.mask().to(logits.device), -math.inf)  # (V,), before every choice of the row's
    token constraint.advance(token)  # after it, also with a stop token
    if constraint.is_done: ...  # the value is whole and nothing but a stop can follow: end the row with `stop`

Every call has a matcher of its own, so that a schema that grows over its limits fails one row. What a schema may cost
is bounded where it is read (bytes, depth) and at every token (llguidance's fuel), never by a clock: the same schema is
answered or refused on every machine. Between two parts of the value stands nothing, a space, or a line break with its
indentation: a reply cannot wander through white space for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sartor.core.errors import ModelError, RequestError, missing_package
from sartor.text.json_schema import read_schema

_SPACE = r"(\n[ \t]{0,32}| )?"
# Fuel: about 20 ms for reading a schema and 7 ms for a token, by llguidance's own figures; its states take 1-2 kB
# each.
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class Grammar:
    """A base's tokens as JSON sees them: text of each, and which of them end a reply.

    tokenizer: a fast one of transformers. stops: ids that end a reply (Chat.stops). vocabulary: width V of the logits,
    which models pad beyond their tokenizer. Raises ExtraError without llguidance, ModelError when the tokenizer is not
    fast or has more tokens than V.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int], vocabulary: int) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise missing_package("llguidance", "serve") from None
        self._library = llguidance
        self.vocabulary = vocabulary
        try:
            self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(stops))
        except ValueError as error:
            raise ModelError(
                f"replies of this base cannot be constrained: {_short(error)}", "use a base with a tokenizer.json"
            ) from None

    def constraint(self, schema: str, *, loose: bool = False) -> Constraint:
        """What one reply must obey. Raises RequestError for a schema that is wrong, too large or not supported.

        loose: with any white space between its parts, to check what another server wrote.
        """
        read_schema(schema)
        library = self._library
        space = {"whitespace_flexible": True} if loose else {"whitespace_pattern": _SPACE}
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(schema, overrides={**space, "lenient": False})
        except ValueError as error:  # numbers that only Python reads
            raise _refused(str(error)) from None
        limits = library.LLParserLimits(**_LIMITS)
        matcher = library.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        constraint = Constraint(matcher, self._tokens, self.vocabulary)
        constraint.mask()  # some schemas that nothing obeys show only here
        return constraint


class Constraint:
    """Where one reply stands in its schema."""

    def __init__(self, matcher: Any, tokens: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._vocabulary = vocabulary

    def mask(self) -> torch.Tensor:
        """Which tokens may come next: (V,) bool on the CPU, never all False. Stop tokens may only when the value is
        whole.

        Raises RequestError when the schema costs more at this place than a token may.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocabulary, bitorder="little")
        return torch.from_numpy(allowed.view(np.bool_))

    def advance(self, token: int) -> None:
        """Take the token that was chosen. Raises RequestError when the mask did not allow it, or as `mask` does."""
        self._matcher.consume_token(token)
        self._check()

    def accept(self, text: str) -> None:
        """Take text that something else wrote, in whatever tokens. Raises RequestError where it does not obey."""
        self._matcher.consume_tokens(self._tokens.tokenize_str(text))
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether what is written is a whole value, so that the reply may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def is_done(self) -> bool:
        """Whether the value is whole and nothing but a stop token can follow: the reply is over without one."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())


# What the library says in words of its own code, in ours; the remedy beside it
_WORDS = (
    (
        "NoExtensionBias",
        "it refers to itself with nothing between, so no reply would end",
        "refer to it below properties or items",
    ),
    ("coerce_one_of", "oneOf with values that fit twice is not supported", "say it by anyOf"),
    (
        "in a registry",
        "it refers to another document, and nothing is fetched",
        'put it under "$defs", and refer to it by "#/$defs/..."',
    ),
    ("anyOf is empty", "an enum or anyOf holds nothing, so no reply would fit", "put what may be said into it"),
    ("invalid multiple of", "multipleOf is no number above 0", '"multipleOf": 1'),
)


def _refused(problem: str) -> RequestError:
    for pattern, explanation, remedy in _WORDS:
        if pattern in problem:
            return RequestError(f"the JSON Schema cannot be obeyed: {explanation}", remedy)
    return RequestError(f"the JSON Schema cannot be obeyed: {_short(problem)}", _remedy(problem))


def _remedy(problem: str) -> str:
    if "nimplemented" in problem or "oneOf" in problem:
        return "leave that keyword out, or say it by anyOf, enum, properties, required, items, pattern or $ref"
    if "too " in problem or "limit" in problem:
        return "make it smaller: fewer optional properties, shorter patterns, lower maxLength and maxItems"
    return "check the schema against https://json-schema.org"


def _short(problem: object) -> str:
    """In one line, without the library's own state that follows it."""
    return " ".join(str(problem).partition("\n<")[0].split())[:300] or "no reason given"
