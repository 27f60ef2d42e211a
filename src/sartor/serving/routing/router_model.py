"""Fitted router of a team."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sartor.serving.routing.agent_classifier import AgentClassifier, GeneralPrompts
from sartor.serving.routing.text_features import F32, TextFeatures, neighbours

BASE = "base"
# Agents whose prompts a text is compared with, by the scores of all
CANDIDATES = 8


@dataclass(frozen=True)
class ReportSlice:
    """Where a text belongs among the rows of an agent's Report, and the mean gain there."""

    number: int
    rows: int
    gain: float


@dataclass(frozen=True)
class RoutedText:
    """What the router finds in one text. score: probability by agent, of the CANDIDATES best (the rest have next to
    none).

    nearest: by agent, (exemplar's id, likeness). poor: the slice of its Report that the text belongs to, of agents
    that were no better than the base there.
    """

    score: Mapping[str, float]
    nearest: Mapping[str, tuple[str, float]]
    poor: Mapping[str, ReportSlice] = field(default_factory=dict)

    def best(self, openable: Collection[str]) -> list[tuple[str, float]]:
        """(agent, score) of those that may be chosen, the best first."""
        return sorted(((name, self.score[name]) for name in self.score if name in openable), key=lambda pair: -pair[1])


@dataclass(frozen=True)
class CandidateScores:
    """N texts and K candidates of each. agents: (N, K) places, best score first; score, likeness: (N, K), -inf for
    nobody.

    foreign: (N,) likeness to the general prompts.
    """

    agents: Any
    score: F32
    likeness: F32
    foreign: F32


@dataclass(frozen=True)
class SharedWeights:
    """The figures that no part has: how much a score and a likeness say of an agent, and of the base a likeness to
    general prompts. A conditional logit (McFadden 1974) over the candidates and the base.
    """

    score: float
    likeness: float
    base: float
    foreign: float

    def probability(self, candidates: CandidateScores) -> F32:
        """(N, K): that the text is for each candidate; the base has the rest."""
        logits = np.where(
            np.isfinite(candidates.score), self.score * candidates.score + self.likeness * candidates.likeness, -np.inf
        )
        base = self.base + self.foreign * candidates.foreign[:, None]
        peak = np.maximum(logits.max(axis=1, keepdims=True), base)
        exp_logits = np.exp(logits - peak)
        return np.asarray(exp_logits / (exp_logits.sum(axis=1, keepdims=True) + np.exp(base - peak)))


@dataclass(frozen=True)
class FittedRouter:
    """A team's router. Its parts know nothing of each other; `shared` and `threshold` are of all, and cheap to find
    again.
    """

    agents: tuple[str, ...]
    space: GeneralPrompts
    parts: tuple[AgentClassifier, ...]
    shared: SharedWeights
    threshold: float
    figures: Mapping[str, Any] = field(default_factory=dict)
    unproven: Mapping[str, str] = field(default_factory=dict)

    @property
    def encoder(self) -> str:
        """Whose vectors `judge` takes; `tfidf` for words alone."""
        return self.space.encoder

    @property
    def has_encoder(self) -> bool:
        """Whether `judge` takes vectors."""
        return self.space.dense is not None

    @property
    def summary(self) -> dict[str, Any]:
        """Encoder, threshold, agents and held-out figures."""
        fields = {"encoder": self.encoder, "threshold": self.threshold, "agents": list(self.agents)}
        return {**fields, "unproven": dict(self.unproven), **self.figures}

    def judge(
        self, texts: Sequence[str], vectors: F32 | None = None, openable: Collection[str] | None = None
    ) -> list[RoutedText]:
        """Each text judged; `vectors` are the encoder's (N, D). The best of `openable` are looked at among others."""
        features = self.space.features(texts, vectors)
        candidates = self._linear.look(features, self._columns(openable))
        probability = self.shared.probability(candidates)
        return [
            self._judged(features.at([row]), candidates.agents[row], probability[row]) for row in range(len(texts))
        ]

    def _columns(self, openable: Collection[str] | None) -> Any:
        if openable is None or len(self.agents) <= CANDIDATES:
            return None
        return np.array([index for index, name in enumerate(self.agents) if name in openable], dtype=int)

    def _judged(self, features: TextFeatures, agents: Any, probability: F32) -> RoutedText:
        score, nearest, poor = {}, {}, {}
        for index, chance in zip(agents, probability, strict=True):
            name, part = self.agents[index], self.parts[index]
            if name in score:  # named twice: its second chance is none
                continue
            likeness = features.likeness(part.train_features)[0]
            best = int(likeness.argmax())
            score[name] = float(chance)
            nearest[name] = (part.ids[best], float(likeness[best]))
            if part.slices is not None:
                number = int(part.slices.nearest(features)[0])
                if part.slices.lacks_gain(number):
                    poor[name] = ReportSlice(number, int(part.slices.size[number]), float(part.slices.gain[number]))
        return RoutedText(score, nearest, poor)

    @cached_property
    def _linear(self) -> Linear:
        return Linear.of(self.space, self.parts)


