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
    """What the router finds in one text. score: probability by agent, of the CANDIDATES best (the rest have next to none).

    nearest: by agent, (exemplar's id, likeness). poor: the slice of its Report that the text belongs to, of agents that were no
    better than the base there.
    """

    score: Mapping[str, float]
    nearest: Mapping[str, tuple[str, float]]
    poor: Mapping[str, ReportSlice] = field(default_factory=dict)

    def best(self, openable: Collection[str]) -> list[tuple[str, float]]:
        """(agent, score) of those that may be chosen, the best first."""
        return sorted(((name, self.score[name]) for name in self.score if name in openable), key=lambda pair: -pair[1])


@dataclass(frozen=True)
class Looked:
    """N texts and K candidates of each. agents: (N, K) places, best score first; score, likeness: (N, K), -inf for nobody.

    foreign: (N,) likeness to the general prompts.
    """

    agents: Any
    score: F32
    likeness: F32
    foreign: F32


@dataclass(frozen=True)
class Shared:
    """The figures that no part has: how much a score and a likeness say of an agent, and of the base a likeness to general
    prompts. A conditional logit (McFadden 1974) over the candidates and the base.
    """

    score: float
    likeness: float
    base: float
    foreign: float

    def probability(self, found: Looked) -> F32:
        """(N, K): that the text is for each candidate; the base has the rest."""
        said = np.where(np.isfinite(found.score), self.score * found.score + self.likeness * found.likeness, -np.inf)
        base = self.base + self.foreign * found.foreign[:, None]
        most = np.maximum(said.max(axis=1, keepdims=True), base)
        raised = np.exp(said - most)
        return np.asarray(raised / (raised.sum(axis=1, keepdims=True) + np.exp(base - most)))


@dataclass(frozen=True)
class Fitted:
    """A team's router. Its parts know nothing of each other; `shared` and `threshold` are of all, and cheap to find again."""

    agents: tuple[str, ...]
    space: GeneralPrompts
    parts: tuple[AgentClassifier, ...]
    shared: Shared
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
    def told(self) -> dict[str, Any]:
        """Encoder, threshold, agents and held-out figures."""
        said = {"encoder": self.encoder, "threshold": self.threshold, "agents": list(self.agents)}
        return {**said, "unproven": dict(self.unproven), **self.figures}

    def judge(
        self, texts: Sequence[str], vectors: F32 | None = None, openable: Collection[str] | None = None
    ) -> list[RoutedText]:
        """Each text judged; `vectors` are the encoder's (N, D). The best of `openable` are looked at among others."""
        asked = self.space.features(texts, vectors)
        found = self._linear.look(asked, self._places(openable))
        probability = self.shared.probability(found)
        return [self._judged(asked.at([row]), found.agents[row], probability[row]) for row in range(len(texts))]

    def _places(self, openable: Collection[str] | None) -> Any:
        if openable is None or len(self.agents) <= CANDIDATES:
            return None
        return np.array([place for place, name in enumerate(self.agents) if name in openable], dtype=int)

    def _judged(self, asked: TextFeatures, agents: Any, probability: F32) -> RoutedText:
        score, nearest, poor = {}, {}, {}
        for place, chance in zip(agents, probability, strict=True):
            name, part = self.agents[place], self.parts[place]
            if name in score:  # named twice: its second chance is none
                continue
            likeness = asked.likeness(part.own)[0]
            best = int(likeness.argmax())
            score[name] = float(chance)
            nearest[name] = (part.ids[best], float(likeness[best]))
            if part.slices is not None:
                number = int(part.slices.nearest(asked)[0])
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
        return cls(space, parts, words, np.stack(dense, axis=1) if dense else None, general, np.array([p.bias for p in parts]))

    def scores(self, asked: TextFeatures, to_general: F32) -> F32:
        """(N, A)."""
        found = np.asarray((asked.words @ self.words).todense())
        if self.dense is not None and asked.dense is not None:
            found = (found + asked.dense @ self.dense) / 2
        return np.asarray(found + to_general @ self.general + self.bias, dtype=np.float32)

    def look(self, asked: TextFeatures, also: Any = None) -> Looked:
        """The candidates of each text, and the best of the places `also` beside them."""
        to_general = asked.likeness(self.space.general)
        scores = self.scores(asked, to_general)
        agents = best_places(scores)
        found = np.take_along_axis(scores, agents, 1)
        if also is not None and len(also):
            more = also[best_places(scores[:, also])]
            is_new = (more[:, :, None] != agents[:, None, :]).all(axis=2)
            found = np.concatenate([found, np.where(is_new, np.take_along_axis(scores, more, 1), -np.inf)], axis=1)
            agents = np.concatenate([agents, more], axis=1)
        return Looked(agents, found, self.likeness(asked, agents), neighbours(to_general))

    def likeness(self, asked: TextFeatures, agents: Any) -> F32:
        """(N, K): mean likeness to the nearest prompts of each candidate."""
        found = np.zeros(agents.shape, dtype=np.float32)
        for place in np.unique(agents):
            rows, columns = np.nonzero(agents == place)
            found[rows, columns] = neighbours(asked.at(rows).likeness(self.parts[place].own))
        return found


def best_places(scores: F32) -> Any:
    """(N, K): the columns of the CANDIDATES largest of each row, the largest first."""
    most = min(CANDIDATES, scores.shape[1])
    found = np.argpartition(-scores, most - 1, axis=1)[:, :most]
    return np.take_along_axis(found, np.argsort(-np.take_along_axis(scores, found, 1), axis=1), 1)
