"""Rows for the tests of de-duplication: seeded text with the word frequencies of a language, and what may be done to it."""

from __future__ import annotations

import random

import numpy as np

from sartor.curate.dedup import clusters, near_duplicates, pair_scoring, shingles

_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"


def words(count: int = 5000, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return list(
        dict.fromkeys("".join(rng.choices(_LETTERS, range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(count))
    )


WORDS = words()
WEIGHTS = [1 / (place + 3) for place in range(len(WORDS))]


def text(count: int, rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, WEIGHTS, k=count))


def texts(rows: int, count: int = 200, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [text(count, rng) for _ in range(rows)]


def edited(row: str, fraction: float, rng: random.Random) -> str:
    """That fraction of the words substituted, deleted or inserted."""
    found = row.split()
    for place in sorted(rng.sample(range(len(found)), round(fraction * len(found))), reverse=True):
        kind = rng.randrange(3)
        if kind == 0:
            found[place] = rng.choice(WORDS)
        elif kind == 1:
            del found[place]
        else:
            found.insert(place, rng.choice(WORDS))
    return " ".join(found)


def search(
    rows: list[str], **changes: object
) -> tuple[near_duplicates.NearDuplicatePairs, clusters.Removals, pair_scoring.DuplicateRules]:
    """What the core makes of rows at its defaults."""
    how = shingles.resolve("auto", 0, rows)
    rules = pair_scoring.rules_for(how, **changes)
    sketches = shingles.sketch(rows, how)
    rank = np.array([len(row) for row in rows])
    found = near_duplicates.near_duplicates(sketches.shingles, sketches.offsets, sketches.digests, rules, rank)
    return found, clusters.resolve_clusters(found.pairs, rank, rules), rules
