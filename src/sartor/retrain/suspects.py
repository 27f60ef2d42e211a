"""Keys whose ratings are unlike everybody else's: one that turns good and bad around is found by how often it says bad.

Each key is held against all others by the monitors' own evidence (`serving/dispatch/sequential_tests.py`), both ways. A key that is named has
done nothing wrong for sure: whoever asks harder questions is unlike the others. A person decides (`--believe`, `--ignore`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sartor.evaluate.limits import Check
from sartor.serving.dispatch.sequential_tests import Rate, excess

# by which a key's rate of bad ratings may differ from that of all others
MARGIN = 0.15
# the probability that any key is named of people who rate alike, within the margin
FALSE_ALARM = 0.01


@dataclass(frozen=True)
class Suspect:
    """A key's ratings and everybody else's."""

    key: str
    own: Rate
    others: Rate

    def __str__(self) -> str:
        return f"{self.key} found {self.own.bad} of {self.own.seen} bad, all others {self.others.bad} of {self.others.seen}"


def by_key(ratings: Iterable[tuple[str, float]]) -> dict[str, Rate]:
    """(key, rating) -> what each key said; a rating of 0 says nothing."""
    found: dict[str, Rate] = {}
    for key, rating in ratings:
        if rating:
            found.setdefault(key, Rate()).count(rating < 0)
    return found


def suspects(rates: Mapping[str, Rate]) -> list[Suspect]:
    """The keys that differ, the most telling first. Of one key alone nothing can be said."""
    limit = math.log(2 * max(len(rates), 1) / FALSE_ALARM)
    found = []
    for key, own in rates.items():
        rest = [rate for name, rate in rates.items() if name != key]
        others = Rate(sum(rate.seen for rate in rest), sum(rate.bad for rate in rest))
        evidence = max(excess(own, others, MARGIN), excess(others, own, MARGIN)) if others.seen else 0.0
        if evidence >= limit:
            found.append((evidence, Suspect(key, own, others)))
    # where one key is unlike, all others are a little unlike those among whom it is: the most telling is named alone
    return [suspect for _, suspect in sorted(found, key=lambda pair: -pair[0])[:1]] if len(rates) <= 2 else [
        suspect for _, suspect in sorted(found, key=lambda pair: -pair[0])
    ]  # fmt: skip


def check(rates: Mapping[str, Rate], believed: Iterable[str] = ()) -> Check:
    """Whether everybody rates alike, but for those whom a person believes."""
    found = [suspect for suspect in suspects(rates) if suspect.key not in set(believed)]
    if not found:
        return Check("pass", f"{len(rates)} keys rate alike, within {MARGIN:g}")
    names = ", ".join(suspect.key for suspect in found)
    return Check("fail", "; ".join(map(str, found)), f"look at what {names} rated; then --ignore or --believe {found[0].key}")
