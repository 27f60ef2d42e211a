"""Which groups are held out: decided by the digest of (seed, group), so that neither row order nor other runs matter."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable


def held_out_groups(groups: Iterable[str], fraction: float, seed: int) -> set[str]:
    """Groups that together hold about `fraction` of the rows. `groups` names the group of each row.

    At least one group stays for training. A group that would overshoot the wanted count by more than it helps is passed
    over, so a few large groups cannot eat the training rows.

    >>> sorted(held_out_groups(["a", "b", "c", "d"], 0.5, seed=0))
    ['a', 'd']
    """
    sizes = Counter(groups)
    wanted = round(fraction * sizes.total())
    chosen: set[str] = set()
    count = 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        if count >= wanted or len(chosen) == len(sizes) - 1:
            break
        if count + sizes[group] - wanted <= max(wanted - count, 1):
            chosen.add(group)
            count += sizes[group]
    return chosen
