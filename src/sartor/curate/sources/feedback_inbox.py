"""Whose ratings contradict the others' on the same replies, or what is known of them: those are set aside, and named.

A trial is a reply that a voice rated and that is judged elsewhere too: by what is known of it, else by most of the other
voices, one vote each. A voice is set aside when it stands against that judgement both in more of its trials than `disagreement`
allows (exact binomial test) and more often than the other voices do (Fisher's exact test, 1922), by p-values that Holm
corrects over all voices. Only the worst goes at once: whoever rated the same replies as a voice that lies is contradicted by
it, and what remains is judged anew without. Who merely thinks otherwise now and then stays; so does a majority that lies,
unless it is held against what is known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sartor.core.statistics import holm
from sartor.curate.inbox.lines import Line
from sartor.curate.inbox.terms import InboxTerms

Giver = tuple[str, str]  # key, user
WHOLE = "*"  # in the place of a user: the key with all of its users
Votes = Mapping[str, Mapping[Giver, int]]  # of a reply, what each giver says of it: a sum of signs


@dataclass(frozen=True)
class Standing:
    """How what a voice says goes with the rest. user: "*" of a key as a whole. compared: its trials. against: those of them in
    which it contradicts. p: that it does so by chance, corrected.
    """

    key: str
    user: str
    compared: int = 0
    against: int = 0
    p: float = 1.0
    is_aside: bool = False

    @property
    def score(self) -> float:
        """How far it is to be trusted, 0..1: the mean of what its agreement leaves likely, from even odds on (Laplace 1774)."""
        return (self.compared - self.against + 1) / (self.compared + 2)

    @property
    def name(self) -> str:
        """The key, and the user's digest cut short, as a person reads it."""
        key = f"the key {self.key}" if self.key else "whoever asks without a key"
        return key if self.user == WHOLE else f"the user {self.user[:12]} of {key}"

    @property
    def why(self) -> str:
        """Why it is set aside, in a sentence."""
        return f"{self.name} contradicts the rest on {self.against} of {self.compared} replies (p {self.p:.1g})"


def judged(lines: Sequence[Line], terms: InboxTerms) -> list[Standing]:
    """The standing of every key, and of every user of a key that has several, by key and user."""
    votes, known = _votes(lines)
    users = _users(lines)
    found: dict[Giver, Standing] = {}
    while True:
        standings = [one for one in _standings(votes, known, users, terms) if (one.key, one.user) not in found]
        worst = min(standings, key=lambda one: (one.p, -one.against), default=None)
        if worst is None or worst.p > terms.alpha:
            return sorted([*found.values(), *standings], key=lambda one: (one.key, one.user))
        found[worst.key, worst.user] = replace(worst, is_aside=True)
        votes = {item: {giver: sum_ for giver, sum_ in by.items() if not _is_of(giver, worst)} for item, by in votes.items()}


def aside(standings: Iterable[Standing]) -> Mapping[Giver, Standing]:
    """Those that are set aside, by key and user."""
    return {(one.key, one.user): one for one in standings if one.is_aside}


def _is_of(giver: Giver, voice: Standing) -> bool:
    return giver[0] == voice.key and voice.user in (WHOLE, giver[1])


def _votes(lines: Iterable[Line]) -> tuple[Votes, Mapping[str, int]]:
    votes: dict[str, Counter[Giver]] = defaultdict(Counter)
    known: dict[str, int] = {}
    for line in lines:
        if line.item and line.sign:
            votes[line.item][line.key, line.user] += line.sign
            known[line.item] = line.known
    return {item: by for item, by in votes.items() if known[item] or len(by) > 1}, known


def _users(lines: Iterable[Line]) -> Mapping[str, set[str]]:
    """Key -> its users."""
    users: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        users[line.key].add(line.user)
    return users


def _standings(votes: Votes, known: Mapping[str, int], users: Mapping[str, set[str]], terms: InboxTerms) -> list[Standing]:
    """Every voice, its p corrected over all that have a trial. Keys are compared with keys, users with users."""
    keys = _trials(votes, known, lambda giver: (giver[0], WHOLE))
    people = _trials(votes, known, lambda giver: giver)
    wanted = [(key, user) for key, some in users.items() if len(some) > 1 for user in some if user]
    tested = [
        *(_tested(voice, keys, terms) for voice in ((key, WHOLE) for key in users)),
        *(_tested(voice, people, terms) for voice in wanted),
    ]
    counted = [place for place, one in enumerate(tested) if one.compared]
    for place, p in zip(counted, holm([tested[place].p for place in counted]), strict=True):
        tested[place] = replace(tested[place], p=p)
    return tested


def _trials(votes: Votes, known: Mapping[str, int], voice_of: Any) -> dict[Giver, tuple[int, int]]:
    """Voice -> (against, compared)."""
    found: dict[Giver, tuple[int, int]] = {}
    for item, by in votes.items():
        sums: Counter[Giver] = Counter()
        for giver, said in by.items():
            sums[voice_of(giver)] += said
        signs = {voice: _sign(total) for voice, total in sums.items()}
        together = sum(signs.values())
        for voice, own in signs.items():
            judgement = known.get(item) or _sign(together - own)
            if own and judgement:
                against, compared = found.get(voice, (0, 0))
                found[voice] = against + (own != judgement), compared + 1
    return found


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _tested(voice: Giver, trials: Mapping[Giver, tuple[int, int]], terms: InboxTerms) -> Standing:
    from scipy.stats import binom, hypergeom  # a second to load, which a source without an inbox need not wait for

    against, compared = trials.get(voice, (0, 0))
    if not compared:
        return Standing(*voice)
    all_against, all_compared = (sum(one[place] for one in trials.values()) for place in (0, 1))
    p = float(binom.sf(against - 1, compared, terms.disagreement))
    if all_compared > compared:
        p = max(p, float(hypergeom.sf(against - 1, all_compared, all_against, compared)))
    return Standing(*voice, compared, against, p)