@dataclass(frozen=True)
class Linear:
    """The classifiers of all parts side by side. words: (D, A) sparse; dense: (W, A); general: (G, A); bias: (A,)."""

    space: GeneralPrompts
    parts: tuple[AgentClassifier, ...]
    words: Any
    dense: F32 | None
    general: F32
    bias: F32

    @classmethod
    def of(cls, space: GeneralPrompts, parts: tuple[AgentClassifier, ...]) -> Linear:
        """Of these parts."""
        import scipy.sparse

        words = scipy.sparse.vstack([scipy.sparse.csr_matrix(part.words) for part in parts], format="csr").T.tocsr()
        dense = [part.dense for part in parts if part.dense is not None]
        general = np.stack([part.general for part in parts], axis=1)
        return cls(
            space, parts, words, np.stack(dense, axis=1) if dense else None, general, np.array([p.bias for p in parts])
        )

    def scores(self, features: TextFeatures, to_general: F32) -> F32:
        """(N, A)."""
        scores = np.asarray((features.words @ self.words).todense())
        if self.dense is not None and features.dense is not None:
            scores = (scores + features.dense @ self.dense) / 2
        return np.asarray(scores + to_general @ self.general + self.bias, dtype=np.float32)

    def look(self, features: TextFeatures, extra: Any = None) -> CandidateScores:
        """The candidates of each text, and the best of the places `extra` beside them."""
        to_general = features.likeness(self.space.general)
        scores = self.scores(features, to_general)
        agents = best_columns(scores)
        best_scores = np.take_along_axis(scores, agents, 1)
        if extra is not None and len(extra):
            added = extra[best_columns(scores[:, extra])]
            is_new = (added[:, :, None] != agents[:, None, :]).all(axis=2)
            best_scores = np.concatenate(
                [best_scores, np.where(is_new, np.take_along_axis(scores, added, 1), -np.inf)], axis=1
            )
            agents = np.concatenate([agents, added], axis=1)
        return CandidateScores(agents, best_scores, self.likeness(features, agents), neighbours(to_general))

    def likeness(self, features: TextFeatures, agents: Any) -> F32:
        """(N, K): mean likeness to the nearest prompts of each candidate."""
        result = np.zeros(agents.shape, dtype=np.float32)
        for agent in np.unique(agents):
            rows, columns = np.nonzero(agents == agent)
            result[rows, columns] = neighbours(features.at(rows).likeness(self.parts[agent].train_features))
        return result


def best_columns(scores: F32) -> Any:
    """(N, K): the columns of the CANDIDATES largest of each row, the largest first."""
    n_best = min(CANDIDATES, scores.shape[1])
    columns = np.argpartition(-scores, n_best - 1, axis=1)[:, :n_best]
    return np.take_along_axis(columns, np.argsort(-np.take_along_axis(scores, columns, 1), axis=1), 1)
