"""Version of Sartor's own arithmetic, by the dtype in which a base computes.

Replies, activations and runs repeat bit for bit only under the arithmetic that produced them. Stored content that is
later repeated, compared or continued therefore states its dtype and `numerics`, this version. Content without the key
has numerics 1. W x is the frozen product, s B A x the low-rank product of LoRA:

    1   y = round(round(W x) + s B A x): the frozen product is rounded to the dtype, then the sum is rounded again
    2   y = round(W x + s B A x): the sum is rounded once
    3   the same, with s B rounded where 2 rounds B; tunings compute packs whose length is a multiple of 32 tokens

fp32 and fp64 lose nothing that matters with version 1 and still use it. A quantised base has the version of the dtype
in which it computes, a composed base that of its language model. Other engines (llama.cpp, servers over HTTP) have no
version.
"""

from __future__ import annotations

from typing import Any

FIRST = 1
NUMERICS = {"bfloat16": 3, "float16": 3}
CHANGES = {
    2: "the low-rank product is added before the frozen product is rounded",
    3: "B is scaled before it is rounded, and packs are filled up to a multiple of 32 tokens",
}
_MOST_SHOWN = 20


def numerics(dtype: str) -> int:
    """Return the version with which this Sartor computes in `dtype`.

    dtype: torch's name, with or without `torch.`.
    """
    return NUMERICS.get(dtype.removeprefix("torch."), FIRST)


def difference(made_by: Any, dtype: str) -> str:
    """Return how the arithmetic that made something in `dtype` differs from this version's; empty if equal.

    made_by: the stored value of `numerics`; None for content without that key.
    """
    made_by, current = FIRST if made_by is None else made_by, numerics(dtype)
    if made_by == current:
        return ""
    name = dtype.removeprefix("torch.")
    if isinstance(made_by, int) and made_by > current:
        return f"numerics {made_by}, of a newer Sartor: this version computes {name} by numerics {current}"
    oldest = made_by if isinstance(made_by, int) else current - 1
    changes = "; ".join(change for version, change in CHANGES.items() if oldest < version <= current)
    text = f"numerics {made_by!s:.{_MOST_SHOWN}}, and this version computes {name} by numerics {current}"
    return f"{text}: {changes}" if changes else text


def not_checked(made_by: Any, dtype: str) -> str:
    """Return why something made in `dtype` cannot be compared with this version's output; empty if it can."""
    reason = difference(made_by, dtype)
    return f"not checked: made by {reason}" if reason else ""
