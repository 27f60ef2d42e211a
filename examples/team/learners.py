"""Records of learners of the times table, as JSONL: `python examples/team/learners.py tutor.jsonl
LEARNER=records.jsonl...`.

A record is an answer that a learner gave and what the tutor said that helped: what slipped, a hint, the next exercise.

    7 x 8 = 56, said 15     ->      {"slip":"added","hint":"count it as rows of eggs","next":"7 x 7"}

What slipped stands in the question: the right answer is beside what was said. Which hint helps, and how far the next
exercise
may go, is of the learner: each has a hint for small exercises and one for large ones, a thing to count with, and a
step. The first file has twelve learners together, without names, as a tutor for everybody would be tuned; each further
one has a learner who is not among them (ana, bo, cem).
Records are made by this script, from a seed; no person is behind them.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import write

SYSTEM = "Tutor of the times table."
HINTS = (
    "count it as rows of {thing}",
    "double the half with {thing}",
    "start from ten rows of {thing}",
    "add one more row of {thing}",
)
THINGS = ("eggs", "goals", "beads", "stickers", "seats")
SLIPS = ("none", "added", "one row less", "one row more", "swapped")
STEPS = (1, 2, 3)
# an exercise above it is a large one
LARGE = 30
SHARED, RECORDS = 12, 70


@dataclass(frozen=True)
class Learner:
    """What helps somebody: hint for small exercises, hint for large ones, thing, step."""

    small: str
    large: str
    thing: str
    step: int

    def helped(self, a: int, b: int, slip: str) -> str:
        """The tutor's reply to an answer of this learner."""
        hint = (self.large if a * b > LARGE else self.small).format(thing=self.thing)
        further = min(9, b + self.step) if slip == "none" else max(2, b - self.step)
        said = {"slip": slip, "hint": "" if slip == "none" else hint, "next": f"{a} x {further}"}
        return json.dumps(said, separators=(",", ":"))


def answered(a: int, b: int, slip: str) -> int:
    """What somebody says who slips like that."""
    right = a * b
    swapped = int(str(right)[::-1])
    return {"none": right, "added": a + b, "one row less": right - a, "one row more": right + a, "swapped": swapped}[
        slip
    ]


def records(learner: Learner, count: int, seed: str) -> Iterator[dict[str, Any]]:
    """Rows of one learner, no exercise with the same slip twice; those whose slip the answer does not show are left
    out.
    """
    draw = random.Random(seed)
    every = list(itertools.product(range(2, 10), range(2, 10), SLIPS))
    draw.shuffle(every)
    shown = [(a, b, slip) for a, b, slip in every if _shows(a, b, slip)]
    for a, b, slip in shown[:count]:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{a} x {b} = {a * b}, said {answered(a, b, slip)}"},
            {"role": "assistant", "content": learner.helped(a, b, slip)},
        ]
        yield {"messages": messages, "group": f"{a} x {b} {slip}"}


def _shows(a: int, b: int, slip: str) -> bool:
    if slip == "swapped" and (a * b < 10 or a * b % 10 == 0):
        return False
    said = answered(a, b, slip)
    return [one for one in SLIPS if answered(a, b, one) == said] == [slip]


def somebody(seed: str) -> Learner:
    """A learner, by chance."""
    draw = random.Random(seed)
    small, large = draw.sample(HINTS, 2)
    return Learner(small, large, draw.choice(THINGS), draw.choice(STEPS))


def together() -> list[dict[str, Any]]:
    """Twelve learners' records, in one order."""
    rows = [
        row for number in range(SHARED) for row in records(somebody(f"learner {number}"), RECORDS, f"records {number}")
    ]
    random.Random(0).shuffle(rows)
    return rows


def of(name: str) -> list[dict[str, Any]]:
    """Records of one who is not among them."""
    return list(records(somebody(name), 2 * RECORDS, name))


if __name__ == "__main__":
    if len(sys.argv) < 2 or any("=" not in each for each in sys.argv[2:]):
        sys.exit("python examples/team/learners.py TUTOR.jsonl [LEARNER=RECORDS.jsonl ...]")
    write(Path(sys.argv[1]), together())
    for name, _, file in (each.partition("=") for each in sys.argv[2:]):
        write(Path(file), of(name))
