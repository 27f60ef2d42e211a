"""The curve of `route.py`: what a request costs among 10 to 500 agents, what one more agent costs, and who is found.

An agent is one intent of home-intents in one of 65 languages: ten commands to fit on, three held out, three asked, of
templates apart. Times are processor time, since a shared machine's clock says more of its other work.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np
import route_sets as sets

from sartor.serving.routing import agent_classifier, calibration
from sartor.serving.routing.agent_classifier import GeneralPrompts
from sartor.serving.routing.exemplars import ExemplarPrompt, Exemplars
from sartor.serving.routing.router_model import FittedRouter
from sartor.serving.routing.text_features import TextFeatures
from sartor.serving.team_config import Routing

FITTED, HELD, ASKED = 10, 3, 3
ENCODERS = ("tfidf", "minilm")
MOST_ASKED = 500
TIMED, ENCODED = 100, 10
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
    """Up to `most` agents, the same first ones however many are asked for: all of one language, then all of the
    next.
    """
    languages = sets.languages()
    random.Random(seed).shuffle(languages)
    found: dict[str, sets.Known] = {}
    for language in languages:
        for intent, rows in sets.spoken(language, FITTED + HELD + ASKED, seed).items():
            if len(rows) < FITTED + HELD + ASKED:
                continue
            name, texts = f"{language}-{intent}", [text for text, _ in rows]
            numbered = [ExemplarPrompt(f"{name}:{n}", text) for n, text in enumerate(texts, 1)]
            exemplars = Exemplars(tuple(numbered[:FITTED]), tuple(numbered[FITTED : FITTED + HELD]))
            found[name] = sets.Known(exemplars, tuple(texts[FITTED + HELD :]))
            if len(found) == most:
                return found
    return found


@dataclass(frozen=True)
class Eyes:
    """Texts as the router sees them by one encoder."""

    ground: GeneralPrompts
    crew: Vectors

    def vectors(self, texts: Sequence[str]) -> Any:
        """(N, D); None for words alone."""
        return self.crew.vectors(texts) if self.ground.dense is not None else None

    def features(self, texts: Sequence[str]) -> TextFeatures:
        """Of N texts."""
        return self.ground.features(texts, self.vectors(texts))


def curve(sizes: Sequence[int], encoder: str, crew: Vectors, rules: Routing) -> list[dict[str, Any]]:
    """A point for each size, and for each the nearest centroid's accuracy."""
    if not sizes:
        return []
    everyone = members(max(sizes))
    ground = agent_classifier.make(
        encoder, None if encoder == "tfidf" else crew.vectors(agent_classifier.general_texts())
    )
    eyes, parts, took = Eyes(ground, crew), {}, []
    for name, one in everyone.items():
        vectors = eyes.vectors(agent_classifier.rows_of(one.exemplars).texts)
        began = time.process_time()
        parts[name] = agent_classifier.fit(one.exemplars, ground, vectors)
        took.append(time.process_time() - began)
    turns = sets.small_talk()
    talk = random.Random(0).sample(turns, min(FOREIGN, len(turns)))
    found: list[dict[str, Any]] = []
    for size in sizes:
        names = list(everyone)[:size]
        began = time.process_time()
        fitted = calibration.assemble({name: parts[name] for name in names}, ground, rules.target, rules.risk)
        shared_s = time.process_time() - began
        asked = random.Random(size).sample(
            pairs := [(t, n) for n in names for t in everyone[n].asked], min(MOST_ASKED, len(pairs))
        )
        point = {
            "agents": len(names),
            **found_by(fitted, asked, eyes),
            "centroid_best": nearest(fitted, asked, eyes),
            "chitchat_to_base": to_base(fitted, talk, eyes),
            "fit_ms_per_agent": round(1e3 * median(took[: len(names)]), 1),
            "shared_s": round(shared_s, 2),
            "judge_ms": timed(fitted, [text for text, _ in asked], eyes),
        }
        found.append(
            {**point, "ratio": round(point["judge_ms"] / (found[0]["judge_ms"] if found else point["judge_ms"]), 2)}
        )
        if ground.dense is not None:
            found[-1]["encode_ms"] = encoded([text for text, _ in asked], crew)
    return found


def found_by(fitted: FittedRouter, asked: Sequence[tuple[str, str]], eyes: Eyes) -> dict[str, float]:
    """Of own prompts: those that get their agent at the threshold, and those whose best agent is theirs."""
    texts = [text for text, _ in asked]
    judged = fitted.judge(texts, eyes.vectors(texts))
    best = [max(one.score.items(), key=lambda pair: pair[1]) for one in judged]
    right = np.array([name == owner for (name, _), (_, owner) in zip(best, asked, strict=True)])
    sure = np.array([score >= fitted.threshold for _, score in best])
    return {"accuracy": round(float((right & sure).mean()), 4), "best": round(float(right.mean()), 4)}


def nearest(fitted: FittedRouter, asked: Sequence[tuple[str, str]], eyes: Eyes) -> float:
    """Of own prompts those whose nearest centroid is their agent's, in the same features."""
    import scipy.sparse
    from sklearn.preprocessing import normalize

    texts = eyes.features([text for text, _ in asked])
    words = normalize(
        scipy.sparse.vstack([scipy.sparse.csr_matrix(one.train_features.words.mean(axis=0)) for one in fitted.parts])
    )
    likeness = (texts.words @ words.T).toarray()
    if texts.dense is not None:
        means = normalize(np.stack([one.train_features.dense.mean(axis=0) for one in fitted.parts]))
        likeness = likeness + texts.dense @ means.T
    names = [fitted.agents[place] for place in likeness.argmax(axis=1)]
    return round(float(np.mean([name == owner for name, (_, owner) in zip(names, asked, strict=True)])), 4)


def to_base(fitted: FittedRouter, texts: Sequence[str], eyes: Eyes) -> float:
    """Of foreign prompts those that are left to the base."""
    judged = fitted.judge(texts, eyes.vectors(texts))
    return round(float(np.mean([max(one.score.values()) < fitted.threshold for one in judged])), 4)


def timed(fitted: FittedRouter, texts: Sequence[str], eyes: Eyes) -> float:
    """Milliseconds of one request whose vector is at hand: the median of TIMED, one by one."""
    took = []
    for text in random.Random(1).choices(texts, k=TIMED):
        vectors = eyes.vectors([text])
        began = time.process_time()
        fitted.judge([text], vectors)
        took.append(time.process_time() - began)
    return round(1e3 * median(took), 3)


def encoded(texts: Sequence[str], crew: Vectors) -> float:
    """Milliseconds of the encoder for one request."""
    took = []
    for text in random.Random(2).choices(texts, k=ENCODED):
        began = time.process_time()
        crew.afresh([text])
        took.append(time.process_time() - began)
    return round(1e3 * median(took), 3)
