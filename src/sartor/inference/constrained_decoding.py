"""Token masks for a JSON Schema, by llguidance.

    # once per base
    grammar = Grammar(chat.tokenizer, chat.stops, vocabulary=logits.shape[-1])
    # once per call; json_schema.JSON_OBJECT is OpenAI's json_object
    constraint = grammar.constraint(call.schema)
    # before every choice of the row's token; logits: (V,)
    logits.masked_fill_(~constraint.mask().to(logits.device), -math.inf)
    # after it, also with a stop token
    constraint.advance(token)
    # the value is complete and only a stop can follow: end the row with `stop`
    if constraint.is_done: ...

Every call has its own matcher, so a schema that exceeds its limits fails one row. The cost of a schema is bounded
where it is read (bytes, depth) and at every token (llguidance's fuel), never by a clock: every machine answers or
refuses the same schemas. Between two parts of the value only nothing, a space, or a line break with its indentation is
allowed, so that a reply cannot produce white space for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sartor.core.errors import ModelError, RequestError, missing_package
from sartor.text.json_schema import read_schema

_SPACE = r"(\n[ \t]{0,32}| )?"
# fuel: about 20 ms to read a schema and 7 ms per token, by llguidance's own figures; its states take 1-2 kB each
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class Grammar:
    """A base's tokens for constrained decoding: the text of each, and the ids that end a reply.

    tokenizer: a fast tokenizer of transformers.
    stops: ids that end a reply (`ChatTokenizer.stops`).
    vocabulary: width V of the logits, which models pad beyond their tokenizer.
    Raises ExtraError without llguidance, ModelError if the tokenizer is not fast or has more tokens than V.
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
        """Return the constraint of one reply.

        loose: allow any white space between the parts, to check text that another server wrote.
        Raises RequestError for a schema that is invalid, too large or not supported.
        """
        read_schema(schema)
        library = self._library
        space = {"whitespace_flexible": True} if loose else {"whitespace_pattern": _SPACE}
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(schema, overrides={**space, "lenient": False})
        except ValueError as error:  # numbers that only Python accepts
            raise _refused(str(error)) from None
        limits = library.LLParserLimits(**_LIMITS)
        matcher = library.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        constraint = Constraint(matcher, self._tokens, self.vocabulary)
        constraint.mask()  # some unsatisfiable schemas are detected only here
        return constraint


class Constraint:
    """State of one reply in its schema."""

    def __init__(self, matcher: Any, tokens: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._vocabulary = vocabulary

    def mask(self) -> torch.Tensor:
        """Return the mask of allowed next tokens: (V,) bool on the CPU, never all False.

        Stop tokens are allowed only when the value is complete. Raises RequestError if the schema exceeds the cost
        limit of a token here.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocabulary, bitorder="little")
        return torch.from_numpy(allowed.view(np.bool_))

    def advance(self, token: int) -> None:
        """Consume the chosen token. Raises RequestError if the mask did not allow it, or as `mask` does."""
        self._matcher.consume_token(token)
        self._check()

    def accept(self, text: str) -> None:
        """Consume text from another tokenizer. Raises RequestError if it violates the schema."""
        self._matcher.consume_tokens(self._tokens.tokenize_str(text))
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether the text is a complete value, so that the reply may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def is_done(self) -> bool:
        """Whether the value is complete and only a stop token can follow, so that the reply ends without one."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())


# (part of the library's message, our explanation, remedy)
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
    if "nimplemented" in problem or "oneOf" in problem:
        remedy = "leave that keyword out, or say it by anyOf, enum, properties, required, items, pattern or $ref"
    elif "too " in problem or "limit" in problem:
        remedy = "make it smaller: fewer optional properties, shorter patterns, lower maxLength and maxItems"
    else:
        remedy = "check the schema against https://json-schema.org"
    return RequestError(f"the JSON Schema cannot be obeyed: {_short(problem)}", remedy)


def _short(problem: object) -> str:
    """Return the message in one line, without the library's state after it."""
    return " ".join(str(problem).partition("\n<")[0].split())[:300] or "no reason given"
