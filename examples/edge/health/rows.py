"""A made-up person's log with a made-up device: what was written down, and how it is filed. Synthetic, and no medical
advice.

    python rows.py OUT.jsonl             what the publisher tunes on: many made-up people, no names
    python rows.py OUT.jsonl --owner     one made-up person's own entries, with words of her own, which never leave the
                                         device

Nobody's data is in it, and nothing in it says what to take or to do: an entry is filed, not judged.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

KINDS = {
    "sleep": ("slept {n} hours", "lay awake from {n} to three", "a nap of {n} quarters of an hour"),
    "movement": ("walked {n} thousand steps", "{n} lengths in the pool", "climbed {n} floors"),
    "food": ("{n} slices of bread", "soup and {n} potatoes", "{n} glasses of water"),
    "mood": ("felt {n} of ten", "laughed {n} times today", "was cross {n} times"),
}
# what only she calls it so: a base cannot know, and a release for everybody should not
OWN = {
    "sleep": ("a boat night, {n} harbours",),
    "movement": ("round the heron, {n} times",),
    "food": ("{n} of grandmother's moons",),
    "mood": ("weather inside: {n}",),
}


def rows(words: dict[str, tuple[str, ...]], seed: int) -> list[dict[str, str]]:
    """One row for each wording and number, shuffled."""
    made = [
        {"question": f"log: {wording.format(n=number)}", "answer": json.dumps({"file": kind})}
        for kind, wordings in words.items()
        for wording, number in itertools.product(wordings, range(1, 10))
    ]
    random.Random(seed).shuffle(made)
    return made


def main(out: str, *options: str) -> None:
    """Write the rows."""
    lines = (json.dumps(row) + "\n" for row in rows(OWN if "--owner" in options else KINDS, 0))
    Path(out).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
