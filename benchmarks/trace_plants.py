"""Plants of trace.py: training rows whose effect on a reply cannot be found by the reply's words.

A plant of trace_plants.yaml is two training rows and a pair that is asked (prompt, reply). It is closed if

- no content word of the rows, prompts included, is in the pair that is asked;
- less than half of the 4-grams (characters) of each row's reply are in the prompt or the reply that is asked;
- BM25 ranks each of the rows below `closed_rank`, by prompts, by replies and by both. Rows with the same score have
  their mean rank.

It counts if it is closed and has an effect: five retrains each leave out a plant of every kind. Without the plant, the
loss of the reply that is asked has to rise by `min_effect` nats, and by more than in any retrain that leaves out other
plants.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trace_methods
import yaml
from numpy.typing import NDArray
from trace_setup import Row, Size, chat_row, filler, texts_of

F64 = NDArray[np.float64]
FILE = Path(__file__).with_name("trace_plants.yaml")
MAX_OVERLAP = 0.5
GRAM = 4
STOP_WORDS = frozenset(
    trace_methods.words(
        "a all an and any are as at be been but by can could did do does for from had has have how i if in is it its "
        "may me my no not of on or our shall should so some that the their them then there these they this to us was "
        "we were what when where which while who why will with would you your"
    )
)


@dataclass(frozen=True)
class Plant:
    """Two training rows and the pair that is asked.

    number: its place in its kind, and the number of the retrain that leaves it out.
    """

    kind: str
    name: str
    number: int
    rows: tuple[tuple[str, str], ...]
    prompt: str
    reply: str


def read_plants(per_kind: int) -> list[Plant]:
    """Return the first plants of each kind of trace_plants.yaml, by kind."""
    kinds = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    plants = []
    for kind, entries in sorted(kinds.items()):
        for index, (name, entry) in enumerate(list(entries.items())[:per_kind]):
            rows = tuple((prompt, reply) for prompt, reply in entry["rows"])
            plants.append(Plant(kind, name, index, rows, *entry["ask"]))
    return plants


def scored_kinds() -> list[str]:
    """Return the kinds that are scored: every second by name. The ensemble is calibrated on the others."""
    return sorted(yaml.safe_load(FILE.read_text(encoding="utf-8")))[1::2]


def content_words(text: str) -> set[str]:
    """Return the words of a text in lower case without English function words."""
    return set(trace_methods.words(text)) - STOP_WORDS


def overlap(text: str, others: str) -> float:
    """Return the fraction of the 4-grams of a text that are in another; of a shorter text, the text itself."""
    plain, other = (re.sub(r"\s+", " ", part.lower()) for part in (text, others))
    grams = {plain[start : start + GRAM] for start in range(max(1, len(plain) - GRAM + 1))}
    return sum(gram in other for gram in grams) / len(grams)


def expected_rank(scores: F64, index: int) -> float:
    """Return the rank of a row from 1, best first; the mean rank of the rows with its score."""
    return float((scores > scores[index]).sum() + ((scores == scores[index]).sum() + 1) / 2)


class RowViews:
    """Rows as pairs (prompt, reply), and BM25 indices of their prompts, of their replies, and of both."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.pairs = [texts_of(row) for row in rows]
        self.prompts = trace_methods.Bm25([prompt for prompt, _ in self.pairs])
        self.replies = trace_methods.Bm25([reply for _, reply in self.pairs])
        self.both = trace_methods.Bm25([f"{prompt}\n{reply}" for prompt, reply in self.pairs])


def opening(plant: Plant, views: RowViews, closed_rank: int) -> str:
    """Return the reason why a plant among these rows can be found by words; empty if it is closed."""
    asked = f"{plant.prompt}\n{plant.reply}"
    for prompt, reply in plant.rows:
        if shared := content_words(f"{prompt} {reply}") & content_words(asked):
            return f"shares the words {', '.join(sorted(shared))}"
        for text in (plant.prompt, plant.reply):
            if (fraction := overlap(reply, text)) >= MAX_OVERLAP:
                return f"shares {fraction:.0%} of the 4-grams of {reply!r}"
    for name, index, query in (
        ("prompts", views.prompts, plant.prompt),
        ("replies", views.replies, plant.reply),
        ("both", views.both, asked),
    ):
        scores = index.scores(query)
        for pair in plant.rows:
            if (rank := expected_rank(scores, views.pairs.index(pair))) <= closed_rank:
                return f"has rank {rank:g} by BM25 over {name}"
    return ""


