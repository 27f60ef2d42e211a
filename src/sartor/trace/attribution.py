"""Attribution methods, and the scores that one gives to training rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np


class Method(StrEnum):
    """Attribution method. A later one costs more and is closer to the effect of leaving a row out."""

    RETRIEVAL = "retrieval"
    GRADIENT = "gradient"
    UNROLLED = "unrolled"


@dataclass(frozen=True)
class Attribution:
    """Scores of one method.

    scores: (Q, N) of Q queries and the N rows of `TracedAdapter.rows`; larger if the row made the reply likelier.
        Those of unrolling are nats: the predicted rise of the reply's loss, summed over its tokens, if the row is
        left out. Others have no unit.
    approximate: the reason why the scores are those of a tuning that differs from the one that ran; empty otherwise.
    facts: further values for the JSON, such as the difference of the replayed loss.
    notes: what else a reader has to know, each a sentence.
    """

    method: Method
    scores: np.ndarray[Any, np.dtype[np.float64]]
    approximate: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
