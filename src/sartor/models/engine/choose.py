"""Logits -> the next token of one reply: penalties, grammar, temperature, nucleus; and what was likely.

Every reply draws from a generator of its own, seeded by the call alone, one number per token: a reply does not depend on
who is answered beside it.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any, Protocol

import torch

from sartor.models.engine.contract import Logprob
from sartor.models.engine.spelling import token_text
from sartor.models.sampling import Sampling

# Tokens that are looked at before the whole vocabulary is sorted for a nucleus.
LIKELY = 256


class Constraint(Protocol):
    """Where a reply stands in its grammar."""

    def mask(self) -> torch.Tensor:
        """(V,) bool on the CPU: the tokens that may come next, at least one."""
        ...

    def advance(self, token: int) -> None:
        """Take the token that was chosen."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether nothing but the end can follow."""
        ...


class Chooser:
    """One reply's choices."""

    def __init__(self, sampling: Sampling, constraint: Constraint | None = None) -> None:
        self.sampling, self.constraint = sampling, constraint
        self._draw = random.Random(sampling.seed)
        self._written: Counter[int] = Counter()
        self._has_penalty = bool(sampling.frequency_penalty or sampling.presence_penalty)

    @property
    def is_plain(self) -> bool:
        """Whether the largest logit is the choice."""
        return self.sampling.is_greedy and not self._has_penalty and self.constraint is None

    def choose(self, logits: torch.Tensor) -> int:
        """A token for (V,) finite fp32 logits on the CPU. Raises RequestError when the grammar cannot go on."""
        if self._has_penalty or self.constraint is not None:
            logits = logits.clone()
        if self._has_penalty and self._written:
            tokens = torch.tensor(list(self._written))
            counts = torch.tensor(list(self._written.values()), dtype=torch.float32)
            logits[tokens] -= self.sampling.frequency_penalty * counts + self.sampling.presence_penalty
        if self.constraint is not None:
            logits[~self.constraint.mask()] = -math.inf
        return int(logits.argmax()) if self.sampling.is_greedy else self._sample(logits)

    def take(self, token: int) -> None:
        """Note a token that was written."""
        if self._has_penalty:
            self._written[token] += 1
        if self.constraint is not None:
            self.constraint.advance(token)

    @property
    def is_done(self) -> bool:
        """Whether the grammar lets nothing but the end follow."""
        return self.constraint is not None and self.constraint.is_done

    def _sample(self, logits: torch.Tensor) -> int:
        shares = (logits / self.sampling.temperature).softmax(-1)
        order = None
        if self.sampling.top_p < 1:
            ordered, order = shares.topk(min(LIKELY, len(shares)))
            if float(ordered.sum(dtype=torch.float64)) < self.sampling.top_p:
                ordered, order = shares.sort(descending=True)
            # a token stays if the mass before it is below top_p, so the most likely one always stays
            before = ordered.cumsum(-1, dtype=torch.float64) - ordered
            shares = ordered[before < self.sampling.top_p]
        sums = shares.cumsum(-1, dtype=torch.float64)
        place = int(torch.searchsorted(sums, self._draw.random() * float(sums[-1]), right=True))
        place = min(place, int((shares > 0).nonzero()[-1]))  # rounding may point behind the last
        return place if order is None else int(order[place])


def logprob(tokenizer: Any, logits: torch.Tensor, token: int, alternatives: int) -> Logprob:
    """The model's own log-probabilities, before temperature, penalties and grammar, from (V,) logits."""
    logs = logits.log_softmax(-1)
    top = logs.topk(alternatives)
    likely = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Logprob(
        token_text(tokenizer, token),
        float(logs[token]),
        tuple((token_text(tokenizer, other), float(value)) for other, value in likely),
    )
