"""How many of the rows one voice may give, and which: what a loud key says must not be all that is learnt."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

from sartor.curate.inbox.lines import Line, Place
from sartor.curate.inbox.terms import InboxTerms

Giver = tuple[str, str]


def over_share(lines: Sequence[Line], terms: InboxTerms) -> dict[Place, str]:
    """Lines that are too many of one user or one key, drawn by the seed, each with the sentence that says so."""
    gone: dict[Place, str] = {}
    for giver_of in (_user, _key):
        gone |= _cut([line for line in lines if line.place not in gone], terms, giver_of)
    return gone


def _user(line: Line) -> Giver:
    return line.key, line.user


def _key(line: Line) -> Giver:
    return line.key, ""


def _cut(lines: Sequence[Line], terms: InboxTerms, giver_of: Callable[[Line], Giver]) -> dict[Place, str]:
    counts = Counter(map(giver_of, lines))
    most = allowed(list(counts.values()), terms)
    taken: Counter[Giver] = Counter()
    gone: dict[Place, str] = {}
    for line in sorted(lines, key=lambda line: _draw(terms.seed, line)):
        giver = giver_of(line)
        taken[giver] += 1
        if taken[giver] > most:
            what = "user" if giver[1] else "key"
            gone[line.place] = f"its {what} gives {counts[giver]} rows; of {len(counts)} that speak, one may give {most}"
    return gone


def _draw(seed: int, line: Line) -> bytes:
    return hashlib.sha256(f"{seed}:{line.receipt}:{line.key}".encode()).digest()


def allowed(counts: Sequence[int], terms: InboxTerms) -> int:
    """How many rows each may give: the most that is no more than `most_fraction` of what is then left of all, or `most_rows`.

    Where few speak, twice the even share stands for the fraction: of one or two, all may be said by one.

    >>> allowed([1000, 20, 20, 20, 20, 20, 20, 20], InboxTerms())
    46
    >>> allowed([60], InboxTerms())
    60
    """
    most = max(counts, default=0)
    fraction = max(terms.most_fraction, 2 / len(counts)) if counts else 1.0
    while fraction < 1:
        less = max(terms.most_rows, int(fraction * sum(min(count, most) for count in counts)))
        if less >= most:
            break
        most = less
    return most
