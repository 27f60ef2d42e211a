"""Version of Sartor's own arithmetic, by the dtype that a base computes in.

Replies, activations and runs repeat to the bit only by the arithmetic that made them. What is stored to be repeated,
compared or continued therefore states its dtype and `numerics`, this version. Content without the key was made by
numerics 1.

    1   the frozen product is rounded to the dtype, then the low-rank product is added and the sum is rounded again
    2   the low-rank product is added to the frozen product before that is rounded: once

fp32 and fp64 lose nothing that matters by the first way, and still go it. A quantised base has the version of the
dtype that it computes in, a composed base that of its language model. Engines that are not Sartor's (llama.cpp,
servers over HTTP) have none.
"""

from __future__ import annotations

from typing import Any

FIRST = 1
NUMERICS = {"bfloat16": 2, "float16": 2}
CHANGES = {2: "the low-rank product is added before the frozen product is rounded"}
_MOST_SHOWN = 20


def numerics(dtype: str) -> int:
    """Return the version by which this Sartor computes in `dtype` (torch's name for it, with or without `torch.`)."""
    return NUMERICS.get(dtype.removeprefix("torch."), FIRST)


def difference(made_by: Any, dtype: str) -> str:
    """Return in what the arithmetic that made something in `dtype` differs from this version's; empty if it does not.

    made_by: what stands under `numerics`; None for content that has no such key.
    """
    made_by, current = FIRST if made_by is None else made_by, numerics(dtype)
    if made_by == current:
        return ""
    name = dtype.removeprefix("torch.")
    if isinstance(made_by, int) and made_by > current:
        return f"numerics {made_by}, of a newer Sartor: this version computes {name} by numerics {current}"
    change = f": {CHANGES[current]}" if current in CHANGES else ""
    return f"numerics {made_by!s:.{_MOST_SHOWN}}, and this version computes {name} by numerics {current}{change}"


def not_checked(made_by: Any, dtype: str) -> str:
    """Return why something made in `dtype` cannot be compared with what this version makes; empty if it can."""
    reason = difference(made_by, dtype)
    return f"not checked: made by {reason}" if reason else ""
