"""Exemplars -> a router, and its threshold: chosen with prompts that no tuning saw and foreign ones that no router saw.

What is foreign cannot be listed, so it is simulated twice: whole kinds of general prompts are left out of the fit, a fold of
them at a time; and each agent in turn, whose held-out prompts are then foreign to the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from sartor.agents.routing.exemplars import Exemplars, Prompt, digest, general, shortened
from sartor.agents.routing.features import F32, Dense, Features, Lexical
from sartor.agents.routing.fitted import Fitted, neighbours, scores

# Prompts of all agents together: the time grows with their square
MOST_ROWS = 1_600
FOLDS = 5
# Agents that are left out in turn; with more, the first ones by the digest of their names
MOST_LEFT_OUT = 6
# Directions of the likeness matrix that the classifier is fitted in
RANK = 300
PENALTY = 10.0  # scikit-learn's C
# An agent without held-out prompts lends so many of its own, which are then not fitted on
LENT = 5
# A score below which nobody is chosen
LEAST = 1e-3
# What a prompt that misses its agent weighs against a foreign one that gets an agent: who asks the team mostly asks its agents
OWN_WEIGHT = 2.0
# By how much an encoder that costs more must be better
GAIN = 0.005


@dataclass(frozen=True)
class Rows:
    """All that a router is fitted with. labels: as in Fitted; folds: of general prompts, by their kind, else -1.

    The last `held` rows are held-out prompts of agents.
    """

    prompts: tuple[Prompt, ...]
    labels: Any
    folds: Any
    held: int

    @property
    def texts(self) -> list[str]:
        """As they are compared."""
        return [shortened(prompt.text) for prompt in self.prompts]


def rows_of(agents: Mapping[str, Exemplars]) -> Rows:
    """The rows of these agents (each has exemplars) and the general prompts; at most MOST_ROWS prompts of agents."""
    share = max(8, MOST_ROWS // max(1, len(agents)))
    fitted: list[tuple[Prompt, int, int]] = []
    held: list[tuple[Prompt, int, int]] = []
    for place, found in enumerate(agents.values()):
        train, held_out = found.train[:share], found.held_out[: share // 2]
        if not held_out:
            train, held_out = train[: -(len(train) // LENT) or None], train[len(train) - len(train) // LENT :]
        fitted += [(prompt, place, -1) for prompt in train]
        held += [(prompt, place, -1) for prompt in held_out]
        fitted += [(prompt, len(agents), _fold("other")) for prompt in found.other]
    fitted += [(prompt, len(agents), _fold(kind)) for kind, prompts in general().items() for prompt in prompts]
    prompts, labels, folds = zip(*fitted, *held, strict=True)
    return Rows(prompts, np.array(labels), np.array(folds), len(held))


def fit(agents: Mapping[str, Exemplars], encoder: str, vectors: F32 | None, target: float) -> Fitted:
    """The router of these agents. `vectors`: of `rows_of(agents).texts` by the encoder, None for words alone.

    target: fraction of foreign prompts that must be left to the base where the threshold is chosen. One thread.
    """
    import scipy.linalg  # noqa: F401 - the limit below holds for libraries that are loaded by then
    import sklearn.linear_model  # noqa: F401

    with threadpool_limits(1):
        return _Fit(agents, encoder, vectors).run(target)


class _Fit:
    def __init__(self, agents: Mapping[str, Exemplars], encoder: str, vectors: F32 | None) -> None:
        self._agents = agents
        self._encoder = encoder
        self._rows = rows_of(agents)
        known = len(self._rows.prompts) - self._rows.held
        texts = self._rows.texts
        self._lexical = Lexical.of(texts[:known])
        self._dense = Dense.of(vectors[:known]) if vectors is not None else None
        self._features = Features(self._lexical(texts), self._dense(vectors) if self._dense is not None else None)
        self._likeness = self._features.likeness(self._features)
        self._is_held = np.arange(len(texts)) >= known
        self._is_fitted = ~self._is_held & ~self._near_an_agent()
        self._turn, self._turned = self._directions()

    def run(self, target: float) -> Fitted:
        rows = self._rows
        weights, intercept = self._classifier(self._is_fitted, len(self._agents))
        held = np.flatnonzero(self._is_held)
        score = self._scores(held, self._is_fitted, weights, intercept, rows.labels)
        best = np.where(score.argmax(axis=1) == rows.labels[held], score.max(axis=1), -1.0)
        own = {name: best[rows.labels[held] == place] for place, name in enumerate(self._agents)}
        kinds, agents = self._foreign_kinds(), self._foreign_agents()
        threshold, accuracy, left = choose(list(own.values()), np.concatenate([kinds, agents]), target)
        figures = {
            "held_out": len(held),
            "accuracy": round(accuracy, 4),
            "by_agent": {name: _fraction(found >= threshold) for name, found in own.items()},
            "foreign": len(kinds) + len(agents),
            "to_base": round(left, 4),
            "to_base_kinds": _fraction(kinds < threshold),
            "to_base_agents": _fraction(agents < threshold),
            "general": int((rows.labels[self._is_fitted] == len(self._agents)).sum()),
        }
        kept = np.flatnonzero(self._is_fitted)
        dense = self._features.dense
        return Fitted(
            agents=tuple(self._agents),
            encoder=self._encoder,
            digest=digest(self._agents),
            threshold=threshold,
            ids=tuple(rows.prompts[row].id for row in kept),
            labels=rows.labels[kept],
            lexical=self._lexical,
            dense=self._dense,
            features=Features(self._features.words[kept], dense[kept] if dense is not None else None),
            weights=weights,
            intercept=intercept,
            figures=figures,
        )

    def _near_an_agent(self) -> F32:
        """General prompts that are as like an agent's as its own are to each other: they may well be its business."""
        labels, base = self._rows.labels, len(self._agents)
        is_near = np.zeros(len(labels), dtype=bool)
        general_rows = np.flatnonzero((labels == base) & ~self._is_held & (self._rows.folds != _fold("other")))
        for place in range(base):
            own = np.flatnonzero((labels == place) & ~self._is_held)
            among = self._likeness[np.ix_(own, own)]
            np.fill_diagonal(among, -1)
            zeros = np.zeros(len(own), dtype=int)
            usual = np.median(neighbours(among, zeros, 1)) if len(own) > 1 else 1.0
            found = neighbours(self._likeness[np.ix_(general_rows, own)], zeros, 1)[:, 0]
            is_near[general_rows] |= found >= usual
        return is_near

    def _directions(self) -> tuple[F32, F32]:
        """(M, R) that turns likenesses to the M fitted rows into R features, and those features of all rows.

        The inner products of these features are the likenesses (but for directions of next to no weight), so a linear
        classifier on them is one on words and vectors, at a small part of the cost.
        """
        from sklearn.utils.extmath import randomized_svd

        kept = np.flatnonzero(self._is_fitted)
        matrix = self._likeness[np.ix_(kept, kept)]
        vectors, values, _ = randomized_svd(matrix, min(RANK, len(kept)), n_iter=4, random_state=0)
        is_large = values > 1e-4 * values[0]
        turn = (vectors[:, is_large] / np.sqrt(values[is_large])).astype(np.float32)
        return turn, self._likeness[:, kept] @ turn

    def _classifier(self, chosen: F32, classes: int, labels: Any = None) -> tuple[F32, F32]:
        """(M, classes + 1) weights over the fitted rows and the intercept, of logistic regression on the rows `chosen`."""
        from sklearn.linear_model import LogisticRegression

        labels = self._rows.labels if labels is None else labels
        model = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=300)
        model.fit(self._turned[chosen], labels[chosen])
        slopes, intercept = model.coef_, model.intercept_
        if classes == 1:  # scikit-learn says two classes by one difference
            slopes, intercept = np.vstack([0 * slopes, slopes]), np.append(0 * intercept, intercept)
        return (self._turn @ slopes.T).astype(np.float32), intercept.astype(np.float32)

    def _scores(self, asked: Any, chosen: F32, weights: F32, intercept: F32, labels: Any) -> F32:
        """Scores of the rows `asked` by a classifier that was fitted on the rows `chosen`."""
        kept = self._is_fitted
        logits = self._likeness[np.ix_(asked, np.flatnonzero(kept))] @ weights + intercept
        seen = np.flatnonzero(chosen)
        return scores(self._likeness[np.ix_(asked, seen)], logits, labels[seen])

    def _foreign_kinds(self) -> F32:
        """Best scores of general prompts by classifiers that saw no prompt of their kind."""
        found = []
        for fold in range(FOLDS):
            left_out = self._is_fitted & (self._rows.folds == fold)
            chosen = self._is_fitted & (self._rows.folds != fold)
            if not left_out.any() or not (self._rows.labels[chosen] == len(self._agents)).any():
                continue
            weights, intercept = self._classifier(chosen, len(self._agents))
            found.append(self._scores(np.flatnonzero(left_out), chosen, weights, intercept, self._rows.labels).max(axis=1))
        return np.concatenate(found)

    def _foreign_agents(self) -> F32:
        """Best scores of each agent's held-out prompts by classifiers that never heard of that agent."""
        if len(self._agents) < 2:
            return np.zeros(0)
        found = []
        names = sorted(self._agents, key=lambda name: zlib.crc32(name.encode()))[:MOST_LEFT_OUT]
        for name in names:
            place = list(self._agents).index(name)
            labels = np.where(self._rows.labels > place, self._rows.labels - 1, self._rows.labels)
            chosen = self._is_fitted & (self._rows.labels != place)
            weights, intercept = self._classifier(chosen, len(self._agents) - 1, labels)
            asked = np.flatnonzero(self._is_held & (self._rows.labels == place))
            if len(asked):
                found.append(self._scores(asked, chosen, weights, intercept, labels).max(axis=1))
        return np.concatenate(found) if found else np.zeros(0)