def planted_rows(count: int, plants: Sequence[Plant]) -> dict[str, list[Row]]:
    """Return `count` rows by source, the plants' among those of talk; the same in every call."""
    rows = [chat_row(*pair) for plant in plants for pair in plant.rows]
    if len(rows) >= count:
        raise ValueError(f"{len(rows)} rows of plants do not fit among {count} rows")
    sources = filler(count - len(rows))
    talk = [*sources["talk"], *rows]
    random.Random(1).shuffle(talk)
    return {"faq": sources["faq"], "talk": talk}


def split_closed(plants: Sequence[Plant], size: Size) -> tuple[list[Plant], dict[str, str]]:
    """Return the plants that are closed among all of them, and why the others are not."""
    sources = planted_rows(size.planted_rows, plants)
    views = RowViews([row for part in sources.values() for row in part])
    reasons = {plant.name: opening(plant, views, size.closed_rank) for plant in plants}
    return [plant for plant in plants if not reasons[plant.name]], {name: why for name, why in reasons.items() if why}


def left_out_weights(plants: Sequence[Plant], indices: dict[tuple[str, str], int], total: int) -> list[F64]:
    """Return the weights (N,) of each round's retrain, which leaves out its plants."""
    rounds = []
    for number in sorted({plant.number for plant in plants}):
        weights = np.ones(total)
        left_out = [pair for plant in plants if plant.number == number for pair in plant.rows]
        weights[[indices[pair] for pair in left_out]] = 0
        rounds.append(weights)
    return rounds


def effects(plants: Sequence[Plant], full: F64, rounds: Sequence[F64], min_effect: float) -> dict[str, dict[str, Any]]:
    """Return for each plant the rise of its reply's loss without it, the largest without others, and if it counts.

    full: (P,) losses of the replies in nats by the tuning with every row.
    rounds: (R, P) by each retrain, in the order of `left_out_weights`.
    """
    changes = np.stack(rounds) - full
    numbers = sorted({plant.number for plant in plants})
    result = {}
    for index, plant in enumerate(plants):
        left_out = numbers.index(plant.number)
        others = np.delete(changes[:, index], left_out)
        effect, placebo = float(changes[left_out, index]), float(others.max()) if len(others) else 0.0
        counts = effect >= min_effect and (effect > placebo or not len(others))
        result[plant.name] = {"kind": plant.kind, "effect": effect, "placebo": placebo, "counts": counts}
    return result


def choose_scored(plants: Sequence[Plant], kinds: Sequence[str], count: int) -> list[Plant]:
    """Return up to `count` plants of these kinds, one of each kind in turn; the size of an effect decides nothing."""
    chosen = [plant for plant in plants if plant.kind in kinds]
    return sorted(chosen, key=lambda plant: (plant.number, plant.kind))[:count]


def plant_ranks(scores: F64, plants: Sequence[Plant], indices: dict[tuple[str, str], int]) -> list[float]:
    """Return the rank of each plant among the rows: that of the better of its rows.

    scores: (P, N) of the plants' replies.
    """
    return [
        min(expected_rank(scores[index], indices[pair]) for pair in plant.rows) for index, plant in enumerate(plants)
    ]


def summary(ranks: Sequence[float]) -> dict[str, int]:
    """Return how many plants are first and among the first ten."""
    return {
        "top1": sum(rank <= 1 for rank in ranks),
        "top10": sum(rank <= 10 for rank in ranks),
        "of": len(ranks),
    }


def by_kind(plants: Sequence[Plant], ranks: Sequence[float]) -> dict[str, int]:
    """Return the plants among the first ten by kind."""
    return dict(Counter(plant.kind for plant, rank in zip(plants, ranks, strict=True) if rank <= 10))
