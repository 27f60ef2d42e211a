"""The curve of `route.py`: what a request costs among 10 to 500 agents, what one more agent costs, and who is found.

An agent is one intent of home-intents in one of 65 languages: ten commands to fit on, three held out, three asked, of templates
apart. They are alike on purpose: most teams of this size would be easier.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, Protocol

import numpy as np
import route_sets as sets

from sartor.agents.routing import fitting, part, space
from sartor.agents.routing.exemplars import Exemplars, Prompt
from sartor.agents.routing.fitted import Fitted
from sartor.agents.team import Routing

FITTED, HELD, ASKED = 10, 3, 3
TIMED = 200
FOREIGN = 150


class Vectors(Protocol):
    """Of `Crew`."""

    def vectors(self, texts: Sequence[str], encoder: str = "minilm") -> Any:
        """(N, D)."""
        ...

    def afresh(self, texts: Sequence[str], encoder: str = "minilm") -> Any:
        """(N, D), computed."""
        ...


def members(most: int, seed: int = 0) -> dict[str, sets.Known]:
    """Up to `most` agents, the same first ones however many are asked for."""
    rng = random.Random(seed)
    pool = []
    for language in sets.languages():
        for intent, rows in sets.spoken(language, FITTED + HELD + ASKED, seed).items():
            if len(rows) == FITTED + HELD + ASKED:
                pool.append((f"{language}-{intent}", [text for text, _ in rows]))
    rng.shuffle(pool)
    found = {}
    for name, texts in pool[:most]:
        numbered = [Prompt(f"{name}:{n}", text) for n, text in enumerate(texts, 1)]
        exemplars = Exemplars(tuple(numbered[:FITTED]), tuple(numbered[FITTED : FITTED + HELD]))
        found[name] = sets.Known(exemplars, tuple(texts[FITTED + HELD :]))
    return found


def curve(sizes: Sequence[int], crew: Vectors, rules: Routing) -> list[dict[str, Any]]:
    """A point for each size, and for each the nearest centroid's accuracy."""
    if not sizes:
        return []
    everyone = members(max(sizes))
    ground = space.make("minilm", crew.vectors(space.general_texts()))
    parts, took = {}, []
    for name, one in everyone.items():
        vectors = crew.vectors(part.rows_of(one.exemplars).texts)
        began = time.perf_counter()
        parts[name] = part.fit(one.exemplars, ground, vectors)
        took.append(time.perf_counter() - began)
    talk = random.Random(0).sample(sets.small_talk(), FOREIGN)
    found = []
    for size in sizes:
        names = list(everyone)[:size]
        began = time.perf_counter()
        fitted = fitting.assemble({name: parts[name] for name in names}, ground, rules.target, rules.risk)
        shared_s = time.perf_counter() - began
        asked = [(text, name) for name in names for text in everyone[name].asked]
        found.append(
            {
                "agents": len(names),
                **found_by(fitted, asked, crew),
                "centroid_best": nearest(everyone, names, asked, crew),
                "chitchat_to_base": to_base(fitted, talk, crew),
                "fit_s_per_agent": round(median(took[: len(names)]), 4),
                "shared_s": round(shared_s, 2),
                **timed(fitted, [text for text, _ in asked], crew),
            }
        )
        found[-1]["ratio"] = round(found[-1]["judge_ms"] / found[0]["judge_ms"], 2)
    return found


def found_by(fitted: Fitted, asked: Sequence[tuple[str, str]], crew: Vectors) -> dict[str, float]:
    """Of own prompts: those that get their agent at the threshold, and those whose best agent is theirs."""
    texts = [text for text, _ in asked]
    judged = fitted.judge(texts, crew.vectors(texts))
    best = [max(one.score.items(), key=lambda pair: pair[1]) for one in judged]
    right = np.array([name == owner for (name, _), (_, owner) in zip(best, asked, strict=True)])
    sure = np.array([score >= fitted.threshold for _, score in best])
    return {"accuracy": round(float((right & sure).mean()), 4), "best": round(float(right.mean()), 4)}


def nearest(everyone: dict[str, sets.Known], names: list[str], asked: Sequence[tuple[str, str]], crew: Vectors) -> float:
    """Of own prompts those whose nearest centroid is their agent's."""
    means = np.stack([crew.vectors([p.text for p in everyone[name].exemplars.train]).mean(axis=0) for name in names])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    best = (crew.vectors([text for text, _ in asked]) @ means.T).argmax(axis=1)
    return round(float(np.mean([names[place] == owner for place, (_, owner) in zip(best, asked, strict=True)])), 4)


def to_base(fitted: Fitted, texts: Sequence[str], crew: Vectors) -> float:
    """Of foreign prompts those that are left to the base."""
    judged = fitted.judge(texts, crew.vectors(texts))
    return round(float(np.mean([max(one.score.values()) < fitted.threshold for one in judged])), 4)


def timed(fitted: Fitted, texts: Sequence[str], crew: Vectors) -> dict[str, float]:
    """Medians of requests one by one: with the vector at hand, and with the encoder's part."""
    drawn = random.Random(1).choices(texts, k=TIMED)
    known = crew.vectors(drawn)
    fitted.judge(drawn[:1], known[:1])
    judge, encode = [], []
    for place, text in enumerate(drawn):
        began = time.perf_counter()
        fitted.judge([text], known[place : place + 1])
        judge.append(time.perf_counter() - began)
        if place < TIMED // 10:
            began = time.perf_counter()
            crew.afresh([text])
            encode.append(time.perf_counter() - began)
    return {
        "judge_ms": round(1e3 * median(judge), 3),
        "with_encoder_ms": round(1e3 * (median(judge) + median(encode)), 3),
    }