def choose(own: Sequence[F32], foreign: F32, target: float) -> tuple[float, float, float]:
    """(threshold, fraction of own prompts that get their agent, fraction of foreign ones left to the base).

    own: by agent, scores of held-out prompts, -1 where another agent scored higher; each agent counts the same. Of the
    thresholds that leave `target` of the foreign prompts to the base (or the most that can be), the one with the largest sum of
    both fractions, the first times OWN_WEIGHT; it lies at the geometric mean of a score and the next one below, since a score
    is a product.
    """
    found = np.unique(np.concatenate([*own, foreign, [1.0]]))
    found = found[found > LEAST]
    marks = np.sqrt(np.concatenate([[LEAST], found[:-1]]) * found)
    right = np.mean([1 - np.searchsorted(np.sort(one), marks) / len(one) for one in own if len(one)], axis=0)
    left = np.searchsorted(np.sort(foreign), marks) / len(foreign)
    best = max(range(len(marks)), key=lambda place: (min(left[place], target), OWN_WEIGHT * right[place] + left[place]))
    return float(marks[best]), float(right[best]), float(left[best])


def _fold(kind: str) -> int:
    return zlib.crc32(kind.encode()) % FOLDS


def _fraction(found: F32) -> float | None:
    return round(float(found.mean()), 4) if len(found) else None


def best_of(found: Sequence[Fitted]) -> Fitted:
    """The router with the best mean of both fractions, weighted; one that costs more (stands later) must be better by GAIN."""
    best = found[0]
    for other in found[1:]:
        if _merit(other) >= _merit(best) + GAIN:
            best = other
    return best


def _merit(fitted: Fitted) -> float:
    own, left = fitted.figures["accuracy"], fitted.figures["to_base"]
    return float(OWN_WEIGHT * own + left) / (OWN_WEIGHT + 1)
