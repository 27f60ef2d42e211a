"""Part of core.lineage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def tally(words: Iterable[str]) -> dict[str, int]:
    """How often each word occurs, most frequent first: the form of every count in a manifest."""
    return dict(Counter(words).most_common())
