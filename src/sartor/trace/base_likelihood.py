"""Likelihood of a reply under the tuned model and under its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sartor.evaluate.audit.model_pair import ModelPair
from sartor.inference.generate import context_tokens
from sartor.models.tuned_model import open_tuned
from sartor.trace.query_encoding import check_length
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery

# rounding differs by less; a base this close to the tuned model gives the reply as high a likelihood
AS_HIGH_NATS = 0.02


@dataclass(frozen=True)
class ReplyLikelihood:
    """Negative log-likelihood of a reply, in nats, summed over its tokens.

    tokens: of the reply, its end included.
    """

    tuned: float
    base: float
    tokens: int

    @property
    def base_says_it(self) -> bool:
        """Whether the base gives the reply a likelihood as high as the tuned model does."""
        return self.base <= self.tuned + AS_HIGH_NATS

    def as_json(self) -> dict[str, float]:
        """Return the part of the trace's JSON on the likelihood."""
        return {"tuned_nats": round(self.tuned, 4), "base_nats": round(self.base, 4), "tokens": self.tokens}


def reply_likelihood(
    traced: TracedAdapter, query: TraceQuery, notice: Callable[[str], object] = lambda line: None
) -> ReplyLikelihood:
    """Measure the likelihood of a query's reply with the adapter and without it.

    Raises RequestError if prompt and reply exceed the base's context, SourceError if the chat template refuses them,
    and what opening the base raises.
    """
    base, model = open_tuned(traced.artifact, notice)
    pair = ModelPair(base, model, traced.dataset.path)
    row = pair.encoded(query.prompt, query.reply, query.tools)
    check_length(len(row.ids), context_tokens(base.model))
    base_nats, tuned_nats = pair.nats([row])[:, 0]
    return ReplyLikelihood(tuned=float(tuned_nats), base=float(base_nats), tokens=row.supervised_tokens)
