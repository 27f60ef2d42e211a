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
# Number of agents, best by score, with whose prompts a text is compared
CANDIDATES = 8


@dataclass(frozen=True)
class ReportSlice:
    """Slice of an agent's Report that a text belongs to.

    gain: mean gain over the base in the slice.
    """

    number: int
    rows: int
    gain: float


@dataclass(frozen=True)
class RoutedText:
    """Result of the router for one text.

    score: probability by agent, for the CANDIDATES best; the others have almost none.
    nearest: by agent, (exemplar's id, similarity).
    poor: by agent, the text's slice of its Report, if the agent was no better than the base there.
    """

    score: Mapping[str, float]
    nearest: Mapping[str, tuple[str, float]]
    poor: Mapping[str, ReportSlice] = field(default_factory=dict)

    def best(self, openable: Collection[str]) -> list[tuple[str, float]]:
        """Return (agent, score) of the agents that may be chosen, best first."""
        return sorted(((name, self.score[name]) for name in self.score if name in openable), key=lambda pair: -pair[1])


@dataclass(frozen=True)
class CandidateScores:
    """Scores of K candidate agents for each of N texts.

    agents: (N, K) indices, best score first.
    score, likeness: (N, K); a score of -inf marks no agent.
    foreign: (N,) similarity to the general prompts.
    """

    agents: Any
    score: F32
    likeness: F32
    foreign: F32


@dataclass(frozen=True)
class SharedWeights:
    """Weights shared by all agents: of an agent's score and similarity, and of the base.

    The model is a conditional logit (McFadden 1974) over the candidates and the base.
    """

    score: float
    likeness: float
    base: float
    foreign: float

    def probability(self, candidates: CandidateScores) -> F32:
        """Return (N, K) probabilities that a text is for each candidate; the base has the rest.

        z_k = w_score * score_k + w_likeness * likeness_k;  z_base = b + w_foreign * foreign
        p_k = exp(z_k) / (sum_j exp(z_j) + exp(z_base))
        """
        logits = np.where(
            np.isfinite(candidates.score), self.score * candidates.score + self.likeness * candidates.likeness, -np.inf
        )
        base = self.base + self.foreign * candidates.foreign[:, None]
        # subtract the largest logit before exp: max(max_k z_k, z_base), (N, 1)
        peak = np.maximum(logits.max(axis=1, keepdims=True), base)
        exp_logits = np.exp(logits - peak)
        return np.asarray(exp_logits / (exp_logits.sum(axis=1, keepdims=True) + np.exp(base - peak)))


@dataclass(frozen=True)
class FittedRouter:
    """Router of a team.

    parts: one classifier per agent, independent of each other.
    shared, threshold: of all agents, cheap to fit again.
    figures: held-out figures.
    unproven: agents whose Report shows no gain over the base, with its figures.
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
        """Name of the encoder whose vectors `judge` takes; `tfidf` for words alone."""
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
        """Return the result for each of N texts. vectors: (N, D) of the encoder.

        openable: agents that may be chosen; the best of them are candidates besides the best of all.
        """
        features = self.space.features(texts, vectors)
        columns = None
        if openable is not None and len(self.agents) > CANDIDATES:
            columns = np.array([index for index, name in enumerate(self.agents) if name in openable], dtype=int)
        candidates = self._linear.look(features, columns)
        probability = self.shared.probability(candidates)
        return [
            self._judged(features.at([row]), candidates.agents[row], probability[row]) for row in range(len(texts))
        ]

    def _judged(self, features: TextFeatures, agents: Any, probability: F32) -> RoutedText:
        score, nearest, poor = {}, {}, {}
        for index, chance in zip(agents, probability, strict=True):
            name, part = self.agents[index], self.parts[index]
            if name in score:  # a repeated candidate has probability 0
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
    """Linear classifiers of A agents, side by side.

    words: (D, A) sparse. dense: (W, A). general: (G, A). bias: (A,).
    """

    space: GeneralPrompts
    parts: tuple[AgentClassifier, ...]
    words: Any
    dense: F32 | None
    general: F32
    bias: F32

    @classmethod
    def of(cls, space: GeneralPrompts, parts: tuple[AgentClassifier, ...]) -> Linear:
        """Return the combined classifiers of these parts."""
        import scipy.sparse

        words = scipy.sparse.vstack([scipy.sparse.csr_matrix(part.words) for part in parts], format="csr").T.tocsr()
        dense = [part.dense for part in parts if part.dense is not None]
        general = np.stack([part.general for part in parts], axis=1)
        return cls(
            space,
            parts,
            words=words,
            dense=np.stack(dense, axis=1) if dense else None,
            general=general,
            bias=np.array([p.bias for p in parts]),
        )

    def scores(self, features: TextFeatures, to_general: F32) -> F32:
        """Return (N, A) scores of all agents. to_general: (N, G) similarities to the general prompts."""
        scores = np.asarray((features.words @ self.words).todense())
        if self.dense is not None and features.dense is not None:
            scores = (scores + features.dense @ self.dense) / 2
        return np.asarray(scores + to_general @ self.general + self.bias, dtype=np.float32)

    def look(self, features: TextFeatures, extra: Any = None) -> CandidateScores:
        """Return the candidates of each text, and the best of the agent indices `extra` besides them.

        extra: (E,) or None.
        """
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
        """Return (N, K) mean similarities to the nearest prompts of each candidate. agents: (N, K) indices."""
        result = np.zeros(agents.shape, dtype=np.float32)
        for agent in np.unique(agents):
            rows, columns = np.nonzero(agents == agent)
            result[rows, columns] = neighbours(features.at(rows).likeness(self.parts[agent].train_features))
        return result


def best_columns(scores: F32) -> Any:
    """Return (N, K) column indices of the CANDIDATES largest values of each row, largest first.

    scores: (N, A).
    """
    n_best = min(CANDIDATES, scores.shape[1])
    columns = np.argpartition(-scores, n_best - 1, axis=1)[:, :n_best]
    return np.take_along_axis(columns, np.argsort(-np.take_along_axis(scores, columns, 1), axis=1), 1)
