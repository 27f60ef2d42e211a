"""Queries as tokens, for the methods that compute with the base."""

from __future__ import annotations

from sartor.core import reply_markup
from sartor.core.errors import ConfigError, RequestError
from sartor.inference.generate import context_tokens
from sartor.models.base import Base
from sartor.models.packing import TokenizedExample
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery
from sartor.tune.dataset_encoding import keep_last_reply


def encode_query(base: Base, traced: TracedAdapter, query: TraceQuery) -> TokenizedExample:
    """Return a query as tokens, of which those of the reply alone are learnt.

    Raises SourceError if the chat template refuses it, RequestError if it is longer than the base's context,
    ConfigError if the template gives the reply no token.
    """
    example = reply_markup.read_example(query.example, base.chat.markup.spelt, keep_id=True)
    row = keep_last_reply(base.chat.encode(example, traced.dataset.path), example)
    check_length(len(row.ids), context_tokens(base.model))
    if not row.supervised_tokens:
        raise ConfigError("the template gives the reply no token", '--reply "what the model said"')
    return row


def check_length(tokens: int, context: int | None) -> None:
    """Raise RequestError if a prompt with its reply has more tokens than the base has positions."""
    if context and tokens > context:
        raise RequestError(
            f"prompt and reply have {tokens:,} tokens, and the base has {context:,} positions: no model can compute "
            "the reply's likelihood",
            "a shorter reply; or `sartor trace` by --method retrieval, which reads words alone",
        )
